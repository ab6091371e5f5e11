"""The table of a stage's sequences: their KV slots, their waiting rows, and which rows run next.

It has no threads and no lock, so the caller holds one.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from agent.drafts import History
from agent.sampler import Sampler
from backends.base import Tokens
from wire.activations import HopBits
from wire.messages import Sampling


@dataclass(slots=True)
class Rows:
    """The rows of a sequence that run in one pass: a token's row, or a chunk of a prompt.

    last: whether a token is sampled from them, because no row of the sequence follows.
    content: token ids int64 [count], or hidden rows as received with their bits a value.
    drafts: the tokens of all rows but the first, if they are guesses that the last stage checks.
    """

    position: int
    count: int
    last: bool
    content: Tokens | tuple[memoryview, HopBits]
    drafts: tuple[int, ...] = ()
    by_model: bool = False
    """Whether a draft model has made the guesses."""
    wanted: int = 0
    """The guesses that the draft model is to make before the pass, on the first stage."""
    arrived_s: float = 0.0
    """When they were added to the table, by a monotonic clock."""


@dataclass(slots=True, eq=False)
class Drafting:
    """The guesses of a sequence."""

    history: History
    most: int
    """The most guesses of a pass."""
    checked: tuple[int, ...] = ()
    """The guesses of the last pass."""
    matched: int = 0
    """The number of earlier tokens that spoke for them."""
    by_model: bool = False
    """Whether the draft model made them."""
    draft_s: float = 0.0
    """How long it worked for them."""
    began_s: float = 0.0
    """When the last pass began, by a monotonic clock. 0 if its time says nothing."""
    uses_model: bool = False
    """Whether the draft model may guess for this sequence."""


@dataclass(slots=True, eq=False)
class Sequence:
    """The generation that holds a KV slot. ``sampler`` exists on the last stage only."""

    number: int
    slot: int
    sampling: Sampling
    sampler: Sampler | None
    cached: int = 0
    """Rows that the slot kept from an earlier sequence. They count as arrived."""
    arrived: int = 0
    """Rows that have arrived, whether run or not. The next ones begin at this position."""
    sure: int = 0
    """Arrived rows that are no guesses. The next ones may replace the others."""
    waiting: deque[Rows] = field(default_factory=deque)
    """Rows that have not run yet, in order."""
    left_s: float = 0.0
    """When the rows ran from which a token is sampled. 0 once the next row has come."""
    drafting: Drafting | None = None
    """Exists on the first stage, if it guesses tokens for this sequence."""
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
        self._kept: dict[int, int] = {}
        """Maps a slot to its leading rows that have run, and that no failed pass has spoiled."""
        self._since_chunk = 0
        """The tokens' rows that have run since the last chunk of a prompt."""
        self._round_s = 0.0
        """How long the last token took to come back."""
        self.due_s = 0.0
        """When a group that waits for its other rows goes without them. 0: ``take`` found none."""
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
        self,
        number: int,
        slot: int,
        sampling: Sampling,
        sampler: Sampler | None,
        cached: int = 0,
    ) -> Sequence | None:
        """Give the slot to a new sequence and end its old one. None for a number of the past.

        The slot must keep ``cached`` rows, as ``keeps`` says.
        """
        newest = self._newest.get(slot)
        if newest is not None:
            if number <= newest:
                return None  # A late start of a sequence that was cancelled.
            self._held.pop(newest, None)
        if number in self._held:
            return None
        self._newest[slot] = number
        self._kept[slot] = cached
        self.newest = max(self.newest, number)
        self._held[number] = sequence = Sequence(
            number, slot, sampling, sampler, cached, arrived=cached, sure=cached
        )
        return sequence

    def keeps(self, slot: int, rows: int) -> bool:
        """Whether the slot has so many leading rows of its last sequence."""
        return rows <= self._kept.get(slot, 0)

    def ran(self, turns: list[Turn]) -> None:
        """Note that a pass has computed the rows of these turns."""
        for sequence, rows in turns:
            if self._newest[sequence.slot] == sequence.number:
                self._kept[sequence.slot] = rows.position + rows.count

    def spoil(self, sequence: Sequence) -> Sequence | None:
        """Drop a sequence whose pass failed. Its slot may have lost all rows.

        Returns the sequence that has the slot meanwhile and relied on these rows. It is dropped,
        too. None if there is no such sequence.
        """
        self._held.pop(sequence.number, None)
        self._kept[sequence.slot] = 0
        heir = self._held.get(self._newest[sequence.slot])
        if heir is None or not heir.cached:
            return None
        return self._held.pop(heir.number)

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
        is_next = sequence.sure <= rows.position <= sequence.arrived
        if not is_next or end > self._context_tokens:
            return False
        sequence.arrived, sequence.sure = end, end - len(rows.drafts)
        rows.arrived_s = time.monotonic()
        if sequence.left_s:
            self._round_s = rows.arrived_s - sequence.left_s
            sequence.left_s = 0.0
        sequence.waiting.append(rows)
        return True

    def extend(self, sequence: Sequence, rows: Rows, guesses: tuple[int, ...]) -> bool:
        """Append rows of guesses to the row of a sequence's newest token, which is to run now.

        False, without effect, if the sequence is over or other rows have come.
        """
        end = rows.position + rows.count
        if self._held.get(sequence.number) is not sequence or sequence.arrived != end:
            return False
        if rows.drafts or isinstance(rows.content, tuple):
            return False
        rows.content = np.concatenate([rows.content, np.array(guesses, np.int64)])
        rows.drafts, rows.by_model, rows.count = guesses, True, rows.count + len(guesses)
        sequence.arrived = rows.position + rows.count
        return True

    @property
    def lone(self) -> Sequence | None:
        """The only sequence that uses the stage, if there is only one."""
        return next(iter(self._held.values())) if len(self._held) == 1 else None

    @property
    def held_rows(self) -> int:
        """The rows of all sequences that hold a slot."""
        return sum(sequence.arrived for sequence in self._held.values())

    @property
    def most_rows(self) -> int:
        return self._slots * self._context_tokens

    @property
    def count(self) -> int:
        """The number of sequences that use the stage."""
        return len(self._held)

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

    def _group(self, size: int) -> list[Sequence]:
        """The sequences of the next group of ``size``; none if all wait for some of theirs."""
        held = sorted(self._held.values(), key=lambda sequence: sequence.slot)
        found = []
        for first in range(0, len(held), size):
            group = held[first : first + size]
            here = [one for one in group if one.waiting and one.waiting[0].count == 1]
            if here:
                arrived_s = min(one.waiting[0].arrived_s for one in here)
                is_whole = not any(one.left_s for one in group)
                due_s = arrived_s if is_whole else arrived_s + self._round_s
                found.append((due_s, arrived_s, here))
        now_s = time.monotonic()
        ready = [(arrived_s, here) for due_s, arrived_s, here in found if due_s <= now_s]
        if ready:
            return min(ready, key=lambda one: one[0])[1]
        self.due_s = min(due_s for due_s, _, _ in found)
        return []

    def take(self, *, chunks: bool, most: int | None = None) -> list[Turn]:
        """Return the turns of the next pass: the next single row of each sequence, or one chunk.

        most: the sequences form groups of so many, in the order of their slots, because rows of
            neighbouring slots take the least time. Only rows of one group go: of that which has the
            row that has waited longest. A group waits for those of its rows that are on their way,
            as long as the last token took for it. Once it has run as a whole it stays together.

        While both wait, one chunk runs for each token of every answer, and prompts take turns.
        Without ``chunks``, chunks stay in the table. A row with guesses goes first, in a pass of
        its own. Empty if nothing can run.
        """
        self.due_s = 0.0
        tokens, answers = [], len(self._held)
        for sequence in self._held.values():
            if sequence.waiting:
                rows = sequence.waiting[0]
                if rows.drafts:
                    return [self._begun(sequence)]
                if rows.count == 1:
                    tokens.append(sequence)
                else:
                    answers -= 1
        if most is not None and tokens and most < len(self._held):
            tokens = self._group(most)
        if chunks and (self._since_chunk >= answers or not tokens):
            for sequence in self._held.values():
                if sequence.waiting and sequence.waiting[0].count > 1:
                    self._held[sequence.number] = self._held.pop(sequence.number)
                    self._since_chunk = 0
                    return [self._begun(sequence)]
        self._since_chunk += len(tokens)
        return [self._begun(sequence) for sequence in tokens]

    def _begun(self, sequence: Sequence) -> Turn:
        rows = sequence.waiting.popleft()
        if rows.last and not sequence.waiting:
            sequence.left_s = time.monotonic()
        return sequence, rows
