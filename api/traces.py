"""``/shoal/v1/trace?request=ID``: one request over the devices."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from api.common import read_query
from coordinator.loading.models import Models
from coordinator.serving.requests import InFlight, Requests
from coordinator.serving.traces import StagePasses, trace
from planning.errors import RequestInvalid

LAST = "last"
"""Stands for the newest request in place of its id."""


class TraceRoutes:
    """The route handler of traces."""

    def __init__(self, models: Models, requests: Requests) -> None:
        self._models = models
        self._requests = requests

    def routes(self) -> list[Route]:
        return [Route("/shoal/v1/trace", self.trace, methods=["GET"])]

    async def trace(self, request: Request) -> Response:
        found = self._find(read_query(request, "request").get("request", LAST))
        epochs = {epoch for epoch, _ in found.sequences}
        deployment = next(filter(None, map(self._models.of_epoch, epochs)), None)
        if deployment is None:
            raise RequestInvalid(
                f"the stages that ran request {found.id} are no longer loaded, or it never ran",
                "request",
            )
        stages = await trace(deployment, list(found.sequences))
        if not any(stage.passes for stage in stages):
            raise RequestInvalid(
                f"the devices have forgotten the passes of request {found.id}: they remember their "
                "last ones only",
                "request",
            )
        plan = deployment.plan
        predicted = [1e3 * stage.compute_s for stage in plan.stages]
        return JSONResponse(
            {
                "request": found.to_dict(),
                "stages": [
                    _stage(stage, found, predicted_ms)
                    for stage, predicted_ms in zip(stages, predicted, strict=True)
                ],
                "predicted_hops_ms": [1e3 * hop.seconds for hop in plan.hops]
                + [1e3 * plan.return_s],
            }
        )

    def _find(self, name: str) -> InFlight:
        """The request with this id. Raises RequestInvalid."""
        ran = (one for one in self._requests.ended if one.sequences)
        found = next(ran, None) if name == LAST else self._requests.find(name)
        if found is None:
            raise RequestInvalid(
                f"no request {name!r} is remembered: `shoal trace` without an id takes the last "
                "one, and the coordinator's log has the ids",
                "request",
            )
        return found


def _stage(stage: StagePasses, request: InFlight, predicted_ms: float) -> dict[str, Any]:
    """A stage's passes as JSON. Times are seconds since the request arrived."""

    def since(time_us: int) -> float:
        return round(stage.seconds(time_us) - request.arrived_s, 6)

    return {
        "device": stage.member.name,
        "clock_error_s": round(stage.error_s, 6),
        "predicted_token_ms": predicted_ms,
        "passes": [
            {
                "sequence": item.sequence,
                "position": item.position,
                "rows": item.rows,
                "together": item.together,
                "arrived_s": since(item.arrived_us),
                "started_s": since(item.started_us),
                "computed_s": since(item.computed_us),
                "sent_s": since(item.sent_us),
            }
            for item in stage.passes
        ],
    }
