"""The HTTP routes of the ``shoal`` command.

Measure, plan, load and quality stream one JSON object a line. {"step": ...} reports progress, and
{"result": ...} or {"error": ...} comes last. A client that goes away cancels the operation.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from api.common import json_lines, model_state, read_json, read_query, while_connected
from coordinator.loading.deployment import Deployment, Planned, Team
from coordinator.loading.models import Models
from coordinator.loading.operations import Compared, Operations
from coordinator.loading.paces import counts_of, slow_devices, token_s
from coordinator.loading.rebalance import Verdict
from coordinator.loading.several import PlannedTogether, SeveralRequest
from coordinator.loading.state import (
    Loading,
    Present,
    Serving,
    deployment_of,
    directory_of,
    name_of,
    request_of,
)
from coordinator.quality.measuring import QualityFound
from coordinator.quality.store import QualityRequest
from coordinator.roster.book import BadBook, Device
from coordinator.roster.measurements import Step
from coordinator.roster.members import Member, Roster
from coordinator.roster.noise import device_noise, plan_noise
from coordinator.serving.urgency import Urgency
from coordinator.story import Story
from model.checkpoint import Checkpoint
from model.hub import (
    HubName,
    cache_directory,
    cached_model,
    on_this_machine,
    parse_name,
    this_machine,
    user_name,
)
from model.spec import ModelSpec
from planning.errors import RequestInvalid
from planning.insight.view import describe_plan
from planning.request import LoadRequest, model_name
from planning.request_fields import text_sha256
from wire.claim import shown
from wire.messages import PROTOCOL_VERSION, StageLoaded
from wire.versions import shoal_version

POLL_S = 30.0
"""The longest wait for new events. The answer may then have none."""

MOST_SHOWN_CHARS = 200
"""So much of a client's text is in an error."""

MOST_DIGITS = 15

Emit = Callable[[dict[str, Any]], None]
Wanted = TypeVar("Wanted", LoadRequest, QualityRequest)


class AdminRoutes:
    """Route handlers about devices and models."""

    def __init__(
        self, cluster: str, roster: Roster, operations: Operations, models: Models, story: Story
    ) -> None:
        self._cluster = cluster
        self._roster = roster
        self._operations = operations
        self._models = models
        self._story = story

    def routes(self) -> list[Route]:
        return [
            Route("/shoal/v1/devices", self.devices, methods=["GET"]),
            Route("/shoal/v1/measure", self.measure, methods=["POST"]),
            Route("/shoal/v1/revoke", self.revoke, methods=["POST"]),
            Route("/shoal/v1/ps", self.ps, methods=["GET"]),
            Route("/shoal/v1/events", self.events, methods=["GET"]),
            Route("/shoal/v1/found", self.found, methods=["GET"]),
            Route("/shoal/v1/describe", self.describe, methods=["POST"]),
            Route("/shoal/v1/plan", self.plan, methods=["POST"]),
            Route("/shoal/v1/load", self.load, methods=["POST"]),
            Route("/shoal/v1/unload", self.unload, methods=["POST"]),
            Route("/shoal/v1/rebalance", self.rebalance, methods=["POST"]),
            Route("/shoal/v1/quality", self.quality, methods=["POST"]),
        ]

    async def devices(self, request: Request) -> Response:
        read_query(request)
        return JSONResponse(await self._devices())

    async def measure(self, request: Request) -> Response:
        name = (await _body(request, "device")).get("device")
        if not isinstance(name, str):
            raise RequestInvalid("name the device to measure", "device")

        async def work(emit: Emit) -> dict[str, Any]:
            await self._operations.measure(name, _emitter(emit))
            return await self._devices()

        return json_lines(work)

    async def revoke(self, request: Request) -> Response:
        """Let a device join no more, and drop it."""
        name = (await _body(request, "device")).get("device")
        if not isinstance(name, str):
            raise RequestInvalid("name the device to revoke", "device")
        try:
            gone = await self._roster.revoke(name)
        except (BadBook, OSError) as error:
            raise RequestInvalid(str(error), "device") from error
        self._story.tell("revoked", gone.name or gone.device, "")
        return JSONResponse({"revoked": gone.name or gone.device, "device": gone.device})

    async def _devices(self) -> dict[str, Any]:
        now_s = time.monotonic()
        links = self._roster.links()
        known, here = await self._known(), {member.device for member in self._roster.members}
        keys = {item.device: _shown_key(item) for item in known}
        return {
            "cluster": self._cluster,
            "version": shoal_version(),
            "protocol": PROTOCOL_VERSION,
            "devices": [
                {
                    **_device(member),
                    "key": keys.get(member.device, ""),
                    "noise": device_noise(member, links),
                }
                for member in self._roster.members
            ],
            "absent": [
                {
                    "name": item.name or item.device,
                    "device": item.device,
                    "key": keys[item.device],
                    "joined_s": item.joined_s,
                }
                for item in known
                if item.device not in here
            ],
            "links": [asdict(link) for link in links],
            "no_links": [
                asdict(link) | {"age_s": round(now_s - failure.failed_s, 3), "text": str(link)}
                for link, failure in self._roster.failed_links()
            ],
        }

    async def _known(self) -> tuple[Device, ...]:
        """The devices that may join. None if the list of them is damaged, which the log says."""
        try:
            return await self._roster.known()
        except BadBook:
            return ()

    async def ps(self, request: Request) -> Response:
        read_query(request)
        models = [model_view(state) for _, state in self._models.present()]
        answer: dict[str, Any] = {"model": models[0] if models else None}
        if models[1:]:
            answer["beside"] = models[1:]
        return JSONResponse(answer)

    async def events(self, request: Request) -> Response:
        """The last events. ``?after=NUMBER`` waits for events after that one."""
        text = read_query(request, "after").get("after")
        if text is None:
            return self._events(0)
        if not (text.isascii() and text.isdigit() and len(text) <= MOST_DIGITS):
            raise RequestInvalid("after: give the number of an event", "after")
        await while_connected(request, self._event_after(int(text)))
        return self._events(int(text))

    def _events(self, number: int) -> Response:
        return JSONResponse({"events": [asdict(event) for event in self._story.after(number)]})

    async def _event_after(self, number: int) -> None:
        with self._story.changed.watch() as changed:
            while not self._story.after(number):
                changed.clear()
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(changed.wait(), POLL_S)
                    continue
                return

    async def found(self, request: Request) -> Response:
        """The path of a hub's model in this machine's cache, or null: ``?model=ORG/NAME``."""
        name = _hub_name(read_query(request, "model").get("model"))
        path = await asyncio.to_thread(cached_model, name)
        return JSONResponse(
            {
                "model": str(name),
                "path": None if path is None else str(path),
                "cache": str(cache_directory()),
                "host": socket.gethostname(),
                "user": user_name(),
                "machine": this_machine(),
            }
        )

    async def describe(self, request: Request) -> Response:
        """Fetch a hub's config.json alone, to plan the model. Its folder, and the model's size."""
        from model.hub_download import fetch_config

        name = _hub_name((await _body(request, "model")).get("model"))
        folder, size_bytes = await asyncio.to_thread(fetch_config, name)
        return JSONResponse({"path": str(folder), "size_bytes": size_bytes})

    async def plan(self, request: Request) -> Response:
        """Plan a model; or several with ``models``, together."""
        body = await read_json(request)
        if "models" in body:
            return await self._plan_several(body)
        wanted = await _located(LoadRequest.from_dict(body))
        await asyncio.to_thread(Checkpoint.open_to_plan, wanted.model, wanted.adapter)

        async def work(emit: Emit) -> dict[str, Any]:
            planned = await self._operations.plan(wanted, _emitter(emit))
            return {
                **_planned(planned),
                "noise": self._noise(planned.checkpoint.spec, planned.request),
            }

        return json_lines(work)

    async def _plan_several(self, body: Mapping[str, Any]) -> Response:
        several = await _all_located(SeveralRequest.from_dict(body))
        for one in several.requests:
            await asyncio.to_thread(Checkpoint.open_to_plan, one.model, one.adapter)

        async def work(emit: Emit) -> dict[str, Any]:
            together = await self._operations.plan_several(several, _emitter(emit))
            return _together(together)

        return json_lines(work)

    async def _load_several(self, body: Mapping[str, Any]) -> Response:
        several = await _all_located(SeveralRequest.from_dict(body))
        for one in several.requests:
            await _require_checkpoint(one)

        async def work(emit: Emit) -> dict[str, Any]:
            together, found = await self._operations.load_several(several, _emitter(emit))
            now_s = time.monotonic()
            return _together(together) | {
                "loaded": [model_view(Serving(deployment, now_s)) for deployment in found]
            }

        return json_lines(work)

    async def load(self, request: Request) -> Response:
        """Load a model; or several with ``models``, planned together."""
        body = await read_json(request)
        if "models" in body:
            return await self._load_several(body)
        wanted = await _located(LoadRequest.from_dict(body))
        await _require_checkpoint(wanted)

        async def work(emit: Emit) -> dict[str, Any]:
            deployment = await self._operations.load(wanted, _emitter(emit))
            return {
                **model_view(Serving(deployment, time.monotonic())),
                "noise": self._noise(deployment.spec, deployment.request),
            }

        return json_lines(work)

    def _noise(self, spec: ModelSpec, request: LoadRequest) -> list[dict[str, Any]]:
        """The figures of a plan for an identified ``request`` that are noisy."""
        return plan_noise(
            self._roster.members, self._roster.links(), spec, request.bits, request.exclude
        )

    async def quality(self, request: Request) -> Response:
        wanted = await _located(QualityRequest.from_dict(await read_json(request)))
        await _require_checkpoint(wanted)

        async def work(emit: Emit) -> dict[str, Any]:
            return _quality(await self._operations.calibrate(wanted, _emitter(emit)))

        return json_lines(work)

    async def rebalance(self, request: Request) -> Response:
        """Compare the plan of the model that answers with the best one now, and move to that.

        With ``dry_run`` nothing is moved. Without ``model`` it is the first one that answers.
        """
        body = await _body(request, "model", "dry_run")
        dry_run, name = body.get("dry_run", False), body.get("model")
        if not isinstance(dry_run, bool):
            raise RequestInvalid("dry_run: expected true or false", "dry_run")
        if not (name is None or isinstance(name, str)):
            raise RequestInvalid("model: expected the name of a loaded model", "model")

        async def work(emit: Emit) -> dict[str, Any]:
            deployment, compared, verdict = await self._operations.rebalance(
                _emitter(emit), moves=not dry_run, name=name
            )
            answer = _comparison(deployment, compared, verdict)
            if verdict.moves and not dry_run:
                moved = await self._models.latest(deployment)
                answer["moved_to"] = [team[0].name for team in moved.teams]
            return answer

        return json_lines(work)

    async def unload(self, request: Request) -> Response:
        """Unload the model ``model``, or all. The answer's ``models`` has their names."""
        name = (await _body(request, "model")).get("model")
        if name is not None and not isinstance(name, str):
            raise RequestInvalid("model: give the name of a loaded model", "model")
        names = await self._operations.unload(name)
        return JSONResponse({"unloaded": names[0] if names else None, "models": names})


async def _body(request: Request, *known: str) -> dict[str, Any]:
    """The request's JSON object. Another field than ``known`` is refused: a wish would be lost."""
    body = await read_json(request)
    unknown = sorted(body.keys() - set(known))
    if unknown:
        shown = ", ".join(unknown)[:MOST_SHOWN_CHARS]
        raise RequestInvalid(f"unknown fields: {shown}")
    return body


def _hub_name(text: object) -> HubName:
    """The name in a request. Raises RequestInvalid."""
    name = parse_name(text) if isinstance(text, str) else None
    if name is None:
        raise RequestInvalid("model: give a model's name on the hub, as ORG/NAME", "model")
    return name


async def _located(wanted: Wanted) -> Wanted:
    """The same request with the path of its model in place of a hub's name. Raises ModelError."""
    return replace(wanted, model=await asyncio.to_thread(on_this_machine, wanted.model))


async def _all_located(several: SeveralRequest) -> SeveralRequest:
    """The same requests with paths in place of hubs' names. Raises ModelError."""
    return replace(several, requests=tuple([await _located(one) for one in several.requests]))


async def _require_checkpoint(wanted: LoadRequest | QualityRequest) -> None:
    """Raise ModelError for a directory without a model, before the stream has a status."""
    await asyncio.to_thread(Checkpoint.open, wanted.model, wanted.adapter)


def _emitter(emit: Emit) -> Callable[[Step], None]:
    return lambda step: emit({"step": asdict(step)})


def _device(member: Member) -> dict[str, Any]:
    return {
        "name": member.name,
        "device": member.device,
        "version": member.version,
        "address": member.connection.peer_host,
        "endpoints": [
            f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            for host, port in (
                (item.host, item.port) for item in (*member.advertised, *member.endpoints)
            )
        ],
        "joined_s": round(member.connected_s, 3),
        "memory_available_bytes": member.memory_available_bytes,
        "load": round(member.load, 3),
        "celsius": member.celsius,
        **asdict(member.profile),
    }


def _shown_key(device: Device) -> str:
    return shown(bytes.fromhex(device.fingerprint))


def _together(together: PlannedTogether) -> dict[str, Any]:
    """A joint plan as JSON, with what is known of each model's loss."""
    answer = together.describe()
    for entry, part in zip(answer["models"], together.parts, strict=True):
        entry["context_tokens"] = part.context_tokens
        entry["weights"] = part.weights
        if part.quality is not None:
            entry["quality"] = part.quality
        if part.request.with_problem:
            entry["problem"] = part.problem.to_dict()
    answer["ids"] = dict(together.parts[0].devices)
    return answer


def _planned(planned: Planned) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "model": model_name(planned.request.model),
        "context_tokens": planned.context_tokens,
        "plan": describe_plan(planned.checkpoint.spec, planned.plan, planned.request.slots),
        "adapter": planned.request.adapter,
        "weights": planned.weights,
        "devices": dict(planned.devices),
    }
    if planned.quality is not None:
        answer["quality"] = planned.quality
    if planned.draft is not None:
        answer["draft"] = planned.draft.on(planned.plan).describe(planned.plan)
    if planned.request.with_problem:
        answer["problem"] = planned.problem.to_dict()
    return answer


def _comparison(deployment: Deployment, compared: Compared, verdict: Verdict) -> dict[str, Any]:
    """The JSON of the present plan and the best one, both by the present figures.

    moves, why: whether the rule moves the model, if this lasts, and the reason.
    """
    planned, choice = compared.planned, compared.choice
    spec, slots = deployment.spec, deployment.slots.total
    return {
        "model": deployment.name,
        "moves": verdict.moves,
        "why": verdict.why,
        "gain": choice.gain,
        "loss_gain": choice.loss_gain,
        "pause_s": choice.move_s,
        "slower_than_planned": {one.name: factor for one, factor in compared.slow.items()},
        "present": describe_plan(spec, compared.present, slots),
        "plan": describe_plan(spec, planned.plan, slots),
    }


def _quality(found: QualityFound) -> dict[str, Any]:
    """The JSON that ``shoal calibrate --quality --json`` prints for its own measurements."""
    known, spec = found.known, found.checkpoint.spec
    return {
        "model": str(found.request.model),
        "fingerprint": found.checkpoint.fingerprint,
        "measured_on": found.device,
        "tokens": sum(map(len, known.sequences)),
        "scheme": known.scheme,
        "group_size": known.group_size,
        "blocks": [
            {
                "block": block,
                "bits": bits,
                "kl": kl,
                "weight_error": error,
                "name": spec.block_name(block),
                "normalized_weight_error": error / 2.0**bits,
            }
            for (block, bits), (kl, error) in sorted(known.blocks.items())
            if bits in found.request.bits
        ]
        + [
            {
                "block": block,
                "bits": bits,
                "kl": kl,
                "weight_error": error,
                "name": spec.block_name(block),
                "normalized_weight_error": error / 2.0**bits,
                "arithmetic": arithmetic,
            }
            for (arithmetic, block, bits), (kl, error) in sorted(known.own.items())
            if bits in found.request.bits
        ],
        "hops": [
            {"after": spec.block_name(boundary), "bits": bits, "kl": kl}
            for (boundary, bits), kl in sorted(
                known.hops.items(), key=lambda hop: (hop[0][0], -hop[0][1])
            )
        ],
        "worst_hops": known.worst_hops(spec.block_count),
        "plans": [
            {"bits": plan, "predicted_kl": predicted, "measured_kl": measured}
            for plan, predicted, measured in known.checks()
            if plan in found.request.plans
        ],
    }


def model_view(state: Present) -> dict[str, Any]:
    """The JSON of a model, with plan and stages if it has a deployment."""
    answer: dict[str, Any] = {
        "model": name_of(state),
        "directory": str(directory_of(state)),
        **model_state(state),
        "keep_s": request_of(state).keep_s,
        "weight": request_of(state).weight,
        "together": dict(request_of(state).together),
    }
    if isinstance(state, Loading):
        answer["step"] = state.step
    deployment = deployment_of(state)
    return answer if deployment is None else answer | _deployment(deployment)


def _deployment(deployment: Deployment) -> dict[str, Any]:
    """The JSON of a deployment. Its plan also has the sums that teams measured."""
    slots = deployment.slots
    spec = deployment.spec
    plan = describe_plan(spec, deployment.plan, slots.total)
    use: dict[str, Any] = {
        "slots": {
            "total": slots.total,
            "used": slots.used,
            "waiting": slots.waiting,
            "classes": {Urgency(rank).name.lower(): n for rank, n in sorted(slots.ranks.items())},
        }
    }
    if spec.encodes:  # It has no KV cache.
        use = {"requests": slots.users}
    for stage, sums in zip(plan["stages"], deployment.sums, strict=True):
        if sums is not None:
            figures = {"row_s": sums.row_s, "chunk_rows": sums.chunk_rows, "chunk_s": sums.chunk_s}
            stage["measured_sum"] = figures
    return {
        "context_tokens": deployment.context_tokens,
        "output": None if deployment.spec.output is None else deployment.spec.output.kind,
        "scheme": deployment.request.scheme,
        "scheme_text_sha256": text_sha256(deployment.request.scheme_text),
        "group_size": deployment.request.group_size,
        **use,
        "plan": plan,
        "quality": deployment.quality,
        "adapter": deployment.request.adapter,
        "draft": _draft(deployment),
        "weights": list(deployment.weights),
        "sampling_defaults": deployment.sampling_defaults.stated(),
        "slow": slow_devices(deployment),
        "stages": [
            _stage(deployment, team, loaded)
            for team, loaded in zip(deployment.teams, deployment.loaded, strict=True)
        ],
    }


def _pace(deployment: Deployment, team: Team, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The measured time of a token in a stage, or of an encoder's pass."""
    if not deployment.spec.encodes:
        return {"token_s": max((part["token_s"] or 0.0 for part in parts), default=0.0) or None}
    counts = counts_of(deployment, team[0])
    if counts is None or not counts.passes:
        return {"pass_s": None, "pass_tokens": None}
    return {
        "pass_s": counts.compute_us / counts.passes / 1e6,
        "pass_tokens": counts.rows / counts.passes,
    }


def _draft(deployment: Deployment) -> dict[str, Any] | None:
    """The JSON of a draft model; None without one. One without room has a name and no device."""
    draft, wanted = deployment.draft, deployment.request.draft
    if draft is not None:
        return draft.describe(deployment.plan, deployment.draft_counts)
    return None if wanted is None else {"model": model_name(wanted), "device": None}


def _stage(deployment: Deployment, team: Team, loaded: tuple[StageLoaded, ...]) -> dict[str, Any]:
    """A loaded stage: sums over its devices, the longest load, and each member of a team.

    token_s: of the slowest device. None until enough tokens have passed. An encoder has pass_s
    instead, the mean time of its passes, and their mean tokens.
    """
    parts = [
        {
            "device": member.name,
            "memory_bytes": one.memory_bytes,
            "fetched_bytes": one.fetched_bytes,
            "from_peers_bytes": one.from_peers_bytes,
            "load_s": one.load_s,
            "token_s": token_s(deployment, member),
        }
        for member, one in zip(team, loaded, strict=True)
    ]
    return {
        "device": team[0].name,
        "memory_bytes": sum(one.memory_bytes for one in loaded),
        "fetched_bytes": sum(one.fetched_bytes for one in loaded),
        "from_peers_bytes": sum(one.from_peers_bytes for one in loaded),
        "load_s": max(one.load_s for one in loaded),
        **_pace(deployment, team, parts),
        "members": parts if len(team) > 1 else [],
    }
