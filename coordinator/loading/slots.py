"""The KV slots of a deployment, given out by the rank of requests, and then in order of arrival.

A slot keeps the rows of its last sequence. A prompt that begins with the same tokens computes only
the rest.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]

SIMILAR = 0.1
"""The share of a prompt that a slot must keep to be chosen for it, as in llama-server."""

_NOTHING: Ids = np.empty(0, np.int64)


class Held:
    """A slot in the hands of one request.

    slot: its number.
    cached: the leading tokens of the prompt whose rows every stage has in this slot.
    """

    def __init__(self, slot: int, prompt: Sequence[int], cached: int) -> None:
        self.slot = slot
        self.cached = cached
        self._tokens = list(prompt)
        self._valid = cached

    def sampled(self, token: int) -> None:
        """Note the next token of the answer. So all stages have the rows of the tokens before."""
        self._valid = len(self._tokens)
        self._tokens.append(token)

    def forget(self) -> None:
        """Note that a stage may lack rows of this slot."""
        self.cached = self._valid = 0

    @property
    def tokens(self) -> tuple[int, ...]:
        """The prompt and the answer so far."""
        return tuple(self._tokens)

    @property
    def kept(self) -> Ids:
        """The leading tokens whose rows every stage has."""
        return np.array(self._tokens[: self._valid], np.int64)


class Slots:
    """``total`` slots, for one event loop."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = set(range(total))
        self._line: list[tuple[int, asyncio.Future[int]]] = []
        """The ranks and turns of those who wait, the next one first."""
        self._kept = [_NOTHING] * total
        """The tokens whose rows each slot keeps on every stage."""
        self._ended = [0] * total
        """When each slot was given back last, as a count of all such moments."""
        self._endings = 0
        self.users = 0
        """The requests that use the deployment without a slot now."""
        self.ranks: Counter[int] = Counter()
        """How many requests of each rank hold a slot."""
        self.used_s = time.monotonic()
        """When the last use ended, or the last request came."""

    @property
    def used(self) -> int:
        return self.total - len(self._free)

    @property
    def waiting(self) -> int:
        """The number of requests in line."""
        return len(self._line)

    @property
    def is_idle(self) -> bool:
        """Whether nobody holds a slot, waits for one, or uses the deployment without one."""
        return not (self.used or self._line or self.users)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Use the deployment without a slot, as texts of an encoder do, and paused answers."""
        self.users += 1
        try:
            yield
        finally:
            self.users -= 1
            self.used_s = time.monotonic()

    @property
    def kept_tokens(self) -> int:
        """The rows that free slots keep for later prompts."""
        return sum(len(self._kept[slot]) for slot in self._free)

    @asynccontextmanager
    async def one(
        self, prompt: Sequence[int] = (), *, reuse: bool = True, rank: int = 0
    ) -> AsyncIterator[Held]:
        """Wait in line for a slot, and hold it. With ``reuse``, its kept rows may serve.

        rank: a request stands before all others with a larger one.
        """
        # At least the last token runs, because its row gives the logits of the first answer token.
        begin = np.array(prompt[:-1] if reuse else (), np.int64)
        slot = await self._take(begin, rank)
        cached = _common(self._kept[slot], begin)
        held = Held(slot, prompt, cached)
        self._kept[slot] = _NOTHING
        self.ranks[rank] += 1
        try:
            yield held
        finally:
            self.ranks[rank] -= 1
            self.ranks += Counter()  # Without ranks that nobody has.
            self._kept[slot] = held.kept
            self._give(slot)

    async def _take(self, begin: Ids, rank: int) -> int:
        if self._free:  # Then the line is empty.
            slot = self._choose(begin)
            self._free.remove(slot)
            return slot
        turn: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        before = sum(other <= rank for other, _ in self._line)
        self._line.insert(before, (rank, turn))
        try:
            return await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # It got the slot at the same moment.
                self._give(turn.result())
            else:
                self._line = [waiting for waiting in self._line if waiting[1] is not turn]
            raise

    def _choose(self, begin: Ids) -> int:
        """Return the free slot that keeps most of a prompt, or else one of those used longest ago.

        Slots that keep nothing count as older than others. Of the older half, a neighbour of a used
        slot is taken, because stages run rows of neighbouring slots together.
        """
        shared = {slot: _common(self._kept[slot], begin) for slot in self._free}
        best = max(shared, key=lambda slot: (shared[slot], -len(self._kept[slot]), -slot))
        if shared[best] > SIMILAR * len(begin):
            return best
        by_age = sorted(
            self._free, key=lambda slot: (len(self._kept[slot]) > 0, self._ended[slot], slot)
        )
        used = set(range(self.total)) - self._free
        older = by_age[: (len(by_age) + 1) // 2]
        return next((slot for slot in older if used & {slot - 1, slot + 1}), older[0])

    def _give(self, slot: int) -> None:
        """Hand the slot to the first in line, or put it back."""
        self._endings += 1
        self.used_s = time.monotonic()
        self._ended[slot] = self._endings
        while self._line:
            _, turn = self._line.pop(0)
            if not turn.done():
                turn.set_result(slot)
                return
        self._free.add(slot)


def _common(one: Ids, other: Ids) -> int:
    """Return the number of leading tokens that are equal."""
    count = min(len(one), len(other))
    differs = one[:count] != other[:count]
    return int(differs.argmax()) if differs.any() else count
