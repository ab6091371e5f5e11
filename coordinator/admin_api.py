"""The routes behind the ``shoal`` command: devices, plan, load, unload, ps.

Plan and load stream one JSON object a line: {"step": ...} for progress, then {"result": ...} or
{"error": ...}. A client that goes away cancels the operation.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from coordinator.fleet import Deployment, Fleet, Planned, PlanRequest, Step, model_name
from coordinator.http import json_lines, read_json
from coordinator.members import Member, Roster
from coordinator.plan import Plan
from model.spec import ModelSpec

Emit = Callable[[dict[str, Any]], None]


class AdminRoutes:
    """Route handlers over a fleet."""

    def __init__(self, cluster: str, roster: Roster, fleet: Fleet) -> None:
        self._cluster = cluster
        self._roster = roster
        self._fleet = fleet

    def routes(self) -> list[Route]:
        return [
            Route("/shoal/v1/devices", self.devices, methods=["GET"]),
            Route("/shoal/v1/ps", self.ps, methods=["GET"]),
            Route("/shoal/v1/plan", self.plan, methods=["POST"]),
            Route("/shoal/v1/load", self.load, methods=["POST"]),
            Route("/shoal/v1/unload", self.unload, methods=["POST"]),
        ]

    async def devices(self, request: Request) -> Response:
        return JSONResponse(
            {
                "cluster": self._cluster,
                "devices": [_device(member) for member in self._roster.members],
                "links": [asdict(link) for link in self._roster.links()],
            }
        )

    async def ps(self, request: Request) -> Response:
        deployment = self._fleet.deployment
        return JSONResponse({"model": None if deployment is None else _deployment(deployment)})

    async def plan(self, request: Request) -> Response:
        wanted = PlanRequest.from_dict(await read_json(request))

        async def work(emit: Emit) -> dict[str, Any]:
            return _planned(await self._fleet.plan(wanted, _emitter(emit)))

        return json_lines(work)

    async def load(self, request: Request) -> Response:
        wanted = PlanRequest.from_dict(await read_json(request))

        async def work(emit: Emit) -> dict[str, Any]:
            return _deployment(await self._fleet.load(wanted, _emitter(emit)))

        return json_lines(work)

    async def unload(self, request: Request) -> Response:
        await read_json(request)
        return JSONResponse({"unloaded": await self._fleet.unload()})


def _emitter(emit: Emit) -> Callable[[Step], None]:
    return lambda step: emit({"step": asdict(step)})


def _device(member: Member) -> dict[str, Any]:
    return {
        "name": member.name,
        "device": member.device,
        "version": member.version,
        "address": member.connection.peer_host,
        "joined_s": round(time.time() - member.joined_s, 3),
        "memory_available_bytes": member.memory_available_bytes,
        **asdict(member.profile),
    }


def _planned(planned: Planned) -> dict[str, Any]:
    return {
        "model": model_name(planned.request.model),
        "context_tokens": planned.context_tokens,
        "plan": describe_plan(planned.checkpoint.spec, planned.plan),
    }


def _deployment(deployment: Deployment) -> dict[str, Any]:
    return {
        "model": deployment.name,
        "directory": str(deployment.model),
        "state": "broken" if deployment.broken else "ready",
        "reason": str(deployment.broken) if deployment.broken else None,
        "context_tokens": deployment.context_tokens,
        "plan": describe_plan(deployment.spec, deployment.plan),
        "stages": [
            {
                "device": member.name,
                "memory_bytes": loaded.memory_bytes,
                "fetched_bytes": loaded.fetched_bytes,
                "load_s": loaded.load_s,
            }
            for member, loaded in zip(deployment.members, deployment.loaded, strict=True)
        ],
    }


def describe_plan(spec: ModelSpec, plan: Plan) -> dict[str, Any]:
    """A plan as JSON: its own fields, and each block by name with its device and bits."""
    return {
        **plan.to_dict(),
        "blocks": [
            {
                "block": placement.block,
                "name": spec.block_name(placement.block),
                "device": placement.device,
                "bits": placement.bits,
            }
            for placement in plan.placements
        ],
        "predicted_ms_per_token": plan.decode_s * 1e3,
        "predicted_prefill_ms_per_token": plan.prefill_s_per_token * 1e3,
        "proven_optimal": plan.proven_optimal,
        "gap": plan.gap,
    }
