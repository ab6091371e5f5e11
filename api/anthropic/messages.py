"""/v1/messages: answers in Anthropic's form."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from api.anthropic.requests import chat_request
from api.common import EventForm, describe, messages_error
from api.formats.json_call import read_object
from api.formats.parts import Arguments, CallBegins, Text, Thought
from api.openai.api import Api
from api.openai.events import Block, Event, Outcome
from api.openai.jobs import Job, read_job
from coordinator.loading.deployment import Deployment

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def _event(event: dict[str, Any]) -> str:
    return f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"


def _error(error: Exception) -> str:
    return _event(messages_error(*describe(error)))


class Messages(Api):
    """One request. Its stream begins and ends each block of the answer."""

    form = EventForm(_event, _error, "")
    names: Mapping[str, str] = {"stop": "stop_sequences", "enable_thinking": "thinking"}

    def __init__(self, body: Mapping[str, Any]) -> None:
        super().__init__(body)
        self._job: Job | None = None
        self._outcome = Outcome()
        self._open: Block | None = None
        self._blocks = 0

    def read(self, deployment: Deployment) -> Job:
        with self.naming():
            return self.named(read_job(deployment, chat_request(self.body), chat=True))

    def whole(self, job: Job, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        self._job, (outcome,) = job, outcomes
        return {
            **self._message(job),
            "content": [_whole(block) for block in outcome.blocks or [Block(Text(""))]],
            **self._stop(outcome),
            "usage": self._usage(job, outcome),
        }

    def begin(self, job: Job, outcomes: Sequence[Outcome]) -> Iterator[dict[str, Any]]:
        self._job, (self._outcome,) = job, outcomes
        empty: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None}
        usage = self._usage(job, self._outcome)
        message = {**self._message(job), **empty, "usage": usage}
        yield {"type": "message_start", "message": message}

    def add(self, event: Event) -> Iterator[dict[str, Any]]:
        for part in event.parts:
            if self._open is None or not self._open.takes(part):
                yield from self._close()
                yield from self._begin(Block.of(part))
            if not isinstance(part, CallBegins):
                yield self._delta(_delta(part))

    def end(self) -> Iterator[dict[str, Any]]:
        if not self._outcome.blocks:
            yield from self._begin(Block(Text("")))
        yield from self._close()
        assert self._job is not None  # noqa: S101 - begin has set it
        usage = self._usage(self._job, self._outcome)
        stop = self._stop(self._outcome)
        yield {"type": "message_delta", "delta": stop, "usage": usage}
        yield {"type": "message_stop"}

    def _begin(self, block: Block) -> Iterator[dict[str, Any]]:
        self._open = block
        first = _first(block.begun)
        yield {"type": "content_block_start", "index": self._blocks, "content_block": first}

    def _close(self) -> Iterator[dict[str, Any]]:
        if self._open is None:
            return
        if isinstance(self._open.begun, Thought):
            yield self._delta({"type": "signature_delta", "signature": ""})
        yield {"type": "content_block_stop", "index": self._blocks}
        self._blocks += 1
        self._open = None

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._blocks, "delta": delta}

    def _message(self, job: Job) -> dict[str, Any]:
        return {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": job.deployment.name,
        }

    def _stop(self, outcome: Outcome) -> dict[str, Any]:
        if outcome.finish == "stop" and outcome.stop:
            return {"stop_reason": "stop_sequence", "stop_sequence": outcome.stop}
        return {"stop_reason": _REASONS[outcome.finish], "stop_sequence": None}

    def _usage(self, job: Job, outcome: Outcome) -> dict[str, int]:
        """Count tokens. Those of the cache are apart from the other ones of the prompt."""
        cached = outcome.timing.cached_tokens
        return {
            "input_tokens": len(job.prompt) - cached,
            "output_tokens": len(outcome.tokens),
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
        }


def _whole(block: Block) -> dict[str, Any]:
    """Return a block that has come whole."""
    match block.begun:
        case Thought():
            own: dict[str, Any] = {"thinking": block.text}
        case CallBegins():
            own = {"input": _input(block.text)}
        case Text():
            own = {"text": block.text}
    return {**_first(block.begun), **own}


def _first(begun: Text | Thought | CallBegins) -> dict[str, Any]:
    match begun:
        case Thought():
            return {"type": "thinking", "thinking": "", "signature": ""}
        case CallBegins(_, id, name):
            return {"type": "tool_use", "id": id, "name": name, "input": {}}
        case _:
            return {"type": "text", "text": ""}


def _delta(part: Text | Thought | Arguments) -> dict[str, Any]:
    match part:
        case Text(text):
            return {"type": "text_delta", "text": text}
        case Thought(text):
            return {"type": "thinking_delta", "thinking": text}
        case Arguments(_, text):
            return {"type": "input_json_delta", "partial_json": text}


def _input(arguments: str) -> dict[str, Any]:
    """Return the object of a call's arguments. Text that is none, or was cut off, stays text."""
    found = read_object(arguments or "{}")
    return {"text": arguments} if found is None else found
