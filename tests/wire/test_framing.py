"""Framing without I/O: any split of the bytes gives the same messages, and both handshakes."""

from __future__ import annotations

from dataclasses import replace

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.machines import answering, calling
from wire import admission, introduction, limits
from wire.claim import Claim
from wire.codec import MAGIC, PREFIX, encode
from wire.errors import AuthFailed, ConnectionLost, ProtocolError, VersionMismatch, WireError
from wire.framing import BUFFER_BYTES, Framer
from wire.handshake import NEEDED
from wire.introduction import Answerer, Caller
from wire.messages import (
    Activation,
    BlockChunk,
    Heartbeat,
    JoinRefused,
    Message,
    PeerHello,
    ProbePing,
    RequestFailed,
)

ACTIVATION = Activation(1, 2, 0, 3, 4, 32, True)


def feed(framer: Framer, data: bytes, cuts: list[int]) -> list[tuple[Message, bytes]]:
    """All messages in ``data``, which arrives in pieces of at most these sizes, over and over."""
    frames: list[tuple[Message, bytes]] = []
    begin = turn = 0
    while True:
        while (frame := framer.next_frame()) is not None:
            frames.append((frame[0], bytes(frame[1])))
        if begin == len(data):
            return frames
        space, _ = framer.space()
        piece = data[begin : begin + min(len(space), cuts[turn % len(cuts)])]
        space[: len(piece)] = piece
        framer.received(len(piece))
        begin, turn = begin + len(piece), turn + 1


def outcome(framer: Framer, data: bytes, cuts: list[int]) -> str:
    """The error that ends a connection on which ``data`` arrives, then the end of the stream."""
    try:
        feed(framer, data, cuts)
        framer.received(0)
    except WireError as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("the end of the stream is no error")


sizes = st.sampled_from(
    [0, 1, 8, 4096, BUFFER_BYTES - 64, BUFFER_BYTES, BUFFER_BYTES + 1, 3 * BUFFER_BYTES]
)
contents = st.tuples(st.sampled_from([RequestFailed, ProbePing]), st.integers(0, 9), sizes)


def framed(kind: type[Message], number: int, size: int) -> tuple[Message, bytes]:
    """A message with a header, or a payload, of about ``size`` bytes."""
    if kind is ProbePing:
        return ProbePing(number), bytes([number]) * size
    return RequestFailed(number, "x" * size), b""


pieces = st.lists(st.integers(1, 2 * BUFFER_BYTES), min_size=1, max_size=5)


@settings(deadline=None)
@given(st.lists(contents, max_size=8), pieces)
def test_any_split_gives_the_same_messages(
    parts: list[tuple[type[Message], int, int]], cuts: list[int]
) -> None:
    frames = [framed(*part) for part in parts]
    data = b"".join(encode(message, len(payload)) + payload for message, payload in frames)
    assert feed(Framer("pi:1"), data, cuts) == frames


@settings(deadline=None)
@given(st.binary(max_size=200), pieces, st.booleans())
def test_hostile_bytes_end_in_one_error_however_they_are_split(
    data: bytes, cuts: list[int], has_prefix: bool
) -> None:
    if has_prefix:  # A plausible prefix, so that the header is what is hostile.
        data = PREFIX.pack(MAGIC, 3, 0, 40, len(data), 0) + data
    expected = outcome(Framer("pi:1"), data, [1 << 20])
    assert outcome(Framer("pi:1"), data, cuts) == expected
    assert outcome(Framer("pi:1"), data, [1]) == expected


def test_every_truncation_is_told_from_an_orderly_end() -> None:
    frame = encode(ACTIVATION, 8) + b"payload!"
    for cut in range(1, len(frame)):
        found = outcome(Framer("pi:1"), frame[:cut], [len(frame)])
        assert found == "ConnectionLost: pi:1 closed the connection in the middle of a message"
    orderly = "ConnectionLost: pi:1 closed the connection"
    assert outcome(Framer("pi:1"), frame, [len(frame)]) == orderly
    assert outcome(Framer("pi:1"), b"", [1]) == orderly


def test_a_payload_arrives_in_memory_of_its_own() -> None:
    """Only what the buffer already holds is copied; the transport fills the rest directly."""
    framer = Framer("pi:1")
    payload = bytes(range(256)) * 1024
    head = encode(BlockChunk(0, len(payload)), len(payload))
    assert feed(framer, head + payload[:100], [1 << 20]) == []
    space, whole = framer.space()
    assert whole
    assert len(space) == len(payload) - 100
    space[:] = payload[100:]
    framer.received(len(space))
    frame = framer.next_frame()
    assert frame is not None
    received = frame[1]
    space[0] ^= 255  # The same memory.
    assert received[100] == payload[100] ^ 255
    assert feed(framer, encode(Heartbeat(1)), [7]) == [(Heartbeat(1), b"")]
    assert received[101:] == payload[101:]


@pytest.mark.parametrize(
    ("message", "payload_bytes"),
    [(RequestFailed(1, "x" * 2000), 0), (PeerHello("x" * 2000, "y"), 0), (ProbePing(1), 1000)],
)
def test_what_may_not_come_is_refused_by_its_prefix(message: Message, payload_bytes: int) -> None:
    framer = Framer("pi:1")
    framer.admit = admission.hello({PeerHello: limits.MAX_HELLO_BYTES})
    with pytest.raises(ProtocolError, match="it began with"):
        feed(framer, encode(message, payload_bytes)[: PREFIX.size], [5])


# ---- both ends, in memory -----------------------------------------------------------------------


class Pair:
    """A caller and an answerer whose bytes go to each other without a network."""

    def __init__(self, caller: Caller | None, answerer: Answerer, cut: int = 1 << 20) -> None:
        self.ends = (
            Framer("answerer:1", None if caller is None else introduction.call(caller)),
            Framer("caller:1", introduction.answer(answerer)),
        )
        self.heard: tuple[list[Message], list[Message]] = ([], [])
        self.errors: list[WireError | None] = [None, None]
        self._cut = cut
        self._under_way = [b"", b""]

    def say(self, end: int, data: bytes) -> None:
        self._under_way[1 - end] += data

    def run(self) -> None:
        """Deliver until nobody has anything to say."""
        quiet = 0
        end = 0
        while quiet < 2:
            quiet = 0 if self._step(end) else quiet + 1
            end = 1 - end

    def _step(self, end: int) -> bool:
        framer = self.ends[end]
        data, self._under_way[end] = self._under_way[end], b""
        if self.errors[end] is None:
            try:
                frames = feed(framer, data, [self._cut])
                self.heard[end].extend(message for message, _ in frames)
            except WireError as error:
                self.errors[end] = error
        outgoing = framer.take_outgoing()
        self.say(end, outgoing)
        return bool(data or outgoing)


@pytest.mark.parametrize("cut", [1, 7, 1 << 20])
def test_both_handshakes_meet_and_what_follows_is_read(cut: int) -> None:
    pair = Pair(calling(), answering(), cut)
    pair.run()
    assert pair.errors == [None, None]
    assert not any(framer.is_proving for framer in pair.ends)
    pair.say(0, encode(Heartbeat(1)))
    pair.say(1, encode(Heartbeat(2)))
    pair.run()
    assert pair.heard == ([Heartbeat(2)], [Heartbeat(1)])


@pytest.mark.parametrize("cut", [1, 1 << 20])
def test_who_does_not_get_through_is_told_why_at_both_ends(cut: int) -> None:
    def nobody(claim: Claim) -> None:
        raise AuthFailed("not this one", "not you")

    pair = Pair(calling(), replace(answering(), admit=nobody), cut)
    pair.run()
    assert pair.heard[0] == [JoinRefused("not you")]
    assert str(pair.errors[1]) == "caller:1: not this one"


def test_who_does_not_introduce_itself_is_told_so() -> None:
    pair = Pair(None, answering())
    pair.say(0, encode(Heartbeat(1)))
    pair.run()
    assert pair.heard[0] == [JoinRefused(NEEDED)]
    assert isinstance(pair.errors[1], AuthFailed)


@settings(deadline=None)
@given(st.lists(st.binary(max_size=60), max_size=4), pieces)
def test_no_bytes_get_past_a_handshake(headers: list[bytes], cuts: list[int]) -> None:
    framer = Framer("pi:1", introduction.answer(answering()))
    data = b"".join(
        PREFIX.pack(MAGIC, 3, 0, code, len(header), 0) + header
        for code, header in zip((26, 95, 4, 4), headers, strict=False)
    )
    assert outcome(framer, data, cuts)
    assert framer.is_proving


@pytest.mark.parametrize("cut", [1, 1 << 20])
@pytest.mark.parametrize("answerer", [None, answering()], ids=["insecure", "tls"])
def test_another_version_is_heard_out_and_told(cut: int, answerer: Answerer | None) -> None:
    header = msgpack.packb(["0" * 16, "pi", "7.1"])
    data = PREFIX.pack(MAGIC, 9, 0, 1, len(header), 0) + header
    framer = Framer("10.0.0.7:1", None if answerer is None else introduction.answer(answerer))
    with pytest.raises(VersionMismatch, match=r"^10\.0\.0\.7 \(pi\) runs shoal 7\.1"):
        feed(framer, data, [cut])
    assert framer.take_outgoing().startswith(MAGIC + b"\x09")


def test_another_version_that_stops_is_told_with_what_is_known() -> None:
    framer = Framer("10.0.0.7:1")
    assert feed(framer, PREFIX.pack(MAGIC, 9, 0, 1, 50, 0) + b"x", [99]) == []
    assert framer.is_refusing
    error = framer.lost(" was silent")
    assert isinstance(error, VersionMismatch)
    assert str(error).startswith("10.0.0.7 runs a newer shoal (protocol 9)")
    assert framer.outgoing


def test_a_transport_that_fails_is_a_lost_connection() -> None:
    assert isinstance(Framer("pi:1").lost(": reset"), ConnectionLost)
