"""Three stages of a random encoder on loopback sockets, against what transformers computed."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from agent.encoding import EncoderRelay
from agent.links import Link, Measuring
from agent.peers import Entrance, PeerServer, connect_peer
from backends.base import StageOptions
from backends.onnx_cpu import OnnxCpuBackend
from model.quantize import Format
from model.texts import Texts
from tests.encoder_cases import Golden, stored
from wire import limits
from wire.connection import Listener
from wire.messages import (
    EncodeTexts,
    Endpoint,
    Message,
    PassFailed,
    PeerLost,
    Sampling,
    SequenceFailed,
    StartSequence,
    TextRows,
    TextsEncoded,
)

EPOCH = 7
HOP_KEY = b"told to nobody else"
CONTEXT = 48
ANSWER_S = 60.0
GOLDEN = Golden.load("bert-span")


LONG_AND_SHORT = (40, *[1] * 30)
"""Side by side they are 31 texts of 40 rows, more than a pass may have."""


class Node:
    """A device of the ring; what it would tell the coordinator is in ``reports``."""

    def __init__(self, device: str, name: str, directory: Path, blocks: range) -> None:
        checkpoint, artifacts = stored(name, Format.of(32), directory)
        self.device = device
        self.reports: queue.Queue[Message] = queue.Queue()
        options = StageOptions(1, CONTEXT, 1, exact=True)
        own = artifacts[blocks.start : blocks.stop]
        self.relay = EncoderRelay(
            OnnxCpuBackend().stage(checkpoint.spec, own, options),
            checkpoint.spec,
            blocks,
            epoch=EPOCH,
            context_tokens=CONTEXT,
            hop_bits=32,
            report=self.reports.put,
        )
        self.listener = Listener("127.0.0.1", 0)
        self.peers = PeerServer(device, self.listener)
        self.peers.start()

    def connect(self, other: Node) -> None:
        endpoint = Endpoint("127.0.0.1", other.listener.port)
        other.peers.entrances = (Entrance(self.device, HOP_KEY, other.relay.deliver),)
        connection = connect_peer(self.device, other.device, [endpoint], hop_key=HOP_KEY)
        self.relay.connect(connection, Link(other.device), Measuring())

    def close(self) -> None:
        self.relay.close()
        self.peers.close()

    def next(self) -> Message:
        return self.reports.get(timeout=ANSWER_S)


@pytest.fixture
def ring(tmp_path: Path) -> Iterator[list[Node]]:
    blocks = (range(2), range(2, 4), range(4, 5))
    nodes = [Node(f"d{index}", "bert-span", tmp_path, part) for index, part in enumerate(blocks)]
    for index, node in enumerate(nodes):
        node.connect(nodes[(index + 1) % len(nodes)])
    yield nodes
    for node in nodes:
        node.close()


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Node]:
    node = Node("alone", "bert-span", tmp_path, range(5))
    yield node
    node.close()


def order(number: int, golden: Golden = GOLDEN) -> EncodeTexts:
    texts = golden.texts
    tokens = tuple(golden.tokens.tolist())
    return EncodeTexts(EPOCH, number, tokens, texts.lengths, texts.seconds)


def result(node: Node, width: int = 2) -> np.ndarray:
    message = node.next()
    assert isinstance(message, TextsEncoded), message
    return np.frombuffer(message.values, "<f4").reshape(-1, width)


def test_passes_go_through_three_stages(ring: list[Node]) -> None:
    for number in (1, 2, 3):
        ring[0].relay.encode(order(number))
    for _ in range(3):
        np.testing.assert_allclose(result(ring[-1]), GOLDEN.output, atol=1e-4)
    counts = [node.relay.counts() for node in ring]
    assert [count.passes for count in counts] == [3, 3, 3]
    assert counts[0].rows == 3 * len(GOLDEN.tokens)
    assert counts[0].sent_bytes == 3 * 4 * 32 * len(GOLDEN.tokens)
    assert counts[2].frames == 0
    assert [one.rows for one in ring[1].relay.traced((2,))] == [len(GOLDEN.tokens)]


def test_long_results_come_in_parts(alone: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RESULT_BYTES", 100)
    alone.relay.encode(order(1))
    parts, first = [], 0
    while first < len(GOLDEN.tokens):
        message = alone.next()
        assert isinstance(message, TextsEncoded)
        assert message.first == first
        parts.append(np.frombuffer(message.values, "<f4").reshape(-1, 2))
        assert parts[-1].nbytes <= 100
        first += len(parts[-1])
    np.testing.assert_allclose(np.concatenate(parts), GOLDEN.output, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lengths": (49,), "seconds": (49,)}, "do not fit"),
        ({"lengths": (3,), "seconds": (3,)}, "do not fit"),
        ({"seconds": (99, 1, 11, 3, 14)}, "do not fit"),
        (
            {"tokens": (5,) * 70, **dict.fromkeys(("lengths", "seconds"), LONG_AND_SHORT)},
            "do not fit",
        ),
        ({"tokens": (128,) * len(GOLDEN.tokens)}, "outside the vocabulary"),
        ({"tokens": (-1,) * len(GOLDEN.tokens)}, "outside the vocabulary"),
    ],
)
def test_false_orders_end_one_pass(alone: Node, change: dict[str, object], said: str) -> None:
    plain = order(1)
    values = {name: getattr(plain, name) for name in ("tokens", "lengths", "seconds")}
    alone.relay.encode(EncodeTexts(EPOCH, 1, **(values | change)))
    message = alone.next()
    assert isinstance(message, PassFailed)
    assert message.number == 1
    assert said in message.reason
    alone.relay.encode(order(2))
    np.testing.assert_allclose(result(alone), GOLDEN.output, atol=1e-4)


def test_false_rows_end_one_pass(ring: list[Node]) -> None:
    for message, payload in (
        (TextRows(EPOCH, 4, 32, (2,), (2,)), b"short"),
        (TextRows(EPOCH, 4, 32, (60,), (60,)), bytes(60 * 128)),
        (TextRows(EPOCH, 4, 32, (), ()), b""),
    ):
        ring[1].relay.deliver(message, memoryview(payload))
        said = ring[1].next()
        assert isinstance(said, PassFailed)
        assert said.number == 4
    # Rows of another epoch are dropped in silence.
    ring[1].relay.deliver(TextRows(EPOCH + 1, 5, 32, (1,), (1,)), memoryview(bytes(128)))
    ring[1].relay.deliver(TextRows(EPOCH, 6, 32, (1,), (1,)), memoryview(bytes(4 * 32 - 4)))
    said = ring[1].next()
    assert isinstance(said, PassFailed)
    assert said.number == 6


def test_a_prompt_is_refused_by_what_the_model_does(alone: Node) -> None:
    alone.relay.start(StartSequence(EPOCH, 1, 0, (1, 2), Sampling(4, ())))
    said = alone.next()
    assert isinstance(said, SequenceFailed)
    assert "generates none" in said.reason


def test_a_lost_hop_is_told(ring: list[Node]) -> None:
    ring[1].close()
    ring[0].relay.encode(order(1))
    messages = [ring[0].next()]
    assert isinstance(messages[0], PeerLost)
    assert messages[0].device == "d1"
    assert not ring[0].relay.works


def test_texts_that_wait_are_bounded(alone: Node) -> None:
    # The stage's thread takes one pass at a time. It can be anywhere, so twice the bound is sent.
    for number in range(200):
        alone.relay.encode(order(number))
    kinds = {type(alone.next()) for _ in range(200)}
    assert kinds <= {TextsEncoded, PassFailed}
    assert Texts.plain(1).are_sound
