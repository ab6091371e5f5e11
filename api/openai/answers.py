"""Chat completions and plain completions: the JSON objects of their answers."""

from __future__ import annotations

import abc
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from api.formats.parts import Arguments, CallBegins, Part, Text, Thought
from api.openai.api import Api
from api.openai.events import Call, Event, Outcome
from api.openai.jobs import Job, read_job
from api.openai.logprobs import Offsets, chat_logprobs, completion_logprobs
from coordinator.loading.deployment import Deployment
from wire.logprobs import TokenLogprobs


class _Choices(Api):
    """Both kinds have an envelope, choices, and usage at the end."""

    chat: bool

    def __init__(self, body: Mapping[str, Any]) -> None:
        super().__init__(body)
        self._head: dict[str, Any] = {}
        self._job: Job | None = None
        self._outcomes: Sequence[Outcome] = ()
        self._untold: dict[int, list[TokenLogprobs]] = {}
        """Log-probabilities of tokens whose text has not come yet, by the answer's number."""

    def read(self, deployment: Deployment) -> Job:
        return read_job(deployment, self.body, chat=self.chat)

    def whole(self, job: Job, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        told = job.sampling.top_logprobs >= 0
        choices = [
            {
                "index": index,
                **self._choice(job, index, outcome),
                "finish_reason": outcome.finish,
                "logprobs": self._whole_logprobs(job, index, outcome) if told else None,
                **(details(job, index, outcome) if len(outcomes) > 1 else {}),
            }
            for index, outcome in enumerate(outcomes)
        ]
        return {
            **envelope(job, self._kind()),
            "choices": choices,
            "usage": usage(job, outcomes),
            **details(job, 0, outcomes[0]),
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
        assert self._job is not None  # noqa: S101 - begin has set it
        yield from self._before(self._job, event)
        self._untold.setdefault(event.index, []).extend(event.piece.logprobs)
        for part in event.parts:
            yield self._chunk(event.index, self._delta(part))
        if event.finish:
            chunk = self._chunk(event.index, self._last(), event.finish)
            yield {**chunk, **details(self._job, event.index, self._outcomes[event.index])}

    def end(self) -> Iterator[dict[str, Any]]:
        assert self._job is not None  # noqa: S101 - begin has set it
        if self._job.include_usage:
            yield {**self._head, "choices": [], "usage": usage(self._job, self._outcomes)}

    def _chunk(
        self, index: int, choice: dict[str, Any], finish: str | None = None
    ) -> dict[str, Any]:
        logprobs = None
        if self._job is not None and self._untold.get(index):
            logprobs = self._logprobs(self._job, index, self._untold.pop(index))
        whole = {"index": index, **choice, "logprobs": logprobs, "finish_reason": finish}
        return {**self._head, "choices": [whole]}

    def _before(self, job: Job, event: Event) -> Iterator[dict[str, Any]]:
        """Yield what comes before the first part of an answer."""
        yield from ()

    @abc.abstractmethod
    def _kind(self) -> str:
        """Return the name of an answer's object."""

    @abc.abstractmethod
    def _choice(self, job: Job, index: int, outcome: Outcome) -> dict[str, Any]:
        """Return what a whole choice holds."""

    @abc.abstractmethod
    def _whole_logprobs(self, job: Job, index: int, outcome: Outcome) -> dict[str, Any]:
        """Return the log-probabilities of a whole choice."""

    @abc.abstractmethod
    def _logprobs(self, job: Job, index: int, told: list[TokenLogprobs]) -> dict[str, Any]:
        """Return the log-probabilities of the next tokens of a stream."""

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

    def _choice(self, job: Job, index: int, outcome: Outcome) -> dict[str, Any]:
        return {"message": message(outcome)}

    def _whole_logprobs(self, job: Job, index: int, outcome: Outcome) -> dict[str, Any]:
        return chat_logprobs(job.deployment, outcome.logprobs)

    def _logprobs(self, job: Job, index: int, told: list[TokenLogprobs]) -> dict[str, Any]:
        return chat_logprobs(job.deployment, told)

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

    def __init__(self, body: Mapping[str, Any]) -> None:
        super().__init__(body)
        self._begun: set[int] = set()
        """The answers that have begun with what they echo."""
        self._offsets: dict[int, Offsets] = {}
        """The places of an answer's tokens, by the answer's number."""

    def _choice(self, job: Job, index: int, outcome: Outcome) -> dict[str, Any]:
        return {"text": job.echo(index) + outcome.text}

    def _whole_logprobs(self, job: Job, index: int, outcome: Outcome) -> dict[str, Any]:
        answer = self._logprobs(job, index, outcome.logprobs)
        if not job.echoed:
            return answer
        prompt = _prompt_logprobs(job, index, outcome.prompt_logprobs)
        return {name: [*values, *answer[name]] for name, values in prompt.items()}

    def _logprobs(self, job: Job, index: int, told: list[TokenLogprobs]) -> dict[str, Any]:
        if index not in self._offsets:
            self._offsets[index] = Offsets(job.deployment, len(job.echo(index)))
        return completion_logprobs(job.deployment, told, self._offsets[index])

    def _before(self, job: Job, event: Event) -> Iterator[dict[str, Any]]:
        """Yield the echoed prompt, once its log-probabilities are there if they are wanted."""
        index, scores = event.index, event.piece.prompt_logprobs
        if not job.echoed or index in self._begun or (event.piece.notice and not scores):
            return
        self._begun.add(index)
        chunk = self._chunk(index, {"text": job.echo(index)})
        if job.sampling.top_logprobs >= 0:
            (choice,) = chunk["choices"]
            choice["logprobs"] = _prompt_logprobs(job, index, scores)
        yield chunk

    def _delta(self, part: Part) -> dict[str, Any]:
        return {"text": part.text if isinstance(part, Text) else ""}

    def _last(self) -> dict[str, Any]:
        return {"text": ""}


def _prompt_logprobs(job: Job, index: int, told: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """The log-probabilities of the prompt that an answer echoes."""
    first = job.prompts[index // job.choices][0]
    return completion_logprobs(job.deployment, told, Offsets(job.deployment), first=first)


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
    prompt_tokens = sum(map(len, job.prompts))
    completion_tokens = sum(len(outcome.tokens) for outcome in outcomes)
    thought_tokens = sum(outcome.thought_tokens for outcome in outcomes)
    # A prompt counts once, however many answers it has.
    cached_tokens = sum(outcome.timing.cached_tokens for outcome in outcomes[:: job.choices])
    # An identical request had got these before.
    kept_tokens = sum(outcome.timing.kept_tokens for outcome in outcomes)
    kept = {"cached_tokens": kept_tokens} if kept_tokens else {}
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": thought_tokens, **kept},
    }


def details(job: Job, index: int, outcome: Outcome) -> dict[str, Any]:
    """The token ids and measured speeds of one answer, if the request asks for them."""
    if not job.token_ids:
        return {}
    return {
        "shoal": {
            "prompt_tokens": list(job.prompts[index // job.choices]),
            "tokens": outcome.tokens,
            "prefill_tokens_per_s": outcome.timing.prefill_tokens_per_s,
            "decode_tokens_per_s": outcome.timing.decode_tokens_per_s,
        }
    }
