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
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from coordinator.http.common import model_state, read_json, server_sent_events, while_connected
from coordinator.loading.deployment import Deployment
from coordinator.loading.models import Models
from coordinator.loading.state import Loading, Replacing, Resuming, describe, name_of
from coordinator.serving.gateway import Gateway, Timing, room_for_answer
from model.generation import (
    MAX_REPETITION_PENALTY,
    MAX_TEMPERATURE,
    MAX_TOP_K,
    MIN_REPETITION_PENALTY,
)
from planning.errors import RequestInvalid
from wire.messages import Sampling

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default for completions. Chat answers may fill the context."""

PROMPT_THREADS = 4

LONG_REQUEST_BYTES = 256 << 10
"""Requests of this size or more are tokenized one at a time. Each takes about 80 times its size in
memory."""

MAX_STOP_STRINGS = 4
MAX_STOP_CHARACTERS = 256


@dataclass(frozen=True, slots=True)
class _Job:
    """A checked request, ready to run."""

    deployment: Deployment
    chat: bool
    prompt: tuple[int, ...]
    sampling: Sampling
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    token_ids: bool

    @property
    def kind(self) -> str:
        if not self.chat:
            return "text_completion"
        return "chat.completion.chunk" if self.stream else "chat.completion"


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
    ) -> _Job:
        """Check and tokenize in a thread, because a long text would block the event loop."""
        async with self._one_long if is_long else contextlib.nullcontext():
            work = functools.partial(_job, deployment, body, chat=chat)
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def _whole(self, job: _Job) -> dict[str, Any]:
        timing, text, tokens, finish = Timing(), "", list[int](), ""
        pieces = self._gateway.generate(
            job.deployment, job.prompt, job.sampling, job.stop, timing, withdrawable=True
        )
        async with aclosing(pieces):
            async for piece in pieces:
                if piece.withdraws:
                    text, tokens = "", []
                text += piece.text
                tokens += piece.tokens
                finish = piece.finish
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "logprobs": None}
        if job.chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        return {
            **_envelope(job),
            "choices": [choice],
            "usage": _usage(job, len(tokens)),
            **_details(job, tokens, timing),
        }

    async def _stream(self, job: _Job) -> AsyncGenerator[dict[str, Any] | str]:
        envelope, timing, tokens = _envelope(job), Timing(), list[int]()
        if job.include_usage:
            envelope["usage"] = None
        if job.chat:
            yield {**envelope, "choices": [_delta({"role": "assistant", "content": ""}, None)]}
        pieces = self._gateway.generate(job.deployment, job.prompt, job.sampling, job.stop, timing)
        async with aclosing(pieces):
            async for piece in pieces:
                tokens += piece.tokens
                if piece.notice:
                    yield " ".join(piece.notice.split())
                if piece.text:
                    part = _delta({"content": piece.text}, None)
                    if not job.chat:
                        part = _text(piece.text, None)
                    yield {**envelope, "choices": [part]}
                if piece.finish:
                    last = _delta({}, piece.finish) if job.chat else _text("", piece.finish)
                    yield {
                        **envelope,
                        "choices": [last],
                        **_details(job, tokens, timing),
                    }
        if job.include_usage:
            yield {**envelope, "choices": [], "usage": _usage(job, len(tokens))}


def _delta(delta: dict[str, Any], finish: str | None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}


def _text(text: str, finish: str | None) -> dict[str, Any]:
    return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}


def _envelope(job: _Job) -> dict[str, Any]:
    prefix = "chatcmpl" if job.chat else "cmpl"
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": job.kind,
        "created": int(time.time()),
        "model": job.deployment.name,
    }


def _usage(job: _Job, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": len(job.prompt),
        "completion_tokens": completion_tokens,
        "total_tokens": len(job.prompt) + completion_tokens,
    }


def _details(job: _Job, tokens: list[int], timing: Timing) -> dict[str, Any]:
    if not job.token_ids:
        return {}
    return {
        "shoal": {
            "prompt_tokens": list(job.prompt),
            "tokens": tokens,
            "prefill_tokens_per_s": timing.prefill_tokens_per_s,
            "decode_tokens_per_s": timing.decode_tokens_per_s,
        }
    }


# ---- reading requests --------------------------------------------------------------------------


def _is_long(request: Request) -> bool:
    """Whether a request may have a long text. h11 has checked the number."""
    return int(request.headers.get("content-length", LONG_REQUEST_BYTES)) >= LONG_REQUEST_BYTES


_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": (None, ""),
    "logprobs": (None, False),
    "top_logprobs": (None,),
    "logit_bias": (None, {}),
    "presence_penalty": (0, None),
    "frequency_penalty": (0, None),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
}
"""OpenAI's fields that are not supported, with the values that have no effect."""

_IGNORED = frozenset(
    {"user", "store", "metadata", "service_tier", "parallel_tool_calls", "safety_identifier"}
)
"""Fields that do not change the answer."""

_KNOWN = frozenset(
    {
        "model",
        "stream",
        "stream_options",
        "stop",
        "seed",
        "temperature",
        "top_p",
        "top_k",
        "repetition_penalty",
        "max_tokens",
        "ignore_eos",
        "return_token_ids",
    }
)


def _job(deployment: Deployment, body: Mapping[str, Any], *, chat: bool) -> _Job:
    own = {"messages", "max_completion_tokens"} if chat else {"prompt"}
    for field, value in body.items():
        if field in _NEUTRAL:
            if not any(value == allowed for allowed in _NEUTRAL[field]):
                raise RequestInvalid(f"{field} is not supported by this server", field)
        elif field not in _KNOWN | own | _IGNORED:
            raise RequestInvalid(f"unknown field {field!r}", field)
    model = body.get("model", deployment.name)
    if model != deployment.name:
        raise RequestInvalid(
            f"the model {model!r} is not loaded; {deployment.name!r} is", "model", "model_not_found"
        )
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise RequestInvalid("stream_options must be an object", "stream_options")
    prompt = _chat_prompt(deployment, body) if chat else _prompt(deployment, body)
    room_for_answer(len(prompt), deployment.context_tokens, deployment.spec)
    return _Job(
        deployment=deployment,
        chat=chat,
        prompt=tuple(prompt),
        sampling=_sampling(deployment, body, chat=chat),
        stop=_stop(body),
        stream=_flag(body, "stream"),
        include_usage=_flag(options, "include_usage"),
        token_ids=_flag(body, "return_token_ids"),
    )


def _prompt(deployment: Deployment, body: Mapping[str, Any]) -> list[int]:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return _encode(deployment, prompt, add_special=True)
    if isinstance(prompt, list) and all(type(token) is int for token in prompt):
        if any(not 0 <= token < deployment.spec.vocab for token in prompt):
            raise RequestInvalid("prompt: token ids outside the vocabulary", "prompt")
        return prompt
    raise RequestInvalid("prompt: expected one string, or one list of token ids", "prompt")


def _chat_prompt(deployment: Deployment, body: Mapping[str, Any]) -> list[int]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestInvalid("messages: expected a list with at least one message", "messages")
    plain = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RequestInvalid("messages: each needs a role and content", "messages")
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(_text_part(part) for part in content)
        if not isinstance(content, str):
            raise RequestInvalid("messages: content must be text", "messages")
        plain.append({"role": message["role"], "content": content})
    text = deployment.tokenizer.apply_chat_template(plain)
    return _encode(deployment, text, add_special=False)


def _encode(deployment: Deployment, text: str, *, add_special: bool) -> list[int]:
    """The tokens of a prompt. A prompt that is far too long is refused before tokenizing."""
    least_tokens = deployment.tokenizer.least_tokens(text)
    if least_tokens:
        room_for_answer(least_tokens, deployment.context_tokens, deployment.spec, at_least=True)
    tokens = deployment.tokenizer.encode(text, add_special=add_special)
    vocab = deployment.spec.vocab
    if max(tokens, default=0) >= vocab:
        raise RequestInvalid(
            f"the prompt has the token {max(tokens)}, the model only {vocab} tokens:"
            " its tokenizer and its weights do not belong together",
            "prompt",
        )
    return tokens


def _text_part(part: Any) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        text: str = part["text"]
        return text
    raise RequestInvalid("messages: only text content is supported", "messages")


def _sampling(deployment: Deployment, body: Mapping[str, Any], *, chat: bool) -> Sampling:
    default = deployment.context_tokens if chat else DEFAULT_COMPLETION_TOKENS
    newer = chat and body.get("max_completion_tokens") is not None
    limit = "max_completion_tokens" if newer else "max_tokens"
    known = {**_NEUTRAL_SAMPLING, **deployment.sampling_defaults.stated()}
    penalties = MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY
    return Sampling(
        max_tokens=int(_number(body, limit, default, 1, 1 << 31, whole=True)),
        stop_tokens=() if _flag(body, "ignore_eos") else deployment.spec.eos_tokens,
        temperature=_number(body, "temperature", known["temperature"], 0.0, MAX_TEMPERATURE),
        top_k=int(_number(body, "top_k", known["top_k"], 0, MAX_TOP_K, whole=True)),
        top_p=_number(body, "top_p", known["top_p"], 0.0, 1.0),
        seed=int(_number(body, "seed", secrets.randbits(32), -(1 << 63), (1 << 63) - 1, whole=True))
        % (1 << 63),
        repetition_penalty=_number(
            body, "repetition_penalty", known["repetition_penalty"], *penalties
        ),
    )


_NEUTRAL_SAMPLING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
"""The values that draw from the model's own distribution."""


def _number(
    body: Mapping[str, Any],
    field: str,
    default: float,
    low: float,
    high: float,
    *,
    whole: bool = False,
) -> float:
    value = body.get(field)
    if value is None:
        return default
    if type(value) is not int and (whole or type(value) is not float):
        raise RequestInvalid(f"{field}: expected a {'whole ' if whole else ''}number", field)
    if not low <= value <= high:
        raise RequestInvalid(f"{field}: {value} is not between {low:g} and {high:g}", field)
    return float(value) if not whole else value


def _flag(body: Mapping[str, Any], field: str) -> bool:
    value = body.get(field)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise RequestInvalid(f"{field}: expected true or false", field)


def _stop(body: Mapping[str, Any]) -> tuple[str, ...]:
    stop = body.get("stop")
    if stop is None:
        return ()
    strings = [stop] if isinstance(stop, str) else stop
    if (
        not isinstance(strings, list)
        or len(strings) > MAX_STOP_STRINGS
        or not all(
            isinstance(item, str) and 0 < len(item) <= MAX_STOP_CHARACTERS for item in strings
        )
    ):
        raise RequestInvalid(
            f"stop: expected a string, or a list of up to {MAX_STOP_STRINGS}, each of 1 to "
            f"{MAX_STOP_CHARACTERS} characters",
            "stop",
        )
    return tuple(strings)
