"""An agent without its coordinator keeps its stage for the next one; the test is both of them."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from agent import daemon
from agent.daemon import Agent
from backends.base import Artifacts, Backend, Capabilities, Stage, StageOptions
from calibration.trial import Trials
from model.artifact import read_block, write_artifact
from model.checkpoint import Checkpoint
from model.quantize import BITS, Format
from model.spec import ModelSpec
from tests.agent.teams import CONTEXT, ReferenceStage
from tests.agent.test_daemon import ANSWER_S, Coordinator, running_agent
from wire.connection import Listener
from wire.messages import (
    AgentHello,
    BlockRef,
    CoordinatorWelcome,
    Endpoint,
    Heartbeat,
    KeptStage,
    LoadStage,
    Sampling,
    SequenceFailed,
    StageDamaged,
    StageLoaded,
    StartSequence,
    TokenSampled,
)

FIXTURE = Path(__file__).parents[1] / "fixtures" / "opt-pre"
CHECKPOINT = Checkpoint.open(FIXTURE)
SPEC = CHECKPOINT.spec
GOLDEN = np.load(FIXTURE / "golden.npz")
PROMPT = tuple(GOLDEN["prompt"].tolist())
EXPECTED = GOLDEN["continuation"].tolist()[:8]
EPOCH = 77


class WholeBackend(Backend):
    """The reference, for a whole model. Its passes wait while ``gate`` is closed."""

    gate = threading.Event()
    begun = threading.Event()
    """Whether a pass has come to the gate."""

    @classmethod
    def probe(cls) -> Capabilities:
        return Capabilities("reference", "1", dict.fromkeys(BITS, 32))

    def load(self, spec: ModelSpec, artifacts: Artifacts, options: StageOptions) -> Stage:
        blocks = [read_block(path, spec, block)[1] for block, path in artifacts]
        stage = ReferenceStage(spec, artifacts[0][0], blocks, options.slots)
        stage.before_sum = lambda: self._wait()
        return stage

    def _wait(self) -> None:
        self.begun.set()
        assert self.gate.wait(ANSWER_S)


class Shoal:
    """An agent that has loaded the whole model, and its coordinator."""

    def __init__(self, agent: Agent, coordinator: Coordinator) -> None:
        self.agent = agent
        self.coordinator = coordinator

    def place(self, directory: Path) -> tuple[BlockRef, ...]:
        """Put the model's blocks into the agent's cache."""
        refs = []
        for block in range(SPEC.block_count):
            file = write_artifact(directory, block, CHECKPOINT.block(block), Format.of(32))
            target = self.agent._cache.path(file.sha256)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file.path, target)
            refs.append(BlockRef(file.sha256, file.path.stat().st_size, block))
        return tuple(refs)

    def start(self, number: int, tokens: int = len(EXPECTED)) -> None:
        self.coordinator.send(StartSequence(EPOCH, number, 0, PROMPT, Sampling(tokens, ())))

    def answer(self) -> list[int]:
        tokens: list[int] = []
        while True:
            message = self.coordinator.answer()
            assert isinstance(message, TokenSampled), message
            tokens.append(message.token)
            if message.finish:
                return tokens

    def lose(self, *, keeps: bool) -> AgentHello:
        """End the connection, and welcome the agent again."""
        self.coordinator.close()
        hello = self.coordinator.hello()
        self.coordinator.send(CoordinatorWelcome("test", hello.name, (EPOCH,) if keeps else ()))
        return hello


@contextmanager
def loaded(directory: Path, said: list[str]) -> Iterator[Shoal]:
    coordinator = Coordinator(Listener("127.0.0.1", 0))
    endpoint = Endpoint("127.0.0.1", coordinator.listener.port)
    try:
        with running_agent(directory / "agent", endpoint, said) as agent:
            hello = coordinator.welcome()
            assert hello.kept == ()
            shoal = Shoal(agent, coordinator)
            made = directory / "made"
            made.mkdir()
            order = LoadStage(
                1, EPOCH, SPEC.to_dict(), shoal.place(made), 1, CONTEXT, hello.device, b"key"
            )
            coordinator.send(order)
            assert isinstance(coordinator.answer(), StageLoaded)
            yield shoal
    finally:
        coordinator.listener.close()
        coordinator.close()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def shoal(tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Shoal]:
    monkeypatch.setattr(daemon, "backend_class", lambda name: WholeBackend)
    monkeypatch.setattr(Trials, "require", lambda *_: None)  # They try another backend.
    WholeBackend.gate.set()
    with loaded(tmp_path, said) as shoal:
        yield shoal


def test_a_stage_outlives_its_coordinator_and_answers_the_next_one(
    shoal: Shoal, said: list[str]
) -> None:
    shoal.start(5)
    assert shoal.answer() == EXPECTED
    hello = shoal.lose(keeps=True)
    assert hello.kept == (KeptStage(EPOCH, 5),)
    shoal.start(6)
    assert shoal.answer() == EXPECTED
    assert sum(text.startswith("loaded") for text in said) == 1


def test_an_answer_in_flight_ends_with_its_coordinator(shoal: Shoal) -> None:
    shoal.start(5, CONTEXT - len(PROMPT))
    assert isinstance(shoal.coordinator.answer(), TokenSampled)
    assert shoal.lose(keeps=True).kept == (KeptStage(EPOCH, 5),)
    # The slot is free, and tokens of the old answer do not come.
    shoal.start(6)
    assert shoal.answer() == EXPECTED


def test_a_stage_that_the_next_coordinator_does_not_want_is_unloaded(shoal: Shoal) -> None:
    assert shoal.lose(keeps=False).kept == (KeptStage(EPOCH),)
    shoal.start(6)
    assert shoal.coordinator.answer() == SequenceFailed(EPOCH, 6, "the stage is not loaded")
    assert shoal.lose(keeps=False).kept == ()


def test_a_stage_is_not_kept_for_ever(shoal: Shoal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon, "KEPT_S", -1.0)
    assert shoal.lose(keeps=True).kept == ()


def test_a_stage_that_was_stopped_for_damage_is_not_kept(shoal: Shoal) -> None:
    agent = shoal.agent
    (stage,) = agent._stages
    agent._loader.stop_damaged(stage, agent._cache.path("0" * 64))
    assert shoal.lose(keeps=True).kept == ()


def test_damage_is_told_before_anything_fails_by_it(shoal: Shoal) -> None:
    """Else a request would end by the failure, while the coordinator knows of no damage yet."""
    agent = shoal.agent
    (stage,) = agent._stages
    WholeBackend.gate.clear()
    WholeBackend.begun.clear()
    shoal.start(5)
    assert WholeBackend.begun.wait(ANSWER_S)
    path = agent._cache.path("0" * 64)
    stopping = threading.Thread(target=agent._loader.stop_damaged, args=(stage, path))
    stopping.start()  # It waits for the pass.
    shoal.start(6)
    try:
        told = shoal.coordinator.answer()
        assert isinstance(told, StageDamaged), told
        assert not stage.works
    finally:
        WholeBackend.gate.set()
        stopping.join(ANSWER_S)


def test_a_pass_that_does_not_end_is_told_and_the_agent_joins_again_after_it(shoal: Shoal) -> None:
    shoal.start(5, 1)
    assert len(shoal.answer()) == 1
    WholeBackend.gate.clear()
    shoal.start(6)
    connection = shoal.coordinator.connection
    assert connection is not None
    running_us: list[int] = []
    while len(running_us) < 2:  # It sends heartbeats all the same.
        message, _ = connection.receive()
        assert isinstance(message, Heartbeat)
        connection.send(Heartbeat())
        (stage,) = message.stages
        assert stage.counts is not None
        if stage.counts.running_us:
            running_us.append(stage.counts.running_us)
            assert (stage.epoch, stage.counts.running_rows) == (EPOCH, len(PROMPT))
    assert running_us[0] < running_us[1]
    shoal.coordinator.close()
    joining: list[AgentHello] = []
    waiting = threading.Thread(target=lambda: joining.append(shoal.coordinator.hello()))
    waiting.start()
    waiting.join(1.0)
    assert not joining  # It could not unload its stage now.
    WholeBackend.gate.set()
    waiting.join(ANSWER_S)
    (hello,) = joining
    assert hello.kept == (KeptStage(EPOCH, 6),)
    shoal.coordinator.send(CoordinatorWelcome("test", hello.name))
    shoal.start(7)
    assert shoal.coordinator.answer() == SequenceFailed(EPOCH, 7, "the stage is not loaded")
