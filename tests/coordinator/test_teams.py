"""Stages that several devices share: how they are loaded, connected, served, lost and kept."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest
from starlette.requests import Request

from api.admin import AdminRoutes
from coordinator.errors import AgentFailed, AgentLost, CoordinatorError, LinkFailed
from coordinator.files.artifacts import ArtifactStore
from coordinator.loading import operations
from coordinator.loading.deployment import Deployment, Planned, wanted_artifacts
from coordinator.loading.keeper import Keeper
from coordinator.loading.models import Models
from coordinator.loading.operations import Operations
from coordinator.loading.paces import Paces, slow_devices
from coordinator.loading.plan_maker import PlanMaker, Slowness, as_measured
from coordinator.loading.recovery import LoadedFile
from coordinator.loading.turns import Turns
from coordinator.quality.store import QualityStore
from coordinator.roster.measurements import Step
from coordinator.roster.members import Member, Roster
from coordinator.roster.names import NameBook
from coordinator.serving.gateway import Gateway
from coordinator.serving.pieces import Piece
from coordinator.story import Story
from model.artifact import read_block
from model.checkpoint import Checkpoint
from model.quantize import Format
from model.share import Share, share_spec
from model.spec import ModelSpec
from model.tokenizer import Tokenizer
from planning import plan as planned_as
from planning.plan import Hop, Plan, PlanError, Proof, Stage
from planning.problem import PlanningProblem
from planning.request import LoadRequest
from planning.sensitivity import LossSource
from tests.team import shares_of
from wire import limits
from wire.async_connection import AsyncConnection, serve
from wire.messages import (
    AgentHello,
    BlocksFetched,
    ConnectStage,
    ConnectTeam,
    Done,
    Endpoint,
    FetchBlocks,
    Heartbeat,
    KeptStage,
    LinkMeasured,
    LoadStage,
    MeasureLink,
    MeasureModel,
    MeasureTeam,
    Message,
    ModelMeasured,
    PeerLost,
    ReleaseSequence,
    RequestFailed,
    Sampling,
    SequenceFailed,
    StageBeat,
    StageDamaged,
    StageLoaded,
    StartSequence,
    TeamMeasured,
    TokenSampled,
    UnloadStage,
)
from wire.profile import TIMED_ROWS, BlockTiming, DeviceProfile, TimingKind

MODEL = Path(__file__).parents[1] / "fixtures" / "opt-pre"
CHECKPOINT = Checkpoint.open(MODEL)
SPEC = CHECKPOINT.spec
BLOCKS = SPEC.block_count
NAMES = ("a", "b", "c", "d")
PROFILE = DeviceProfile(
    "x86_64", "test", 1, 1, "onnx_cpu", "1", ((32, 32),), 1 << 30, 1 << 30, 1 << 30, 1e9, 1e9
)
Parts = tuple[tuple[str, ...], int]
"""The devices of a stage, and the end of its blocks."""

RING: tuple[Parts, ...] = ((("b", "a", "c"), 3), (("d",), BLOCKS))
"""Three devices share the embedding and two layers; a fourth one has the rest."""
ALONE: tuple[Parts, ...] = ((("a",), 3), (("d",), BLOCKS))
"""Two stages, each of one device."""

Told = TypeVar("Told", bound=Message)


def plan_of(parts: Iterable[Parts], sum_bits: int = 8) -> Plan:
    stages, first = [], 0
    for names, last in parts:
        shares = shares_of(SPEC, range(len(names), 0, -1))
        members = tuple(
            planned_as.Member(name, share, 0.7, 0, 0, 0, 0, sums_s=0.3)
            for name, share in zip(names, shares, strict=True)
        )
        stage = Stage(names[0], first, (32,) * (last - first), 1.0, 1.0, 0, 0, 0, 0, hop_bits=32)
        if len(names) > 1:
            stage = replace(stage, members=members, sum_bits=sum_bits)
        stages.append(stage)
        first = last
    hops = tuple(Hop(a.device, b.device, 0.0) for a, b in itertools.pairwise(stages))
    return Plan(tuple(stages), hops, 0.0, 1.0, 1.0, None, Proof("", 0.0, 0.0))


def planned(plan: Plan, names: Iterable[str] = NAMES) -> Planned:
    problem = cast(PlanningProblem, None)  # Nothing here asks for figures of losses.
    losses = cast(LossSource, None)
    devices = {name: f"id-of-{name}" for name in names}
    request = LoadRequest(MODEL, bits=(32,), slots=2)
    return Planned(request, CHECKPOINT, 64, problem, plan, None, None, losses, devices)


def block_timings(bits: int) -> list[BlockTiming]:
    """Return the times of the model's blocks, as a device measures them for several sequences."""
    kinds: tuple[TimingKind, ...] = ("embedding", "layer", "head")
    return [BlockTiming(kind, 0, bits, 0.1, 0.1, rows_s=(0.1,) * len(TIMED_ROWS)) for kind in kinds]


class Given(PlanMaker):
    """Gives the plans of operations in place of the planner's."""

    def __init__(self, operations: PlansGiven) -> None:
        vars(self).update(vars(operations._maker))
        self._operations = operations

    async def plan(
        self,
        request: LoadRequest,
        *,
        asked: bool,
        weights: bool = True,
        slowness: Slowness = as_measured,
        measures: bool = True,
    ) -> Planned:
        return self._operations.next(request)


class PlansGiven(Operations):
    """Operations with plans from a list in place of the planner's."""

    plans: list[Plan]

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._maker = Given(self)

    def next(self, request: LoadRequest) -> Planned:
        if not self.plans:
            raise PlanError("no plan is left")
        joined = [member.name for member in self._roster.members]
        return replace(planned(self.plans.pop(0), joined), request=request)


class Shoal:
    """A coordinator's parts, and agents that do as they are told and tell what that was."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.roster = Roster("test", NameBook(directory), story := Story())
        self.store = ArtifactStore(directory)
        self.store.prepare()
        self.story, self.models, self.turns = story, Models(story), Turns()
        self.operations = PlansGiven(
            self.roster, self.store, QualityStore(directory), self.models, self.turns
        )
        self.operations.plans = []
        self.kept = LoadedFile(directory)
        self.keeper = Keeper(self.roster, self.models, self.turns, self.operations, self.kept, 5)
        self.paces = Paces(self.roster, self.models, story)
        self.gateway = Gateway(self.roster, self.models)
        self.port = 0
        self.agents: dict[str, AsyncConnection] = {}
        self.playing: dict[str, asyncio.Task[None]] = {}
        self.told: list[tuple[str, Message]] = []
        """What the coordinator told whom, besides heartbeats."""
        self.news = asyncio.Event()
        self.refused: set[tuple[str, str]] = set()
        """Pairs of devices that cannot connect. A lead with itself: it cannot measure sums."""
        self.frozen: set[str] = set()
        """Devices that say nothing more."""
        self.busy: set[str] = set()
        """Devices whose measurements of a model do not end."""
        self.steps: list[Step] = []

    async def handle(self, connection: AsyncConnection) -> None:
        message, _ = await connection.receive(5)
        assert isinstance(message, AgentHello)
        await self.roster.serve(message, connection)

    async def join(self, *names: str, kept: Sequence[tuple[int, int]] = ()) -> None:
        """``kept``: epochs of stages that the agents still have, and their newest sequences."""
        for name in names:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            agent = self.agents[name] = AsyncConnection(reader, writer)
            ports = (Endpoint("127.0.0.1", 1000 + ord(name)),)
            hello = AgentHello(f"id-of-{name}", name, "1", ports, PROFILE)
            await agent.send(replace(hello, kept=tuple(itertools.starmap(KeptStage, kept))))
            await agent.receive(5)
            self.playing[name] = asyncio.ensure_future(self.play(name, agent))

    async def play(self, name: str, agent: AsyncConnection) -> None:
        while True:
            message, _ = await agent.receive(60)
            if name in self.frozen:
                continue
            if isinstance(message, Heartbeat):
                await agent.send(Heartbeat())
                continue
            self.told.append((name, message))
            self.news.set()
            if isinstance(message, LoadStage):
                fetched = sum(ref.size_bytes for ref in message.blocks)
                await agent.send(StageLoaded(message.request, 1000 + ord(name), fetched, 0.5, 0))
            elif isinstance(message, (ConnectTeam, ConnectStage)):
                if (name, message.device.removeprefix("id-of-")) in self.refused:
                    await agent.send(RequestFailed(message.request, "refused"))
                else:
                    await agent.send(Done(message.request))
            elif isinstance(message, MeasureTeam):
                if (name, name) in self.refused:
                    await agent.send(RequestFailed(message.request, "busy"))
                else:
                    await agent.send(TeamMeasured(message.request, 0.25e-3, 32, 4e-3))
            elif isinstance(message, FetchBlocks):
                await agent.send(BlocksFetched(message.request, 0))
            elif isinstance(message, UnloadStage):
                await agent.send(Done(message.request))
            elif isinstance(message, MeasureModel) and name not in self.busy:
                timings = tuple(timing for bits in message.bits for timing in block_timings(bits))
                await agent.send(ModelMeasured(message.request, timings))
            elif isinstance(message, MeasureLink):
                await agent.send(LinkMeasured(message.request, 1e-3, 1e8))

    def member(self, name: str) -> Member:
        return next(member for member in self.roster.members if member.name == name)

    def kill(self, name: str) -> None:
        self.playing[name].cancel()
        self.agents[name].close()

    async def load(self, *plans: Plan) -> Deployment:
        self.operations.plans += plans
        return await self.operations.load(planned(plans[0]).request, self.steps.append)

    def of(self, kind: type[Told]) -> list[tuple[str, Told]]:
        return [(name, message) for name, message in self.told if isinstance(message, kind)]

    def loads(self) -> dict[str, LoadStage]:
        """The last order to load of each device."""
        return dict(self.of(LoadStage))

    async def until(self, holds: Callable[[], object]) -> None:
        """Wait until something holds that a message to an agent or a new state brings."""
        with self.models.changed.watch() as changed:
            while not holds():
                self.news.clear()
                waits = [asyncio.ensure_future(event.wait()) for event in (self.news, changed)]
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                for wait in waits:
                    wait.cancel()
                changed.clear()

    async def said(self, name: str, message: Message) -> None:
        await self.agents[name].send(message)


@asynccontextmanager
async def running(directory: Path) -> AsyncIterator[Shoal]:
    shoal = Shoal(directory)
    server, shoal.port = await serve("127.0.0.1", 0, shoal.handle)
    try:
        yield shoal
    finally:
        server.close()
        shoal.keeper.close()
        shoal.roster.close()
        for task in shoal.playing.values():
            task.cancel()
        for agent in shoal.agents.values():
            agent.close()


Run = Callable[[Callable[[Shoal], Awaitable[None]]], None]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def run(test: Callable[[Shoal], Awaitable[None]], names: tuple[str, ...] = NAMES) -> None:
        async def main() -> None:
            async with running(tmp_path) as shoal:
                await shoal.join(*names)
                await asyncio.wait_for(test(shoal), 60)

        asyncio.run(main())

    return run


# ---- paces -------------------------------------------------------------------------------------


async def shown_model(shoal: Shoal) -> dict[str, Any]:
    """Return the model in the JSON of `shoal ps`."""
    routes = AdminRoutes("test", shoal.roster, shoal.operations, shoal.models, shoal.story)
    request = Request({"type": "http", "query_string": b""})
    answer = json.loads(bytes((await routes.ps(request)).body))
    model: dict[str, Any] = answer["model"]
    return model


async def report_pace(shoal: Shoal, name: str, epoch: int, token_s: float) -> None:
    """Send a heartbeat, and wait until the coordinator has read it."""
    member = shoal.member(name)
    beat = StageBeat(epoch, token_s)
    await shoal.said(name, Heartbeat(1, stages=(beat,)))
    while member.beats != {epoch: beat}:
        member.heard.clear()
        await member.heard.wait()


def test_a_slow_member_is_named_once_until_it_is_as_planned_again(run: Run) -> None:
    async def test(shoal: Shoal) -> None:
        deployment = await shoal.load(plan_of(RING))  # One second a token for each device.
        epoch = deployment.epoch

        def told() -> list[tuple[str, str]]:
            kinds = ("slow", "as planned")
            return [(one.kind, one.subject) for one in shoal.story.after() if one.kind in kinds]

        await report_pace(shoal, "a", epoch - 1, 50.0)  # Of another load.
        await report_pace(shoal, "c", epoch, 1.9)
        await report_pace(shoal, "d", epoch, 0.0)  # Not enough passes yet.
        assert told() == []
        assert slow_devices(deployment) == []
        await report_pace(shoal, "a", epoch, 9.8)
        await report_pace(shoal, "a", epoch, 9.9)
        assert told() == [("slow", "a")]
        (line,) = slow_devices(deployment)
        assert line.startswith("a takes 9.9e+03 ms a token for its part, 9.9 times the predicted")
        await report_pace(shoal, "a", epoch, 1.7)
        assert told() == [("slow", "a")]
        await report_pace(shoal, "a", epoch, 1.4)
        assert told() == [("slow", "a"), ("as planned", "a")]
        await report_pace(shoal, "d", epoch, 2.0)
        assert told()[2:] == [("slow", "d")]
        shown = await shown_model(shoal)
        assert [stage["token_s"] for stage in shown["stages"]] == [1.9, 2.0]
        assert shown["slow"] == slow_devices(deployment)

    run(test)


# ---- loading -----------------------------------------------------------------------------------


def test_members_load_then_connect_to_each_other_and_leads_to_a_ring(run: Run) -> None:
    async def test(shoal: Shoal) -> None:
        deployment = await shoal.load(plan_of(RING))
        kinds = [type(message).__name__ for _, message in shoal.told]
        assert kinds == ["LoadStage"] * 4 + ["ConnectTeam"] * 3 + [
            *("ConnectStage", "ConnectStage", "MeasureTeam")
        ]
        loads = shoal.loads()
        connects = shoal.of(ConnectTeam)
        assert [(name, message.device) for name, message in connects] == [
            ("b", "id-of-a"),
            ("b", "id-of-c"),
            ("a", "id-of-c"),
        ]
        (key,) = {message.team_key for _, message in connects}
        team = ("id-of-b", "id-of-a", "id-of-c")
        for name in "bac":
            assert (loads[name].team, loads[name].team_key) == (team, key)
            assert (loads[name].sum_bits, loads[name].slots) == (8, 2)
            assert ModelSpec.from_dict(loads[name].spec) == SPEC
        assert connects[0][1].endpoints[0].port == 1000 + ord("a")
        # The ring goes over the leads. Nobody can pass for the previous device of the others.
        ring = [message for _, message in shoal.of(ConnectStage)]
        assert [(name, message.device) for name, message in shoal.of(ConnectStage)] == [
            ("b", "id-of-d"),
            ("d", "id-of-b"),
        ]
        assert [loads[name].previous for name in "bacd"] == ["id-of-d", "", "", "id-of-b"]
        assert [message.hop_key for message in ring] == [loads["d"].hop_key, loads["b"].hop_key]
        keys = {key, *(load.hop_key for load in loads.values())}
        assert len(keys) == 5
        assert all(len(one) == 16 for one in keys)
        alone = loads["d"]
        assert (alone.team, alone.share, alone.team_key) == ((), (), b"")
        epochs = {message.epoch for _, message in connects}
        epochs |= {message.epoch for message in ring} | {load.epoch for load in loads.values()}
        assert epochs == {deployment.epoch}

    run(test)


def test_a_member_is_told_of_its_own_slices_only(run: Run) -> None:
    async def test(shoal: Shoal) -> None:
        await shoal.load(plan_of(RING))
        loads = shoal.loads()
        blocks = {name: [ref.block for ref in load.blocks] for name, load in loads.items()}
        assert blocks == {"b": [0, 1, 2], "a": [1, 2], "c": [1, 2], "d": [3, 4]}
        for name in "bac":
            own = share_spec(SPEC, Share.from_tuple(loads[name].share))
            for ref in loads[name].blocks:
                path = shoal.store.path(ref.sha256)
                assert path is not None
                read_block(path, own if ref.block else SPEC, ref.block)
        sent = {name: {ref.sha256 for ref in load.blocks} for name, load in loads.items()}
        assert not any(sent[one] & sent[other] for one, other in itertools.combinations(NAMES, 2))
        labels = {step.label for step in shoal.steps if step.phase == "load"}
        assert labels <= {"a of b+a+c", "b of b+a+c", "c of b+a+c", "d"}

    run(test)


def test_a_team_alone_has_the_head_in_parts(run: Run) -> None:
    async def test(shoal: Shoal) -> None:
        deployment = await shoal.load(plan_of([(("b", "a"), BLOCKS)]))
        assert shoal.of(ConnectStage) == []
        assert [name for name, _ in shoal.of(ConnectTeam)] == ["b"]
        loads = shoal.loads()
        assert [ref.block for ref in loads["a"].blocks] == list(range(1, BLOCKS))
        vocab = [Share.from_tuple(loads[name].share).vocab for name in "ba"]
        assert (vocab[0][0], vocab[1][1]) == (0, SPEC.vocab)
        assert vocab[0][1] == vocab[1][0]
        assert deployment.where == "b+a"
        assert deployment.after(shoal.member("b")) is None

    run(test)


def test_a_team_whose_sums_cannot_be_measured_is_loaded_all_the_same(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(shoal: Shoal) -> None:
        shoal.refused.add(("b", "b"))
        deployment = await shoal.load(plan_of(RING))
        assert deployment.sums == (None, None)
        assert shoal.models.serving is deployment

    run(test)
    assert "sums of b+a+c were not measured: busy" in caplog.text


def test_no_team_has_the_embedding_alone() -> None:
    with pytest.raises(PlanError, match="a\\+b cannot share the embedding alone"):
        wanted_artifacts(planned(plan_of([(("a", "b"), 1), (("c",), BLOCKS)])))


def test_shares_keep_the_format_that_was_asked_for() -> None:
    asked = planned(plan_of(RING))
    asked = replace(asked, request=replace(asked.request, scheme="truncate", group_size=32))
    formats = {item.fmt for _, item in wanted_artifacts(asked)}
    assert formats == {Format.of(32, "truncate", 32)}


# ---- failures while loading --------------------------------------------------------------------


def test_a_pair_that_cannot_connect_is_planned_around(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "PLACEMENTS", 2)

    async def test(shoal: Shoal) -> None:
        shoal.refused.add(("a", "c"))
        with pytest.raises(LinkFailed) as failed:
            await shoal.load(*[plan_of(RING)] * 2)
        assert (failed.value.source, failed.value.target) == ("a", "c")
        # Nothing stays loaded.
        assert len(shoal.of(UnloadStage)) == 2 * len(NAMES)
        assert [str(link) for link, _ in shoal.roster.failed_links()] == [
            "a cannot reach c (refused; its addresses are 127.0.0.1:1099)"
        ]
        shoal.told.clear()
        deployment = await shoal.load(plan_of(RING), plan_of([(("b", "a"), BLOCKS)]))
        assert deployment.where == "b+a"
        assert len(shoal.of(UnloadStage)) == len(NAMES)

    run(test)


def test_a_member_that_is_damaged_while_all_connect_is_no_failed_link(run: Run) -> None:
    """A stage that has stopped takes no connection of its team."""

    async def test(shoal: Shoal) -> None:
        shoal.refused.add(("b", "a"))
        loading = asyncio.ensure_future(shoal.load(plan_of(RING)))
        await shoal.until(lambda: len(shoal.of(LoadStage)) == 4)
        await shoal.said("a", StageDamaged(shoal.loads()["a"].epoch, "rot"))
        await shoal.until(lambda: shoal.of(ConnectTeam))
        shoal.refused.clear()
        deployment = await loading
        assert len({message.epoch for _, message in shoal.of(LoadStage)}) == 2
        assert deployment.epoch == shoal.loads()["a"].epoch
        assert not shoal.roster.failed_links()

    run(test)


def test_a_member_that_is_lost_while_it_loads_is_named(run: Run) -> None:
    async def test(shoal: Shoal) -> None:
        shoal.frozen.add("c")
        loading = asyncio.ensure_future(shoal.load(plan_of(RING)))
        await shoal.until(lambda: {"a", "b", "d"} <= shoal.loads().keys())
        shoal.kill("c")
        with pytest.raises(AgentLost, match="c: device lost"):
            await loading
        assert {name for name, _ in shoal.of(UnloadStage)} == {"a", "b", "d"}

    run(test)


def test_a_member_that_left_before_is_named(run: Run) -> None:
    async def test(shoal: Shoal) -> None:
        left = planned(plan_of(RING))
        shoal.kill("c")
        with shoal.roster.changed.watch() as changed:
            while len(shoal.roster.members) == len(NAMES):
                await changed.wait()
                changed.clear()
        tokenizer = Tokenizer.load(MODEL)
        files = await shoal.operations._deployer.files(left, tokenizer)
        with pytest.raises(AgentLost, match=r"c: device lost \(it left while the plan was made"):
            await shoal.operations._deployer.deploy(left, tokenizer, files, shoal.roster.members)

    run(test)


# ---- serving -----------------------------------------------------------------------------------


async def collect(shoal: Shoal, tokens: int = 2) -> list[Piece]:
    deployment = await shoal.models.deployment()
    pieces = shoal.gateway.generate(deployment, (1, 2), Sampling(tokens, ()))
    return [piece async for piece in pieces]


def test_only_leads_are_told_of_sequences_and_only_the_last_one_samples(run: Run) -> None:
    async def test(shoal: Shoal) -> None:
        deployment = await shoal.load(plan_of([(("a",), 2), (("b", "c", "d"), BLOCKS)]))
        task = asyncio.ensure_future(collect(shoal))
        await shoal.until(lambda: len(shoal.of(StartSequence)) == 2)
        started = dict(shoal.of(StartSequence))
        assert started.keys() == {"a", "b"}
        number = started["a"].sequence
        # A member that is no lead must not sample.
        await shoal.said("c", TokenSampled(deployment.epoch, number, 0, 65, ""))
        await shoal.said("b", TokenSampled(deployment.epoch, number, 0, 66, ""))
        await shoal.said("b", TokenSampled(deployment.epoch, number, 1, 67, "length"))
        assert [token for piece in await task for token in piece.tokens] == [66, 67]
        await shoal.until(lambda: len(shoal.of(ReleaseSequence)) == 2)
        assert {name for name, _ in shoal.of(ReleaseSequence)} == {"a", "b"}

    run(test)


def test_a_member_can_end_a_sequence(run: Run) -> None:
    async def test(shoal: Shoal) -> None:
        deployment = await shoal.load(plan_of([(("a", "b"), BLOCKS)]))
        task = asyncio.ensure_future(collect(shoal))
        await shoal.until(lambda: shoal.of(StartSequence))
        number = shoal.of(StartSequence)[0][1].sequence
        await shoal.said("d", SequenceFailed(deployment.epoch, number, "a stranger's"))
        await shoal.said("b", SequenceFailed(deployment.epoch, number, "no memory"))
        with pytest.raises(AgentFailed, match="b: no memory"):
            await task
        shoal.models.require(deployment)

    run(test)


# ---- losses ------------------------------------------------------------------------------------


def lead_killed(shoal: Shoal, epoch: int) -> list[tuple[str, Message]]:
    shoal.kill("b")
    return []


def member_killed(shoal: Shoal, epoch: int) -> list[tuple[str, Message]]:
    """The others close their connections, and report each other."""
    shoal.kill("c")
    return [
        ("a", PeerLost(epoch, "id-of-b", "closed")),
        ("b", PeerLost(epoch, "id-of-a", "closed")),
    ]


def member_frozen(shoal: Shoal, epoch: int) -> list[tuple[str, Message]]:
    shoal.frozen.add("c")
    return [
        ("b", PeerLost(epoch, "id-of-c", "silent")),
        ("a", PeerLost(epoch, "id-of-b", "closed")),
    ]


def last_killed(shoal: Shoal, epoch: int) -> list[tuple[str, Message]]:
    shoal.kill("d")
    return [("b", PeerLost(epoch, "id-of-d", "reset"))]


@pytest.mark.parametrize(
    ("lose", "victim"),
    [(lead_killed, "b"), (member_killed, "c"), (member_frozen, "c"), (last_killed, "d")],
)
def test_a_lost_device_of_a_team_is_replaced_and_the_answer_goes_on(
    run: Run,
    lose: Callable[[Shoal, int], list[tuple[str, Message]]],
    victim: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "LIVENESS_S", 2.5)

    async def test(shoal: Shoal) -> None:
        deployment = await shoal.load(plan_of(RING))
        task = asyncio.ensure_future(collect(shoal, 3))
        await shoal.until(lambda: len(shoal.of(StartSequence)) == 2)
        number = shoal.of(StartSequence)[0][1].sequence
        await shoal.said("d", TokenSampled(deployment.epoch, number, 0, 65, ""))
        left = tuple(name for name in NAMES if name != victim)
        shoal.operations.plans.append(plan_of([(left[:2], 3), (left[2:], BLOCKS)]))
        shoal.told.clear()
        for name, message in lose(shoal, deployment.epoch):
            await shoal.said(name, message)
        await shoal.until(lambda: len(shoal.of(StartSequence)) == 2)
        again = shoal.models.serving
        assert again is not None
        assert again.where == f"{left[0]}+{left[1]}, {left[2]}"
        (prompt,) = {m.prompt for _, m in shoal.of(StartSequence) if m.prompt}
        assert prompt == (1, 2, 65)
        number = shoal.of(StartSequence)[0][1].sequence
        await shoal.said(left[2], TokenSampled(again.epoch, number, 0, 66, ""))
        await shoal.said(left[2], TokenSampled(again.epoch, number, 1, 67, "length"))
        pieces = await task
        assert [token for piece in pieces for token in piece.tokens] == [65, 66, 67]
        (notice,) = [piece.notice for piece in pieces if piece.notice]
        assert f"{victim}: device lost" in notice
        # The devices that are left can reach each other. Nobody is told otherwise.
        assert shoal.roster.failed_links() == ()
        events = [(event.kind, event.text) for event in shoal.story.after()]
        assert ("served", "on b+a+c, d") in events
        assert ("replaced", f"on {again.where}") in events

    run(test)


@pytest.mark.parametrize(
    ("reports", "pair"),
    [
        ([("b", "c")], ("b", "c")),
        ([("c", "b")], ("c", "b")),
        ([("c", "a")], ("c", "a")),
        # Both ends report, and a third one was told of it.
        ([("a", "c"), ("b", "c"), ("c", "b")], ("b", "c")),
        # The third one reports a device that reports another one.
        ([("a", "b"), ("b", "c")], ("b", "c")),
    ],
)
def test_a_link_between_living_members_is_planned_around(
    run: Run, reports: list[tuple[str, str]], pair: tuple[str, str]
) -> None:
    async def test(shoal: Shoal) -> None:
        deployment = await shoal.load(plan_of(RING))
        shoal.operations.plans.append(plan_of([(("b", "a"), 3), (("d",), BLOCKS)]))
        for source, target in reports:
            await shoal.said(source, PeerLost(deployment.epoch, f"id-of-{target}", "reset"))
        await shoal.until(lambda: shoal.models.serving not in (deployment, None))
        ((link, _),) = shoal.roster.failed_links()
        assert (link.source, link.target) == pair
        ended = shoal.models.ended_by(deployment)
        assert isinstance(ended, LinkFailed)
        assert (ended.source, ended.target) == pair

    run(test)


def test_reports_about_strangers_and_old_teams_change_nothing(run: Run) -> None:
    async def test(shoal: Shoal) -> None:
        old = await shoal.load(plan_of(RING))
        deployment = await shoal.load(plan_of(RING))
        for name, epoch, device in (
            ("a", old.epoch, "id-of-b"),
            ("a", deployment.epoch, "id-of-d"),  # Only the lead knows the next stage.
            ("a", deployment.epoch, "id-of-a"),
            ("a", deployment.epoch, "nobody"),
            ("d", deployment.epoch, "id-of-c"),
        ):
            await shoal.said(name, PeerLost(epoch, device, "reset"))
        # Later messages of the same connections are seen after them.
        for name in "ad":
            await shoal.said(name, PeerLost(deployment.epoch, "last", "reset"))
            shoal.member(name).heard.clear()
            await shoal.member(name).lives()
        assert shoal.models.serving is deployment
        assert shoal.roster.failed_links() == ()

    run(test)


# ---- what is kept and shown --------------------------------------------------------------------


def test_a_restarted_coordinator_waits_for_all_members(run: Run) -> None:
    async def test(shoal: Shoal) -> None:
        await shoal.load(plan_of(RING))
        ((_, devices),) = shoal.kept.read()
        assert devices == ("id-of-b", "id-of-a", "id-of-c", "id-of-d")

    run(test)


def test_the_status_names_every_member(run: Run) -> None:
    async def test(shoal: Shoal) -> None:
        await shoal.load(plan_of(RING))
        answer = await shown_model(shoal)
        team, alone = answer["stages"]
        loads = shoal.loads()
        fetched = {name: sum(ref.size_bytes for ref in load.blocks) for name, load in loads.items()}
        memory = {name: 1000 + ord(name) for name in NAMES}
        assert [member["device"] for member in team["members"]] == ["b", "a", "c"]
        assert team["device"] == "b"
        assert team["memory_bytes"] == sum(memory[name] for name in "bac")
        assert team["fetched_bytes"] == sum(fetched[name] for name in "bac")
        assert team["members"][2] == {
            "device": "c",
            "memory_bytes": memory["c"],
            "fetched_bytes": fetched["c"],
            "from_peers_bytes": 0,
            "load_s": 0.5,
            "token_s": None,
        }
        assert alone["members"] == []
        shares = [member["share"] for member in answer["plan"]["stages"][0]["members"]]
        measured = {"row_s": 0.25e-3, "chunk_rows": 32, "chunk_s": 4e-3}
        assert answer["plan"]["stages"][0]["measured_sum"] == measured
        assert "measured_sum" not in answer["plan"]["stages"][1]
        assert [share["kv_heads"] for share in shares] == [[0, 1], [1, 2], [2, 4]]

    run(test)


def test_members_are_unloaded_and_measuring_them_is_refused(run: Run) -> None:
    async def test(shoal: Shoal) -> None:
        deployment = await shoal.load(plan_of([(("b", "a", "c"), BLOCKS)]))
        with pytest.raises(CoordinatorError, match="is loaded on c or its machine"):
            await shoal.operations.measure("c", lambda step: None)
        assert await shoal.operations.unload() == (deployment.name,)
        assert {name for name, _ in shoal.of(UnloadStage)} == {"a", "b", "c"}

    run(test)
