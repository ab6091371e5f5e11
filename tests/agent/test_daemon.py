"""A whole agent in this process; the test is its coordinator."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import astuple
from pathlib import Path

import pytest

from agent import daemon, memory
from agent import quiet as moments
from agent.config import NAME, AgentConfig, ConfigError, default_name
from agent.daemon import Agent
from agent.quiet import Figures
from backends.base import Backend
from backends.registry import backend_class
from calibration.layers import kept_timings
from calibration.store import CalibrationStore
from model.checkpoint import Checkpoint
from model.memory import memory_bytes
from tests.figures import FIGURES, leave_figures
from wire import conditions, discovery, limits
from wire.conditions import Conditions
from wire.connection import Connection, Listener
from wire.errors import ConnectionLost
from wire.messages import (
    AgentHello,
    BlockRef,
    BlocksFound,
    CancelRequest,
    ConnectStage,
    CoordinatorWelcome,
    DeviceMeasured,
    Done,
    Endpoint,
    FiguresChanged,
    FindBlocks,
    Heartbeat,
    JoinRefused,
    MeasureDevice,
    MeasureLink,
    MeasureModel,
    MeasureModelAgain,
    MeasureQuality,
    Message,
    ModelMeasured,
    Progress,
    RequestFailed,
    Sampling,
    SequenceFailed,
    StartSequence,
    UnloadStage,
)
from wire.profile import BlockTiming

SPEC = Checkpoint.open(Path(__file__).parents[1] / "fixtures" / "llama").spec
ANSWER_S = 60.0
REFS = tuple(BlockRef("0" * 64, 1, block) for block in range(SPEC.block_count))


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

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Send heartbeats meanwhile, also while the agent is not asked anything."""
        over = threading.Event()

        def beat() -> None:
            with suppress(ConnectionLost):  # A test may end the connection.
                while not over.wait(limits.LIVENESS_S / 5):
                    self.send(Heartbeat())

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(ANSWER_S)

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
            # As the real one: an agent that hears nothing for COORDINATOR_PATIENCE_S leaves.
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


@contextmanager
def running_agent(
    state_dir: Path,
    coordinator: Endpoint | None,
    said: list[str],
    *,
    bind_host: str = "127.0.0.1",
    advertise: tuple[Endpoint, ...] = (),
    measures: bool = False,
) -> Iterator[Agent]:
    """``measures`` False: it finds figures of an earlier start."""
    store = state_dir / "calibration.json"
    if not (measures or store.exists()):
        leave_figures(store)
    agent = Agent(
        AgentConfig(
            name="pi",
            state_dir=state_dir,
            cluster="test",
            coordinator=coordinator,
            bind_host=bind_host,
            advertise=advertise,
            data_port=0,
            memory_bytes=None,
            storage_bytes=None,
            threads=1,
            backend="onnx_cpu",
            insecure=True,
        ),
        said.append,
    )
    thread = threading.Thread(target=agent.run)
    thread.start()
    try:
        yield agent
    finally:
        agent.stop()
        thread.join(ANSWER_S)
    assert not thread.is_alive()


@pytest.fixture
def agent(coordinator: Coordinator, said: list[str], tmp_path: Path) -> Iterator[Agent]:
    endpoint = Endpoint("127.0.0.1", coordinator.listener.port)
    with running_agent(tmp_path, endpoint, said) as agent:
        yield agent


def test_what_a_killed_agent_left_goes_with_the_next_start_and_not_before(
    said: list[str], tmp_path: Path
) -> None:
    leftover = tmp_path / "blocks" / ".products-killed"
    with running_agent(tmp_path, Endpoint("127.0.0.1", 9), said):
        leftover.mkdir(parents=True)  # As a load that is under way.
        with pytest.raises(ConfigError), running_agent(tmp_path, None, said):
            pass
        assert leftover.exists()
    with running_agent(tmp_path, Endpoint("127.0.0.1", 9), said):
        assert not leftover.exists()


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
    coordinator.send(ConnectStage(2, 1, "nobody", (), b""))
    answer = coordinator.answer()
    assert isinstance(answer, RequestFailed)
    assert "not loaded" in answer.reason
    coordinator.close()
    assert coordinator.welcome().device == first.device


def test_only_the_first_start_measures_the_device(
    coordinator: Coordinator, said: list[str], tmp_path: Path
) -> None:
    endpoint, store = Endpoint("127.0.0.1", coordinator.listener.port), "calibration.json"
    with running_agent(tmp_path / "first", endpoint, said, measures=True):
        first = coordinator.welcome().profile
    names = [name for name, _ in first.conditions]
    assert names == ["memory", "disk", "call", "relay", "sum"]
    assert first.relay_s not in (0.0, FIGURES["relay"])
    assert len(json.loads((tmp_path / "first" / store).read_text())["entries"]) == len(names)
    leave_figures(tmp_path / "first" / store)
    with running_agent(tmp_path / "first", endpoint, said):
        again = coordinator.welcome().profile
    assert [name for name, _ in again.conditions] == names
    assert (again.memory_read_bytes_per_s, again.call_s, again.relay_s) == (
        FIGURES["memory"],
        FIGURES["call"],
        FIGURES["relay"],
    )


def test_threads_end_if_not_all_of_them_can_be_started(
    coordinator: Coordinator, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, started, is_short = threading.Thread.start, list[threading.Thread](), threading.Event()

    def start(thread: threading.Thread) -> None:
        if thread.name == "worker" and not is_short.is_set():
            is_short.set()
            raise RuntimeError("can't start new thread")
        if thread.name in ("heartbeat", "quiet", "gauges") and not is_short.is_set():
            started.append(thread)
        begin(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with running_agent(tmp_path, Endpoint("127.0.0.1", coordinator.listener.port), said):
        coordinator.welcome()
        coordinator.welcome()  # It comes again.
        assert is_short.is_set()
        assert len(started) == 3
        for thread in started:
            thread.join(ANSWER_S)
            assert not thread.is_alive()


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


def test_another_address_is_tried_where_the_first_is_no_coordinator(
    coordinator: Coordinator, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = Listener("127.0.0.1", 0)

    def hang_up() -> None:
        while (connection := wrong.accept()) is not None:
            connection.close()

    listening = threading.Thread(target=hang_up)
    listening.start()
    endpoints = (
        Endpoint("127.0.0.1", wrong.port),
        Endpoint("127.0.0.1", coordinator.listener.port),
    )
    monkeypatch.setattr(discovery, "find_coordinator", lambda *_: endpoints)
    with running_agent(tmp_path, None, said):
        coordinator.welcome()
        # Two refusals in a row are one line.
        coordinator.close()
        for _ in range(2):
            coordinator.hello()
            coordinator.send(JoinRefused("the cluster is full"))
        coordinator.welcome()
        coordinator.send(UnloadStage(1))
        assert coordinator.answer() == Done(1)
    wrong.close()
    listening.join(ANSWER_S)
    assert said.count("the coordinator refused: the cluster is full; trying again") == 1
    assert sum(line.startswith("joined cluster") for line in said) == 2


def test_a_coordinator_of_another_cluster_is_not_joined(
    coordinator: Coordinator, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Coordinator(Listener("127.0.0.1", 0))
    endpoints = tuple(Endpoint("127.0.0.1", one.listener.port) for one in (other, coordinator))
    monkeypatch.setattr(discovery, "find_coordinator", lambda *_: endpoints)
    with running_agent(tmp_path, None, said):
        assert other.hello().cluster == "test"
        other.send(CoordinatorWelcome("kitchen", "pi"))
        coordinator.welcome()
        coordinator.send(UnloadStage(1))
        assert coordinator.answer() == Done(1)
    with running_agent(tmp_path, endpoints[0], said):
        for _ in range(2):
            other.hello()
            other.send(CoordinatorWelcome("kitchen", "pi"))
    other.listener.close()
    other.close()
    assert [line for line in said if "joined" in line] == [
        f"joined cluster 'test' at 127.0.0.1:{coordinator.listener.port} as pi"
    ]
    assert said[-1] == (
        f"127.0.0.1:{other.listener.port} is the coordinator of cluster 'kitchen', and this agent "
        "wants 'test': give it --cluster kitchen, or the address of another coordinator; "
        "trying again"
    )


def test_an_agent_that_comes_back_says_that_it_is_the_same_process(
    coordinator: Coordinator, said: list[str], tmp_path: Path
) -> None:
    endpoint = Endpoint("127.0.0.1", coordinator.listener.port)
    with running_agent(tmp_path, endpoint, said):
        first = coordinator.hello()
        coordinator.send(JoinRefused("the cluster is full"))
        second = coordinator.hello()
        coordinator.send(JoinRefused("the cluster is full"))
    assert first.run == second.run
    assert first.attempt < second.attempt
    with running_agent(tmp_path, endpoint, said):
        assert coordinator.hello().run not in ("", first.run)
        coordinator.send(JoinRefused("the cluster is full"))


def test_an_agent_announces_no_address_that_only_its_machine_has(
    coordinator: Coordinator, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Joining over loopback, as on the coordinator's machine, says nothing to others."""
    found = ("192.168.1.7", "172.17.0.1", "127.0.0.1")
    monkeypatch.setattr(daemon, "reachable_addresses", lambda host: found)
    advertised = (Endpoint("nas.example", 7430), Endpoint("10.0.0.9", 0))
    endpoint = Endpoint("127.0.0.1", coordinator.listener.port)
    with running_agent(
        tmp_path,
        endpoint,
        said,
        bind_host="0.0.0.0",  # noqa: S104 - what the command binds by default
        advertise=advertised,
    ):
        hello = coordinator.welcome()
    assert [item.host for item in hello.endpoints] == ["192.168.1.7", "172.17.0.1"]
    assert hello.advertised == (advertised[0], Endpoint("10.0.0.9", hello.port))
    assert hello.port == hello.endpoints[0].port
    monkeypatch.setattr(daemon, "reachable_addresses", lambda host: found[2:])
    with running_agent(tmp_path, endpoint, said):
        hello = coordinator.welcome()
    assert [item.host for item in hello.endpoints] == ["127.0.0.1"]
    assert hello.port == 0


@pytest.mark.parametrize(
    ("host_name", "expected"),
    [
        ("pi-1.local", "pi-1"),
        ("raspberrypi_4", "raspberrypi_4"),
        ("My Laptop", "My-Laptop"),
        ("Küche", "Kuche"),
        ("-_x_-", "x"),
        ("台所", "device"),
        ("", "device"),
        ("a" * 64, "a" * 63),
        ("a\nb;c", "a-b-c"),
    ],
)
def test_a_host_name_is_mended_where_a_device_may_not_be_called_so(
    host_name: str, expected: str
) -> None:
    assert default_name(host_name) == expected
    assert NAME.fullmatch(expected)


@pytest.mark.usefixtures("agent")
def test_it_says_which_blocks_it_holds(coordinator: Coordinator, tmp_path: Path) -> None:
    coordinator.welcome()
    held, other = "a" * 64, "b" * 64
    (tmp_path / "blocks" / held).write_bytes(b"x")
    coordinator.send(FindBlocks(1, (other, held, "../device-id")))
    assert coordinator.answer() == BlocksFound(1, (held,))


@pytest.mark.usefixtures("agent")
@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (MeasureQuality(1, SPEC.to_dict(), (), ((1, 2),), (), (), "rtn", 32), "all blocks of the"),
        (
            MeasureQuality(1, SPEC.to_dict(), REFS, ((1, 2),), ((9, (4,)),), (), "rtn", 32),
            "no such",
        ),
        (MeasureQuality(1, SPEC.to_dict(), REFS, ((1, 2),), ((0, (7,)),), (), "rtn", 32), "widths"),
        (
            MeasureQuality(
                1, SPEC.to_dict(), REFS, ((1, 2),), (), (), "rtn", 32, ((SPEC.head_block, (8,)),)
            ),
            "no such boundaries",
        ),
        (MeasureQuality(1, SPEC.to_dict(), REFS, ((1, 2),), (), ((4,),), "rtn", 32), "1 formats"),
        (MeasureQuality(1, SPEC.to_dict(), REFS, ((-1,),), ((0, (4,)),), (), "rtn", 32), "within"),
        (
            MeasureQuality(1, SPEC.to_dict(), REFS, (), ((0, (4,)),), (), "rtn", 32),
            "no calibration",
        ),
        (MeasureQuality(1, SPEC.to_dict(), REFS, ((1, 2),), ((0, (4,)),), (), "rtn", 5), "group"),
    ],
)
def test_a_measurement_of_quality_that_makes_no_sense_is_refused(
    coordinator: Coordinator, request_: MeasureQuality, reason: str
) -> None:
    coordinator.welcome()
    coordinator.send(request_)
    answer = coordinator.answer()
    assert isinstance(answer, RequestFailed)
    assert reason in answer.reason
    assert "internal" not in answer.reason


BUSY = Conditions(2, 1e9, 0.0, 0.0, 9.0, 0.0, 1.0)
"""Worse than any machine of a test is."""


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever runs beside the tests counts as quiet, and agents look around all the time."""
    monkeypatch.setattr(conditions, "QUIET_CORES", 1e6)
    monkeypatch.setattr(conditions, "QUIET_SPREAD", 1e6)
    monkeypatch.setattr(moments, "LOOK_S", 0.02)
    monkeypatch.setattr(moments, "QUIET_S", 0.0)
    monkeypatch.setattr(moments, "PAUSE_S", 0.0)


def onnx() -> Backend:
    return backend_class("onnx_cpu")()


def spoil(store: CalibrationStore) -> None:
    """Make every figure that of a busy machine, and a hundred times as slow."""
    content = json.loads(store.path.read_text())
    for key in content["conditions"]:
        content["conditions"][key] = list(astuple(BUSY))
        content["entries"][key] = [100 * value for value in content["entries"][key]]
    store.path.write_text(json.dumps(content))


@pytest.mark.usefixtures("quiet")
def test_memory_that_another_program_gives_back_is_told(
    coordinator: Coordinator, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = [1 << 30]
    total = memory_bytes()[1]
    monkeypatch.setattr("agent.daemon.memory_bytes", lambda: (free[0], total))
    monkeypatch.setattr(memory, "STEADY_S", 0.1)
    with running_agent(tmp_path, Endpoint("127.0.0.1", coordinator.listener.port), said):
        before = coordinator.welcome().profile.memory_bytes
        free[0] += before
        for change in iter(coordinator.answer, None):
            assert isinstance(change, FiguresChanged)
            after = change.profile.memory_bytes
            if after > before:
                break
    assert after == before + int(memory.SHARE * before)


@pytest.mark.usefixtures("agent", "quiet")
def test_figures_of_a_busy_machine_are_measured_again_when_it_is_quiet(
    coordinator: Coordinator, tmp_path: Path
) -> None:
    coordinator.welcome()
    coordinator.send(MeasureModel(1, SPEC.to_dict(), (4, 8)))
    measured = coordinator.answer()
    assert isinstance(measured, ModelMeasured)
    assert all(timing.conditions is not None for timing in measured.timings)
    store = CalibrationStore(tmp_path / "calibration.json")
    spoil(store)
    slow: dict[tuple[str, int, int], BlockTiming] = {}
    for change in iter(coordinator.answer, None):
        assert isinstance(change, FiguresChanged)
        for timing in change.timings:
            slow[timing.kind, timing.variant, timing.bits] = timing
        if len(slow) == len(measured.timings) and not any(
            timing.conditions is None or timing.conditions.is_noisy for timing in slow.values()
        ):
            break
    before = {(item.kind, item.variant, item.bits): item.decode_s for item in measured.timings}
    assert slow.keys() == before.keys()
    kept = {
        (item.kind, item.variant, item.bits): item
        for item in kept_timings(SPEC, (4, 8), onnx(), threads=1, store=store)
    }
    assert kept == slow


@pytest.mark.usefixtures("agent")
def test_figures_that_calibrate_left_are_told(
    coordinator: Coordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments, "LOOK_S", 0.02)
    coordinator.welcome()
    coordinator.send(MeasureModel(1, SPEC.to_dict(), (4,)))
    assert isinstance(coordinator.answer(), ModelMeasured)
    quiet = Conditions(2, 0.0, 0.0, 0.0, 0.0, 0.0, 2.0)
    store = CalibrationStore(tmp_path / "calibration.json")
    content = json.loads(store.path.read_text())
    for key in content["entries"]:
        content["entries"][key] = [0.125] * len(content["entries"][key])
        content["conditions"][key] = list(astuple(quiet))
    store.path.write_text(json.dumps(content))
    while True:
        change = coordinator.answer()
        assert isinstance(change, FiguresChanged)
        if change.timings and {timing.decode_s for timing in change.timings} == {0.125}:
            break
    figures = change.profile
    assert figures.call_s == figures.relay_s == figures.memory_read_bytes_per_s == 0.125
    assert figures.sum_s == 0.125
    names = ("memory", "disk", "call", "relay", "sum")
    assert dict(figures.conditions) == dict.fromkeys(names, quiet)


def test_the_device_is_measured_again_on_request(
    coordinator: Coordinator, said: list[str], tmp_path: Path
) -> None:
    leave_figures(tmp_path / "calibration.json", others_cores=1e9)
    with running_agent(tmp_path, Endpoint("127.0.0.1", coordinator.listener.port), said):
        ask_for_measurements(coordinator)


def ask_for_measurements(coordinator: Coordinator) -> None:
    hello = coordinator.welcome()
    names = [name for name, _ in hello.profile.conditions]
    assert names == ["memory", "disk", "call", "relay", "sum"]
    assert hello.profile.kernel_id
    coordinator.send(MeasureDevice(1))
    answer = coordinator.answer()
    assert isinstance(answer, DeviceMeasured)
    assert answer.profile.memory_bytes == hello.profile.memory_bytes
    assert answer.profile.memory_read_bytes_per_s not in (0, FIGURES["memory"])
    # Whoever asked may have gone away.
    coordinator.send(MeasureDevice(2))
    coordinator.send(CancelRequest(2))
    assert coordinator.answer() == RequestFailed(2, "cancelled")
    coordinator.send(MeasureModel(3, SPEC.to_dict(), (8,)))
    first = coordinator.answer()
    coordinator.send(MeasureModel(4, SPEC.to_dict(), (8,)))
    kept = coordinator.answer()
    coordinator.send(MeasureModelAgain(5, SPEC.to_dict(), (8,)))
    again = coordinator.answer()
    assert isinstance(first, ModelMeasured)
    assert isinstance(kept, ModelMeasured)
    assert isinstance(again, ModelMeasured)
    assert kept.timings == first.timings


@pytest.mark.usefixtures("quiet")
def test_a_quiet_moment_ends_when_something_is_asked(
    coordinator: Coordinator, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, ended = threading.Event(), threading.Event()

    def improve(figures: Figures, check: Callable[[], None]) -> bool:
        begun.set()
        try:
            while True:
                check()
                time.sleep(0.001)
        finally:
            ended.set()

    monkeypatch.setattr(Figures, "improve", improve)
    endpoint = Endpoint("127.0.0.1", coordinator.listener.port)
    with running_agent(tmp_path, endpoint, said):
        coordinator.welcome()
        assert begun.wait(ANSWER_S)
        coordinator.send(MeasureModel(1, SPEC.to_dict(), (4,)))
        assert isinstance(coordinator.answer(), ModelMeasured)
        assert ended.is_set()
