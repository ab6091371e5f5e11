"""Whole agents in this process that share a stage; the test is their coordinator."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from agent import daemon
from agent.daemon import Agent
from agent.turnstile import Ticket
from backends.base import Artifacts, Backend, BackendError, Capabilities, Stage, StageOptions
from calibration.trial import Trials
from model.artifact import read_block, store_block, write_artifact
from model.checkpoint import Checkpoint
from model.quantize import BITS, Format
from model.share import Share, share_tensors
from model.spec import ModelSpec
from tests.agent.teams import ANSWER_S, CONTEXT, EPOCH, TEAM_KEY, ReferenceStage
from tests.agent.test_daemon import Coordinator, running_agent
from tests.team import shares_of
from wire.connection import Listener
from wire.messages import (
    BlockRef,
    ConnectTeam,
    Done,
    Endpoint,
    LoadStage,
    MeasureDevice,
    MeasureTeam,
    Message,
    PeerLost,
    RequestFailed,
    Sampling,
    StageDamaged,
    StageLoaded,
    StartSequence,
    TeamMeasured,
    TokenSampled,
    UnloadStage,
)

FIXTURE = Path(__file__).parents[1] / "fixtures" / "opt-pre"
CHECKPOINT = Checkpoint.open(FIXTURE)
SPEC = CHECKPOINT.spec
GOLDEN = np.load(FIXTURE / "golden.npz")
PROMPT = tuple(GOLDEN["prompt"].tolist())
EXPECTED = GOLDEN["continuation"].tolist()[:12]
MEMBERS = 3
FLOATS = Format.of(32)


class ShareBackend(Backend):
    """The reference, for shares of layers."""

    @classmethod
    def probe(cls) -> Capabilities:
        return Capabilities("reference", "1", dict.fromkeys(BITS, 32), shares=True)

    def load(self, spec: ModelSpec, artifacts: Artifacts, options: StageOptions) -> Stage:
        blocks = [read_block(path, spec, block)[1] for block, path in artifacts]
        first = artifacts[0][0]
        if options.team_sum is None and first:
            raise BackendError("whole layers are not wanted here")
        return ReferenceStage(spec, first, blocks, options.slots, options.team_sum)


class NoShareBackend(ShareBackend):
    @classmethod
    def probe(cls) -> Capabilities:
        return Capabilities("reference", "1", dict.fromkeys(BITS, 32))


@dataclass
class Device:
    agent: Agent
    coordinator: Coordinator
    name: str
    endpoint: Endpoint
    blocks: tuple[BlockRef, ...]
    share: Share
    made: Path
    """The folder of its files."""

    def place(self) -> None:
        """Put the files into the agent's cache, so that it need not fetch them."""
        for ref in self.blocks:
            target = self.agent._cache.path(ref.sha256)
            target.parent.mkdir(parents=True, exist_ok=True)
            (made,) = (path for path in self.made.iterdir() if ref.sha256 in path.name)
            shutil.copy(made, target)

    def ask(self, message: Message) -> Message:
        """Return the answer. Members that unload their stage first look lost to the others."""
        self.coordinator.send(message)
        answer = self.coordinator.answer()
        while isinstance(answer, PeerLost):
            answer = self.coordinator.answer()
        return answer


def artifacts_of(directory: Path, share: Share, first_block: int) -> tuple[BlockRef, ...]:
    """The files of a member: its slices, and the whole embedding from block 0 on."""
    refs = []
    for block in range(first_block, SPEC.block_count):
        tensors = CHECKPOINT.block(block)
        if block == 0:
            file = write_artifact(directory, block, tensors, FLOATS)
        else:
            file = store_block(directory, block, share_tensors(SPEC, block, tensors, share), FLOATS)
        refs.append(BlockRef(file.sha256, file.path.stat().st_size, block))
    return tuple(refs)


@pytest.fixture(scope="module")
def agents(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Device]]:
    tmp_path = tmp_path_factory.mktemp("agents")
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setattr(daemon, "backend_class", lambda name: ShareBackend)
        patch.setattr(Trials, "require", lambda *_: None)  # They try another backend.
        devices: list[Device] = []
        for index, share in enumerate(shares_of(SPEC, (2, 1, 1))):
            coordinator = Coordinator(Listener("127.0.0.1", 0))
            stack.callback(coordinator.close)
            stack.callback(coordinator.listener.close)
            endpoint = Endpoint("127.0.0.1", coordinator.listener.port)
            agent = stack.enter_context(running_agent(tmp_path / str(index), endpoint, []))
            hello = coordinator.welcome()
            # On a busy machine the other agents take longer than one may hear nothing.
            stack.enter_context(coordinator.beating())
            made = tmp_path / f"made-{index}"
            made.mkdir()
            refs = artifacts_of(made, share, min(index, 1))
            devices.append(
                Device(agent, coordinator, hello.device, hello.endpoints[0], refs, share, made)
            )
        for device in devices:  # Then all their threads run, which outlive each test.
            assert device.ask(UnloadStage(8)) == Done(8)
        yield devices


@pytest.fixture
def devices(agents: list[Device]) -> Iterator[list[Device]]:
    """Agents without a stage, before and after."""
    yield agents
    for device in agents:
        if not device.agent._stop.is_set():
            assert device.ask(UnloadStage(9)) == Done(9)


def load(devices: list[Device], epoch: int = EPOCH, keeps: tuple[int, ...] = ()) -> None:
    """Load and connect the team, as a coordinator does."""
    for device in devices:
        device.place()
        answer = device.ask(replace(load_stage(device, devices, epoch), keeps=keeps))
        assert isinstance(answer, StageLoaded), answer
    for index, device in enumerate(devices):
        for other in devices[index + 1 :]:
            request = ConnectTeam(2, epoch, other.name, (other.endpoint,), TEAM_KEY)
            assert device.ask(request) == Done(2)


def load_stage(device: Device, devices: list[Device], epoch: int) -> LoadStage:
    return LoadStage(
        1,
        epoch,
        SPEC.to_dict(),
        device.blocks,
        1,
        CONTEXT,
        "",
        b"told to nobody",
        team=tuple(one.name for one in devices),
        share=device.share.to_tuple(),
        team_key=TEAM_KEY,
        sum_bits=32,
    )


def answer(lead: Device, epoch: int = EPOCH, number: int = 1) -> list[int]:
    lead.coordinator.send(StartSequence(epoch, number, 0, PROMPT, Sampling(len(EXPECTED), ())))
    tokens = []
    while True:
        message = lead.coordinator.answer()
        assert isinstance(message, TokenSampled), message
        tokens.append(message.token)
        if message.finish:
            return tokens


def test_agents_load_connect_measure_and_answer_again_and_again(
    devices: list[Device],
) -> None:
    lead, *others = devices
    for epoch in (EPOCH, EPOCH + 1):
        load(devices, epoch)
        measured = lead.ask(MeasureTeam(3, epoch))
        assert isinstance(measured, TeamMeasured)
        assert measured.row_s > 0
        assert answer(lead, epoch) == EXPECTED
    refused = others[0].ask(MeasureTeam(4, EPOCH + 1))
    assert isinstance(refused, RequestFailed)
    assert "does not lead" in refused.reason
    # A stage of a team is a stage: nothing is measured beside it.
    refused = others[0].ask(MeasureDevice(5))
    assert isinstance(refused, RequestFailed)
    assert "unload it first" in refused.reason


def test_a_member_with_a_damaged_file_says_so_and_nobody_is_lost(
    devices: list[Device],
) -> None:
    load(devices)
    lead, middle, _ = devices
    agent = middle.agent
    path = agent._cache.path(middle.blocks[0].sha256)
    (stage,) = agent._stages
    agent._loader.stop_damaged(stage, path)
    damaged = middle.coordinator.answer()
    assert isinstance(damaged, StageDamaged)
    assert damaged.epoch == EPOCH
    lead.coordinator.send(StartSequence(EPOCH, 1, 0, PROMPT, Sampling(1, ())))
    # The lead waits for the member, and unloading ends the wait.
    assert lead.ask(UnloadStage(3)) == Done(3)


@pytest.mark.parametrize("wrong", ["epoch", "key", "no shares", "embedding"])
def test_what_does_not_fit_is_refused(
    devices: list[Device], monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    lead, middle, _ = devices
    if wrong in ("no shares", "embedding"):
        request = load_stage(lead, devices, EPOCH)
        why = "cannot run shares"
        if wrong == "embedding":
            team = (devices[1].name, lead.name)
            request, why = replace(request, team=team), "cannot share"
        else:
            monkeypatch.setitem(lead.agent.__dict__, "_backend", NoShareBackend())
        lead.place()
        refused = lead.ask(request)
    else:
        for device in (lead, middle):
            device.place()
            assert isinstance(device.ask(load_stage(device, devices, EPOCH)), StageLoaded)
        epoch, key, why = EPOCH + 1, TEAM_KEY, "not loaded"
        if wrong == "key":
            epoch, key, why = EPOCH, b"another", "not an earlier member"
        refused = lead.ask(ConnectTeam(2, epoch, middle.name, (middle.endpoint,), key))
    assert isinstance(refused, RequestFailed)
    assert why in refused.reason
    assert lead.ask(UnloadStage(3)) == Done(3)


def test_a_pass_of_a_team_takes_its_turn_at_the_lead(devices: list[Device]) -> None:
    load(devices)
    lead = devices[0]
    turnstile, other = lead.agent._stages.turnstile, Ticket()
    turnstile.enter(other)  # A stage of another model computes.
    with ThreadPoolExecutor(1) as pool:
        answered = pool.submit(answer, lead)
        deadline_s = time.monotonic() + ANSWER_S
        while not turnstile.is_wanted and time.monotonic() < deadline_s:
            time.sleep(1e-3)  # A turnstile tells no event of who waits.
        is_waiting = turnstile.is_wanted
        turnstile.leave(other)
        assert is_waiting
        assert answered.result(ANSWER_S) == EXPECTED


def test_a_team_that_waits_for_a_mute_member_lets_others_compute(devices: list[Device]) -> None:
    load(devices)
    lead, middle, _ = devices
    middle.agent._stages.team_of(EPOCH).stop()
    turnstile, other = lead.agent._stages.turnstile, Ticket()
    lead.coordinator.send(StartSequence(EPOCH, 1, 0, PROMPT, Sampling(1, ())))
    deadline_s = time.monotonic() + ANSWER_S
    while not turnstile.is_taken and time.monotonic() < deadline_s:
        time.sleep(1e-3)  # A turnstile tells no event of who waits.
    assert turnstile.is_taken
    turnstile.enter(other)
    assert lead.agent._stages.team_of(EPOCH).works  # The member does not count as lost yet.
    turnstile.leave(other)
    assert lead.ask(UnloadStage(3)) == Done(3)


def test_two_teams_of_the_same_devices_in_either_order_do_not_block_each_other(
    devices: list[Device], tmp_path: Path
) -> None:
    teams: dict[int, list[Device]] = {}
    shares = shares_of(SPEC, (1, 1))
    for epoch, order in ((EPOCH, devices[:2]), (EPOCH + 1, devices[1::-1])):
        teams[epoch] = []
        for index, device in enumerate(order):
            made = tmp_path / f"{epoch}-{index}"
            made.mkdir()
            blocks = artifacts_of(made, shares[index], min(index, 1))
            member = replace(device, blocks=blocks, share=shares[index], made=made)
            teams[epoch].append(member)
        load(teams[epoch], epoch, keeps=(EPOCH,))
    with ThreadPoolExecutor(2) as pool:
        for number in (1, 2, 3):
            answers = [
                pool.submit(answer, members[0], epoch, number) for epoch, members in teams.items()
            ]
            assert [one.result(ANSWER_S) for one in answers] == [EXPECTED, EXPECTED]


def test_a_killed_agent_is_named_by_the_others(
    devices: list[Device],
) -> None:
    load(devices)
    lead, middle, last = devices
    middle.agent.stop()
    for device in (last, lead):
        if device is lead:  # At rest the lead does not look.
            device.coordinator.send(StartSequence(EPOCH, 1, 0, PROMPT, Sampling(len(EXPECTED), ())))
        message = device.coordinator.answer()
        while isinstance(message, TokenSampled):
            message = device.coordinator.answer()
        assert isinstance(message, PeerLost), message
        assert (message.epoch, message.device) == (EPOCH, middle.name)
