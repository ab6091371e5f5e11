"""The table of a stage's sequences: their KV slots, their waiting rows, and which rows run next.

It has no threads and no lock: the caller holds one.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from agent.sampler import Sampler
from backends.base import Tokens
from wire.activations import HopBits
from wire.messages import Sampling


@dataclass(slots=True)
class Rows:
    """What has come for a sequence and runs in one pass: a token's row, or a chunk of a prompt.

    ``last``: no row of the sequence is on its way behind these, so that a token is sampled from
    them. ``content``: token ids int64 [count], or hidden rows as they crossed the link at so many
    bits.
    """

    position: int
    count: int
    last: bool
    content: Tokens | tuple[memoryview, HopBits]


@dataclass(slots=True, eq=False)
class Sequence:
    """The generation that holds a KV slot. ``sampler`` exists on the last stage only."""

    number: int
    slot: int
    sampling: Sampling
    sampler: Sampler | None
    arrived: int = 0
    """Rows that have come, run or not: where the next ones go."""
    waiting: deque[Rows] = field(default_factory=deque)
    """What has not run yet, in order."""
    sampled_tokens: int = 0


Turn = tuple[Sequence, Rows]


START_AHEAD = 1024
"""Sequences that the coordinator may have started and this stage not heard of: numbers are given
out in order, and one that is further ahead is made up."""


class SequenceTable:
    """At most one sequence per slot, each with at most a context of rows."""

    def __init__(self, slots: int, context_tokens: int) -> None:
        self._slots = slots
        self._context_tokens = context_tokens
        self._held: dict[int, Sequence] = {}
        """By number; prompts take turns in this order."""
        self._newest: dict[int, int] = {}
        """Slot -> the newest sequence that held it: numbers only grow."""
        self._after_tokens = False
        self.newest = 0
        """The newest sequence that was opened, of any slot; numbers count from 1."""

    def fits(self, slot: int, position: int, rows: int) -> bool:
        """Whether there is such a slot, with room for these rows."""
        return (
            0 <= slot < self._slots
            and position >= 0
            and rows > 0
            and position + rows <= self._context_tokens
        )

    def open(
        self, number: int, slot: int, sampling: Sampling, sampler: Sampler | None
    ) -> Sequence | None:
        """Give the slot to a new sequence and end its old one; return None for a number of the
        past.
        """
        newest = self._newest.get(slot)
        if newest is not None:
            if number <= newest:
                return None  # Cancelled, and still on its way when the slot was given on.
            self._held.pop(newest, None)
        if number in self._held:
            return None
        self._newest[slot] = number
        self.newest = max(self.newest, number)
        self._held[number] = sequence = Sequence(number, slot, sampling, sampler)
        return sequence

    def may_start(self, number: int) -> bool:
        """Whether a sequence of this number may be opened soon."""
        return number > self.newest and (not self.newest or number - self.newest <= START_AHEAD)

    def find(self, number: int) -> Sequence | None:
        return self._held.get(number)

    def drop(self, number: int) -> None:
        """Forget a sequence with all that waits for it."""
        self._held.pop(number, None)

    def clear(self) -> None:
        self._held.clear()

    def add(self, sequence: Sequence, rows: Rows) -> bool:
        """Put behind what waits; False, and nothing done, where these rows are not the next ones,
        or beyond the context."""
        end = rows.position + rows.count
        if rows.position != sequence.arrived or end > self._context_tokens:
            return False
        sequence.arrived = end
        sequence.waiting.append(rows)
        return True

    @property
    def alone(self) -> bool:
        """Whether one sequence has the stage to itself."""
        return len(self._held) == 1

    @property
    def waiting(self) -> bool:
        for sequence in self._held.values():  # noqa: SIM110 - any() takes twice as long
            if sequence.waiting:
                return True
        return False

    def take(self, *, chunks: bool) -> list[Turn]:
        """What the next pass runs: all single rows that are next in their sequences, or one chunk.

        Both kinds alternate while both wait, and prompts take turns. Without ``chunks``, chunks
        stay where they are. Empty where nothing can run.
        """
        tokens = [
            sequence
            for sequence in self._held.values()
            if sequence.waiting and sequence.waiting[0].count == 1
        ]
        if chunks and (self._after_tokens or not tokens):
            for sequence in self._held.values():
                if sequence.waiting and sequence.waiting[0].count > 1:
                    self._held[sequence.number] = self._held.pop(sequence.number)
                    self._after_tokens = False
                    return [(sequence, sequence.waiting.popleft())]
        self._after_tokens = True
        return [(sequence, sequence.waiting.popleft()) for sequence in tokens]
