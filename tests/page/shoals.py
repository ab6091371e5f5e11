"""A shoal that a test makes up, behind the page's real files and stream."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from api.common import HANDLERS
from api.openai.prompts import NO_PLACE
from api.page.routes import PageRoutes
from api.page.state import State, StateFeed
from coordinator.config import CoordinatorConfig
from coordinator.loading.models import Models
from coordinator.loading.turns import Turns
from coordinator.roster.members import Roster
from coordinator.serving.requests import Requests
from coordinator.story import Story
from planning.errors import RequestInvalid
from wire.transport import bind

MB = 1 << 20


class GivenShoal(StateFeed):
    """A shoal whose state, answers and plans a test sets."""

    def __init__(self, directory: Path) -> None:
        story = Story()
        config = CoordinatorConfig(
            cluster="attic",
            state_dir=directory,
            control_host="127.0.0.1",
            control_port=7420,
            http_host="127.0.0.1",
            http_port=0,
            advertise=False,
        )
        roster, models = Roster("attic", story=story), Models(story)
        super().__init__(config, roster, models, Turns(), Requests(), story)
        self.config = config
        self.given: dict[str, Any] = {}
        """Parts of the state in place of the empty ones."""
        self.pieces: Sequence[str | dict[str, Any]] = ()
        """The next answer: texts, or whole deltas."""
        self.hold = threading.Event()
        """An answer waits for it after its pieces."""
        self.hold.set()
        self.asked: list[dict[str, Any]] = []
        """The bodies of the requests so far."""
        self.cancelled = threading.Event()
        self.remembers = True
        """Whether the model takes earlier messages."""
        self.key = ""
        """The API key that is needed; empty: none."""
        self.plan: dict[str, Any] = {}
        """The result of planning."""
        self.url = ""
        self.token = ""
        """The token for the next device."""
        self.reset()

    def state(self) -> State:
        return cast("State", {**super().state(), **self.given})

    async def invite(self) -> str:
        return self.token

    def routes(self) -> list[Route]:
        return [
            *PageRoutes(self.config, self, self.invite).routes(),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/shoal/v1/plan", self.planned, methods=["POST"]),
            Route("/shoal/v1/ps", self.ps, methods=["GET"]),
        ]

    def reset(self) -> None:
        """Be four devices at work, without keys and tokens, that have answered nothing yet."""
        self.given, self.pieces, self.plan = four_pis(), (), {}
        self.key, self.token, self.remembers = "", "", True
        self._app = self._application()
        self.asked.clear()
        self.cancelled.clear()
        self.hold.set()
        self.reopen()

    def reopen(self) -> None:
        """Serve streams again after ``close``."""
        self._closed.clear()

    def _application(self) -> Starlette:
        return Starlette(routes=self.routes(), exception_handlers=HANDLERS)

    async def chat(self, request: Request) -> Response:
        self.asked.append(await request.json())
        if not self.remembers and len(self.asked[-1]["messages"]) > 1:
            raise RequestInvalid("messages[1]: no place", "messages", NO_PLACE)
        return StreamingResponse(self._answer(), media_type="text/event-stream")

    async def _answer(self) -> AsyncIterator[str]:
        def event(delta: dict[str, Any], finish: str | None, **more: Any) -> str:
            choice = {"index": 0, "delta": delta, "finish_reason": finish}
            return f"data: {json.dumps({'choices': [choice], **more})}\n\n"

        try:
            for piece in self.pieces:
                yield event({"content": piece} if isinstance(piece, str) else piece, None)
            await asyncio.to_thread(self.hold.wait)
            figures = {"tokens": [1] * len(self.pieces), "decode_tokens_per_s": 12.5}
            yield event({}, "stop", shoal=figures)
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def planned(self, request: Request) -> Response:
        self.asked.append(await request.json())
        return Response(json.dumps({"result": self.plan}) + "\n")

    async def ps(self, request: Request) -> Response:
        return JSONResponse({"model": next(iter(self.given.get("models", ())), None)})

    async def guarded(self, scope: Any, receive: Any, send: Any) -> None:
        """The application, with the key checked as the coordinator does."""
        is_open = scope["path"] == "/" or scope["path"].startswith("/page/")
        given = dict(scope["headers"]).get(b"authorization", b"").decode()
        if self.key and not is_open and given != f"Bearer {self.key}":
            body = {"error": {"message": "an API key is needed", "code": "invalid_api_key"}}
            await JSONResponse(body, 401)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    @contextmanager
    def serving(self) -> Iterator[GivenShoal]:
        """Serve from a thread until the block ends."""
        listening = bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        config = uvicorn.Config(
            self.guarded,
            interface="asgi3",
            log_level="critical",
            lifespan="off",
            timeout_graceful_shutdown=1,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listening],), name="given shoal")
        thread.start()
        try:
            yield self
        finally:
            self.hold.set()
            server.should_exit = True
            thread.join(60)
            listening.close()


def device(name: str, **changes: Any) -> dict[str, Any]:
    """A device as the state has it."""
    return {
        "name": name,
        "state": "here",
        "reason": "",
        "since_s": time.time() - 4000,
        "version": "0.2.0",
        "address": "192.168.1.20",
        "machine": "Raspberry Pi 4 Model B Rev 1.4",
        "processor": "Cortex-A72",
        "cores": 4,
        "threads": 4,
        "backend": "onnx_cpu",
        "backend_version": "1.22.0",
        "wireless": False,
        "memory_limit_bytes": 1500 * MB,
        "memory_total_bytes": 3800 * MB,
        "memory_available_bytes": 2100 * MB,
        "storage_bytes": 9000 * MB,
        "load": 0.61,
        "celsius": 61,
        "noise": "",
        **changes,
    }


def stage(name: str, first: int, bits: Sequence[int], seconds: float) -> dict[str, Any]:
    """A planned stage."""
    return {
        "device": name,
        "first": first,
        "bits": list(bits),
        "compute_s": seconds,
        "memory_bytes": 55 * MB * len(bits),
        "memory_limit_bytes": 1500 * MB,
        "hop_bits": 8,
        "members": [],
    }


def model(*planned: dict[str, Any], name: str = "llama-3.2-1b", **changes: Any) -> dict[str, Any]:
    """A loaded model with these stages, each measured 10 % slower than predicted."""
    blocks = []
    count = planned[-1]["first"] + len(planned[-1]["bits"])
    for one in planned:
        for number, bits in enumerate(one["bits"], one["first"]):
            what = f"layer {number - 1}"
            what = "embedding" if number == 0 else "head" if number == count - 1 else what
            blocks.append({"block": number, "name": what, "device": one["device"], "bits": bits})
    total_s = sum(one["compute_s"] for one in planned) + 0.0012 * len(planned)
    return {
        "model": name,
        "directory": f"/home/ann/models/{name}",
        "state": "ready",
        "reason": None,
        "waiting_for": [],
        "context_tokens": 2048,
        "slots": {"total": 4, "used": 2, "waiting": 0},
        "plan": {
            "stages": list(planned),
            "hops": [
                {"source": one["device"], "target": two["device"], "seconds": 0.0014}
                for one, two in itertools.pairwise(planned)
            ],
            "return_s": 0.0006,
            "blocks": blocks,
            "shares": {},
            "predicted_ms_per_token": total_s * 1e3,
            "prompt_tokens": 512,
            "predicted_first_token_s": 6.2,
            "proven_optimal": True,
            "gap": 0.0,
            "total_sensitivity": 0.021,
        },
        "quality": {"measured_kl": 0.0184},
        "slow": [],
        "sampling_defaults": {"temperature": 0.6},
        "stages": [
            {
                "device": one["device"],
                "memory_bytes": one["memory_bytes"],
                "token_s": one["compute_s"] * 1.1,
                "hop_s": 0.0016,
                "members": [],
            }
            for one in planned
        ],
        **changes,
    }


def request(identity: str, state: str = "answering", **changes: Any) -> dict[str, Any]:
    """A request as the state has it."""
    return {
        "id": identity,
        "path": "/v1/chat/completions",
        "client": "192.168.1.7",
        "key": "",
        "model": "llama-3.2-1b",
        "state": state,
        "time_s": time.time() - 9,
        "started_s": 0.1,
        "first_token_s": 1.34,
        "token_s": 0.0781,
        "prompt_tokens": 214,
        "cached_tokens": 180,
        "answer_tokens": 87,
        "drafted_tokens": 0,
        "accepted_tokens": 0,
        "status": 200,
        "error": "",
        **changes,
    }


def event(number: int, kind: str, subject: str, text: str = "") -> dict[str, Any]:
    return {
        "number": number,
        "time_s": time.time() - 600 + 20 * number,
        "monotonic_s": float(number),
        "kind": kind,
        "subject": subject,
        "text": text,
    }


def four_pis() -> dict[str, Any]:
    """The parts of a shoal at work: a ring of four stages, two answers, one lost device."""
    return {
        "devices": [
            device("attic-pi"),
            device("kitchen-pi", celsius=77, load=0.94),
            device("nano", backend="torch_cuda", processor="Cortex-A57", cores=4, load=0.28),
            device("shelf-pi", load=None, celsius=None),
            device("old-laptop", state="lost", reason="it was silent for 5 s"),
        ],
        "models": [
            model(
                stage("attic-pi", 0, (8, 4, 4, 5), 0.0171),
                stage("kitchen-pi", 4, (4, 4, 4, 5, 6), 0.0203),
                stage("nano", 9, (6, 6, 8, 8, 8, 8), 0.0118),
                stage("shelf-pi", 15, (4, 4, 8), 0.0152),
            )
        ],
        "requests": [
            request("req-1"),
            request("req-2", "prompt", answer_tokens=0, token_s=None, first_token_s=None),
            request("req-0", "ended", answer_tokens=411, client="127.0.0.1"),
        ],
        "events": [
            event(1, "joined", "attic-pi", "from 192.168.1.20:40122"),
            event(2, "served", "llama-3.2-1b", "on attic-pi, kitchen-pi, nano, shelf-pi"),
            event(3, "left", "old-laptop", "it was silent for 5 s"),
        ],
    }
