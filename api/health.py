"""Whether the coordinator lives and its model answers, and which requests are in flight.

``/health`` answers as llama-server's does: 200 with {"status": "ok"} while the model answers, else
503. It needs no key, so it names no devices and no clients. ``/health/live`` is 200 while the
coordinator itself runs, with or without a model. A container's manager asks that one.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from coordinator.loading.models import RETRY_LOADING_S, Models
from coordinator.loading.state import Asleep, Broken, Loading, Nothing, Replacing, Resuming, Serving
from coordinator.serving.requests import Requests

_WORDS = {
    Nothing: "no model is loaded",
    Loading: "the model is being loaded",
    Resuming: "the model is being loaded again after a restart",
    Replacing: "a device was lost, and the model is being placed anew",
    Broken: "the model has lost devices that it needs",
}


class HealthRoutes:
    """Route handlers about the coordinator's own state."""

    def __init__(self, models: Models, requests: Requests) -> None:
        self._models = models
        self._requests = requests

    def routes(self) -> list[Route]:
        return [
            Route("/health", self.health, methods=["GET"]),
            Route("/health/live", self.live, methods=["GET"]),
            Route("/shoal/v1/requests", self.requests, methods=["GET"]),
        ]

    async def health(self, request: Request) -> Response:
        state = self._models.current
        if isinstance(state, (Serving, Asleep)):  # A request loads the model that sleeps.
            return JSONResponse({"status": "ok"})
        progress = self._models.progress()
        message = _WORDS[type(state)] + (f" ({progress})" if progress else "")
        error = {"code": 503, "message": message, "type": "unavailable_error"}
        soon = isinstance(state, (Loading, Resuming, Replacing))
        return JSONResponse(
            {"status": state.word, "error": error},
            status_code=503,
            headers={"Retry-After": str(RETRY_LOADING_S)} if soon else {},
        )

    async def live(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def requests(self, request: Request) -> Response:
        return JSONResponse(
            {
                "in_flight": [one.to_dict() for one in self._requests.in_flight],
                "ended": [one.to_dict() for one in self._requests.ended],
            }
        )
