"""Which measurements run at the same time, and the words about noisy figures."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coordinator.errors import AgentFailed, AgentLost
from coordinator.roster.measurements import (
    Step,
    machines,
    measure_again,
    measure_blocks,
    measure_links,
    without_conflict,
)
from coordinator.roster.members import Member, Roster
from coordinator.roster.noise import device_noise, plan_noise
from model.checkpoint import Checkpoint
from wire.async_connection import AsyncConnection, serve
from wire.conditions import Conditions
from wire.messages import (
    AgentHello,
    DeviceMeasured,
    Endpoint,
    FiguresChanged,
    Heartbeat,
    LinkMeasured,
    MeasureDevice,
    MeasureLink,
    MeasureModel,
    MeasureModelAgain,
    ModelMeasured,
    RequestFailed,
)
from wire.profile import BlockTiming, DeviceProfile

SPEC = Checkpoint.open(Path(__file__).parents[1] / "fixtures" / "llama").spec
WIDE = replace(SPEC, layers=(replace(SPEC.layers[0], kv_heads=4, head_dim=64, ffn=256),))
"""A model that a team can share, and SPEC is too narrow for."""

PROFILE = DeviceProfile(
    machine="x86_64",
    processor="test",
    cores=1,
    threads=1,
    backend="onnx_cpu",
    backend_version="1",
    container_bits=((4, 4), (8, 8)),
    memory_bytes=1 << 30,
    memory_total_bytes=1 << 30,
    storage_bytes=1 << 30,
    memory_read_bytes_per_s=1e9,
    disk_write_bytes_per_s=1e9,
    call_s=1e-4,
)
QUIET = Conditions(4, 0.0, 0.0, 0.0, 0.1, 0.02, 1.0)
BUSY = Conditions(4, 1.2, 0.0, 0.0, 3.0, 0.1, 2.0)


class Shoal:
    """A roster, and agents that measure when a test lets them."""

    def __init__(self, addresses: dict[str, str], port: int) -> None:
        """``addresses``: from where each agent connects."""
        self.roster = Roster("test")
        self.addresses = addresses
        self.port = port
        self.playing: list[asyncio.Task[None]] = []
        self.agents: dict[str, AsyncConnection] = {}
        self.at_work: dict[str, set[str]] = {}
        """By what is measured: the devices that this keeps busy."""
        self.overlaps: set[frozenset[str]] = set()
        self.conditions = BUSY
        self.refusals: set[tuple[str, str]] = set()

    def began(self, what: str, devices: set[str]) -> None:
        for other, busy in self.at_work.items():
            assert not devices & busy, f"{what} and {other} at the same time"
            self.overlaps.add(frozenset((what, other)))
        self.at_work[what] = devices

    async def play(self, name: str, agent: AsyncConnection) -> None:
        while True:
            message, _ = await agent.receive(10)
            if isinstance(message, Heartbeat):
                await agent.send(Heartbeat())
            elif isinstance(message, MeasureLink):
                target = message.device.removeprefix("id-of-")
                what = f"{name}-{target}"
                self.began(what, {name, target})
                await asyncio.sleep(0.01)  # So that what may begin beside it does.
                del self.at_work[what]
                if (name, target) in self.refusals:
                    await agent.send(RequestFailed(message.request, "cannot connect"))
                else:
                    answer = LinkMeasured(message.request, 1e-3, 1e8, 2e-3, self.conditions)
                    await agent.send(answer)
            elif isinstance(message, (MeasureModel, MeasureModelAgain)):
                self.began(name, {name})
                await asyncio.sleep(0.01)
                del self.at_work[name]
                rows_s = (2e-3, 3e-3, 4e-3) if message.together else ()
                shares_s = ((0.5, 6e-4, 6e-5),) if message.shares else ()
                timings = tuple(
                    BlockTiming("layer", 0, bits, 1e-3, 1e-4, self.conditions, rows_s, shares_s)
                    for bits in message.bits
                )
                await agent.send(ModelMeasured(message.request, timings, 1e-4))
            elif isinstance(message, MeasureDevice):
                profile = replace(
                    PROFILE,
                    memory_bytes=7,
                    memory_read_bytes_per_s=5e9,
                    conditions=(("memory", self.conditions), ("call", self.conditions)),
                )
                await agent.send(DeviceMeasured(message.request, profile))

    async def join(self, name: str, **profile: Any) -> Member:
        reader, writer = await asyncio.open_connection(
            self.addresses[name], self.port, local_addr=(self.addresses[name], 0)
        )
        agent = self.agents[name] = AsyncConnection(reader, writer)
        own = replace(PROFILE, **profile)
        await agent.send(AgentHello(f"id-of-{name}", name, "1", (Endpoint("127.0.0.1", 1),), own))
        await agent.receive(5)
        self.playing.append(asyncio.ensure_future(self.play(name, agent)))
        (member,) = (member for member in self.roster.members if member.name == name)
        return member


@asynccontextmanager
async def running(addresses: dict[str, str]) -> AsyncIterator[Shoal]:
    async def handle(connection: AsyncConnection) -> None:
        message, _ = await connection.receive(5)
        assert isinstance(message, AgentHello)
        await shoal.roster.serve(message, connection)

    server, port = await serve("0.0.0.0", 0, handle)  # noqa: S104 - several loopback addresses
    shoal = Shoal(addresses, port)
    try:
        yield shoal
    finally:
        server.close()
        shoal.roster.close()
        for task in shoal.playing:
            task.cancel()
        for agent in shoal.agents.values():
            agent.close()
        results = await asyncio.gather(*shoal.playing, return_exceptions=True)
        for result in results:
            if isinstance(result, AssertionError):
                raise result


APART = {name: f"127.0.0.{number}" for number, name in enumerate("abcd", 2)}
TOGETHER = dict.fromkeys("abcd", "127.0.0.2")


def run(addresses: dict[str, str], test: Callable[[Shoal], Awaitable[None]]) -> None:
    async def main() -> None:
        async with running(addresses) as shoal:
            await asyncio.wait_for(test(shoal), 30)

    asyncio.run(main())


def all_links(shoal: Shoal) -> set[tuple[str, str]]:
    return {(link.source, link.target) for link in shoal.roster.links()}


def test_four_devices_apart_are_measured_at_the_same_time() -> None:
    async def test(shoal: Shoal) -> None:
        for name in APART:
            await shoal.join(name, kernel_id=f"kernel of {name}")
        steps: list[Step] = []
        members = shoal.roster.members
        await measure_blocks(members, SPEC, (4, 8), steps.append)
        assert shoal.overlaps >= {frozenset(pair) for pair in itertools.combinations("abcd", 2)}
        shoal.overlaps.clear()
        await measure_links(shoal.roster, members, steps.append)
        assert all_links(shoal) == set(itertools.permutations("abcd", 2))
        # Each device is in one measurement at a time, which the agents have checked; and there
        # were two of them.
        assert shoal.overlaps
        links = [step for step in steps if step.phase == "links"]
        assert (links[-1].done, links[-1].total) == (12, 12)
        assert [step.done for step in links] == sorted(step.done for step in links)
        assert {step.label for step in links} >= {"a to b", "d to c"}

    run(APART, test)


def test_passes_of_several_rows_are_measured_when_they_are_asked_for() -> None:
    async def test(shoal: Shoal) -> None:
        members = [await shoal.join("a")]
        for rows, expected in (
            (False, ()),
            (True, (2e-3, 3e-3, 4e-3)),
            (False, (2e-3, 3e-3, 4e-3)),
        ):
            timings = await measure_blocks(members, SPEC, (4, 8), lambda step: None, rows=rows)
            assert [timing.rows_s for timing in timings["a"]] == [expected, expected]

    run(APART, test)


def test_shares_are_measured_once_two_devices_can_be_a_team() -> None:
    async def test(shoal: Shoal) -> None:
        async def known() -> dict[str, bool]:
            timings = await measure_blocks(
                shoal.roster.members, WIDE, (4,), lambda step: None, shares=True
            )
            return {name: bool(found[0].shares_s) for name, found in timings.items()}

        await shoal.join("a", shares=True)
        await shoal.join("b")
        assert await known() == {"a": False, "b": False}
        await shoal.join("c", shares=True)
        assert await known() == {"a": True, "b": False, "c": True}
        # Once they are known they stay, also when they are measured again.
        again, *others = shoal.roster.members
        await measure_again(shoal.roster, again, others, lambda step: None)
        assert await known() == {"a": True, "b": False, "c": True}
        asked = await measure_blocks(
            shoal.roster.members, WIDE, (8,), lambda step: None, ("c",), shares=True
        )
        assert [timing.shares_s for timing in asked["a"]] == [()]

    run(APART, test)


@pytest.mark.parametrize(
    ("addresses", "profile"),
    [
        (TOGETHER, {}),  # One address.
        (APART, {"kernel_id": "the same"}),  # Containers of one machine.
    ],
    ids=["address", "kernel"],
)
def test_agents_of_one_machine_take_turns(
    addresses: dict[str, str], profile: dict[str, Any]
) -> None:
    async def test(shoal: Shoal) -> None:
        for name in addresses:
            await shoal.join(name, **profile)
        members = shoal.roster.members
        assert [len(residents) for residents in machines(members)] == [4]
        await measure_blocks(members, SPEC, (4,), lambda step: None)
        await measure_links(shoal.roster, members, lambda step: None)
        assert all_links(shoal) == set(itertools.permutations("abcd", 2))
        assert shoal.overlaps == set()

    run(addresses, test)


def test_radio_links_take_turns() -> None:
    async def test(shoal: Shoal) -> None:
        for name in APART:
            await shoal.join(name, kernel_id=name, wireless=name in "ab")
        members = shoal.roster.members
        await measure_links(shoal.roster, members, lambda step: None)
        radio = {frozenset(pair) for pair in shoal.overlaps}
        for pair in radio:
            # Two links at once: the air may be part of one of them.
            assert sum(bool(set(link.split("-")) & set("ab")) for link in pair) <= 1
        assert all_links(shoal) == set(itertools.permutations("abcd", 2))

    run(APART, test)


def test_machines_known_by_address_and_by_kernel_are_one() -> None:
    async def test(shoal: Shoal) -> None:
        await shoal.join("a", kernel_id="x")
        await shoal.join("b", kernel_id="y")
        await shoal.join("c")
        await shoal.join("d", kernel_id="x")
        found = {frozenset(item.name for item in each) for each in machines(shoal.roster.members)}
        assert found == {frozenset("acd"), frozenset("b")}

    run({"a": "127.0.0.2", "b": "127.0.0.3", "c": "127.0.0.4", "d": "127.0.0.4"}, test)


def test_a_link_that_cannot_be_made_stops_no_other() -> None:
    async def test(shoal: Shoal) -> None:
        for name in APART:
            await shoal.join(name, kernel_id=name)
        shoal.refusals = {("a", "b"), ("c", "d")}
        await measure_links(shoal.roster, shoal.roster.members, lambda step: None)
        assert all_links(shoal) == set(itertools.permutations("abcd", 2)) - shoal.refusals

    run(APART, test)


def test_a_device_lost_meanwhile_ends_the_measurement() -> None:
    async def test(shoal: Shoal) -> None:
        for name in APART:
            await shoal.join(name, kernel_id=name)

        def on_step(step: Step) -> None:
            if step.done == 3:
                shoal.agents["d"].close()

        with pytest.raises(AgentLost, match="d: device lost"):
            await measure_links(shoal.roster, shoal.roster.members, on_step)

    run(APART, test)


def test_jobs_that_fail_cancel_the_others() -> None:
    async def main() -> None:
        ended: list[str] = []

        async def fail() -> None:
            await asyncio.sleep(0)
            raise AgentFailed("a", "no")

        async def last() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.append("cancelled")

        async def never() -> None:
            ended.append("begun")

        jobs = [
            (frozenset("a"), fail),
            (frozenset("b"), last),
            (frozenset("ab"), never),
        ]
        with pytest.raises(AgentFailed):
            await without_conflict(jobs)
        assert ended == ["cancelled"]
        await without_conflict([])

    asyncio.run(main())


# ---- what is noisy -----------------------------------------------------------------------------


def test_noisy_figures_are_named_until_they_are_measured_again() -> None:
    async def test(shoal: Shoal) -> None:
        a = await shoal.join("a", kernel_id="a", conditions=(("memory", QUIET), ("call", BUSY)))
        b = await shoal.join("b", kernel_id="b")
        roster, members = shoal.roster, shoal.roster.members
        await measure_blocks(members, SPEC, (4,), lambda step: None)
        await measure_links(roster, members, lambda step: None)
        found = device_noise(a, roster.links())
        assert found is not None
        assert found["text"] == (
            "a: time of a call, block times, link to b: measured while other programs used 1.2 of "
            "4 cores; run `shoal devices --measure a` when it is quiet"
        )
        assert found["conditions"]["others_cores"] == 1.2
        in_plan = plan_noise(members, roster.links(), SPEC, (4, 8))
        assert [entry["device"] for entry in in_plan] == ["a", "b"]
        # A plan without b does not use b's figures, nor the links to it.
        (alone,) = plan_noise(members, roster.links(), SPEC, (4,), excluded=(b.device,))
        assert alone["figures"] == ["time of a call", "block times"]
        shoal.conditions = QUIET
        steps: list[Step] = []
        await measure_again(roster, a, members, steps.append)
        assert device_noise(a, roster.links()) is None
        assert a.profile.memory_read_bytes_per_s == 5e9
        assert a.profile.memory_bytes == PROFILE.memory_bytes
        (left,) = plan_noise(members, roster.links(), SPEC, (4,))
        assert (left["device"], left["figures"]) == ("b", ["block times"])
        assert {step.phase for step in steps} == {"links"}
        assert b.profile.memory_read_bytes_per_s == 1e9

    run(APART, test)


def test_better_figures_come_unasked() -> None:
    async def test(shoal: Shoal) -> None:
        a = await shoal.join("a", kernel_id="a")
        await measure_blocks([a], SPEC, (4,), lambda step: None)
        assert device_noise(a, ()) is not None
        better = (
            BlockTiming("layer", 0, 4, 5e-4, 5e-5, QUIET),
            BlockTiming("layer", 0, 8, 5e-4, 5e-5, QUIET),  # Of which nobody has asked.
        )
        profile = replace(PROFILE, call_s=5e-5, conditions=(("call", QUIET),))
        await shoal.agents["a"].send(FiguresChanged(profile, SPEC.to_dict(), better))
        a.heard.clear()
        while a.profile.call_s != 5e-5:
            await a.heard.wait()
            a.heard.clear()
        assert a.timings[SPEC] == {4: [better[0]]}
        assert device_noise(a, ()) is None

    run(APART, test)


@pytest.mark.parametrize(
    "change",
    [
        FiguresChanged(replace(PROFILE, memory_read_bytes_per_s=0.0), {}, ()),
        FiguresChanged(replace(PROFILE, call_s=-1.0), {}, ()),
        FiguresChanged(PROFILE, {"vocab": "many"}, ()),
        FiguresChanged(PROFILE, SPEC.to_dict(), (BlockTiming("layer", 0, 4, 0.0, 1.0),)),
        FiguresChanged(replace(PROFILE, conditions=(("x", QUIET),) * 65), {}, ()),
    ],
)
def test_impossible_figures_end_the_connection(change: FiguresChanged) -> None:
    async def test(shoal: Shoal) -> None:
        a = await shoal.join("a")
        with shoal.roster.changed.watch() as changed:
            await shoal.agents["a"].send(change)
            while a.lost is None:
                await changed.wait()
                changed.clear()
        assert shoal.roster.members == ()

    run(APART, test)
