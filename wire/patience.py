"""Waiting with a limit, in a process that may stand still itself."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

Result = TypeVar("Result")

SLICE_S = 1.0
"""How much of the limit a standstill costs at most."""

LAST_LOOK_S = 0.05
"""Time for the event loop to read what its sockets hold, before the limit is called exceeded."""


async def within(work: Awaitable[Result], timeout_s: float | None) -> Result:
    """Await ``work`` for at most ``timeout_s`` in which this process could run; None is for ever.

    A process that was stopped, suspended or starved has read nothing meanwhile, so its own
    standstill must not count as the silence of others. The limit is waited for in slices. Each
    counts once, however long it really took, and the event loop reads its sockets in between.

    Raises asyncio.TimeoutError once the limit is exceeded; ``work`` is cancelled then.
    """
    task = asyncio.ensure_future(work)
    left_s = timeout_s
    try:
        while left_s is None or left_s > 0:
            slice_s = None if left_s is None else min(left_s, SLICE_S)
            await asyncio.wait({task}, timeout=slice_s)
            if task.done():
                return task.result()
            if left_s is not None and slice_s is not None:
                left_s -= slice_s
        await asyncio.wait({task}, timeout=LAST_LOOK_S)
        if task.done():
            return task.result()
        raise asyncio.TimeoutError
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
        if task.done() and not task.cancelled():
            task.exception()  # Or asyncio would report one that comes with a cancellation.
