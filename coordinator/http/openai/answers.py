"""Chat completions and plain completions: the JSON objects of their answers."""

from __future__ import annotations

import abc
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from coordinator.http.formats.parts import Arguments, CallBegins, Part, Text, Thought
from coordinator.http.openai.api import Api
from coordinator.http.openai.events import Call, Event, Outcome
from coordinator.http.openai.jobs import Job, read_job
from coordinator.loading.deployment import Deployment


class _Choices(Api):
    """Both kinds have an envelope, choices, and usage at the end."""

    chat: bool

    def __init__(self, body: Mapping[str, Any]) -> None:
        super().__init__(body)
        self._head: dict[str, Any] = {}
        self._job: Job | None = None
        self._outcomes: Sequence[Outcome] = ()

    def read(self, deployment: Deployment) -> Job:
        return read_job(deployment, self.body, chat=self.chat)

    def whole(self, job: Job, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                **self._choice(outcome),
                "finish_reason": outcome.finish,
                "logprobs": None,
            }
            for index, outcome in enumerate(outcomes)
        ]
        return {
            **envelope(job, self._kind()),
            "choices": choices,
            "usage": usage(job, outcomes),
            **details(job, outcomes[0]),
        }

    def begin(self, job: Job, outcomes: Sequence[Outcome]) -> Iterator[dict[str, Any]]:
        self._job, self._outcomes = job, outcomes
        self._head = envelope(job, self._kind())
        if job.include_usage:
            self._head["usage"] = None
        for index in range(len(outcomes)):
            for choice in self._first():
                yield self._chunk(index, choice)

    def add(self, event: Event) -> Iterator[dict[str, Any]]:
        for part in event.parts:
            yield self._chunk(event.index, self._delta(part))
        if event.finish:
            assert self._job is not None  # noqa: S101 - begin has set it
            chunk = self._chunk(event.index, self._last(), event.finish)
            yield {**chunk, **details(self._job, self._outcomes[event.index])}

    def end(self) -> Iterator[dict[str, Any]]:
        assert self._job is not None  # noqa: S101 - begin has set it
        if self._job.include_usage:
            yield {**self._head, "choices": [], "usage": usage(self._job, self._outcomes)}

    def _chunk(
        self, index: int, choice: dict[str, Any], finish: str | None = None
    ) -> dict[str, Any]:
        whole = {"index": index, **choice, "logprobs": None, "finish_reason": finish}
        return {**self._head, "choices": [whole]}

    @abc.abstractmethod
    def _kind(self) -> str:
        """Return the name of an answer's object."""

    @abc.abstractmethod
    def _choice(self, outcome: Outcome) -> dict[str, Any]:
        """Return what a whole choice holds."""

    def _first(self) -> Iterator[dict[str, Any]]:
        """Yield what a stream's first chunk of each choice holds, if there is one."""
        yield from ()

    @abc.abstractmethod
    def _delta(self, part: Part) -> dict[str, Any]:
        """Return what the chunk of one part holds."""

    @abc.abstractmethod
    def _last(self) -> dict[str, Any]:
        """Return what a choice's last chunk holds."""


class ChatCompletions(_Choices):
    """/v1/chat/completions."""

    chat = True

    def _kind(self) -> str:
        return "chat.completion.chunk" if self.wants_stream else "chat.completion"

    def _choice(self, outcome: Outcome) -> dict[str, Any]:
        return {"message": message(outcome)}

    def _first(self) -> Iterator[dict[str, Any]]:
        yield {"delta": {"role": "assistant", "content": ""}}

    def _delta(self, part: Part) -> dict[str, Any]:
        return {"delta": delta(part)}

    def _last(self) -> dict[str, Any]:
        return {"delta": {}}


class Completions(_Choices):
    """/v1/completions."""

    chat = False

    def _kind(self) -> str:
        return "text_completion"

    def _choice(self, outcome: Outcome) -> dict[str, Any]:
        return {"text": outcome.text}

    def _delta(self, part: Part) -> dict[str, Any]:
        return {"text": part.text if isinstance(part, Text) else ""}

    def _last(self) -> dict[str, Any]:
        return {"text": ""}


def message(outcome: Outcome) -> dict[str, Any]:
    """The assistant's message of a whole answer."""
    content = None if outcome.calls and not outcome.text else outcome.text
    found: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if outcome.thoughts:
        found["reasoning_content"] = outcome.thoughts
    if outcome.calls:
        found["tool_calls"] = [call.to_json() for call in outcome.calls]
    return found


def delta(part: Part) -> dict[str, Any]:
    """The delta of one part."""
    match part:
        case Text(text):
            return {"content": text}
        case Thought(text):
            return {"reasoning_content": text}
        case CallBegins(index, id, name):
            return {"tool_calls": [{"index": index, **Call(id, name).to_json()}]}
        case Arguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


def envelope(job: Job, kind: str) -> dict[str, Any]:
    prefix = "chatcmpl" if job.chat else "cmpl"
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": job.deployment.name,
    }


def usage(job: Job, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    completion_tokens = sum(len(outcome.tokens) for outcome in outcomes)
    thought_tokens = sum(outcome.thought_tokens for outcome in outcomes)
    return {
        "prompt_tokens": len(job.prompt),
        "completion_tokens": completion_tokens,
        "total_tokens": len(job.prompt) + completion_tokens,
        "completion_tokens_details": {"reasoning_tokens": thought_tokens},
    }


def details(job: Job, outcome: Outcome) -> dict[str, Any]:
    """The token ids and measured speeds of one answer, if the request asks for them."""
    if not job.token_ids:
        return {}
    return {
        "shoal": {
            "prompt_tokens": list(job.prompt),
            "tokens": outcome.tokens,
            "prefill_tokens_per_s": outcome.timing.prefill_tokens_per_s,
            "decode_tokens_per_s": outcome.timing.decode_tokens_per_s,
        }
    }
