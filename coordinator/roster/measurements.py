"""Asks agents for the times of blocks and links, and for the blocks that they hold.

Everything is measured once, and kept with the member or the roster. Devices on different machines
are measured at the same time. So are links that share neither a machine nor the air. Functions here
report each step; coordinator.loading decides when they run.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from coordinator.errors import AgentFailed, AgentLost
from coordinator.roster.members import Member, OnProgress, Roster
from model.quantize import Format
from model.share import most_members
from model.spec import ModelSpec
from wire.hygiene import CALL_SECONDS, is_plausible
from wire.messages import (
    BlocksFound,
    DeviceMeasured,
    FindBlocks,
    LinkMeasured,
    MeasureDevice,
    MeasureLink,
    MeasureModel,
    MeasureModelAgain,
    ModelMeasured,
    Progress,
)
from wire.profile import BlockTiming

FILES = "files"
"""The phase of an agent that waits for files of its backend. It may come within another phase."""

AIR = "the air"
"""All radio links are taken to share this, since their channels are not known."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Step:
    """The progress of an operation. ``total`` is 0 if it is not known."""

    phase: str
    label: str
    done: int
    total: int
    unit: str


OnStep = Callable[[Step], None]


def forward(on_step: OnStep, phase: str, name: str) -> OnProgress:
    """A function that turns an agent's progress into steps of ``phase``, labelled ``name``."""

    def on_progress(progress: Progress) -> None:
        own = FILES if progress.phase == FILES else phase
        on_step(Step(own, name, progress.done, progress.total, progress.unit))

    return on_progress


def machines(members: Iterable[Member]) -> list[list[Member]]:
    """The members grouped by machine, as far as that can be known.

    Members are on one machine if they run one kernel or have one address. Several machines behind
    one address share at least their link.
    """
    groups: list[tuple[set[str], list[Member]]] = []
    for member in members:
        signs = {f"address {member.connection.peer_host}"}
        if member.profile.kernel_id:
            signs.add(f"kernel {member.profile.kernel_id}")
        residents = [member]
        for group in [group for group in groups if group[0] & signs]:
            groups.remove(group)
            signs |= group[0]
            residents = group[1] + residents
        groups.append((signs, residents))
    return [residents for _, residents in groups]


async def measure_blocks(
    members: Sequence[Member],
    spec: ModelSpec,
    bits: Sequence[int],
    on_step: OnStep,
    excluded: Collection[str] = (),
    *,
    rows: bool = False,
    shares: bool = False,
    only: Collection[Member] | None = None,
) -> dict[str, tuple[BlockTiming, ...]]:
    """Have each member measure its seconds per block. Members on one machine take turns.

    rows: whether passes of several rows are timed too, each row of another sequence.
    shares: whether shares of blocks are timed too, if two members or more can be in a team.
    excluded: names of members that are not asked. The result has what is known of them.
    only: the only members that are asked now, although others may be in a team with them.
    Raises AgentFailed.
    """
    asking = [member for member in members if member.name not in excluded]
    missing = unmeasured_widths(asking, spec, bits, rows=rows, shares=shares)

    async def one_machine(residents: list[Member]) -> None:
        for member in residents:
            if member.device in missing and (only is None or member in only):
                await _measure_model(
                    member,
                    spec,
                    missing[member.device],
                    on_step,
                    rows=rows,
                    shares=shares and _can_share(member, asking),
                )

    await together(one_machine(residents) for residents in machines(asking))
    return {
        member.name: tuple(
            timing for width in bits for timing in member.timings.get(spec, {}).get(width, ())
        )
        for member in members
    }


def unmeasured_widths(
    members: Sequence[Member],
    spec: ModelSpec,
    bits: Sequence[int],
    *,
    rows: bool = False,
    shares: bool = False,
) -> dict[str, tuple[int, ...]]:
    """Return the widths that a member has not measured yet, by its device id.

    rows, shares: as of ``measure_blocks``. Members that have measured all widths are left out.
    """
    shared = {width for width in bits if most_members(spec, Format.of(width).group_size) > 1}
    found: dict[str, tuple[int, ...]] = {}
    for member in members:
        known = member.timings.get(spec, {})
        usable = dict(member.profile.container_bits)
        in_team = shares and _can_share(member, members)
        missing = tuple(
            width
            for width in bits
            if width in usable
            and (
                width not in known
                or (rows and not _has_rows(known[width]))
                or (in_team and width in shared and not _has_shares(known[width]))
            )
        )
        if missing:
            found[member.device] = missing
    return found


def _can_share(member: Member, members: Sequence[Member]) -> bool:
    """Whether two of the members can share layers, and this is one of them."""
    return member.profile.shares and sum(one.profile.shares for one in members) > 1


def _has_rows(timings: Iterable[BlockTiming]) -> bool:
    """Whether passes of several rows were timed, of all layers."""
    return all(timing.rows_s for timing in timings if timing.kind == "layer")


def _has_shares(timings: Iterable[BlockTiming]) -> bool:
    """Whether at least one share was timed, of all layers."""
    return all(timing.shares_s for timing in timings if timing.kind == "layer")


async def _measure_model(
    member: Member,
    spec: ModelSpec,
    bits: tuple[int, ...],
    on_step: OnStep,
    *,
    again: bool = False,
    rows: bool = False,
    shares: bool = False,
) -> None:
    """Have ``member`` measure the model at ``bits``, and store the times. Raises AgentFailed."""
    try:
        answer = await member.request(
            partial(
                MeasureModelAgain if again else MeasureModel,
                spec=spec.to_dict(),
                bits=bits,
                together=rows,
                shares=shares,
            ),
            ModelMeasured,
            forward(on_step, "measure", member.name),
        )
    except AgentLost:
        raise
    except AgentFailed as error:
        reason = f"{error.reason}; --exclude {member.name} plans without it"
        raise AgentFailed(member.name, reason) from error
    if not (
        CALL_SECONDS[0] <= answer.call_s <= CALL_SECONDS[1] and _are_possible(answer.timings, spec)
    ):
        raise AgentFailed(
            member.name, f"reported impossible times; --exclude {member.name} plans without it"
        )
    if answer.call_s:
        member.profile = replace(member.profile, call_s=answer.call_s)
    known = member.timings.setdefault(spec, {})
    for width in bits:
        known[width] = [timing for timing in answer.timings if timing.bits == width]


async def measure_again(
    roster: Roster, member: Member, others: Sequence[Member], on_step: OnStep
) -> None:
    """Measure ``member`` again: the device, its block times, and its links to and from ``others``.

    Raises AgentFailed.
    """
    answer = await member.request(
        MeasureDevice, DeviceMeasured, forward(on_step, "measure", member.name)
    )
    member.take_figures(answer.profile)
    for spec, known in list(member.timings.items()):
        shares = any(timing.shares_s for timings in known.values() for timing in timings)
        await _measure_model(member, spec, tuple(known), on_step, again=True, shares=shares)
    pairs = [
        pair
        for other in others
        if other is not member
        for pair in ((member, other), (other, member))
    ]
    await try_links(roster, pairs, on_step)


async def measure_links(
    roster: Roster, members: Sequence[Member], on_step: OnStep, *, asked: bool = False
) -> None:
    """Measure every link that was never measured, and every failed link that is due again.

    asked: a user waits for the best plan.
    Raises AgentLost.
    """
    await try_links(roster, roster.links_to_measure(members, asked=asked), on_step)


async def try_links(
    roster: Roster, pairs: Sequence[tuple[Member, Member]], on_step: OnStep
) -> bool:
    """Measure links. Returns whether at least one works. Raises AgentLost.

    Links that share neither a machine nor the air are measured at the same time. A link that cannot
    connect is marked as failed, and plans do not use it.
    """
    hosts = {
        member.device: f"machine {number}"
        for number, residents in enumerate(machines(roster.members))
        for member in residents
    }
    done, works = 0, False

    async def one(source: Member, target: Member) -> None:
        nonlocal done, works
        name = f"{source.name} to {target.name}"
        on_step(Step("links", name, done, len(pairs), "steps"))
        try:
            measured = await source.request(
                partial(MeasureLink, device=target.device, endpoints=target.endpoints_for(source)),
                LinkMeasured,
            )
            roster.set_link(source, target, measured)
        except AgentLost:
            raise
        except AgentFailed as error:
            roster.fail_link(source, target, error.reason)
        else:
            works = True
        done += 1
        on_step(Step("links", name, done, len(pairs), "steps"))

    def needs(source: Member, target: Member) -> frozenset[str]:
        wireless = source.profile.wireless or target.profile.wireless
        ends = (hosts.get(member.device, member.device) for member in (source, target))
        return frozenset((*ends, *((AIR,) if wireless else ())))

    await without_conflict([(needs(*pair), partial(one, *pair)) for pair in pairs])
    return works


async def without_conflict(
    jobs: Sequence[tuple[frozenset[str], Callable[[], Awaitable[None]]]],
) -> None:
    """Run all jobs. Jobs that need nothing in common run at the same time.

    A job is a pair: the things it needs, and a function whose result is awaited. The first failure
    cancels the other jobs. It is raised when they have ended.
    """
    waiting = list(jobs)
    running: dict[asyncio.Future[None], frozenset[str]] = {}
    try:
        while waiting or running:
            taken = frozenset[str]().union(*running.values())
            for job in list(waiting):
                needs, work = job
                if not needs & taken:
                    waiting.remove(job)
                    running[asyncio.ensure_future(work())] = needs
                    taken |= needs
            ended, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                del running[task]
            for task in ended:
                task.result()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def find_held(
    members: Sequence[Member], artifacts: Mapping[tuple[int, int], str], block_count: int
) -> dict[str, list[set[int]]]:
    """For each member's name, the widths of each block whose artifacts are in its cache.

    artifacts: maps (block, bits) to the artifact's hash.
    Raises AgentFailed.
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
    """The bytes per second at which each member can receive blocks. Plans assume these rates.

    The rate is that of the disk or of the fastest measured link into the device, whichever is
    slower. The link from the coordinator itself is not measured.
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
    """Run ``work(on_block, cancelled)`` in a thread. Cancelling waits until ``work`` notices."""
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
    """Await all. The first failure cancels the others, and is raised when they have ended."""
    tasks = [asyncio.ensure_future(item) for item in work]
    try:
        return tuple(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _are_possible(timings: Collection[BlockTiming], spec: ModelSpec) -> bool:
    """Whether the times are plausible, each for another block of the model."""
    variants = len(set(spec.layers))
    measured = {(timing.kind, timing.variant, timing.bits) for timing in timings}
    return (
        len(measured) == len(timings)
        and all(map(is_plausible, timings))
        and all(0 <= timing.variant < variants for timing in timings)
    )
