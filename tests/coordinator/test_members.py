"""The coordinator's side of control connections, on real loopback sockets."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from coordinator.errors import AgentFailed, AgentLost, NoAgents
from coordinator.roster import members
from coordinator.roster.measurements import measure_blocks
from coordinator.roster.members import Member, Roster
from model.families import load_spec
from wire import limits
from wire.async_connection import AsyncConnection, serve
from wire.codec import MAGIC, PREFIX
from wire.errors import ConnectionLost
from wire.messages import (
    PROTOCOL_VERSION,
    AgentHello,
    CancelRequest,
    CoordinatorWelcome,
    Done,
    Endpoint,
    Heartbeat,
    JoinRefused,
    KeptStage,
    LinkChanged,
    LinkMeasured,
    MeasureModel,
    Message,
    ModelMeasured,
    PeerHello,
    Progress,
    RequestFailed,
    StageBeat,
    StageCounts,
    StageLoaded,
    TokenSampled,
    TracedPass,
    TraceTaken,
    UnloadStage,
)
from wire.profile import BlockTiming, DeviceProfile, LinkProfile

PROFILE = DeviceProfile(
    machine="x86_64",
    processor="test",
    cores=1,
    threads=1,
    backend="onnx_cpu",
    backend_version="1",
    container_bits=((32, 32),),
    memory_bytes=1 << 30,
    memory_total_bytes=1 << 30,
    storage_bytes=1 << 30,
    memory_read_bytes_per_s=1e9,
    disk_write_bytes_per_s=1e9,
)
MODEL_CODE = 10
"""Code of MeasureModel, the message with the most freedom in its header."""


def hello(device: str = "0123", name: str = "pi") -> AgentHello:
    return AgentHello(device, name, "1", (Endpoint("127.0.0.1", 1),), PROFILE)


@dataclass
class Coordinator:
    """A roster behind a listening socket, and what it told."""

    port: int = 0
    lost: list[tuple[Member, AgentLost]] = field(default_factory=list)
    events: list[Message] = field(default_factory=list)
    ended: asyncio.Queue[None] = field(default_factory=asyncio.Queue)
    connections: list[AsyncConnection] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.roster = Roster("test")
        self.roster.subscribe(
            lambda member, message: self.events.append(message),
            lambda member, error: self.lost.append((member, error)),
        )

    async def handle(self, connection: AsyncConnection) -> None:
        try:
            message, _ = await connection.receive(5)
            assert isinstance(message, AgentHello)
            await self.roster.serve(message, connection)
        finally:
            self.ended.put_nowait(None)

    async def join(self, message: AgentHello) -> AsyncConnection:
        connection = await self.connect()
        await connection.send(message)
        return connection

    async def connect(self) -> AsyncConnection:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.connections.append(AsyncConnection(reader, writer))
        return self.connections[-1]

    async def joined(self, message: AgentHello) -> tuple[AsyncConnection, Member]:
        connection = await self.join(message)
        answer = await next_message(connection)
        assert isinstance(answer, CoordinatorWelcome)
        return connection, next(m for m in self.roster.members if m.name == answer.name)


async def next_message(connection: AsyncConnection) -> Message:
    """The next message that is no heartbeat."""
    while True:
        message, _ = await connection.receive(5)
        if not isinstance(message, Heartbeat):
            return message


@asynccontextmanager
async def running() -> AsyncIterator[Coordinator]:
    coordinator = Coordinator()
    server, coordinator.port = await serve("127.0.0.1", 0, coordinator.handle)
    try:
        yield coordinator
    finally:
        server.close()
        coordinator.roster.close()
        for connection in coordinator.connections:
            connection.close()


def run(test: Callable[[Coordinator], Awaitable[None]]) -> None:
    async def main() -> None:
        async with running() as coordinator:
            await asyncio.wait_for(test(coordinator), 30)

    asyncio.run(main())


def test_names_are_made_unique() -> None:
    async def test(coordinator: Coordinator) -> None:
        with pytest.raises(NoAgents, match="no agent has joined"):
            coordinator.roster.require_members()
        for device, name in (("a", "pi"), ("b", "pi"), ("c", "pi")):
            await coordinator.joined(hello(device, name))
        assert [m.name for m in coordinator.roster.require_members()] == ["pi", "pi-2", "pi-3"]

    run(test)


def test_an_agent_that_joins_again_replaces_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "SIGN_OF_LIFE_S", 0.05)

    async def test(coordinator: Coordinator) -> None:
        old, member = await coordinator.joined(hello())
        waiting = asyncio.ensure_future(member.request(UnloadStage, Done))
        assert await next_message(old) == UnloadStage(1)
        new, successor = await coordinator.joined(hello())
        with pytest.raises(AgentLost, match="joined again"):
            await waiting
        with pytest.raises(ConnectionLost):
            await next_message(old)
        await coordinator.ended.get()
        assert coordinator.roster.members == (successor,)
        assert [lost for lost, _ in coordinator.lost] == [member]
        waiting = asyncio.ensure_future(successor.request(UnloadStage, Done))
        assert await next_message(new) == UnloadStage(1)
        await new.send(Done(1))
        assert await waiting == Done(1)
        with pytest.raises(AgentLost):
            await member.request(UnloadStage, Done)

    run(test)


def test_a_second_device_with_the_same_id_is_told_how_to_get_its_own() -> None:
    async def test(coordinator: Coordinator) -> None:
        first, member = await coordinator.joined(hello(name="pi-1"))
        second = await coordinator.join(hello(name="pi-2"))
        refused = asyncio.ensure_future(next_message(second))
        while not refused.done():
            await first.send(Heartbeat())
            await asyncio.wait({refused}, timeout=0.05)
        answer = await refused
        assert isinstance(answer, JoinRefused)
        assert "pi-1 at 127.0.0.1 has the same device id and is alive" in answer.reason
        assert "Delete the file device-id" in answer.reason
        assert coordinator.roster.members == (member,)
        assert coordinator.lost == []

    run(test)


@pytest.mark.parametrize(
    "message",
    [
        hello(device=""),
        hello(device="x" * 65),
        hello(name=""),
        hello(name="x" * 64),
        hello(name="a\nb"),
        hello(device="a\x1b[2J"),
        replace(hello(), version="9" * 65),
        replace(hello(), kept=(KeptStage(-1),)),
        replace(hello(), kept=(KeptStage(5, 1 << 53),)),
        AgentHello("a", "a", "1", (), PROFILE),
        AgentHello("a", "a", "1", (Endpoint("h", 0),), PROFILE),
        AgentHello("a", "a", "1", (Endpoint("h" * 256, 1),), PROFILE),
        AgentHello("a", "a", "1", (Endpoint("h", 1),), replace(PROFILE, memory_bytes=1 << 62)),
        AgentHello("a", "a", "1", (Endpoint("h", 1),), replace(PROFILE, processor="x" * 3_900_000)),
    ],
)
def test_a_hello_that_makes_no_sense_is_refused(message: AgentHello) -> None:
    async def test(coordinator: Coordinator) -> None:
        connection = await coordinator.join(message)
        assert isinstance(await next_message(connection), JoinRefused)
        assert coordinator.roster.members == ()

    run(test)


@pytest.mark.parametrize(
    ("kept", "wanted", "keeps"),
    [((5,), {5}, (5,)), ((5,), set(), ()), ((), {5}, ()), ((5, 6, 7), {8, 7, 5}, (5, 7))],
)
def test_only_stages_that_are_awaited_are_kept(
    kept: tuple[int, ...], wanted: set[int], keeps: tuple[int, ...]
) -> None:
    async def test(coordinator: Coordinator) -> None:
        coordinator.roster.keeps = frozenset(wanted)
        stages = tuple(KeptStage(epoch, epoch + 4) for epoch in kept)
        answer = await next_message(await coordinator.join(replace(hello(), kept=stages)))
        assert answer == CoordinatorWelcome("test", "pi", keeps)
        (member,) = coordinator.roster.members
        assert member.kept == {epoch: epoch + 4 for epoch in keeps}

    run(test)


def test_nobody_joins_a_coordinator_that_stops() -> None:
    async def test(coordinator: Coordinator) -> None:
        _, member = await coordinator.joined(hello())
        coordinator.roster.close()
        assert member.lost is not None
        connection = await coordinator.join(hello())
        assert await next_message(connection) == JoinRefused("the coordinator stops")

    run(test)


def test_a_member_lost_while_it_is_asked_leaves_nothing_for_asyncio_to_complain_of() -> None:
    async def test(coordinator: Coordinator) -> None:
        complaints: list[object] = []
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: complaints.append(context)
        )
        _, member = await coordinator.joined(hello())

        def lost_meanwhile(number: int) -> Message:
            member.fail(AgentLost(member.name, "gone"))
            member.connection.close()
            return UnloadStage(number)

        with pytest.raises(AgentLost):
            await member.request(lost_meanwhile, Done)
        gc.collect()
        assert complaints == []

    run(test)


def test_answers_reach_who_asked() -> None:
    async def test(coordinator: Coordinator) -> None:
        connection, member = await coordinator.joined(hello())
        seen: list[Progress] = []
        waiting = asyncio.ensure_future(member.request(UnloadStage, Done, seen.append))
        assert await next_message(connection) == UnloadStage(1)
        await connection.send(Done(99))
        await connection.send(Progress(1, "load", 1, 2, "bytes"))
        await connection.send(Done(1))
        await connection.send(Done(1))
        assert await waiting == Done(1)
        assert seen == [Progress(1, "load", 1, 2, "bytes")]
        for answer, words in (
            (RequestFailed(2, "no memory"), "pi: no memory"),
            (StageLoaded(3, 1, 1, 0.1, 0), "unexpected answer"),
        ):
            waiting = asyncio.ensure_future(member.request(UnloadStage, Done))
            await next_message(connection)
            await connection.send(answer)
            with pytest.raises(AgentFailed, match=words):
                await waiting

    run(test)


def test_an_agent_is_told_that_nobody_waits_any_more() -> None:
    async def test(coordinator: Coordinator) -> None:
        connection, member = await coordinator.joined(hello())
        waiting = asyncio.ensure_future(member.request(UnloadStage, Done))
        assert await next_message(connection) == UnloadStage(1)
        waiting.cancel()
        assert await next_message(connection) == CancelRequest(1)

    run(test)


def test_silence_is_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LIVENESS_S", 0.1)

    async def test(coordinator: Coordinator) -> None:
        _, member = await coordinator.joined(hello())
        with pytest.raises(AgentLost, match=r"was silent for 0\.1 s"):
            await member.request(UnloadStage, Done)
        assert coordinator.roster.members == ()

    run(test)


NESTED = b"\x93\x01" + b"\x81\xa1a" * 900 + b"\x80" + b"\x91\x04"


@pytest.mark.parametrize(
    "data",
    [
        PREFIX.pack(MAGIC, PROTOCOL_VERSION, 0, MODEL_CODE, len(NESTED), 0) + NESTED,
        PREFIX.pack(MAGIC, PROTOCOL_VERSION, 0, MODEL_CODE, 4, 0) + b"\xff" * 4,
        b"GET / HTTP/1.1\r\n\r\n\r\n",
    ],
    ids=["nested", "malformed", "foreign"],
)
def test_a_member_that_breaks_the_protocol_is_lost(data: bytes) -> None:
    async def test(coordinator: Coordinator) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", coordinator.port)
        connection = AsyncConnection(reader, writer)
        await connection.send(hello())
        assert isinstance(await next_message(connection), CoordinatorWelcome)
        writer.write(data)
        await coordinator.ended.get()
        assert coordinator.roster.members == ()
        assert len(coordinator.lost) == 1
        connection.close()

    run(test)


def test_a_member_that_sends_what_only_others_may_is_lost() -> None:
    async def test(coordinator: Coordinator) -> None:
        connection, _ = await coordinator.joined(hello())
        await connection.send(PeerHello("a", "b"))
        await coordinator.ended.get()
        assert coordinator.roster.members == ()

    run(test)


def test_what_a_member_says_is_safe_for_a_terminal() -> None:
    async def test(coordinator: Coordinator) -> None:
        nasty = "1\x1b[2J\u202e"
        message = AgentHello(
            "id", "pi", nasty, (Endpoint(nasty, 1),), replace(PROFILE, processor=nasty)
        )
        connection, member = await coordinator.joined(message)
        texts = member.version, member.profile.processor, member.endpoints[0].host
        assert all(text.isprintable() for text in texts)
        progress = asyncio.Queue[Progress]()
        asked = asyncio.ensure_future(member.request(UnloadStage, Done, progress.put_nowait))
        assert await next_message(connection) == UnloadStage(1)
        await connection.send(Progress(1, nasty, 1, 2, "steps"))
        assert (await progress.get()).phase.isprintable()
        await connection.send(RequestFailed(1, nasty * 100_000))
        with pytest.raises(AgentFailed) as failed:
            await asked
        assert str(failed.value).isprintable()
        assert len(str(failed.value)) < 2000

    run(test)


@pytest.mark.parametrize(
    "lie",
    [
        Heartbeat(-1),
        Heartbeat(2**63 - 1),
        Heartbeat(1, load=1.5),
        Heartbeat(1, celsius=1e9),
        Heartbeat(1, stages=(StageBeat(1, 0, StageCounts(1, 1, -1, 0, 0, 0, 0, 0, 0, 0)),)),
        Heartbeat(1, stages=(StageBeat(1, -1.0),)),
        Heartbeat(1, stages=tuple(map(StageBeat, range(1, 100)))),
        TraceTaken(1, 5, (TracedPass(1, 0, 1, 1, 0, -1, 0, 0),)),
        TraceTaken(1, 2**63 - 1, ()),
        Progress(1, "load", -1, 2, "bytes"),
        Progress(1, "load", 1, 2**63 - 1, "bytes"),
        Progress(1, "load", 1, 2, "\x1b[2J"),
        StageLoaded(1, -1, 0, 1.0, 0),
        StageLoaded(1, 1, 0, -1.0, 0),
        StageLoaded(1, 1, 0, 1e308, 0),
    ],
)
def test_a_member_whose_figures_cannot_be_true_is_lost(lie: Message) -> None:
    async def test(coordinator: Coordinator) -> None:
        connection, member = await coordinator.joined(hello())
        asked = asyncio.ensure_future(member.request(UnloadStage, Done))
        await next_message(connection)
        await connection.send(lie)
        with pytest.raises(AgentLost, match=r"pi: device lost \(it (sent|has)"):
            await asked
        assert coordinator.roster.members == ()

    run(test)


GOOD_TIMING = BlockTiming("layer", 0, 4, 1e-3, 1e-4)


@pytest.mark.parametrize(
    ("timings", "call_s"),
    [
        ((replace(GOOD_TIMING, decode_s=1e308),), 0.0),
        ((replace(GOOD_TIMING, decode_s=5e-324),), 0.0),
        ((replace(GOOD_TIMING, prefill_s_per_token=-1.0),), 0.0),
        ((replace(GOOD_TIMING, variant=99),), 0.0),
        ((replace(GOOD_TIMING, variant=-1),), 0.0),
        ((GOOD_TIMING, GOOD_TIMING), 0.0),
        ((GOOD_TIMING,) * 50_000, 0.0),
        ((GOOD_TIMING,), -1.0),
        ((GOOD_TIMING,), 1e308),
    ],
)
def test_times_that_cannot_be_true_never_reach_the_planner(
    timings: tuple[BlockTiming, ...], call_s: float
) -> None:
    spec = load_spec(Path(__file__).parents[1] / "fixtures" / "llama")

    async def test(coordinator: Coordinator) -> None:
        connection, member = await coordinator.joined(hello())
        member.profile = replace(PROFILE, container_bits=((4, 4),))
        asked = asyncio.ensure_future(measure_blocks([member], spec, (4,), lambda step: None))
        assert isinstance(await next_message(connection), MeasureModel)
        await connection.send(ModelMeasured(1, timings, call_s))
        with pytest.raises(AgentFailed, match="pi: reported impossible times; --exclude pi"):
            await asked
        assert spec not in member.timings

    run(test)


IMPOSSIBLE = [
    (0.0, 1e6, 0.0),
    (1e-3, float("inf"), 0.0),
    (1e-3, 1e6, -1.0),
    (5e-324, 1e6, 0.0),
    (1e308, 1e6, 0.0),
    (1e-3, 5e-324, 0.0),
    (1e-3, 1e308, 0.0),
    (1e-3, 1e6, 1e308),
]


@pytest.mark.parametrize("figures", IMPOSSIBLE)
def test_an_impossible_link_is_refused(figures: tuple[float, float, float]) -> None:
    async def test(coordinator: Coordinator) -> None:
        _, member = await coordinator.joined(hello("a", "one"))
        _, other = await coordinator.joined(hello("b", "two"))
        rtt_s, bytes_per_s, rtt_p90_s = figures
        with pytest.raises(AgentFailed, match="impossible link"):
            coordinator.roster.set_link(
                member, other, LinkMeasured(1, rtt_s, bytes_per_s, rtt_p90_s)
            )
        assert coordinator.roster.links() == ()

    run(test)


def test_a_link_that_changed_is_taken_over_for_the_next_plan() -> None:
    async def test(coordinator: Coordinator) -> None:
        roster = coordinator.roster
        here, member = await coordinator.joined(hello("a", "one"))
        _, other = await coordinator.joined(hello("b", "two"))
        roster.set_link(member, other, LinkMeasured(1, 1e-3, 1e6, 2e-3))
        await here.send(LinkChanged("nobody", 1.0, 1.0, 1.0))
        await here.send(LinkChanged("b", 5e-3, 2e5, 6e-3))
        await here.send(TokenSampled(1, 1, 0, 0, ""))
        while not coordinator.events:
            await next_message_or_beat(here)
        assert roster.links() == (LinkProfile("one", "two", 5e-3, 2e5, 6e-3),)
        await here.send(LinkChanged("b", -1.0, 2e5, 0.0))
        await coordinator.ended.get()
        ((lost, error),) = coordinator.lost
        assert lost.name == "one"
        # It is alive, so that its power and network are not to blame.
        assert str(error).endswith("; update shoal there, or leave it out with --exclude")
        assert str(error.unplaced("none left")).endswith(
            "--exclude; the others cannot take its place: none left"
        )

    run(test)


def test_a_failed_link_names_the_addresses_that_were_tried() -> None:
    async def test(coordinator: Coordinator) -> None:
        _, member = await coordinator.joined(hello("a", "one"))
        advertised = replace(hello("b", "two"), advertised=(Endpoint("two.example", 7),))
        _, other = await coordinator.joined(advertised)
        coordinator.roster.fail_link(member, other, "refused")
        ((link, _),) = coordinator.roster.failed_links()
        assert link.addresses == ("two.example:7", "127.0.0.1:1")

    run(test)


def test_a_link_that_failed_is_no_link_until_it_is_measured_or_its_device_joins_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(members, "SIGN_OF_LIFE_S", 0.05)

    async def test(coordinator: Coordinator) -> None:
        roster = coordinator.roster
        here, member = await coordinator.joined(hello("a", "one"))
        _, other = await coordinator.joined(hello("b", "two"))
        pairs = [(member, other), (other, member)]
        assert roster.links_to_measure(roster.members) == pairs
        for pair in pairs:
            roster.set_link(*pair, LinkMeasured(1, 1e-3, 1e6))
        roster.fail_link(member, other, "refused")
        assert [(link.source, link.target) for link in roster.links()] == [("two", "one")]
        ((link, failure),) = roster.failed_links()
        assert str(link) == "one cannot reach two (refused; its addresses are 127.0.0.1:1)"
        assert failure.count == 1
        # What was on its way when the link failed does not make it whole.
        await here.send(LinkChanged("b", 5e-3, 2e5, 6e-3))
        await here.send(TokenSampled(1, 1, 0, 0, ""))
        while not coordinator.events:
            await next_message_or_beat(here)
        assert roster.link(member, other) is None
        assert roster.links_to_measure(roster.members) == []
        with roster.changed.watch() as changed:
            roster.set_link(member, other, LinkMeasured(1, 1e-3, 1e6))
            assert changed.is_set()
        # The way back of a link that failed in use is not believed either.
        roster.fail_link(member, other, "reset", used=True)
        assert roster.links() == ()
        assert len(roster.links_to_measure(roster.members)) == 1  # It had failed before.
        _, again = await coordinator.joined(hello("b", "two"))
        assert roster.failed_links() == ()
        assert roster.links_to_measure(roster.members) == [(member, again), (again, member)]
        roster.fail_link(member, other, "of one that left")
        assert roster.failed_links() == ()

    run(test)


async def next_message_or_beat(connection: AsyncConnection) -> None:
    """Wait until the roster has said something, which it does each second."""
    await connection.receive(5)


def test_a_link_measured_too_fast_is_taken_as_the_fastest_there_is() -> None:
    async def test(coordinator: Coordinator) -> None:
        _, member = await coordinator.joined(hello("a", "one"))
        _, other = await coordinator.joined(hello("b", "two"))
        coordinator.roster.set_link(member, other, LinkMeasured(1, 1e-8, 4.2e12, 1e-8))
        assert coordinator.roster.links() == (LinkProfile("one", "two", 1e-7, 1e12, 1e-8),)

    run(test)
