"""The JSON objects of answers: chunks, choices, usage."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from coordinator.http.formats.parts import Arguments, CallBegins, Part, Text, Thought
from coordinator.http.openai.events import Tally
from coordinator.http.openai.jobs import Job


@dataclass(slots=True)
class Call:
    """A call of a tool, as far as it has come."""

    id: str
    name: str
    arguments: str = ""

    def to_json(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(slots=True)
class Message:
    """An assistant's whole message, gathered from its parts."""

    text: str = ""
    thoughts: str = ""
    calls: list[Call] = field(default_factory=list)

    def add(self, parts: Iterable[Part]) -> None:
        for part in parts:
            match part:
                case Text(text):
                    self.text += text
                case Thought(text):
                    self.thoughts += text
                case CallBegins(_, id, name):
                    self.calls.append(Call(id, name))
                case Arguments(index, text):
                    self.calls[index].arguments += text

    def to_json(self) -> dict[str, Any]:
        content = None if self.calls and not self.text else self.text
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self.thoughts:
            message["reasoning_content"] = self.thoughts
        if self.calls:
            message["tool_calls"] = [call.to_json() for call in self.calls]
        return message


def deltas(parts: Iterable[Part]) -> Iterator[dict[str, Any]]:
    """Yield the delta of each part, for a stream of chunks."""
    for part in parts:
        match part:
            case Text(text):
                yield {"content": text}
            case Thought(text):
                yield {"reasoning_content": text}
            case CallBegins(index, id, name):
                yield {"tool_calls": [{"index": index, **Call(id, name).to_json()}]}
            case Arguments(index, text):
                yield {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


def delta(delta: dict[str, Any], finish: str | None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}


def text_choice(text: str, finish: str | None) -> dict[str, Any]:
    return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}


def envelope(job: Job) -> dict[str, Any]:
    prefix = "chatcmpl" if job.chat else "cmpl"
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": job.kind,
        "created": int(time.time()),
        "model": job.deployment.name,
    }


def usage(job: Job, tally: Tally) -> dict[str, Any]:
    completion_tokens = len(tally.tokens)
    return {
        "prompt_tokens": len(job.prompt),
        "completion_tokens": completion_tokens,
        "total_tokens": len(job.prompt) + completion_tokens,
        "completion_tokens_details": {"reasoning_tokens": tally.thought_tokens},
    }


def details(job: Job, tally: Tally) -> dict[str, Any]:
    if not job.token_ids:
        return {}
    return {
        "shoal": {
            "prompt_tokens": list(job.prompt),
            "tokens": tally.tokens,
            "prefill_tokens_per_s": tally.timing.prefill_tokens_per_s,
            "decode_tokens_per_s": tally.timing.decode_tokens_per_s,
        }
    }
