"""A long pass lets shorter ones of other models compute between its layers."""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from agent.relay import Relay
from agent.turnstile import Ticket, Turnstile
from backends import onnx_cpu
from backends.base import Array, BackendError, Stage, StageOptions, Tokens
from backends.onnx_cpu import OnnxCpuBackend
from model.checkpoint import Checkpoint
from tests.agent.test_relay import (
    ANSWER_S,
    CONTEXT,
    CONTINUATION,
    EPOCH,
    GREEDY,
    LLAMA,
    PROMPT,
    blocks_at,
)
from tests.agent.test_turnstile import Announced, Shared
from wire.messages import Message, SequenceFailed, StartSequence, TokenSampled


def ticket(last_s: float, weight: float = 1.0) -> Ticket:
    """A stage whose passes take so long."""
    made = Ticket(weight)
    made.last_s = last_s
    return made


class Passes(Shared):
    """Runs stages at a turnstile, each in a thread, and notes the parts that they compute."""

    def __init__(self) -> None:
        super().__init__()
        self.order: list[str] = []
        self._threads: list[threading.Thread] = []

    def run(self, name: str, own: Ticket, parts: int, part_s: float, passes: int = 1) -> None:
        """Run passes in the calling thread. Each part takes ``part_s``."""
        for _ in range(passes):
            self.turnstile.enter(own)
            for part in range(parts):
                if part:
                    self.turnstile.pause(own)
                self.now_s += part_s
                self.order.append(name)
            self.turnstile.leave(own, returns=True)
        self.turnstile.cede(own)

    def queue(self, name: str, own: Ticket, parts: int, part_s: float, passes: int = 1) -> None:
        """Let a thread run passes, which must wait for its turn now."""
        waiting = len(self.turnstile._waiting)
        own.ready = Announced(self.news)
        arguments = (name, own, parts, part_s, passes)
        self._threads.append(threading.Thread(target=self.run, args=arguments, daemon=True))
        self._threads[-1].start()
        self.until(lambda count: count > waiting)

    def join(self) -> None:
        for thread in self._threads:
            thread.join(ANSWER_S)
            assert not thread.is_alive()
        assert not self.turnstile.is_taken


def test_a_short_pass_runs_in_the_middle_of_a_long_one() -> None:
    passes, gate = Passes(), Ticket()
    passes.turnstile.enter(gate)
    passes.queue("long", ticket(8.0), 4, 2.0)
    passes.queue("short", ticket(1.0), 1, 1.0)
    passes.turnstile.leave(gate)
    passes.join()
    assert passes.order == ["long", "short", "long", "long", "long"]


def test_passes_of_one_length_do_not_interrupt_each_other() -> None:
    passes, gate = Passes(), Ticket()
    passes.turnstile.enter(gate)
    passes.queue("one", ticket(8.0), 4, 2.0)
    passes.queue("other", ticket(7.0), 4, 2.0)
    # It comes last, and only it interrupts. The other one stays behind the whole pass.
    passes.queue("short", ticket(1.0), 1, 1.0)
    passes.turnstile.leave(gate)
    passes.join()
    assert passes.order == ["one", "short", *["one"] * 3, *["other"] * 4]


def test_a_paused_pass_and_its_interrupter_take_turns() -> None:
    passes, gate = Passes(), Ticket()
    passes.turnstile.enter(gate)
    passes.queue("long", ticket(8.0), 4, 2.0)
    passes.queue("short", ticket(1.0), 1, 1.0, passes=100)
    passes.turnstile.leave(gate)
    passes.join()
    begun = "".join(name[0] for name in passes.order).rindex("l")
    # The long one has had four parts of 2 s when the short one has had about as much.
    assert 5 <= passes.order[:begun].count("short") <= 9


@pytest.mark.parametrize("weight", [0.5, 1.0, 3.0])
def test_weights_hold_over_many_interrupted_passes(weight: float) -> None:
    passes, gate = Passes(), Ticket()
    passes.turnstile.enter(gate)
    passes.queue("long", ticket(8.0), 8, 1.0, passes=50)
    passes.queue("short", ticket(1.0, weight), 1, 1.0, passes=1200)
    passes.turnstile.leave(gate)
    passes.join()
    last = len(passes.order) - passes.order[::-1].index("long")
    if weight < 3.0:
        last = min(last, len(passes.order) - passes.order[::-1].index("short"))
    counts = Counter(passes.order[: min(last, 400)])
    assert counts["short"] == pytest.approx(weight * counts["long"], rel=0.1)


def test_a_stage_that_has_given_way_does_not_pause() -> None:
    passes, gate = Passes(), Ticket()
    passes.turnstile.enter(gate)
    passes.queue("short", ticket(1.0), 1, 1.0)
    passes.turnstile.give_way(gate)
    assert passes.turnstile.pause(gate) == 0.0
    passes.join()


class SteppedStage(Stage):
    """A real stage whose passes stop between layers until the test lets them go on."""

    def __init__(self, artifacts: list[tuple[int, Path]], name: str, order: list[str]) -> None:
        spec, options = Checkpoint.open(LLAMA).spec, StageOptions(1, CONTEXT, 1)
        self.stage = OnnxCpuBackend().load(spec, artifacts, options)
        self.stage.between = self._between
        self.reached: queue.Queue[None] = queue.Queue()
        self.go = threading.Event()
        self.breaks = False
        self._name, self._order = name, order

    def forward(
        self, slot: int, position: int, inputs: Array | Tokens, *, logits: int = 1
    ) -> Array:
        if self.breaks:
            raise BackendError("this stage is broken")
        result = self.stage.forward(slot, position, inputs, logits=logits)
        self._order.append(self._name)
        return result

    def decode(
        self, slots: Sequence[int], positions: Sequence[int], inputs: Array | Tokens
    ) -> Array:
        return self.stage.decode(slots, positions, inputs)

    def _between(self) -> float:
        self.reached.put(None)
        assert self.go.wait(ANSWER_S)
        assert self.between is not None
        return self.between()

    @property
    def memory_bytes(self) -> int:
        return self.stage.memory_bytes

    def close(self) -> None:
        self.stage.close()


class Model:
    """A whole model on a device that it shares."""

    def __init__(
        self, artifacts: list[tuple[int, Path]], name: str, order: list[str], shared: Turnstile
    ) -> None:
        spec = Checkpoint.open(LLAMA).spec
        self.stage = SteppedStage(artifacts, name, order)
        self.reports: queue.Queue[Message] = queue.Queue()
        self.relay = Relay(
            self.stage,
            spec,
            range(spec.block_count),
            epoch=EPOCH,
            slots=1,
            context_tokens=CONTEXT,
            hop_bits=32,
            report=self.reports.put,
            turnstile=shared,
        )

    def start(self, number: int) -> None:
        self.relay.start(StartSequence(EPOCH, number, 0, PROMPT, GREEDY))

    def answer(self, number: int = 1) -> list[int]:
        tokens = []
        while True:
            message = self.reports.get(timeout=ANSWER_S)
            assert isinstance(message, TokenSampled), message
            if message.sequence == number:
                tokens.append(message.token)
            if message.finish:
                return tokens


@pytest.fixture
def models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Model, Model, list[str]]]:
    monkeypatch.setattr(onnx_cpu, "SEGMENT_BYTES", 1)  # Each layer is a session.
    artifacts, order, shared = blocks_at(32, tmp_path), list[str](), Turnstile()
    long, short = (Model(artifacts, name, order, shared) for name in ("long", "short"))
    short.stage.go.set()
    yield long, short, order
    for model in (long, short):
        model.stage.go.set()
        model.relay.close()


def stop_between_layers(long: Model, short: Model, meanwhile: Callable[[], None]) -> None:
    """Let the short model wait while a pass of the long one stops between two layers."""
    # On a busy machine the short one's pass may take longer. It must not be interrupted for that.
    long.relay._ticket.last_s = 2 * ANSWER_S
    long.start(1)
    long.stage.reached.get(timeout=ANSWER_S)
    news = threading.Condition()
    short.relay._ticket.ready = Announced(news)
    short.start(1)
    with news:
        assert news.wait_for(lambda: long.relay._turnstile.is_wanted, ANSWER_S)
    meanwhile()
    long.stage.go.set()


def test_an_interrupted_model_and_its_interrupter_answer_as_if_alone(
    models: tuple[Model, Model, list[str]],
) -> None:
    long, short, order = models
    stop_between_layers(long, short, lambda: None)
    assert long.answer() == short.answer() == CONTINUATION
    assert order[0] == "short"


def test_an_interrupter_that_fails_lets_the_pass_go_on(
    models: tuple[Model, Model, list[str]],
) -> None:
    long, short, _ = models
    short.stage.breaks = True
    stop_between_layers(long, short, lambda: None)
    assert long.answer() == CONTINUATION
    assert isinstance(short.reports.get(timeout=ANSWER_S), SequenceFailed)


def test_a_sequence_that_is_cancelled_while_its_pass_waits_leaves_its_slot(
    models: tuple[Model, Model, list[str]],
) -> None:
    long, short, _ = models
    stop_between_layers(long, short, lambda: long.relay.release(1))
    assert short.answer() == CONTINUATION
    long.start(2)
    assert long.answer(2) == CONTINUATION
