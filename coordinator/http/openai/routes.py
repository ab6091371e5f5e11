"""The OpenAI-compatible routes: /v1/models, /v1/completions, /v1/chat/completions.

A field that this server cannot honour is refused by name. An answer that silently ignores a field
would be worse than an error. What a request leaves open is decided by the model's
generation_config.json, then by OpenAI's defaults. Beyond OpenAI's fields there are four:

- ``top_k`` draws from so many of the likeliest tokens.
- ``repetition_penalty`` above 1 makes tokens that were there before less likely.
- ``ignore_eos`` goes on after the model's own end of text, up to ``max_tokens``.
- ``return_token_ids`` adds a ``shoal`` object with token ids and measured speeds.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from coordinator.http.common import model_state, read_json, server_sent_events, while_connected
from coordinator.http.openai.answers import (
    Message,
    delta,
    deltas,
    details,
    envelope,
    text_choice,
    usage,
)
from coordinator.http.openai.events import Tally, events
from coordinator.http.openai.jobs import Job, read_job
from coordinator.loading.deployment import Deployment
from coordinator.loading.models import Models
from coordinator.loading.state import Loading, Replacing, Resuming, describe, name_of
from coordinator.serving.gateway import Gateway

PROMPT_THREADS = 4

LONG_REQUEST_BYTES = 256 << 10
"""Requests of this size or more are tokenized one at a time. Each takes about 80 times its size in
memory."""


class OpenAIRoutes:
    """Route handlers that answer with a gateway."""

    def __init__(self, models: Models, gateway: Gateway) -> None:
        self._models = models
        self._gateway = gateway
        # Threads of their own, so that a flood of prompts does not delay block downloads.
        self._threads = ThreadPoolExecutor(PROMPT_THREADS, "prompt")
        self._one_long = asyncio.Semaphore(1)

    def routes(self) -> list[Route]:
        return [
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
        ]

    async def models(self, request: Request) -> Response:
        return JSONResponse(
            {
                "object": "list",
                "data": [
                    {
                        "id": name,
                        "object": "model",
                        "created": 0,
                        "owned_by": "shoal",
                        "shoal": model_state(state),
                    }
                    for name, state in self._models.present()
                ],
            }
        )

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, chat=False)

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, chat=True)

    async def _answer(self, request: Request, *, chat: bool) -> Response:
        body = await read_json(request)
        state = self._models.current
        if body.get("stream") is True and isinstance(state, (Resuming, Loading, Replacing)):
            return server_sent_events(self._late_stream(body, _is_long(request), chat=chat))
        self._models.require_soon()
        deployment = await while_connected(request, self._models.deployment())
        job = await while_connected(
            request, self._prepare(deployment, body, _is_long(request), chat=chat)
        )
        if job.stream:
            return server_sent_events(self._stream(job))
        return JSONResponse(await while_connected(request, self._whole(job)))

    async def _late_stream(
        self, body: Mapping[str, Any], is_long: bool, *, chat: bool
    ) -> AsyncIterator[dict[str, Any] | str]:
        """Stream what the answer waits for, then the answer. Errors come in the stream."""
        yield f"{name_of(self._models.current)} is {describe(self._models.current)}"
        job = await self._prepare(await self._models.deployment(), body, is_long, chat=chat)
        async with aclosing(self._stream(job)) as events:
            async for event in events:
                yield event

    async def _prepare(
        self, deployment: Deployment, body: Mapping[str, Any], is_long: bool, *, chat: bool
    ) -> Job:
        """Check and tokenize in a thread, because a long text would block the event loop."""
        async with self._one_long if is_long else contextlib.nullcontext():
            work = functools.partial(read_job, deployment, body, chat=chat)
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def _whole(self, job: Job) -> dict[str, Any]:
        tally, message, finish = Tally(), Message(), ""
        async with aclosing(events(self._gateway, job, tally, withdrawable=True)) as found:
            async for event in found:
                if event.piece.withdraws:
                    message = Message()
                message.add(event.parts)
                finish = event.finish
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "logprobs": None}
        if job.chat:
            choice["message"] = message.to_json()
        else:
            choice["text"] = message.text
        return {
            **envelope(job),
            "choices": [choice],
            "usage": usage(job, tally),
            **details(job, tally),
        }

    async def _stream(self, job: Job) -> AsyncGenerator[dict[str, Any] | str]:
        head, tally = envelope(job), Tally()
        if job.include_usage:
            head["usage"] = None
        if job.chat:
            yield {**head, "choices": [delta({"role": "assistant", "content": ""}, None)]}
        async with aclosing(events(self._gateway, job, tally)) as found:
            async for event in found:
                if event.piece.notice:
                    yield " ".join(event.piece.notice.split())
                for part in deltas(event.parts):
                    choice = delta(part, None)
                    if not job.chat:
                        choice = text_choice(part["content"], None)
                    yield {**head, "choices": [choice]}
                if event.finish:
                    last = delta({}, event.finish) if job.chat else text_choice("", event.finish)
                    yield {**head, "choices": [last], **details(job, tally)}
        if job.include_usage:
            yield {**head, "choices": [], "usage": usage(job, tally)}


def _is_long(request: Request) -> bool:
    """Whether a request may have a long text. h11 has checked the number."""
    return int(request.headers.get("content-length", LONG_REQUEST_BYTES)) >= LONG_REQUEST_BYTES
