"""Waiting with a limit, in a process that may itself be suspended."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

Result = TypeVar("Result")

SLICE_S = 1.0
"""The most that one standstill costs of the limit."""

LAST_LOOK_S = 0.05
"""Time for the event loop to read its sockets before the limit counts as exceeded."""


async def within(work: Awaitable[Result], timeout_s: float | None) -> Result:
    """Await ``work`` for at most ``timeout_s`` in which this process could run. None is for ever.

    A process that was stopped, suspended or starved has read nothing meanwhile. Its own standstill
    must not count as the silence of others. So the limit is split into slices. Each counts once,
    however long it really took, and the event loop reads its sockets in between.

    Raises asyncio.TimeoutError once the limit is exceeded, and cancels ``work``.
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
            task.exception()  # Otherwise asyncio reports an error that comes with a cancellation.
