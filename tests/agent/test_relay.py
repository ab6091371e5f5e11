"""Two stages of a real model on loopback sockets, against what transformers generated."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from agent.links import Link, Measuring
from agent.peers import PeerServer, connect_peer
from agent.relay import Relay
from backends.base import Array, Stage, StageOptions, Tokens
from backends.onnx_cpu import OnnxCpuBackend
from model.artifact import write_artifact
from model.checkpoint import Checkpoint
from model.quantize import Format
from wire import limits
from wire.activations import HopBits, Rows
from wire.connection import Listener
from wire.messages import (
    Activation,
    Endpoint,
    Message,
    PeerLost,
    Sampling,
    SequenceFailed,
    StartSequence,
    TokenSampled,
)

LLAMA = Path(__file__).parents[1] / "fixtures" / "llama"
EPOCH = 7
CONTEXT = 160
ANSWER_S = 30

GOLDEN = np.load(LLAMA / "golden.npz")
PROMPT = tuple(GOLDEN["prompt"].tolist())
CONTINUATION = GOLDEN["continuation"].tolist()
GREEDY = Sampling(len(CONTINUATION), ())


class GatedStage(Stage):
    """A real stage that runs only while its gate is open, as slow as a test needs it."""

    def __init__(self, stage: Stage) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self._stage = stage

    def forward(
        self, slot: int, position: int, inputs: Array | Tokens, *, logits: bool = True
    ) -> Array:
        assert self.gate.wait(ANSWER_S)
        return self._stage.forward(slot, position, inputs, logits=logits)

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
    ) -> None:
        spec = Checkpoint.open(LLAMA).spec
        blocks = range(artifacts[0][0], artifacts[-1][0] + 1)
        self.device = device
        self.reports: queue.Queue[Message] = queue.Queue()
        self.stage = GatedStage(OnnxCpuBackend().load(spec, artifacts, StageOptions(1, context, 1)))
        self.relay = Relay(
            self.stage,
            spec,
            blocks,
            epoch=EPOCH,
            slots=1,
            context_tokens=context,
            hop_bits=hop_bits,
            report=self.reports.put,
        )
        self.listener = Listener("127.0.0.1", 0)
        self.peers = PeerServer(device, self.listener, self.relay.deliver)
        self.peers.start()

    def connect(self, other: Node) -> None:
        endpoint = Endpoint("127.0.0.1", other.listener.port)
        connection = connect_peer(self.device, other.device, [endpoint])
        self.relay.connect(connection, Link(other.device), Measuring())

    def close(self) -> None:
        self.stage.gate.set()
        self.relay.close()
        self.peers.close()

    def token(self, sequence: int) -> TokenSampled:
        """The next report, which must be a token of ``sequence``."""
        message = self.reports.get(timeout=ANSWER_S)
        assert isinstance(message, TokenSampled), message
        assert (message.epoch, message.sequence) == (EPOCH, sequence)
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


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, Path]]:
    directory = tmp_path_factory.mktemp("blocks")
    checkpoint = Checkpoint.open(LLAMA)
    return [
        (block, write_artifact(directory, block, checkpoint.block(block), Format.of(32)).path)
        for block in range(checkpoint.spec.block_count)
    ]


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


def activation(sequence: int, rows: int, position: int = 0) -> tuple[Activation, memoryview]:
    payload: npt.NDArray[np.float32] = np.zeros((rows, 32), np.float32)
    message = Activation(EPOCH, sequence, 0, position, rows, 32, False, GREEDY)
    return message, payload.data.cast("B")


def test_two_stages_generate_what_the_whole_model_does(ring: tuple[Node, Node]) -> None:
    first, last = ring
    for sequence in (1, 2):
        first.relay.start(start(sequence))
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
    first.relay.start(start(1))
    assert last.answer(1)[:tokens] == CONTINUATION[:tokens]
    for node in (first, last):
        node.close()


def test_one_stage_generates_by_itself(artifacts: list[tuple[int, Path]]) -> None:
    alone = Node("alone", artifacts, CONTEXT)
    alone.relay.start(start(1))
    assert alone.answer(1) == CONTINUATION
    alone.close()


def test_a_prompt_of_several_chunks(
    ring: tuple[Node, Node], artifacts: list[tuple[int, Path]]
) -> None:
    first, last = ring
    prompt = tuple(np.random.default_rng(1).integers(0, 256, 150).tolist())
    first.relay.start(start(1, prompt))
    alone = Node("alone", artifacts, CONTEXT)
    alone.relay.start(start(1, prompt))
    # The token of the last position is sampled although nothing can follow it.
    answer = alone.answer(1)
    assert last.answer(1) == answer
    first.relay.start(replace(start(2, prompt), chunk_tokens=17))
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
    first.relay.start(one)
    assert len(last.answer(1)) == 1
    assert last.reports.empty()


def test_a_stop_token_ends_the_answer(ring: tuple[Node, Node]) -> None:
    first, last = ring
    stop = CONTINUATION[3]
    first.relay.start(replace(start(1), sampling=replace(GREEDY, stop_tokens=(stop,))))
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
    first.relay.start(start(2))
    assert last.answer(2) == CONTINUATION


def test_rows_that_do_not_fit_are_reported(ring: tuple[Node, Node]) -> None:
    _, last = ring
    good, payload = activation(1, 4)
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
        (replace(good, sampling=replace(GREEDY, seed=-1)), payload),
    ):
        last.relay.deliver(message, rows)
        assert isinstance(last.reports.get(timeout=ANSWER_S), SequenceFailed), message


def test_what_belongs_elsewhere_disturbs_nothing(ring: tuple[Node, Node]) -> None:
    first, last = ring
    first.relay.start(start(5))
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
    first.relay.start(start(2))
    tokens = [last.token(2).token]
    last.relay.deliver(*activation(1, 4))
    assert tokens + last.answer(2, 1) == CONTINUATION


def test_a_released_sequence_stops_and_its_slot_serves_the_next(ring: tuple[Node, Node]) -> None:
    first, last = ring
    last.stage.gate.clear()
    first.relay.start(start(1))
    first.stage.gate.clear()
    last.stage.gate.set()
    last.token(1)  # The next one waits at the first stage's gate.
    for node in ring:
        node.relay.release(1)
    first.stage.gate.set()
    first.relay.start(start(2))
    assert last.answer(2) == CONTINUATION
    assert last.reports.empty()
    assert first.reports.empty()


def test_chunks_are_taken_while_the_stage_is_busy(ring: tuple[Node, Node]) -> None:
    """A sender sees a connection that nobody reads as dead after seconds; some chunks take more."""
    first, last = ring
    last.stage.gate.clear()
    first.relay.start(start(1, (PROMPT * 6)[:150]))
    last.relay.deliver(*activation(2, 64))
    last.relay.deliver(*activation(2, 64, position=64))
    assert last.reports.empty()
    # More than two contexts of rows cannot be honest.
    for _ in range(CONTEXT):
        last.relay.deliver(*activation(3, 64))
    assert isinstance(last.reports.get(timeout=ANSWER_S), SequenceFailed)


def test_a_next_device_that_is_gone_is_reported(ring: tuple[Node, Node]) -> None:
    first, last = ring
    last.peers.close()
    lost = first.reports.get(timeout=ANSWER_S)
    assert isinstance(lost, PeerLost)
    assert (lost.epoch, lost.device) == (EPOCH, "last")


def test_a_chunk_that_cannot_be_unpacked_fails_its_sequence_and_no_other(
    ring: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, last = ring

    def no_memory(*_: object) -> Rows:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("agent.relay.decode_rows", no_memory)
        last.relay.deliver(*activation(1, 2))
        failed = last.reports.get(timeout=ANSWER_S)
    assert isinstance(failed, SequenceFailed)
    assert failed.sequence == 1
    first.relay.start(start(2))
    assert last.answer(2) == CONTINUATION
