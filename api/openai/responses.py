"""/v1/responses: OpenAI's newer API, for text and functions. Nothing is stored."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from api.common import EventForm, describe
from api.formats.parts import Arguments, CallBegins, Part, Text, Thought
from api.openai.api import Api
from api.openai.events import Block, Event, Outcome
from api.openai.jobs import Job, read_job
from api.openai.responses_input import NAMES, chat_request
from coordinator.loading.deployment import Deployment


def _event(event: dict[str, Any]) -> str:
    return f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"


class Responses(Api):
    """One request. Its stream has a numbered event for each step of each item."""

    names = NAMES

    def __init__(self, body: Mapping[str, Any]) -> None:
        super().__init__(body)
        self.form = EventForm(_event, self._error, "")
        self._id = f"resp_{secrets.token_hex(16)}"
        self._created = int(time.time())
        self._job: Job | None = None
        self._outcome = Outcome()
        self._number = 0
        self._items: list[dict[str, Any]] = []
        self._open: _Item | None = None
        self._request: dict[str, Any] = {}

    def read(self, deployment: Deployment) -> Job:
        self._request = chat_request(self.body)
        with self.naming():
            return self.named(read_job(deployment, self._request, chat=True))

    def whole(self, job: Job, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        self._job, (self._outcome,) = job, outcomes
        blocks, status = self._outcome.blocks or [Block(Text(""))], self._status()
        *items, last = [_Item(block.begun, block.text) for block in blocks]
        self._items = [*(item.to_json("completed") for item in items), last.to_json(status)]
        return self._response(status)

    def begin(self, job: Job, outcomes: Sequence[Outcome]) -> Iterator[dict[str, Any]]:
        self._job, (self._outcome,) = job, outcomes
        response = self._response("in_progress")
        yield self._numbered("response.created", response=response)
        yield self._numbered("response.in_progress", response=response)

    def add(self, event: Event) -> Iterator[dict[str, Any]]:
        for part in event.parts:
            if self._open is None or not self._open.takes(part):
                yield from self._close("completed")
                yield from self._begin(part)
            assert self._open is not None  # noqa: S101 - begun above
            yield from self._add(self._open, part)

    def end(self) -> Iterator[dict[str, Any]]:
        status = self._status()
        if not self._outcome.blocks:
            yield from self._begin(Text(""))
        yield from self._close(status)
        yield self._numbered(f"response.{status}", response=self._response(status))

    # ---- items ----------------------------------------------------------------------------------

    def _begin(self, part: Part) -> Iterator[dict[str, Any]]:
        item = self._open = _Item(Block.of(part).begun)
        yield self._placed("response.output_item.added", item=item.to_json("in_progress"))
        if isinstance(part, Text):
            yield self._of(item, "response.content_part.added", part=_text_part(""))

    def _add(self, item: _Item, part: Part) -> Iterator[dict[str, Any]]:
        match part:
            case Text(text):
                name, extra = "response.output_text.delta", {"logprobs": list[Any]()}
            case Thought(text):
                name, extra = "response.reasoning_text.delta", {}
            case Arguments(_, text):
                name, extra = "response.function_call_arguments.delta", {}
            case CallBegins():
                return
        item.text += text
        yield self._of(item, name, delta=text, **extra)

    def _close(self, status: str) -> Iterator[dict[str, Any]]:
        item = self._open
        if item is None:
            return
        match item.begun:
            case Text():
                text = {"text": item.text, "logprobs": list[Any]()}
                yield self._of(item, "response.output_text.done", **text)
                part = _text_part(item.text)
                yield self._of(item, "response.content_part.done", part=part)
            case Thought():
                yield self._of(item, "response.reasoning_text.done", text=item.text)
            case CallBegins(_, _, name):
                arguments = {"arguments": item.text, "name": name}
                yield self._of(item, "response.function_call_arguments.done", **arguments)
        done = item.to_json(status)
        yield self._placed("response.output_item.done", item=done)
        self._items.append(done)
        self._open = None

    def _numbered(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **fields}

    def _error(self, error: Exception) -> str:
        body = describe(error)[1]
        return _event(
            self._numbered("error", **{key: body[key] for key in ("code", "message", "param")})
        )

    def _placed(self, kind: str, **fields: Any) -> dict[str, Any]:
        return self._numbered(kind, output_index=len(self._items), **fields)

    def _of(self, item: _Item, kind: str, **fields: Any) -> dict[str, Any]:
        if not isinstance(item.begun, CallBegins):
            fields["content_index"] = 0
        return self._placed(kind, item_id=item.id, **fields)

    # ---- the response ---------------------------------------------------------------------------

    def _status(self) -> str:
        """Say how the answer has ended. Its last item ended so, too."""
        return "incomplete" if self._outcome.finish == "length" else "completed"

    def _response(self, status: str) -> dict[str, Any]:
        job, body, outcome = self._job, self.body, self._outcome
        assert job is not None  # noqa: S101 - begin or whole has set it
        ended = status != "in_progress"
        text = body.get("text") or {}
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"}
            if status == "incomplete"
            else None,
            "instructions": body.get("instructions"),
            "max_output_tokens": body.get("max_output_tokens"),
            "metadata": body.get("metadata") or {},
            "model": job.deployment.name,
            "output": list(self._items),
            "parallel_tool_calls": job.reading is None or job.reading.tools.parallel,
            "previous_response_id": None,
            "reasoning": {"effort": self._request.get("reasoning_effort"), "summary": None},
            "store": False,
            "temperature": job.sampling.temperature,
            "text": {**text, "format": text.get("format") or {"type": "text"}},
            "tool_choice": body.get("tool_choice") or "auto",
            "tools": [{"strict": None, **tool} for tool in body.get("tools") or []],
            "top_p": job.sampling.top_p,
            "truncation": "disabled",
            "usage": _usage(job, outcome) if ended else None,
            "user": body.get("user"),
        }


@dataclass(slots=True)
class _Item(Block):
    """An item of the output."""

    id: str = ""

    def __post_init__(self) -> None:
        prefix = {Text: "msg", Thought: "rs"}.get(type(self.begun), "fc")
        self.id = f"{prefix}_{secrets.token_hex(16)}"

    def to_json(self, status: str) -> dict[str, Any]:
        ended = status != "in_progress"
        match self.begun:
            case Thought():
                content = [{"type": "reasoning_text", "text": self.text}] if ended else []
                fields: dict[str, Any] = {"type": "reasoning", "summary": [], "content": content}
            case CallBegins(_, call_id, name):
                fields = {"type": "function_call", "call_id": call_id, "name": name}
                fields["arguments"] = self.text
            case _:
                fields = {"type": "message", "role": "assistant"}
                fields["content"] = [_text_part(self.text)] if ended else []
        return {"id": self.id, "status": status, **fields}


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(job: Job, outcome: Outcome) -> dict[str, Any]:
    return {
        "input_tokens": len(job.prompt),
        "input_tokens_details": {"cached_tokens": outcome.timing.cached_tokens},
        "output_tokens": len(outcome.tokens),
        "output_tokens_details": {"reasoning_tokens": outcome.thought_tokens},
        "total_tokens": len(job.prompt) + len(outcome.tokens),
    }
