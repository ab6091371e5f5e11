"""One request's way over the devices: the passes that each stage remembers, on one clock.

Each device has a clock of its own. The coordinator asks it for the time a few times. The quickest
answer tells the offset to half its round trip. Then clocks are moved so that no row arrives before
it was sent. What is left is an error that the trace states.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from coordinator.errors import AgentFailed
from coordinator.loading.deployment import Deployment
from coordinator.roster.members import Member
from wire.messages import TakeTrace, TracedPass, TraceTaken

CLOCK_ASKS = 5


@dataclass(frozen=True, slots=True)
class StagePasses:
    """The passes of one stage. ``offset_s`` is its clock minus the coordinator's.

    error_s: the offset may be wrong by so much.
    """

    member: Member
    offset_s: float
    error_s: float
    passes: tuple[TracedPass, ...]

    def seconds(self, time_us: int) -> float:
        """A time of this device's clock as one of the coordinator's monotonic clock."""
        return 1e-6 * time_us - self.offset_s


async def trace(
    deployment: Deployment, sequences: Sequence[tuple[int, int]]
) -> tuple[StagePasses, ...]:
    """The passes of a request's ``sequences`` (epoch, number) on the stages of ``deployment``.

    Raises AgentFailed.
    """
    numbers = tuple(number for epoch, number in sequences if epoch == deployment.epoch)
    taken = await asyncio.gather(
        *(_take(lead, deployment.epoch, numbers) for lead in deployment.leads)
    )
    return causal(taken)


async def _take(lead: Member, epoch: int, numbers: tuple[int, ...]) -> StagePasses:
    best: tuple[float, float] | None = None
    for _ in range(CLOCK_ASKS):
        asked_s = time.monotonic()
        answer = await lead.request(partial(TakeTrace, epoch=epoch, sequences=()), TraceTaken)
        answered_s = time.monotonic()
        error_s = (answered_s - asked_s) / 2
        offset_s = 1e-6 * answer.now_us - (asked_s + answered_s) / 2
        best = min(best or (error_s, offset_s), (error_s, offset_s))
    if best is None:
        raise AgentFailed(lead.name, "its clock was not asked")
    taken = await lead.request(partial(TakeTrace, epoch=epoch, sequences=numbers), TraceTaken)
    return StagePasses(lead, best[1], best[0], taken.passes)


def causal(stages: Sequence[StagePasses]) -> tuple[StagePasses, ...]:
    """Move each clock so that rows arrive after they left the stage before. Times of hops stay ≥ 0.

    A clock moves no further than needed. The first stage's stays.
    """
    moved = list(stages[:1])
    for stage in stages[1:]:
        least_s = min(hop_seconds(moved[-1], stage), default=0.0)
        # A smaller offset makes this device's times later.
        moved.append(replace(stage, offset_s=stage.offset_s + min(least_s, 0.0)))
    return tuple(moved)


def hop_seconds(source: StagePasses, target: StagePasses) -> list[float]:
    """The time of each row's or chunk's hop from one stage to the next."""
    left = {(item.sequence, item.position): item for item in source.passes}
    return [
        target.seconds(item.arrived_us) - source.seconds(before.computed_us)
        for item in target.passes
        if (before := left.get((item.sequence, item.position))) is not None
    ]
