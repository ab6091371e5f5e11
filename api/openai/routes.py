"""The routes for answers: OpenAI's chat completions, completions and responses.

A field that this server cannot honour is refused by name. An answer that silently ignores a field
would be worse than an error. What a request leaves open is decided by the model's
generation_config.json, then by OpenAI's defaults. Beyond OpenAI's fields there are these:

- ``top_k`` draws from so many of the likeliest tokens.
- ``min_p`` drops tokens below this share of the highest probability.
- ``repetition_penalty`` above 1 makes tokens that were there before less likely.
- ``ignore_eos`` goes on after the model's own end of text, up to ``max_tokens``.
- ``cache_prompt`` false computes the whole prompt, also if a slot keeps its first rows.
- ``speculative.n_max`` limits the tokens that are guessed ahead. 0: none.
- ``speculative.draft_model``: whether a draft model may guess them, where one is loaded.
- ``return_token_ids`` adds a ``shoal`` object with token ids and measured speeds.
- ``json_schema``, ``grammar``, ``structured_outputs`` and ``guided_...`` give the answer's format.
- ``enable_thinking`` and ``chat_template_kwargs`` are variables for the chat template.
- ``reasoning_format`` says whether thoughts are told apart from the text.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from api.common import read_json, server_sent_events, while_connected
from api.openai.answers import ChatCompletions, Completions
from api.openai.api import Api
from api.openai.events import Outcome, events
from api.openai.jobs import Job
from api.openai.kinds import require_generates
from api.openai.responses import Responses
from coordinator.loading.deployment import Deployment
from coordinator.loading.models import Models
from coordinator.loading.state import Asleep, Loading, Replacing, Resuming, describe
from coordinator.serving import requests
from coordinator.serving.gateway import Gateway
from coordinator.serving.urgency import urgency_of

PROMPT_THREADS = 4

LONG_REQUEST_BYTES = 256 << 10
"""Requests of this size or more are tokenized one at a time. Each takes about 80 times its size in
memory."""

Result = TypeVar("Result")


class OpenAIRoutes:
    """Route handlers that answer with a gateway."""

    def __init__(
        self,
        models: Models,
        gateway: Gateway,
        require_room: Callable[[str], None] = lambda name: None,
    ) -> None:
        """``require_room`` raises QueueFull if no more requests may wait for a model."""
        self._models = models
        self._require_room = require_room
        self._gateway = gateway
        # Threads of their own, so that a flood of prompts does not delay block downloads.
        self._threads = ThreadPoolExecutor(PROMPT_THREADS, "prompt")
        self._one_long = asyncio.Semaphore(1)

    def routes(self) -> list[Route]:
        return [
            self.route("/v1/completions", Completions),
            self.route("/v1/chat/completions", ChatCompletions),
            self.route("/v1/responses", Responses),
        ]

    def route(self, path: str, api: type[Api]) -> Route:
        """Serve answers in the form of ``api``."""

        async def handle(request: Request) -> Response:
            return await self._answer(request, api)

        return Route(path, handle, methods=["POST"])

    async def _answer(self, request: Request, make: type[Api]) -> Response:
        api = make(await read_json(request))
        flight = requests.current()
        flight.urgency = urgency_of(request.headers, api.body, flight.most_urgent)
        name = self._models.named(api.body.get("model"), None)
        self._require_room(name)
        state = self._models[name]
        if api.wants_stream and isinstance(state, (Resuming, Loading, Replacing, Asleep)):
            return server_sent_events(self._late_stream(name, api, _is_long(request)), api.form)
        self._models.require_soon(name)
        deployment = await while_connected(request, self._models.deployment(name))
        require_generates(deployment)
        work = self.prepare(deployment, lambda: api.read(deployment), is_long=_is_long(request))
        job = await while_connected(request, work)
        if job.stream:
            return server_sent_events(self._stream(api, job), api.form)
        return JSONResponse(await while_connected(request, self._whole(api, job)))

    async def _late_stream(
        self, name: str, api: Api, is_long: bool
    ) -> AsyncIterator[dict[str, Any] | str]:
        """Stream what the answer waits for, then the answer. Errors come in the stream."""
        yield f"{name} is {describe(self._models[name])}"
        deployment = await self._models.deployment(name)
        require_generates(deployment)
        job = await self.prepare(deployment, lambda: api.read(deployment), is_long=is_long)
        async with aclosing(self._stream(api, job)) as found:
            async for event in found:
                yield event

    async def prepare(
        self, deployment: Deployment, work: Callable[[], Result], *, is_long: bool
    ) -> Result:
        """Check and tokenize in a thread, because a long text would block the event loop.

        The thread works for the request of this task (coordinator.serving.requests.current). The
        deployment counts as used meanwhile, so it does not fall asleep.
        """
        context = contextvars.copy_context()
        with deployment.slots.in_use():
            async with self._one_long if is_long else contextlib.nullcontext():
                return await asyncio.get_running_loop().run_in_executor(
                    self._threads, context.run, work
                )

    async def _whole(self, api: Api, job: Job) -> dict[str, Any]:
        outcomes = [Outcome() for _ in job.runs]
        async with aclosing(events(self._gateway, job, outcomes, withdrawable=True)) as found:
            async for _ in found:
                pass
        return api.whole(job, outcomes)

    async def _stream(self, api: Api, job: Job) -> AsyncGenerator[dict[str, Any] | str]:
        outcomes = [Outcome() for _ in job.runs]
        for chunk in api.begin(job, outcomes):
            yield chunk
        async with aclosing(events(self._gateway, job, outcomes)) as found:
            async for event in found:
                if event.piece.notice:
                    yield " ".join(event.piece.notice.split())
                for chunk in api.add(event):
                    yield chunk
        for chunk in api.end():
            yield chunk


def _is_long(request: Request) -> bool:
    """Whether a request may have a long text. h11 has checked the number."""
    return int(request.headers.get("content-length", LONG_REQUEST_BYTES)) >= LONG_REQUEST_BYTES
