"""The KV slots of a deployment, given out in order of arrival."""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Slots:
    """``total`` slots, for one event loop.

    The lowest free slot is given first, because stages run rows of neighbouring slots together.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total))
        self._line: deque[asyncio.Future[int]] = deque()

    @property
    def used(self) -> int:
        return self.total - len(self._free)

    @property
    def waiting(self) -> int:
        """The number of requests in line."""
        return len(self._line)

    @asynccontextmanager
    async def one(self) -> AsyncIterator[int]:
        """Wait in line for a slot, and hold it."""
        slot = await self._take()
        try:
            yield slot
        finally:
            self._give(slot)

    async def _take(self) -> int:
        if self._free:  # Then the line is empty.
            return heapq.heappop(self._free)
        turn: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._line.append(turn)
        try:
            return await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # It got the slot at the same moment.
                self._give(turn.result())
            elif turn in self._line:
                self._line.remove(turn)
            raise

    def _give(self, slot: int) -> None:
        """Hand the slot to the first in line, or put it back."""
        while self._line:
            turn = self._line.popleft()
            if not turn.done():
                turn.set_result(slot)
                return
        heapq.heappush(self._free, slot)
