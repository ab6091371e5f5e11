"""Runs a request: pieces of text from the gateway become parts of answers."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from api.formats.parts import Arguments, CallBegins, Parser, Part, Text, Thought
from api.openai.jobs import Job
from coordinator.errors import FormatFailed
from coordinator.serving.choices import answers
from coordinator.serving.gateway import Gateway
from coordinator.serving.pieces import Piece, Timing
from planning.errors import RequestInvalid
from wire.logprobs import TokenLogprobs
from wire.messages import FinishReason


@dataclass(frozen=True, slots=True)
class Event:
    """The parts that one piece of an answer adds.

    index: the answer's number among the choices of the request.
    finish: "stop", "length" or "tool_calls" for the last event of an answer.
    """

    index: int
    parts: tuple[Part, ...]
    piece: Piece
    finish: str = ""


@dataclass(slots=True)
class Block:
    """Text, thoughts or the arguments of a call, as far as they have come without a break."""

    begun: Text | Thought | CallBegins
    """The kind. The text of what comes is in ``text`` only."""
    text: str = ""

    @staticmethod
    def of(part: Part) -> Block:
        """Return the empty block that a part begins."""
        if isinstance(part, CallBegins):
            return Block(part)
        return Block(Thought("") if isinstance(part, Thought) else Text(""))

    def takes(self, part: Part) -> bool:
        """Whether a part goes on in this block."""
        if isinstance(part, Arguments):
            return isinstance(self.begun, CallBegins)
        return type(part) is type(self.begun) and not isinstance(part, CallBegins)


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
class Outcome:
    """An answer as far as it has come, and what it took."""

    blocks: list[Block] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    thought_tokens: int = 0
    finish: str = ""
    stop: str = ""
    """The string of the request that ended the answer, if one did."""
    timing: Timing = field(default_factory=Timing)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """The log-probabilities of each of the tokens, if they are asked for."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """The same of the prompt's tokens but the first."""
    _thinking: bool = False
    """Whether the last part was a thought."""

    def add(self, event: Event) -> None:
        if event.piece.withdraws:
            self.blocks, self.tokens, self.logprobs = [], [], []
            self.thought_tokens, self._thinking = 0, False
        self.finish, self.stop = event.finish, event.piece.stop
        self.tokens += event.piece.tokens
        self.logprobs += event.piece.logprobs
        self.prompt_logprobs = event.piece.prompt_logprobs or self.prompt_logprobs
        if self._thinking or any(isinstance(part, Thought) for part in event.parts):
            self.thought_tokens += len(event.piece.tokens)
        self._gather(event.parts)
        if event.parts:
            self._thinking = isinstance(event.parts[-1], Thought)

    def _gather(self, parts: Iterable[Part]) -> None:
        for part in parts:
            if not self.blocks or not self.blocks[-1].takes(part):
                self.blocks.append(Block.of(part))
            if not isinstance(part, CallBegins):
                self.blocks[-1].text += part.text

    @property
    def text(self) -> str:
        return "".join(block.text for block in self.blocks if isinstance(block.begun, Text))

    @property
    def thoughts(self) -> str:
        return "".join(block.text for block in self.blocks if isinstance(block.begun, Thought))

    @property
    def calls(self) -> list[Call]:
        return [
            Call(block.begun.id, block.begun.name, block.text)
            for block in self.blocks
            if isinstance(block.begun, CallBegins)
        ]


async def events(
    gateway: Gateway, job: Job, outcomes: Sequence[Outcome], *, withdrawable: bool = False
) -> AsyncGenerator[Event, None]:
    """Yield the events of all answers as they come, and add them to their outcomes.

    Closing the iterator cancels the answers.

    withdrawable: as in ``Gateway.generate``. An event whose piece withdraws has no parts.
    Raises CoordinatorError, RequestInvalid.
    """
    readers = [_Reader(job, index) for index in range(len(outcomes))]
    ended: set[int] = set()
    pieces = answers(
        gateway,
        job.deployment,
        job.runs,
        job.stop,
        [outcome.timing for outcome in outcomes],
        ended,
        withdrawable=withdrawable,
        markers=job.markers,
    )
    try:
        async with aclosing(pieces):
            async for index, piece in pieces:
                if index in ended:
                    continue
                event = readers[index].read(piece)
                outcomes[index].add(event)
                yield event
                if event.finish:
                    ended.add(index)
                    if len(ended) == len(outcomes):
                        return
    except FormatFailed as error:
        field = job.format_field
        raise RequestInvalid(f"{field}: {error}", field, error.code) from error


class _Reader:
    """Follows the pieces of one answer."""

    def __init__(self, job: Job, index: int) -> None:
        self._job = job
        self._index = index
        self._parser: Parser = job.parser()
        self._calls = False

    def read(self, piece: Piece) -> Event:
        if self._job.wants_no_answer:
            piece = _without_answer(piece)
        if piece.withdraws:
            self._parser, self._calls = self._job.parser(), False
            return Event(self._index, (), piece)
        parts = self._parser.feed(piece.text)
        reading = self._job.reading
        # The call is whole, and the request wants no second one.
        ends = reading is not None and not reading.tools.parallel and self._parser.calls_ended > 0
        if piece.finish:
            parts += self._parser.finish()
        if ends:
            parts = _first_call(parts)
        self._calls = self._calls or any(isinstance(part, CallBegins) for part in parts)
        if ends:
            return Event(self._index, tuple(parts), piece, "tool_calls")
        finish = "tool_calls" if self._calls and piece.finish == "stop" else piece.finish
        return Event(self._index, tuple(parts), piece, finish)


def _without_answer(piece: Piece) -> Piece:
    """Leave out the token that was drawn although none is wanted."""
    finish: FinishReason = "length" if piece.finish else ""
    return replace(piece, text="", tokens=(), logprobs=(), finish=finish, stop="")


def _first_call(parts: list[Part]) -> list[Part]:
    """Leave out what comes after the first call."""
    later = [at for at, part in enumerate(parts) if isinstance(part, CallBegins) and part.index]
    return parts[: later[0]] if later else parts
