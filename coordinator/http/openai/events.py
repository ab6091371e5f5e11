"""Runs a request: pieces of text from the gateway become parts of an answer."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from coordinator.http.formats.parts import CallBegins, Parser, Part, Thought
from coordinator.http.openai.jobs import Job
from coordinator.serving.gateway import Gateway, Piece, Timing


@dataclass(frozen=True, slots=True)
class Event:
    """The parts that one piece of an answer adds.

    finish: "stop", "length" or "tool_calls" for the last event of an answer.
    stopped: a string of the request ended the answer, or the first of its calls did.
    """

    parts: tuple[Part, ...]
    piece: Piece
    finish: str = ""
    stopped: bool = False


@dataclass(slots=True)
class Tally:
    """What an answer took so far."""

    tokens: list[int] = field(default_factory=list)
    thought_tokens: int = 0
    timing: Timing = field(default_factory=Timing)
    thinking: bool = False
    """Whether the last part was a thought."""

    def count(self, event: Event) -> None:
        if event.piece.withdraws:
            self.tokens.clear()
            self.thought_tokens = 0
        self.tokens += event.piece.tokens
        thought = any(isinstance(part, Thought) for part in event.parts)
        if thought or (self.thinking and not event.parts):
            self.thought_tokens += len(event.piece.tokens)
        if event.parts:
            self.thinking = isinstance(event.parts[-1], Thought)


async def events(
    gateway: Gateway, job: Job, tally: Tally, *, withdrawable: bool = False
) -> AsyncGenerator[Event, None]:
    """Yield the events of an answer. Closing the iterator cancels the answer.

    withdrawable: as in ``Gateway.generate``. An event whose piece withdraws has no parts.
    """
    pieces = gateway.generate(
        job.deployment,
        job.prompt,
        job.sampling,
        job.stop,
        tally.timing,
        withdrawable=withdrawable,
        markers=job.markers,
    )
    reader = _Reader(job)
    async with aclosing(pieces):
        async for piece in pieces:
            event = reader.read(piece)
            tally.count(event)
            yield event
            if event.finish:
                return


class _Reader:
    """Follows the pieces of one answer."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._parser: Parser = job.parser()
        self._calls = False

    def read(self, piece: Piece) -> Event:
        if piece.withdraws:
            self._parser, self._calls = self._job.parser(), False
            return Event((), piece)
        parts = self._parser.feed(piece.text)
        reading = self._job.reading
        # The call is whole, and the request wants no second one.
        ends = reading is not None and not reading.tools.parallel and self._parser.calls_ended > 0
        if piece.finish:
            parts += self._parser.finish()
        elif ends:
            parts = _first_call(parts)
        self._calls = self._calls or any(isinstance(part, CallBegins) for part in parts)
        if ends:
            return Event(tuple(parts), piece, "tool_calls", stopped=True)
        finish = "tool_calls" if self._calls and piece.finish == "stop" else piece.finish
        # The gateway gives the token that ends a stop string, and none for the end of the text.
        return Event(tuple(parts), piece, finish, piece.finish == "stop" and bool(piece.tokens))


def _first_call(parts: list[Part]) -> list[Part]:
    """Leave out what comes after the first call."""
    later = [at for at, part in enumerate(parts) if isinstance(part, CallBegins) and part.index]
    return parts[: later[0]] if later else parts
