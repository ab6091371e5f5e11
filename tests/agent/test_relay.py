"""Two stages of a real model on loopback sockets, against what transformers generated."""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from agent.drafter import Drafter
from agent.links import Link, Measuring
from agent.peers import Entrance, PeerServer, connect_peer, measure_link
from agent.relay import Relay
from agent.sequences import START_AHEAD
from agent.turnstile import Ticket
from backends.base import Array, BackendError, Stage, StageOptions, Tokens
from backends.onnx_cpu import OnnxCpuBackend
from model.artifact import write_artifact
from model.checkpoint import Checkpoint
from model.grammar_process import GrammarProcess
from model.quantize import Format
from model.token_bytes import TokenBytes
from tests.agent.teams import connected
from wire import limits
from wire.activations import HopBits, Rows
from wire.codec import MAGIC, PREFIX
from wire.connection import Connection, Listener
from wire.errors import ConnectFailed, ConnectionLost
from wire.logprobs import decode_logprobs
from wire.messages import (
    CODES,
    PROTOCOL_VERSION,
    Activation,
    BlockChunk,
    Endpoint,
    FetchBlock,
    LoadStage,
    Message,
    PeerLost,
    PeerWelcome,
    ProbePing,
    ProbePong,
    PromptScored,
    Sampling,
    SequenceFailed,
    StartSequence,
    TextRows,
    TokenSampled,
)

LLAMA = Path(__file__).parents[1] / "fixtures" / "llama"
EPOCH = 7
HOP_KEY = b"told to nobody else"
CONTEXT = 160
ANSWER_S = 60.0

GOLDEN = np.load(LLAMA / "golden.npz")
PROMPT = tuple(GOLDEN["prompt"].tolist())
CONTINUATION = GOLDEN["continuation"].tolist()
GREEDY = Sampling(len(CONTINUATION), ())


class GatedStage(Stage):
    """A real stage that runs only while its gate is open, as slow as a test needs it.

    ``calls`` has the slots and the number of rows of each, and the thread that made it; ``broken``
    slots fail whatever they are part of.
    """

    def __init__(self, stage: Stage) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.calls: queue.Queue[tuple[tuple[int, ...], int, threading.Thread]] = queue.Queue()
        self.broken: set[int] = set()
        self._stage = stage

    def forward(
        self, slot: int, position: int, inputs: Array | Tokens, *, logits: int = 1
    ) -> Array:
        self._enter((slot,), len(inputs))
        return self._stage.forward(slot, position, inputs, logits=logits)

    def decode(
        self, slots: Sequence[int], positions: Sequence[int], inputs: Array | Tokens
    ) -> Array:
        self._enter(tuple(slots), len(inputs))
        return self._stage.decode(slots, positions, inputs)

    def next_call(self) -> tuple[tuple[int, ...], int]:
        slots, rows, _ = self.calls.get(timeout=ANSWER_S)
        return slots, rows

    def _enter(self, slots: tuple[int, ...], rows: int) -> None:
        self.calls.put((slots, rows, threading.current_thread()))
        assert self.gate.wait(ANSWER_S)
        if not self.broken.isdisjoint(slots):
            raise BackendError("this slot is broken")

    @property
    def memory_bytes(self) -> int:
        return self._stage.memory_bytes

    def close(self) -> None:
        self._stage.close()


class Node:
    """A device of the ring; what it would tell the coordinator is in ``reports``."""

    def __init__(
        self,
        device: str,
        artifacts: list[tuple[int, Path]],
        context: int,
        hop_bits: HopBits = 32,
        slots: int = 1,
        grammars: GrammarProcess | None = None,
        drafter: Drafter | None = None,
        rows_at_once: tuple[int, ...] = (),
    ) -> None:
        spec = Checkpoint.open(LLAMA).spec
        blocks = range(artifacts[0][0], artifacts[-1][0] + 1)
        self.device = device
        self.reports: queue.Queue[Message] = queue.Queue()
        options = StageOptions(slots, context, 1)
        self.stage = GatedStage(OnnxCpuBackend().load(spec, artifacts, options))
        self.relay = Relay(
            self.stage,
            spec,
            blocks,
            epoch=EPOCH,
            slots=slots,
            context_tokens=context,
            hop_bits=hop_bits,
            report=self.reports.put,
            grammars=grammars,
            drafter=drafter,
            rows_at_once=rows_at_once,
        )
        self.listener = Listener("127.0.0.1", 0)
        self.peers = PeerServer(device, self.listener)
        self.peers.start()
        self.others: list[Node] = []

    def connect(self, other: Node) -> None:
        endpoint = Endpoint("127.0.0.1", other.listener.port)
        other.peers.entrances = (Entrance(self.device, HOP_KEY, other.relay.deliver),)
        connection = connect_peer(self.device, other.device, [endpoint], hop_key=HOP_KEY)
        self.relay.connect(connection, Link(other.device), Measuring())
        self.others.append(other)

    def start(self, message: StartSequence) -> None:
        """Start a sequence as the coordinator does: on every stage, and on the first one last."""
        for other in self.others:
            other.relay.start(replace(message, prompt=()))
        self.relay.start(message)

    def deliver(self, message: Activation, payload: memoryview) -> None:
        """The first rows of a sequence, which the coordinator has started."""
        self.relay.start(StartSequence(EPOCH, message.sequence, message.slot, (), GREEDY))
        self.relay.deliver(message, payload)

    def close(self) -> None:
        self.stage.gate.set()
        self.relay.close()
        self.peers.close()

    def token(self, sequence: int) -> TokenSampled:
        """The next report, which must be a token of ``sequence``."""
        message = self.reports.get(timeout=ANSWER_S)
        assert isinstance(message, TokenSampled), message
        assert (message.epoch, message.sequence) == (EPOCH, sequence)
        assert (message.after_us > 0) == (message.index > 0)
        return message

    def answer(self, sequence: int, begun: int = 0) -> list[int]:
        """Tokens of ``sequence`` from number ``begun`` on, up to its end."""
        tokens: list[int] = []
        while True:
            message = self.token(sequence)
            assert message.index == begun + len(tokens)
            tokens.append(message.token)
            if message.finish:
                assert message.finish == "length"
                return tokens


def blocks_at(bits: int, directory: Path) -> list[tuple[int, Path]]:
    checkpoint = Checkpoint.open(LLAMA)
    return [
        (block, write_artifact(directory, block, checkpoint.block(block), Format.of(bits)).path)
        for block in range(checkpoint.spec.block_count)
    ]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, Path]]:
    return blocks_at(32, tmp_path_factory.mktemp("blocks"))


@pytest.fixture
def ring(artifacts: list[tuple[int, Path]]) -> Iterator[tuple[Node, Node]]:
    first, last = Node("first", artifacts[:2], CONTEXT), Node("last", artifacts[2:], CONTEXT)
    first.connect(last)
    last.connect(first)
    yield first, last
    for node in (first, last):
        node.close()


def start(sequence: int, prompt: tuple[int, ...] = PROMPT, slot: int = 0) -> StartSequence:
    return StartSequence(EPOCH, sequence, slot, prompt, GREEDY)


def activation(
    sequence: int,
    rows: int,
    position: int = 0,
    *,
    slot: int = 0,
    last: bool = False,
    following: int = 0,
) -> tuple[Activation, memoryview]:
    payload: npt.NDArray[np.float32] = np.zeros((rows, 32), np.float32)
    message = Activation(EPOCH, sequence, slot, position, rows, 32, last, following=following)
    return message, payload.data.cast("B")


def test_two_stages_generate_what_the_whole_model_does(ring: tuple[Node, Node]) -> None:
    first, last = ring
    for sequence in (1, 2):
        first.start(start(sequence))
        assert last.answer(sequence) == CONTINUATION
    assert first.reports.empty()


@pytest.mark.parametrize(("bits", "tokens"), [(16, len(CONTINUATION)), (8, 64)])
def test_fewer_bits_on_the_hop_generate_the_same_here(
    artifacts: list[tuple[int, Path]], bits: HopBits, tokens: int
) -> None:
    """The fixture's logits are far enough apart for that; at 8 bits not for ever."""
    first, last = Node("first", artifacts[:2], CONTEXT, bits), Node("last", artifacts[2:], CONTEXT)
    first.connect(last)
    last.connect(first)
    first.start(start(1))
    assert last.answer(1)[:tokens] == CONTINUATION[:tokens]
    for node in (first, last):
        node.close()


def test_one_stage_generates_by_itself(artifacts: list[tuple[int, Path]]) -> None:
    alone = Node("alone", artifacts, CONTEXT)
    alone.start(start(1))
    assert alone.answer(1) == CONTINUATION
    alone.close()


def test_a_prompt_of_several_chunks(
    ring: tuple[Node, Node], artifacts: list[tuple[int, Path]]
) -> None:
    first, last = ring
    prompt = tuple(np.random.default_rng(1).integers(0, 256, 150).tolist())
    first.start(start(1, prompt))
    alone = Node("alone", artifacts, CONTEXT)
    alone.start(start(1, prompt))
    # The token of the last position is sampled although nothing can follow it.
    answer = alone.answer(1)
    assert last.answer(1) == answer
    first.start(replace(start(2, prompt), chunk_tokens=17))
    assert last.answer(2) == answer
    alone.close()


@pytest.mark.parametrize("chunk_tokens", [-1, 0, limits.PREFILL_CHUNK_TOKENS + 1])
def test_a_prompt_in_impossible_chunks_is_refused(
    ring: tuple[Node, Node], chunk_tokens: int
) -> None:
    first, _ = ring
    first.relay.start(replace(start(1), chunk_tokens=chunk_tokens))
    reason = "the coordinator sent a prompt that does not fit"
    assert first.reports.get(timeout=ANSWER_S) == SequenceFailed(EPOCH, 1, reason)


def test_a_prompt_that_leaves_room_for_one_token(ring: tuple[Node, Node]) -> None:
    first, last = ring
    prompt = (PROMPT * 6)[: CONTEXT - 1]
    one = replace(start(1, prompt), sampling=replace(GREEDY, max_tokens=1))
    first.start(one)
    assert len(last.answer(1)) == 1
    assert last.reports.empty()


def test_a_stop_token_ends_the_answer(ring: tuple[Node, Node]) -> None:
    first, last = ring
    stop = CONTINUATION[3]
    first.start(replace(start(1), sampling=replace(GREEDY, stop_tokens=(stop,))))
    messages = [last.token(1) for _ in range(CONTINUATION.index(stop) + 1)]
    assert [message.finish for message in messages] == [""] * (len(messages) - 1) + ["stop"]


@pytest.mark.parametrize(
    "message",
    [
        start(1, (PROMPT * 6)[: CONTEXT + 1]),
        start(1, slot=1),
        start(1, slot=-1),
        start(1, ()),
        start(1, (260,)),
        start(1, (-1,)),
        replace(start(1), sampling=replace(GREEDY, seed=-1)),
    ],
)
def test_what_cannot_be_started_is_reported(
    ring: tuple[Node, Node], message: StartSequence
) -> None:
    first, last = ring
    first.relay.start(message)
    assert isinstance(first.reports.get(timeout=ANSWER_S), SequenceFailed)
    first.start(start(2))
    assert last.answer(2) == CONTINUATION


def test_rows_that_do_not_fit_are_reported(ring: tuple[Node, Node]) -> None:
    _, last = ring
    good, payload = activation(1, 4)
    last.relay.start(start(1))
    for message, rows in (
        (replace(good, slot=1), payload),
        (replace(good, position=CONTEXT - 3), payload),
        (replace(good, position=-1), payload),
        (replace(good, rows=-4), payload),
        (replace(good, rows=0), payload[:0]),
        (replace(good, bits=16), payload),
        # 8 bits a value with scales that are all zero.
        (replace(good, rows=1, bits=8), payload[: 32 + 4]),
        (replace(good, rows=1 << 40), payload),
        (good, payload[:-4]),
    ):
        last.relay.deliver(message, rows)
        assert isinstance(last.reports.get(timeout=ANSWER_S), SequenceFailed), message


def test_what_belongs_elsewhere_disturbs_nothing(ring: tuple[Node, Node]) -> None:
    first, last = ring
    first.start(start(5))
    tokens = [last.token(5).token]
    message, payload = activation(5, 1, position=3)
    last.relay.deliver(replace(message, epoch=EPOCH - 1), payload)
    last.relay.deliver(message, payload)  # Not where the sequence is.
    last.relay.deliver(replace(message, sequence=4), payload)
    first.relay.deliver(TokenSampled(EPOCH - 1, 5, 1, 9, ""), memoryview(b""))
    first.relay.deliver(TokenSampled(EPOCH, 4, 1, 9, ""), memoryview(b""))
    first.relay.deliver(TokenSampled(EPOCH, 5, 1, 1 << 40, ""), memoryview(b""))
    assert tokens + last.answer(5, 1) == CONTINUATION
    assert first.reports.empty()


def test_a_late_chunk_of_a_cancelled_sequence_does_not_take_its_slot_back(
    ring: tuple[Node, Node],
) -> None:
    first, last = ring
    first.start(start(2))
    tokens = [last.token(2).token]
    last.relay.deliver(*activation(1, 4))
    assert tokens + last.answer(2, 1) == CONTINUATION


def test_a_released_sequence_stops_and_its_slot_serves_the_next(ring: tuple[Node, Node]) -> None:
    first, last = ring
    last.stage.gate.clear()
    first.start(start(1))
    last.stage.next_call()
    first.stage.gate.clear()
    last.stage.gate.set()
    last.token(1)  # The next one waits at the first stage's gate.
    for node in ring:
        node.relay.release(1)
    first.stage.gate.set()
    first.start(start(2))
    assert last.answer(2) == CONTINUATION
    assert last.reports.empty()
    assert first.reports.empty()


def test_chunks_are_taken_while_the_stage_is_busy(ring: tuple[Node, Node]) -> None:
    """A sender sees a connection that nobody reads as dead after seconds; some chunks take more."""
    _, last = ring
    last.stage.gate.clear()
    last.deliver(*activation(2, 64))
    assert last.stage.next_call() == ((0,), 64)
    # Nothing beyond a context is kept, nor is anything twice.
    for position in (64, 64, 0, 128, 0):
        last.relay.deliver(*activation(2, 32 if position == 128 else 64, position))
    last.stage.gate.set()
    assert [last.stage.next_call() for _ in range(2)] == [((0,), 64), ((0,), 32)]
    last.deliver(*activation(3, 1))
    assert last.stage.next_call() == ((0,), 1)
    assert last.reports.empty()
    assert last.stage.calls.empty()


def test_a_next_device_that_is_gone_is_reported(ring: tuple[Node, Node]) -> None:
    first, last = ring
    last.peers.close()
    lost = first.reports.get(timeout=ANSWER_S)
    assert isinstance(lost, PeerLost)
    assert (lost.epoch, lost.device) == (EPOCH, "last")
    # Again at each sequence: the coordinator may not have known the deployment yet.
    for number in (1, 2):
        first.relay.start(start(number))
        assert first.reports.get(timeout=ANSWER_S) == lost


def test_a_chunk_that_cannot_be_unpacked_fails_its_sequence_and_no_other(
    ring: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, last = ring

    def no_memory(*_: object) -> Rows:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("agent.relay.decode_rows", no_memory)
        last.deliver(*activation(1, 2))
        failed = last.reports.get(timeout=ANSWER_S)
    assert isinstance(failed, SequenceFailed)
    assert failed.sequence == 1
    first.start(start(2))
    assert last.answer(2) == CONTINUATION


def test_a_sequence_that_comes_while_the_stage_is_unloaded_does_not_run(
    ring: tuple[Node, Node],
) -> None:
    """Another thread unloads than the one that reads the coordinator's word."""
    first, _ = ring
    first.relay.close()
    first.relay.start(start(1))
    assert first.relay.counts().held_rows == 0
    assert first.stage.calls.empty()
    failed = SequenceFailed(EPOCH, 1, "the stage is not loaded")
    assert first.reports.get(timeout=ANSWER_S) == failed


def test_a_format_that_fails_in_the_middle_is_told_as_such(ring: tuple[Node, Node]) -> None:
    class Allowing:
        """Allows the token of the answer, and then none."""

        is_ready = True

        def __init__(self) -> None:
            self.accepted: list[int] = []

        def allowed(self) -> bytes:
            bits = np.zeros(Checkpoint.open(LLAMA).spec.vocab, np.uint8)
            bits[CONTINUATION[0]] = not self.accepted
            return np.packbits(bits, bitorder="little").tobytes()

        def accept(self, token: int) -> None:
            self.accepted.append(token)

    first, last = ring
    grammars = SimpleNamespace(open=lambda grammar, answer: Allowing(), close=lambda: None)
    last.relay._grammars = grammars  # type: ignore[assignment]  # As much as a relay needs.
    sampling = replace(GREEDY, grammar=b'start: "a"')
    last.relay.start(StartSequence(EPOCH, 1, 0, (), sampling))
    first.relay.start(StartSequence(EPOCH, 1, 0, PROMPT, GREEDY))
    token = last.reports.get(timeout=ANSWER_S)
    assert isinstance(token, TokenSampled)
    assert token.token == CONTINUATION[0]
    reason = "the answer's format allows no token here"
    failed = last.reports.get(timeout=ANSWER_S)
    assert failed == SequenceFailed(EPOCH, 1, reason, format_failed=True)


# ---- repetition penalty ------------------------------------------------------------------------

PENALIZED = [
    *(191, 8, 226, 158, 246, 153, 237, 111, 125, 170, 167, 133, 45, 97, 57, 249, 56, 83, 221, 187)
]
"""What transformers generates with a repetition_penalty of 1.3, greedily."""


def test_the_last_stage_penalizes_the_tokens_of_prompt_and_answer(ring: tuple[Node, Node]) -> None:
    """The first one has the prompt; the last one knows only what the coordinator tells it."""
    first, last = ring
    sampling = Sampling(20, (), repetition_penalty=1.3)
    told = replace(sampling, penalized=tuple(sorted(set(PROMPT))))
    last.relay.start(StartSequence(EPOCH, 1, 0, (), told))
    first.relay.start(StartSequence(EPOCH, 1, 0, PROMPT, sampling))
    assert last.answer(1) == PENALIZED


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"penalized": (-1,)}, "penalized tokens that do not fit"),
        ({"penalized": (260,)}, "penalized tokens that do not fit"),
        ({"repetition_penalty": 1e-50}, "a repetition_penalty that is not between 0.1 and 10"),
    ],
)
def test_a_penalty_that_no_coordinator_sends_is_refused(
    ring: tuple[Node, Node], wrong: dict[str, Any], reason: str
) -> None:
    _, last = ring
    last.relay.start(StartSequence(EPOCH, 1, 0, (), replace(GREEDY, **wrong)))
    failed = last.reports.get(timeout=ANSWER_S)
    assert isinstance(failed, SequenceFailed)
    assert reason in failed.reason


# ---- several sequences -------------------------------------------------------------------------

SLOTS = 4
DRAWN = Sampling(40, (), temperature=1.0, top_p=0.95, seed=3)


@pytest.fixture
def shared_ring(artifacts: list[tuple[int, Path]]) -> Iterator[tuple[Node, Node]]:
    first = Node("first", artifacts[:2], CONTEXT, slots=SLOTS)
    last = Node("last", artifacts[2:], CONTEXT, slots=SLOTS)
    first.connect(last)
    last.connect(first)
    yield first, last
    for node in (first, last):
        node.close()


def asked(slot: int) -> StartSequence:
    """A request of its own for each slot: greedy and drawn, short prompts and long ones."""
    prompt = (PROMPT * 6)[slot : slot + (7, 65, 1, 100)[slot]]
    sampling = replace(GREEDY, max_tokens=40) if slot % 2 else replace(DRAWN, seed=slot)
    return StartSequence(EPOCH, slot + 1, slot, prompt, sampling)


def by_sequence(node: Node, count: int) -> dict[int, list[int]]:
    """The answers of ``count`` sequences whose tokens come in any order."""
    answers: dict[int, list[int]] = {}
    while count:
        message = node.reports.get(timeout=ANSWER_S)
        assert isinstance(message, TokenSampled), message
        tokens = answers.setdefault(message.sequence, [])
        assert message.index == len(tokens)
        tokens.append(message.token)
        count -= bool(message.finish)
    return answers


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_sequences_at_once_give_what_each_gives_alone(bits: int, tmp_path: Path) -> None:
    """Greedy and drawn; on stages that round activations, too, as they do so row by row."""
    blocks = blocks_at(bits, tmp_path)
    first = Node("first", blocks[:2], CONTEXT, slots=SLOTS)
    last = Node("last", blocks[2:], CONTEXT, slots=SLOTS)
    whole = Node("whole", blocks, CONTEXT, slots=SLOTS)
    first.connect(last)
    last.connect(first)
    for begin, end in ((first, last), (whole, whole)):
        # Each on its own stages: where they are split, fp32 sums differ in their last bits.
        alone = {}
        for slot in range(SLOTS):
            begin.start(asked(slot))
            alone[SLOTS + slot + 1] = end.answer(slot + 1)
        while not whole.stage.calls.empty():
            whole.stage.next_call()
        begin.stage.gate.clear()
        for slot in range(SLOTS):
            begin.start(replace(asked(slot), sequence=SLOTS + slot + 1))
        begin.stage.gate.set()
        assert by_sequence(end, SLOTS) == alone
    # A stage that holds the whole model has all four tokens at hand once the prompts are through.
    assert any(len(whole.stage.next_call()[0]) == SLOTS for _ in range(60))
    for node in (first, last, whole):
        node.close()


def test_tokens_that_wait_run_together_and_between_the_chunks_of_a_prompt(
    artifacts: list[tuple[int, Path]],
) -> None:
    last = Node("last", artifacts[2:], CONTEXT, slots=SLOTS)
    for slot in range(3):
        last.deliver(*activation(1 + slot, 4, slot=slot))
        assert last.stage.next_call() == ((slot,), 4)
    last.stage.gate.clear()
    last.deliver(*activation(9, 64, slot=3))
    assert last.stage.next_call() == ((3,), 64)
    last.relay.deliver(*activation(9, 64, 64, slot=3))
    last.relay.deliver(*activation(9, 32, 128, slot=3))
    for position in (4, 5):
        for slot in range(3):
            last.relay.deliver(*activation(1 + slot, 1, position, slot=slot))
    last.stage.gate.set()
    calls = [last.stage.next_call() for _ in range(4)]
    assert calls == [((0, 1, 2), 3), ((3,), 64), ((0, 1, 2), 3), ((3,), 32)]
    last.close()


def test_rows_of_one_pass_run_in_one_pass_of_the_next_stage(
    artifacts: list[tuple[int, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.relay.GATHERING_S", ANSWER_S)
    last = Node("last", artifacts[2:], CONTEXT, slots=SLOTS)
    for slot in range(3):
        last.deliver(*activation(1 + slot, 1, slot=slot))
        assert last.stage.next_call() == ((slot,), 1)
    last.relay._pass_s = 1e3
    for slot in range(3):
        last.relay.deliver(*activation(1 + slot, 1, 1, slot=slot, following=2 - slot))
    assert last.stage.next_call() == ((0, 1, 2), 3)
    last.close()


def test_rows_that_do_not_come_are_not_waited_for_long(artifacts: list[tuple[int, Path]]) -> None:
    last = Node("last", artifacts[2:], CONTEXT, slots=SLOTS)
    for slot in range(2):
        last.deliver(*activation(1 + slot, 1, slot=slot))
        last.stage.next_call()
    last.relay._pass_s = 1e3
    last.relay.deliver(*activation(1, 1, 1, following=7))
    assert last.stage.next_call() == ((0,), 1)
    # Rows of no sequence do not keep others waiting.
    until_s = last.relay._gathers_until_s
    last.relay.deliver(*activation(2, 1, 9, slot=1, following=7))
    assert last.relay._gathers_until_s == until_s
    last.close()


def test_several_groups_of_rows_are_in_the_ring(
    artifacts: list[tuple[int, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Node("first", artifacts[:2], CONTEXT, slots=SLOTS, rows_at_once=(1, 2, 2, 2))
    near, far = connected()
    far.set_receive_timeout(ANSWER_S)
    first.relay.connect(near, Link("next"), Measuring())
    for slot in range(SLOTS):
        first.relay.start(start(1 + slot, PROMPT[:1], slot=slot))
        assert first.stage.next_call() == ((slot,), 1)
    sent = received_rows(far)
    assert [next(sent) for _ in range(SLOTS)] == [(number, 0) for number in range(1, 1 + SLOTS)]
    first.stage.gate.clear()
    for number in (4, 3, 2, 1):
        first.relay.deliver(TokenSampled(EPOCH, number, 0, 1, ""), memoryview(b""))
        if number == 4:
            assert first.stage.next_call() == ((3,), 1)
    first.relay._table._round_s = 1e3
    gathers, wait = threading.Event(), first.relay._changed.wait

    def noted(timeout_s: float | None = None) -> bool:
        if timeout_s is not None:
            gathers.set()  # The lock is held until the thread waits.
        return wait(timeout_s)

    monkeypatch.setattr(first.relay._changed, "wait", noted)
    first.stage.gate.set()
    assert first.stage.next_call() == ((0, 1), 2)
    assert gathers.wait(ANSWER_S)
    first.relay.release(4)  # Sequence 3 has waited for it.
    assert first.stage.next_call() == ((2,), 1)
    assert [next(sent) for _ in range(SLOTS)] == [(4, 0), (1, 1), (2, 0), (3, 0)]
    far.close()
    first.close()


def received_rows(connection: Connection) -> Iterator[tuple[int, int]]:
    """The sequence of each row that comes, and how many rows of its pass follow."""
    while True:
        message, _ = connection.receive()
        if isinstance(message, Activation):
            yield message.sequence, message.following


def test_a_token_of_the_only_sequence_runs_in_the_thread_that_brings_it(
    artifacts: list[tuple[int, Path]],
) -> None:
    last = Node("last", artifacts[2:], CONTEXT, slots=SLOTS)
    last.deliver(*activation(1, 1))
    last.relay.deliver(*activation(1, 1, 1))
    last.deliver(*activation(2, 1, slot=1))  # From here on, two might come at once.
    threads = [last.stage.calls.get(timeout=ANSWER_S)[2] for _ in range(3)]
    assert [thread is threading.current_thread() for thread in threads] == [True, True, False]
    last.close()


def test_a_place_that_was_kept_for_rows_that_are_gone_is_ceded(
    artifacts: list[tuple[int, Path]],
) -> None:
    last = Node("last", artifacts[2:], CONTEXT, slots=2)
    relay, turnstile, other = last.relay, last.relay._turnstile, Ticket()
    other.due_s = 1e9  # The relay's next pass would go first.
    entered = threading.Event()

    def compute() -> None:
        turnstile.enter(other)
        entered.set()
        turnstile.leave(other)

    last.deliver(*activation(1, 1))
    last.stage.next_call()
    last.stage.gate.clear()
    # The token cannot be sent on. While that is told, the only rows that wait are released.
    relay._report = lambda message: relay.release(2)
    threads = [
        threading.Thread(target=relay.deliver, args=activation(1, 1, 1, last=True), daemon=True),
        threading.Thread(target=compute, daemon=True),
    ]
    threads[0].start()
    assert last.stage.next_call() == ((0,), 1)
    last.deliver(*activation(2, 1, slot=1))
    threads[1].start()
    while not turnstile.is_wanted:
        time.sleep(1e-3)  # A turnstile tells no event of who waits.
    last.stage.gate.set()
    assert entered.wait(ANSWER_S)
    for thread in threads:
        thread.join(ANSWER_S)
    last.close()


class Contest:
    """A stage of another model that waits for its turn while a relay computes."""

    def __init__(self, relay: Relay) -> None:
        self.entered = threading.Event()
        self._turnstile, self._ticket = relay._turnstile, Ticket()
        self._ticket.due_s = 1e9  # The relay's next pass would go first.
        self._thread = threading.Thread(target=self._compute, daemon=True)
        self._thread.start()
        while not self._turnstile.is_wanted:
            time.sleep(1e-3)  # A turnstile tells no event of who waits.

    def _compute(self) -> None:
        self._turnstile.enter(self._ticket)
        self.entered.set()
        self._turnstile.leave(self._ticket)


def test_no_place_is_kept_while_the_next_device_takes_nothing(
    artifacts: list[tuple[int, Path]],
) -> None:
    first = Node("first", artifacts[:2], CONTEXT, slots=2)
    near, far = connected()
    first.relay.connect(near, Link("next"), Measuring())
    large = threading.Thread(target=near.send, args=(ProbePing(1), bytes(32 << 20)), daemon=True)
    large.start()
    while not near._send_lock.locked():
        time.sleep(1e-3)  # A lock tells no event of who took it.
    first.stage.gate.clear()
    first.relay.start(start(1, PROMPT[:1]))
    first.stage.next_call()
    first.relay.start(start(2, PROMPT[1:2], slot=1))
    contest = Contest(first.relay)
    first.stage.gate.set()
    assert contest.entered.wait(ANSWER_S)
    assert first.relay.works  # It has not waited until the next device was lost.
    far.set_receive_timeout(ANSWER_S)
    rows = [message for message, _ in (far.receive() for _ in range(3))][1:]
    assert [row.sequence for row in rows if isinstance(row, Activation)] == [1, 2]
    large.join(ANSWER_S)
    far.close()
    first.close()


def test_no_place_is_kept_while_a_grammar_is_followed(
    artifacts: list[tuple[int, Path]], tmp_path: Path
) -> None:
    count = Checkpoint.open(LLAMA).spec.vocab
    words = (b"a", b"b", *(b"%d" % token for token in range(2, count)))
    vocabulary = tmp_path / "tokens"
    vocabulary.write_bytes(TokenBytes(words, (False,) * count, count - 1).encode())
    grammars = GrammarProcess(vocabulary)
    grammars.check('start: "a"')
    last = Node("last", artifacts[2:], CONTEXT, slots=2, grammars=grammars)
    child = grammars._child
    assert child is not None
    os.kill(child.pid, signal.SIGSTOP)
    last.stage.gate.clear()
    last.relay.start(replace(start(1, ()), sampling=Sampling(1, (), grammar=b"start: /[ab]*/")))
    last.relay.start(start(2, (), slot=1))
    last.relay.deliver(*activation(1, 1, last=True))
    last.stage.next_call()
    last.relay.deliver(*activation(2, 1, slot=1))
    contest = Contest(last.relay)
    last.stage.gate.set()
    assert contest.entered.wait(ANSWER_S)
    os.kill(child.pid, signal.SIGCONT)
    assert last.token(1).token in (0, 1)
    last.close()


def test_a_sequence_that_fails_leaves_its_neighbours(shared_ring: tuple[Node, Node]) -> None:
    _, last = shared_ring
    for slot in range(3):
        last.deliver(*activation(1 + slot, 4, slot=slot))
        last.stage.next_call()
    last.stage.gate.clear()
    last.deliver(*activation(9, 2, slot=3))
    last.stage.next_call()
    for slot in range(3):
        last.relay.deliver(*activation(1 + slot, 1, 4, slot=slot, last=True))
    last.stage.broken = {1}
    last.stage.gate.set()
    reports = [last.reports.get(timeout=ANSWER_S) for _ in range(3)]
    assert sorted((type(report).__name__, number_of(report)) for report in reports) == [
        ("SequenceFailed", 2),
        ("TokenSampled", 1),
        ("TokenSampled", 3),
    ]
    assert [last.stage.next_call()[0] for _ in range(4)] == [(0, 1, 2), (0,), (1,), (2,)]
    # It is over: what follows is dropped, even where the slot works again.
    last.stage.broken = set()
    last.relay.deliver(*activation(2, 1, 5, slot=1))
    last.deliver(*activation(10, 1, slot=1))
    assert last.stage.next_call() == ((1,), 1)
    assert last.stage.calls.empty()


def number_of(message: Message) -> int:
    assert isinstance(message, (SequenceFailed, TokenSampled))
    return message.sequence


# ---- who may send -------------------------------------------------------------------------------


def test_only_the_previous_device_may_send_to_a_stage(
    ring: tuple[Node, Node], caplog: pytest.LogCaptureFixture
) -> None:
    """A third member knows the epoch, the sequence and the ids, and speaks on real sockets."""
    first, last = ring
    first.stage.gate.clear()
    first.start(start(5))
    first.stage.next_call()
    for node, before in ((first, last), (last, first)):
        endpoint = [Endpoint("127.0.0.1", node.listener.port)]
        for device, key in ((before.device, b"guessed"), ("third", HOP_KEY)):
            with pytest.raises(ConnectFailed, match="not the previous device"):
                connect_peer(device, node.device, endpoint, hop_key=key)
        message, payload = activation(5, 4)
        for said, data in (
            (message, payload),
            (replace(message, sequence=1 << 62), payload),
            (TokenSampled(EPOCH, 5, 0, 9, ""), memoryview(b"")),
        ):
            with connect_peer(before.device, node.device, endpoint) as third:
                third.send(said, data)
                third.set_receive_timeout(ANSWER_S)
                with pytest.raises(ConnectionLost):
                    third.receive()
    first.stage.gate.set()
    assert last.answer(5) == CONTINUATION
    assert first.reports.empty()
    refused = [line for line in caplog.messages if "previous device" in line]
    assert len(refused) == 2  # One for each device that was spoken to.


def test_a_link_is_measured_by_anyone_and_with_small_probes_only(ring: tuple[Node, Node]) -> None:
    _, last = ring
    endpoint = [Endpoint("127.0.0.1", last.listener.port)]
    with connect_peer("third", "last", endpoint) as third:
        assert measure_link(third)[0].rtt_s > 0
        with suppress(ConnectionLost):  # The other side may close while this one still sends.
            third.send(ProbePing(1), bytes(limits.MAX_PROBE_BYTES + 1))
        with pytest.raises(ConnectionLost):
            third.receive()


def large(kind: type[Message]) -> bytes:
    """The beginning of a frame with a header that takes long to decode."""
    code = next(code for code, one in CODES.items() if one is kind)
    return PREFIX.pack(MAGIC, PROTOCOL_VERSION, 0, code, limits.MAX_HEADER_BYTES, 0)


@pytest.mark.parametrize("kind", [ProbePing, FetchBlock, Activation, TextRows, LoadStage])
@pytest.mark.parametrize("device", ["first", "third"])
def test_a_large_header_of_another_device_is_not_read(
    ring: tuple[Node, Node], device: str, kind: type[Message]
) -> None:
    _, last = ring
    endpoint = [Endpoint("127.0.0.1", last.listener.port)]
    key = HOP_KEY if device == "first" else b""
    with connect_peer(device, "last", endpoint, hop_key=key) as other:
        other._transport.send(large(kind))
        other.set_receive_timeout(ANSWER_S)
        with pytest.raises(ConnectionLost, match="closed the connection"):
            other.receive()


@pytest.mark.parametrize("kind", [ProbePong, BlockChunk, LoadStage])
def test_a_large_header_of_the_next_device_is_not_read(
    kind: type[Message], artifacts: list[tuple[int, Path]]
) -> None:
    """The next device has proved who it is, and answers anything."""
    first = Node("first", artifacts[:2], CONTEXT)
    listener = Listener("127.0.0.1", 0)
    accepted: list[Connection] = []

    def welcome() -> None:
        connection = listener.accept()
        assert connection is not None
        connection.receive()
        connection.send(PeerWelcome("last"))
        connection._transport.send(large(kind))
        accepted.append(connection)

    thread = threading.Thread(target=welcome)
    thread.start()
    endpoint = [Endpoint("127.0.0.1", listener.port)]
    connection = connect_peer("first", "last", endpoint, hop_key=HOP_KEY)
    first.relay.connect(connection, Link("last"), Measuring())
    lost = first.reports.get(timeout=ANSWER_S)
    assert isinstance(lost, PeerLost)
    assert kind.__name__ in lost.reason
    thread.join(ANSWER_S)
    accepted[0].close()
    listener.close()
    first.close()


def test_a_stage_that_is_gone_lets_nobody_in(ring: tuple[Node, Node]) -> None:
    first, last = ring
    last.peers.entrances = ()
    with pytest.raises(ConnectFailed, match="not the previous device"):
        connect_peer(
            first.device, "last", [Endpoint("127.0.0.1", last.listener.port)], hop_key=HOP_KEY
        )


@pytest.mark.parametrize("number", [1 << 62, 3 + START_AHEAD + 1, 3 + START_AHEAD, 4])
def test_rows_of_a_sequence_that_nobody_started_block_no_slot(
    ring: tuple[Node, Node], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even from the device before."""
    monkeypatch.setattr("agent.relay.START_WAIT_S", 0.05)
    first, last = ring
    first.start(start(3))
    assert last.answer(3) == CONTINUATION
    last.relay.deliver(*activation(number, 4))
    first.start(start(4))
    assert last.answer(4) == CONTINUATION
    assert last.reports.empty()


def test_rows_that_overtake_the_start_of_their_sequence_wait_for_it(
    artifacts: list[tuple[int, Path]],
) -> None:
    last = Node("last", artifacts[2:], CONTEXT)
    arrived = threading.Event()

    def deliver() -> None:
        arrived.set()
        last.relay.deliver(*activation(7, 4))

    thread = threading.Thread(target=deliver)
    thread.start()
    assert arrived.wait(ANSWER_S)
    last.relay.start(start(7, ()))
    assert last.stage.next_call() == ((0,), 4)
    thread.join(ANSWER_S)
    last.close()


def test_rows_in_a_slot_that_is_not_their_sequences_are_dropped(
    artifacts: list[tuple[int, Path]],
) -> None:
    last = Node("last", artifacts[2:], CONTEXT, slots=2)
    last.relay.start(start(1, ()))
    last.relay.deliver(*activation(1, 4, slot=1))
    last.relay.deliver(*activation(1, 3))
    assert last.stage.next_call() == ((0,), 3)
    assert last.stage.calls.empty()
    last.close()


# ---- log-probabilities and settings -------------------------------------------------------------


def test_a_prompt_is_scored_over_two_stages(ring: tuple[Node, Node]) -> None:
    first, last = ring
    sampling = replace(GREEDY, max_tokens=1, top_logprobs=0, prompt_logprobs=True)
    message = StartSequence(EPOCH, 5, 0, PROMPT, sampling)
    last.relay.start(message)
    first.relay.start(message)
    for position in range(1, len(PROMPT)):
        scored = last.reports.get(timeout=ANSWER_S)
        assert isinstance(scored, PromptScored)
        assert (scored.sequence, scored.position) == (5, position)
        told = decode_logprobs(scored.logprobs, token=PROMPT[position], top=0, vocab=260)
        assert told.logprob < 0
    sampled = last.reports.get(timeout=ANSWER_S)
    assert isinstance(sampled, TokenSampled)
    assert (sampled.token, sampled.finish) == (CONTINUATION[0], "length")
    assert decode_logprobs(sampled.logprobs, token=sampled.token, top=0, vocab=260).logprob < 0
    assert first.reports.empty()


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"grammar": b'start: "a"'}, "cannot keep an answer to a grammar"),
        ({"grammar": b"\xff"}, "no text"),
        ({"logit_bias": ((260, 1.0),)}, "biased tokens"),
        ({"answer": (-1,)}, "outside the vocabulary"),
        ({"top_logprobs": 21}, "a top_logprobs that is not between -1 and 20"),
        ({"prompt_logprobs": True}, "no prompt"),
    ],
    ids=repr,
)
def test_a_sequence_with_settings_that_do_not_fit_fails_alone(
    ring: tuple[Node, Node], setting: dict[str, Any], reason: str
) -> None:
    first, last = ring
    last.relay.start(StartSequence(EPOCH, 5, 0, (), replace(GREEDY, **setting)))
    failed = last.reports.get(timeout=ANSWER_S)
    assert isinstance(failed, SequenceFailed)
    assert reason in failed.reason
    first.start(start(6))
    assert last.answer(6) == CONTINUATION
