"""A hop between real sockets; the test is the next device."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator

import pytest

from agent import hop as hop_module
from agent.hop import QUEUED_CHUNKS, Hop
from agent.links import Link, LinkFigures, Measuring
from agent.peers import Entrance, PeerServer, connect_peer, measure_link
from tests.system.namespaces import bed_of, unavailable
from wire.connection import Connection, Listener
from wire.errors import ConnectionLost
from wire.messages import (
    Activation,
    Endpoint,
    LinkChanged,
    Message,
    ProbePing,
    ProbePong,
    TokenSampled,
)

ANSWER_S = 60.0
LARGE = 8 << 20
"""More than the buffers of two sockets hold."""


def chunk(number: int, rows: int = 64) -> Activation:
    return Activation(1, 1, 0, number, rows, 16, False)


class Ends:
    """A hop, what it reports, and the other end of its connection."""

    def __init__(self, link: Link) -> None:
        listener = Listener("127.0.0.1", 0)
        connection = Connection.connect(Endpoint("127.0.0.1", listener.port))
        peer = listener.accept()
        listener.close()
        assert peer is not None
        self.peer = peer
        self.peer.set_receive_timeout(ANSWER_S)
        self.lost: queue.Queue[str] = queue.Queue()
        self.news: queue.Queue[LinkChanged] = queue.Queue()
        self.measuring = Measuring()
        self.waiting: queue.Queue[threading.Thread] = queue.Queue()
        """The threads that have told that they wait."""
        self.connection = connection
        self.hop = Hop(
            connection,
            link,
            self.measuring,
            on_lost=self.lost.put,
            on_news=self.news.put,
            on_wait=lambda: self.waiting.put(threading.current_thread()),
        )

    def send(self, *messages: Activation | TokenSampled) -> threading.Thread:
        """Send from a thread: prompt chunks are large."""

        def run() -> None:
            for message in messages:
                large = isinstance(message, Activation) and message.rows > 1
                self.hop.send(message, memoryview(bytes(LARGE if large else 0)))

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def next(self) -> Message:
        """What the peer receives next, pings aside."""
        while True:
            message, _ = self.peer.receive()
            if not isinstance(message, ProbePing):
                return message

    def close(self) -> None:
        self.hop.close()
        self.peer.close()


@pytest.fixture
def make_ends() -> Iterator[Callable[[Link], Ends]]:
    made: list[Ends] = []

    def make(link: Link) -> Ends:
        made.append(Ends(link))
        return made[-1]

    yield make
    for ends in made:
        ends.close()


@pytest.fixture
def ends(make_ends: Callable[[Link], Ends]) -> Ends:
    return make_ends(Link("peer"))


def test_chunks_do_not_wait_for_a_slow_link_until_the_queue_is_full(ends: Ends) -> None:
    few = ends.send(*map(chunk, range(QUEUED_CHUNKS)))
    few.join(ANSWER_S)
    assert not few.is_alive()
    # The rest cannot all have been taken as long as the peer reads nothing.
    token = TokenSampled(1, 1, 0, 7, "")
    more = ends.send(chunk(QUEUED_CHUNKS), chunk(QUEUED_CHUNKS + 1), chunk(99, rows=1), token)
    assert more.is_alive()
    arrived = [ends.next() for _ in range(QUEUED_CHUNKS + 4)]
    more.join(ANSWER_S)
    assert arrived == [*map(chunk, range(QUEUED_CHUNKS + 2)), chunk(99, rows=1), token]


def test_it_tells_before_a_token_waits_for_the_next_device(ends: Ends) -> None:
    ends.send(chunk(0, rows=1)).join(ANSWER_S)
    assert ends.next() == chunk(0, rows=1)
    assert ends.waiting.empty()
    large = threading.Thread(target=ends.connection.send, args=(chunk(1), bytes(LARGE)))
    large.start()
    while not ends.connection._send_lock.locked():
        pass
    token = ends.send(chunk(2, rows=1))
    assert ends.waiting.get(timeout=ANSWER_S) is token
    assert [ends.next() for _ in range(2)] == [chunk(1), chunk(2, rows=1)]
    for thread in (large, token):
        thread.join(ANSWER_S)


def test_it_tells_before_a_chunk_waits_for_room(ends: Ends) -> None:
    first = ends.send(*map(chunk, range(QUEUED_CHUNKS)))
    first.join(ANSWER_S)
    last = ends.send(chunk(QUEUED_CHUNKS))
    while ends.waiting.get(timeout=ANSWER_S) is not last:
        pass  # It is the hop's own thread.
    assert [ends.next() for _ in range(QUEUED_CHUNKS + 1)] == [
        *map(chunk, range(QUEUED_CHUNKS + 1))
    ]
    last.join(ANSWER_S)


def test_tokens_of_other_sequences_pass_the_chunks_that_wait(ends: Ends) -> None:
    chunks = ends.send(*map(chunk, range(QUEUED_CHUNKS)))
    chunks.join(ANSWER_S)
    token = TokenSampled(1, 2, 0, 7, "")
    passing = ends.send(token)
    while passing.is_alive() and not ends.hop._passing:
        pass  # It waits for the chunk that is being sent, if that has begun.
    rest = ends.send(TokenSampled(1, 1, 0, 7, ""))
    arrived = [ends.next() for _ in range(QUEUED_CHUNKS + 2)]
    assert arrived.index(token) < arrived.index(chunk(QUEUED_CHUNKS - 1))
    arrived.remove(token)
    assert arrived == [*map(chunk, range(QUEUED_CHUNKS)), TokenSampled(1, 1, 0, 7, "")]
    for thread in (passing, rest):
        thread.join(ANSWER_S)


def test_a_lost_peer_is_told_once_and_whoever_waits_is_let_go(ends: Ends) -> None:
    failed = threading.Event()

    def run() -> None:
        try:
            while True:
                ends.hop.send(chunk(0), memoryview(bytes(LARGE)))
        except ConnectionLost:
            failed.set()

    thread = threading.Thread(target=run)
    thread.start()
    ends.next()
    ends.peer.close()
    assert failed.wait(ANSWER_S)
    thread.join()
    assert ends.lost.get(timeout=ANSWER_S)
    with pytest.raises(ConnectionLost):
        ends.hop.send(TokenSampled(1, 1, 0, 7, ""))
    assert ends.lost.empty()


def test_a_hop_that_is_closed_is_not_lost(ends: Ends) -> None:
    ends.hop.close()
    with pytest.raises(ConnectionLost):
        ends.hop.send(chunk(0), memoryview(b""))
    assert ends.lost.empty()


def test_pings_of_an_idle_hop_tell_when_the_round_trip_grew(
    make_ends: Callable[[Link], Ends], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hop_module, "PING_S", 0.01)
    ends = make_ends(Link("peer", LinkFigures(1e-4, 1e-4, 1e9)))

    told = threading.Event()

    def answer() -> None:
        while not told.is_set():
            message, _ = ends.peer.receive()
            assert isinstance(message, ProbePing)
            told.wait(0.02)
            ends.peer.send(ProbePong(message.number))

    thread = threading.Thread(target=answer)
    thread.start()
    news = ends.news.get(timeout=ANSWER_S)
    told.set()
    assert news.device == "peer"
    assert 0.02 <= news.rtt_s <= news.rtt_p90_s
    thread.join(ANSWER_S)


def test_nothing_is_pinged_while_something_else_is_measured(
    make_ends: Callable[[Link], Ends], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hop_module, "PING_S", 0.01)
    ends = make_ends(Link("peer"))
    # Without an answer the ping counts as one measurement, until the hop is over.
    assert isinstance(ends.peer.receive()[0], ProbePing)
    assert not ends.measuring.try_begin(lambda: None)
    ends.hop.close()
    assert ends.measuring.try_begin(lambda: None)
    ends.measuring.end()


def test_a_measurement_does_not_wait_for_a_ping_that_nobody_answers(
    make_ends: Callable[[Link], Ends], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hop_module, "PING_S", 0.01)
    monkeypatch.setattr(hop_module, "ANSWER_S", 3600.0)
    ends = make_ends(Link("b", LinkFigures(1e-3, 1e-3, 1e9)))
    first, _ = ends.peer.receive()
    assert isinstance(first, ProbePing)
    with ends.measuring:
        ends.peer.send(ProbePong(first.number))  # Too late: forgotten.
        assert not ends.measuring.try_begin(lambda: None)
    again, _ = ends.peer.receive()
    assert isinstance(again, ProbePing)
    assert again.number > first.number


@pytest.mark.netns
def test_prompts_tell_when_a_link_got_slow() -> None:
    reason = unavailable()
    if reason is not None:
        pytest.skip(reason)
    with bed_of("here", "there") as bed:
        address = bed.network.address("there")
        listener = bed.inside("there", lambda: Listener(address, 0))
        server = PeerServer("b", listener)
        server.entrances = (Entrance("a", b"key", lambda message, payload: None),)
        server.start()
        endpoint = Endpoint(address, listener.port)
        connection = bed.inside("here", lambda: connect_peer("a", "b", [endpoint], hop_key=b"key"))
        before, _ = measure_link(connection)
        connection.set_receive_timeout(None)
        news: queue.Queue[LinkChanged] = queue.Queue()
        lost: queue.Queue[str] = queue.Queue()
        hop = Hop(connection, Link("b", before), Measuring(), on_lost=lost.put, on_news=news.put)
        bed.fault("here", "link:rate=40")
        for _ in range(100):
            hop.send(chunk(0), memoryview(bytes(64 << 10)))
            if not news.empty():
                break
        told = news.get(timeout=ANSWER_S)
        # A busy machine may make it slower still.
        assert told.bytes_per_s < min(1.5 * 40e6 / 8, before.bytes_per_s)
        hop.close()
        server.close()
        assert lost.empty()


@pytest.mark.netns
def test_a_slow_path_is_not_a_dead_one() -> None:
    reason = unavailable()
    if reason is not None:
        pytest.skip(reason)
    with bed_of("here", "there") as bed:
        address = bed.network.address("there")
        listener = bed.inside("there", lambda: Listener(address, 0))
        arrived: queue.Queue[Message] = queue.Queue()
        server = PeerServer("b", listener)
        server.entrances = (Entrance("a", b"key", lambda message, payload: arrived.put(message)),)
        server.start()
        endpoint = Endpoint(address, listener.port)
        connection = bed.inside("here", lambda: connect_peer("a", "b", [endpoint], hop_key=b"key"))
        lost: queue.Queue[str] = queue.Queue()
        hop = Hop(connection, Link("b"), Measuring(), on_lost=lost.put, on_news=lambda _: None)
        bed.fault("here", "link:rate=0.15")
        # More than LIVENESS_S on its way: 128 KiB at 19 kB/s.
        hop.send(chunk(0), memoryview(bytes(128 << 10)))
        assert arrived.get(timeout=60) == chunk(0)
        assert lost.empty()
        # And one over which nothing passes, in one direction, is.
        bed.fault("there", "lose=here")
        hop.send(chunk(1), memoryview(bytes(128 << 10)))
        assert address in lost.get(timeout=60)
        server.close()
