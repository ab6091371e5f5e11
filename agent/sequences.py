"""The table of a stage's sequences: their KV slots, their waiting rows, and which rows run next.

It has no threads and no lock, so the caller holds one.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

from agent.sampler import Sampler
from backends.base import Tokens
from wire.activations import HopBits
from wire.messages import Sampling


@dataclass(slots=True)
class Rows:
    """The rows of a sequence that run in one pass: a token's row, or a chunk of a prompt.

    last: whether a token is sampled from them, because no row of the sequence follows.
    content: token ids int64 [count], or hidden rows as received with their bits a value.
    """

    position: int
    count: int
    last: bool
    content: Tokens | tuple[memoryview, HopBits]
    arrived_s: float = 0.0
    """When they were added to the table, by a monotonic clock."""


@dataclass(slots=True, eq=False)
class Sequence:
    """The generation that holds a KV slot. ``sampler`` exists on the last stage only."""

    number: int
    slot: int
    sampling: Sampling
    sampler: Sampler | None
    arrived: int = 0
    """Rows that have arrived, whether run or not. The next ones begin at this position."""
    waiting: deque[Rows] = field(default_factory=deque)
    """Rows that have not run yet, in order."""
    sampled_tokens: int = 0
    sampled_s: float = 0.0
    """When the last token was sampled, by a monotonic clock."""


Turn = tuple[Sequence, Rows]


START_AHEAD = 1024
"""How many sequences the coordinator may start before this stage hears of them.

Numbers are given out in order, so a number that is further ahead is false.
"""


class SequenceTable:
    """At most one sequence per slot, each with at most a context of rows."""

    def __init__(self, slots: int, context_tokens: int) -> None:
        self._slots = slots
        self._context_tokens = context_tokens
        self._held: dict[int, Sequence] = {}
        """Maps a number to its sequence. Prompts take turns in this order."""
        self._newest: dict[int, int] = {}
        """Maps a slot to the newest sequence that held it. Numbers only grow."""
        self._after_tokens = False
        self.newest = 0
        """The newest sequence that was opened in any slot. Numbers count from 1."""

    def fits(self, slot: int, position: int, rows: int) -> bool:
        """Whether the slot exists and has room for these rows."""
        return (
            0 <= slot < self._slots
            and position >= 0
            and rows > 0
            and position + rows <= self._context_tokens
        )

    def open(
        self, number: int, slot: int, sampling: Sampling, sampler: Sampler | None
    ) -> Sequence | None:
        """Give the slot to a new sequence and end its old one. None for a number of the past."""
        newest = self._newest.get(slot)
        if newest is not None:
            if number <= newest:
                return None  # A late start of a sequence that was cancelled.
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
        """Forget a sequence and its waiting rows."""
        self._held.pop(number, None)

    def clear(self) -> None:
        self._held.clear()

    def add(self, sequence: Sequence, rows: Rows) -> bool:
        """Append to the waiting rows. False, without effect, if they are not next or do not fit."""
        end = rows.position + rows.count
        if rows.position != sequence.arrived or end > self._context_tokens:
            return False
        sequence.arrived = end
        rows.arrived_s = time.monotonic()
        sequence.waiting.append(rows)
        return True

    @property
    def held_rows(self) -> int:
        """The rows of all sequences that hold a slot."""
        return sum(sequence.arrived for sequence in self._held.values())

    @property
    def most_rows(self) -> int:
        return self._slots * self._context_tokens

    @property
    def alone(self) -> bool:
        """Whether only one sequence uses the stage."""
        return len(self._held) == 1

    @property
    def waiting(self) -> bool:
        for sequence in self._held.values():  # noqa: SIM110 - any() takes twice as long
            if sequence.waiting:
                return True
        return False

    def take(self, *, chunks: bool) -> list[Turn]:
        """Return the turns of the next pass: the next single row of each sequence, or one chunk.

        Tokens and chunks alternate while both wait, and prompts take turns. Without ``chunks``,
        chunks stay in the table. Empty if nothing can run.
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
