"""A whole agent in this process; the test is its coordinator."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.config import AgentConfig
from agent.daemon import Agent
from model.checkpoint import Checkpoint
from wire.connection import Connection, Listener
from wire.messages import (
    AgentHello,
    CancelRequest,
    ConnectStage,
    CoordinatorWelcome,
    Done,
    Endpoint,
    Heartbeat,
    JoinRefused,
    MeasureLink,
    MeasureModel,
    Message,
    ModelMeasured,
    Progress,
    RequestFailed,
    Sampling,
    SequenceFailed,
    StartSequence,
    UnloadStage,
)

SPEC = Checkpoint.open(Path(__file__).parents[1] / "fixtures" / "llama").spec
ANSWER_S = 20.0


class Coordinator:
    """Accepts the agent, again and again."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.connection: Connection | None = None

    def hello(self) -> AgentHello:
        """The next time that the agent comes."""
        connection = self.listener.accept()
        assert connection is not None
        connection.set_receive_timeout(ANSWER_S)
        self.close()
        self.connection = connection
        message, _ = connection.receive()
        assert isinstance(message, AgentHello)
        return message

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()

    def welcome(self) -> AgentHello:
        hello = self.hello()
        self.send(CoordinatorWelcome("test", hello.name))
        return hello

    def send(self, message: Message) -> None:
        assert self.connection is not None
        self.connection.send(message)

    def answer(self) -> Message:
        """What the agent says next, heartbeats and progress aside."""
        while True:
            message = self.said()
            if not isinstance(message, Progress):
                return message

    def said(self) -> Message:
        assert self.connection is not None
        while True:
            # As the real one: an agent that hears nothing for LIVENESS_S looks elsewhere.
            message, _ = self.connection.receive()
            if not isinstance(message, Heartbeat):
                return message
            self.connection.send(Heartbeat())


@pytest.fixture
def coordinator() -> Iterator[Coordinator]:
    coordinator = Coordinator(Listener("127.0.0.1", 0))
    yield coordinator
    coordinator.listener.close()
    coordinator.close()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def agent(coordinator: Coordinator, said: list[str], tmp_path: Path) -> Iterator[Agent]:
    agent = Agent(
        AgentConfig(
            name="pi",
            state_dir=tmp_path,
            cluster="test",
            coordinator=Endpoint("127.0.0.1", coordinator.listener.port),
            bind_host="127.0.0.1",
            data_port=0,
            memory_bytes=None,
            storage_bytes=None,
            threads=1,
            backend="onnx_cpu",
        ),
        said.append,
    )
    thread = threading.Thread(target=agent.run)
    thread.start()
    yield agent
    agent.stop()
    thread.join(ANSWER_S)
    assert not thread.is_alive()


@pytest.mark.usefixtures("agent")
def test_it_answers_joins_again_and_keeps_its_identity(
    coordinator: Coordinator, said: list[str]
) -> None:
    first = coordinator.hello()
    coordinator.send(JoinRefused("the cluster is full"))
    second = coordinator.welcome()
    assert second.device == first.device
    assert "the coordinator refused: the cluster is full; trying again" in said
    coordinator.send(UnloadStage(1))
    assert coordinator.answer() == Done(1)
    coordinator.send(ConnectStage(2, 1, "nobody", ()))
    answer = coordinator.answer()
    assert isinstance(answer, RequestFailed)
    assert "not loaded" in answer.reason
    coordinator.close()
    assert coordinator.welcome().device == first.device


@pytest.mark.usefixtures("agent")
def test_work_that_nobody_waits_for_ends(coordinator: Coordinator) -> None:
    coordinator.welcome()
    coordinator.send(MeasureModel(1, SPEC.to_dict(), (4, 8, 16, 32)))
    coordinator.send(CancelRequest(1))
    coordinator.send(MeasureModel(2, SPEC.to_dict(), (32,)))
    assert coordinator.answer() == RequestFailed(1, "cancelled")
    assert isinstance(coordinator.answer(), ModelMeasured)


@pytest.mark.usefixtures("agent")
def test_a_prompt_for_a_stage_that_is_not_loaded_is_answered(coordinator: Coordinator) -> None:
    coordinator.welcome()
    coordinator.send(StartSequence(4, 9, 0, (1,), Sampling(1, ())))
    assert coordinator.answer() == SequenceFailed(4, 9, "the stage is not loaded")


@pytest.mark.usefixtures("agent")
@pytest.mark.parametrize(
    "endpoint", [Endpoint("192.168.1..10", 1), Endpoint("127.0.0.1", 1 << 20), Endpoint("", 0)]
)
def test_a_peer_at_no_address_is_named(coordinator: Coordinator, endpoint: Endpoint) -> None:
    coordinator.welcome()
    coordinator.send(MeasureLink(1, "peer", (endpoint,)))
    answer = coordinator.answer()
    assert isinstance(answer, RequestFailed)
    assert "cannot connect" in answer.reason


@pytest.mark.usefixtures("agent")
def test_a_coordinator_that_breaks_the_protocol_is_left(coordinator: Coordinator) -> None:
    coordinator.welcome()
    coordinator.send(Progress(1, "load", 0, 1, "bytes"))
    coordinator.welcome()
