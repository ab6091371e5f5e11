"""Several answers side by side: the choices of a request, of one prompt or of several."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Collection, Container, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from coordinator.loading.deployment import Deployment
from coordinator.serving.answer import ALL_SHORTCUTS, Shortcuts
from coordinator.serving.gateway import Gateway
from coordinator.serving.pieces import Piece, Timing
from wire.messages import Sampling

SEEDS = 1 << 63


@dataclass(frozen=True, slots=True)
class Run:
    """One answer to generate."""

    prompt: tuple[int, ...]
    sampling: Sampling
    shortcuts: Shortcuts = ALL_SHORTCUTS


def seed_of(seed: int, choice: int) -> int:
    """Return the seed of choice number ``choice``. The first one has the request's own."""
    return (seed + choice) % SEEDS


async def answers(
    gateway: Gateway,
    deployment: Deployment,
    runs: Sequence[Run],
    stop: Sequence[str],
    timings: Sequence[Timing],
    ended: Container[int] = (),
    *,
    withdrawable: bool = False,
    markers: Collection[str] = (),
) -> AsyncGenerator[tuple[int, Piece], None]:
    """Yield the pieces of all ``runs`` as they come, each with the index of its run.

    ended: the runs that the caller wants no more of. They are cancelled.
    Each answer is the one that its run alone would give. At most as many run or stand in line as
    the deployment has slots. Parameters and errors are those of
    ``Gateway.generate``. The first error ends all answers, and so does closing the iterator.
    """

    def generate(index: int) -> AsyncGenerator[Piece, None]:
        run, timing = runs[index], timings[index]
        return gateway.generate(
            deployment,
            run.prompt,
            run.sampling,
            stop,
            timing,
            withdrawable=withdrawable,
            markers=markers,
            shortcuts=run.shortcuts,
        )

    if len(runs) == 1:  # A token takes no detour.
        async with aclosing(generate(0)) as pieces:
            async for piece in pieces:
                yield 0, piece
        return
    arrived: asyncio.Queue[tuple[int, Piece] | asyncio.Task[None]] = asyncio.Queue()

    # Those that found no slot would stand in line before everybody who comes later.
    room = asyncio.Semaphore(deployment.slots.total)

    async def one(index: int) -> None:
        async with room, aclosing(generate(index)) as pieces:
            async for piece in pieces:
                if index in ended:
                    return
                arrived.put_nowait((index, piece))

    tasks = [asyncio.create_task(one(index)) for index in range(len(runs))]
    try:
        for task in tasks:
            task.add_done_callback(arrived.put_nowait)
        left = len(tasks)
        while left:
            item = await arrived.get()
            if isinstance(item, asyncio.Task):
                item.result()
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
