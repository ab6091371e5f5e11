"""What is asked of agents before a plan: times of blocks and links, and the blocks they hold.

Everything is measured once and kept with the member or the roster. Functions here report each step
and send nothing else; the fleet decides when they run.
"""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from coordinator.errors import AgentFailed, AgentLost
from coordinator.members import Member, OnProgress, Roster
from model.spec import ModelSpec
from wire.hygiene import CALL_SECONDS, is_plausible
from wire.messages import (
    BlocksFound,
    FindBlocks,
    LinkMeasured,
    MeasureLink,
    MeasureModel,
    ModelMeasured,
    Progress,
)
from wire.profile import BlockTiming

FILES = "files"
"""An agent's own phase within any other: it waits for files that its backend needs."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Step:
    """How far an operation is, for a progress bar. ``total`` 0: not known."""

    phase: str
    label: str
    done: int
    total: int
    unit: str


OnStep = Callable[[Step], None]


def forward(on_step: OnStep, phase: str, name: str) -> OnProgress:
    """What hands an agent's progress on as steps of ``phase``, labelled with its name."""

    def on_progress(progress: Progress) -> None:
        own = FILES if progress.phase == FILES else phase
        on_step(Step(own, name, progress.done, progress.total, progress.unit))

    return on_progress


async def measure_blocks(
    members: Sequence[Member],
    spec: ModelSpec,
    bits: Sequence[int],
    on_step: OnStep,
    excluded: Collection[str] = (),
) -> dict[str, tuple[BlockTiming, ...]]:
    """Seconds per block on each member; members on one machine take turns.

    Of the ``excluded``, who are not asked, is what is known. Raises AgentFailed.
    """
    hosts: dict[str, list[Member]] = defaultdict(list)
    for member in members:
        if member.name not in excluded:
            hosts[member.connection.peer_host].append(member)

    async def one_host(residents: list[Member]) -> None:
        for member in residents:
            known = member.timings.setdefault(spec, {})
            usable = dict(member.profile.container_bits)
            missing = tuple(width for width in bits if width in usable and width not in known)
            if not missing:
                continue
            try:
                answer = await member.request(
                    partial(MeasureModel, spec=spec.to_dict(), bits=missing),
                    ModelMeasured,
                    forward(on_step, "measure", member.name),
                )
            except AgentLost:
                raise
            except AgentFailed as error:
                reason = f"{error.reason}; --exclude {member.name} plans without it"
                raise AgentFailed(member.name, reason) from error
            if not (
                CALL_SECONDS[0] <= answer.call_s <= CALL_SECONDS[1]
                and _are_possible(answer.timings, spec)
            ):
                raise AgentFailed(
                    member.name,
                    f"reported impossible times; --exclude {member.name} plans without it",
                )
            if answer.call_s:
                member.profile = replace(member.profile, call_s=answer.call_s)
            for width in missing:
                known[width] = [timing for timing in answer.timings if timing.bits == width]

    await together(one_host(residents) for residents in hosts.values())
    return {
        member.name: tuple(
            timing for width in bits for timing in member.timings.get(spec, {}).get(width, ())
        )
        for member in members
    }


async def measure_links(
    roster: Roster, members: Sequence[Member], on_step: OnStep, *, asked: bool = False
) -> None:
    """Measure each ordered pair that has not been; of those that failed, which are due again.

    ``asked``: a user waits for the best plan. Raises AgentLost.
    """
    await try_links(roster, roster.links_to_measure(members, asked=asked), on_step)


async def try_links(
    roster: Roster, pairs: Sequence[tuple[Member, Member]], on_step: OnStep
) -> bool:
    """Measure links, one at a time: none disturbs another. Whether one of them works.

    A pair that cannot connect stays without a link: the plan will not make them neighbours.
    Raises AgentLost.
    """
    works = False
    for done, (source, target) in enumerate(pairs):
        on_step(Step("links", f"{source.name} to {target.name}", done, len(pairs), "steps"))
        try:
            measured = await source.request(
                partial(MeasureLink, device=target.device, endpoints=target.endpoints_for(source)),
                LinkMeasured,
            )
        except AgentLost:
            raise
        except AgentFailed as error:
            roster.fail_link(source, target, error.reason)
            continue
        roster.set_link(source, target, measured)
        works = True
    if pairs:
        on_step(Step("links", "", len(pairs), len(pairs), "steps"))
    return works


async def find_held(
    members: Sequence[Member], artifacts: Mapping[tuple[int, int], str], block_count: int
) -> dict[str, list[set[int]]]:
    """By member: for each block the widths whose artifact, named by its hash, is in its cache.

    ``artifacts`` maps (block, bits) to the hash. Raises AgentFailed.
    """

    async def one(member: Member) -> list[set[int]]:
        answer = await member.request(
            partial(FindBlocks, sha256s=tuple(set(artifacts.values()))), BlocksFound
        )
        found = set(answer.sha256s)
        held: list[set[int]] = [set() for _ in range(block_count)]
        for (block, bits), sha256 in artifacts.items():
            if sha256 in found:
                held[block].add(bits)
        return held

    rows = await together(one(member) for member in members)
    return {member.name: row for member, row in zip(members, rows, strict=True)}


def load_rates(roster: Roster, members: Sequence[Member]) -> dict[str, float]:
    """Bytes per second at which each member can take in blocks, at best: what plans assume.

    The link from the coordinator is not measured; the fastest measured link into the device stands
    for it, and the disk that blocks are written to may be slower.
    """
    rates = {member.name: member.profile.disk_write_bytes_per_s for member in members}
    for name in rates:
        into = [link.bytes_per_s for link in roster.links() if link.target == name]
        rates[name] = min([rates[name], *([max(into)] if into else [])])
    return rates


async def in_thread(
    phase: str,
    work: Callable[[Callable[[int, int], None], Callable[[], bool]], Result],
    on_step: OnStep,
) -> Result:
    """Run ``work(on_block, cancelled)`` in a thread; cancelling waits for it to notice."""
    loop = asyncio.get_running_loop()
    cancelled = threading.Event()

    def on_block(done: int, total: int) -> None:
        loop.call_soon_threadsafe(on_step, Step(phase, "", done, total, "blocks"))

    thread = asyncio.ensure_future(asyncio.to_thread(work, on_block, cancelled.is_set))
    try:
        return await asyncio.shield(thread)
    except asyncio.CancelledError:
        cancelled.set()
        thread.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        await asyncio.wait({thread})
        raise


async def together(work: Iterable[Awaitable[Result]]) -> tuple[Result, ...]:
    """Await all; the first failure cancels the rest and is raised once they have ended."""
    tasks = [asyncio.ensure_future(item) for item in work]
    try:
        return tuple(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _are_possible(timings: Collection[BlockTiming], spec: ModelSpec) -> bool:
    """Whether a device can have measured these: each block that the model has, and once."""
    variants = len(set(spec.layers))
    measured = {(timing.kind, timing.variant, timing.bits) for timing in timings}
    return (
        len(measured) == len(timings)
        and all(map(is_plausible, timings))
        and all(0 <= timing.variant < variants for timing in timings)
    )
