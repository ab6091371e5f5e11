"""Files from other devices: real ports, honest devices, liars, and devices that go."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from agent import holders as holders_module
from agent.blocks import BlockCache
from agent.holders import Holders
from agent.peers import MOST_FETCHING, PeerServer, connect_peer
from wire.chunks import file_chunks
from wire.codec import encode
from wire.connection import Connection, Listener
from wire.errors import ConnectionLost, WireError
from wire.messages import (
    BlockChunk,
    BlockRef,
    BlocksHeld,
    BlocksHello,
    Endpoint,
    FetchBlock,
    FindHolders,
    Holder,
    PeerHello,
    PeerWelcome,
    ProbePing,
    RequestFailed,
)

SIZE = 1 << 20
DRIPS = 200


@dataclass
class Coordinator:
    """Answers who has files, and sends those that nobody has."""

    directory: Path
    listener: Listener
    holders: tuple[Holder, ...] = ()
    asked: list[tuple[str, ...]] = field(default_factory=list)
    sent: list[str] = field(default_factory=list)

    def serve(self) -> None:
        while (connection := self.listener.accept()) is not None:
            with connection:
                try:
                    assert connection.receive()[0] == BlocksHello("asking")
                    while True:
                        self._answer(connection)
                except WireError:
                    continue

    def _answer(self, connection: Connection) -> None:
        request, _ = connection.receive()
        if isinstance(request, FindHolders):
            self.asked.append(request.sha256s)
            connection.send(BlocksHeld(self.holders))
            return
        assert isinstance(request, FetchBlock)
        self.sent.append(request.sha256)
        for chunk, payload in file_chunks(self.directory / request.sha256, request.offset):
            connection.send(chunk, payload)

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint("127.0.0.1", self.listener.port)


class Shoal:
    """A coordinator, devices that have files, and the cache of the one that asks."""

    def __init__(self, directory: Path) -> None:
        (directory / "coordinator").mkdir()
        self.directory = directory
        self.coordinator = Coordinator(directory / "coordinator", Listener("127.0.0.1", 0))
        self._thread = threading.Thread(target=self.coordinator.serve)
        self._thread.start()
        self.servers: list[PeerServer] = []
        self.cache = BlockCache(directory / "asking", 64 << 20)
        self.fetched: list[str] = []

    def close(self) -> None:
        self.coordinator.listener.close()
        for server in self.servers:
            server.close()
        self._thread.join()

    def file(self) -> BlockRef:
        """A file that the coordinator has."""
        data = os.urandom(SIZE)
        sha256 = hashlib.sha256(data).hexdigest()
        (self.coordinator.directory / sha256).write_bytes(data)
        return BlockRef(sha256, SIZE, 0)

    def device(
        self, name: str, *refs: BlockRef, sends: Callable[[str], Path | None] | None = None
    ) -> Holder:
        """A device that says that it has files, and does, or sends what ``sends`` finds."""
        listener = Listener("127.0.0.1", 0)
        server = PeerServer(name, listener)
        server.files = sends or BlockCache(self.coordinator.directory, 1 << 30).held
        server.start()
        self.servers.append(server)
        return self.holder(name, listener.port, *refs)

    def holder(self, name: str, port: int, *refs: BlockRef) -> Holder:
        made = Holder(name, (Endpoint("127.0.0.1", port),), tuple(ref.sha256 for ref in refs))
        self.coordinator.holders += (made,)
        return made

    def fetch(self, *refs: BlockRef) -> tuple[int, int]:
        """The bytes that came, and those of them that devices sent. The files are checked."""

        def connect(holder: Holder) -> Connection:
            self.fetched.append(holder.device)
            return connect_peer("asking", holder.device, holder.endpoints)

        with Holders(connect) as holders:
            came = self.cache.fetch(
                refs, self.coordinator.endpoint, "asking", lambda *_: None, holders=holders
            )
        for ref in refs:
            data = self.cache.path(ref.sha256).read_bytes()
            assert hashlib.sha256(data).hexdigest() == ref.sha256
        return came, holders.came_bytes


@pytest.fixture
def shoal(tmp_path: Path) -> Iterator[Shoal]:
    made = Shoal(tmp_path)
    yield made
    made.close()


def test_files_come_from_devices_that_have_them(shoal: Shoal) -> None:
    first, second, third = (shoal.file() for _ in range(3))
    shoal.device("near", first)
    shoal.device("far", first, second)
    assert shoal.fetch(first, second, third) == (3 * SIZE, 2 * SIZE)
    assert shoal.coordinator.sent == [third.sha256]
    assert shoal.fetched == ["near", "far"]
    assert shoal.coordinator.asked == [tuple(ref.sha256 for ref in (first, second, third))]
    # What is here already is asked for nowhere.
    assert shoal.fetch(first, second, third) == (0, 0)
    assert len(shoal.coordinator.asked) == 1


def test_a_liar_is_caught_by_the_hash_and_left(shoal: Shoal, tmp_path: Path) -> None:
    refs = [shoal.file() for _ in range(3)]
    lie = tmp_path / "lie"
    lie.write_bytes(os.urandom(SIZE))
    shoal.device("liar", *refs, sends=lambda sha256: lie)
    shoal.device("honest", refs[1])
    assert shoal.fetch(*refs) == (3 * SIZE, SIZE)
    assert shoal.coordinator.sent == [refs[0].sha256, refs[2].sha256]
    assert shoal.fetched == ["liar", "honest"]


@pytest.mark.parametrize("size", [0, 1, SIZE - 1, SIZE + 1, 3 * SIZE])
def test_a_file_of_another_size_is_not_taken(size: int, shoal: Shoal, tmp_path: Path) -> None:
    ref, lie = shoal.file(), tmp_path / "lie"
    lie.write_bytes(bytes(size))
    shoal.device("liar", ref, sends=lambda sha256: lie if size else None)
    assert shoal.fetch(ref) == (SIZE, 0)


def test_a_device_that_goes_while_it_sends_is_gone_on_from(shoal: Shoal) -> None:
    """What has come of the file stays: the next source sends only the rest."""
    ref = shoal.file()
    listener = Listener("127.0.0.1", 0)
    data = (shoal.coordinator.directory / ref.sha256).read_bytes()

    def serve() -> None:
        connection = listener.accept()
        assert connection is not None
        with connection:
            assert isinstance(connection.receive()[0], PeerHello)
            connection.send(PeerWelcome("goes"))
            assert connection.receive()[0] == FetchBlock(ref.sha256, 0)
            connection.send(BlockChunk(0, SIZE), data[:1000])

    thread = threading.Thread(target=serve)
    thread.start()
    shoal.holder("goes", listener.port, ref)
    assert shoal.fetch(ref) == (SIZE, 0)
    thread.join()
    listener.close()
    assert shoal.coordinator.sent == [ref.sha256]


def test_a_silent_device_and_one_that_is_not_there_are_left(
    shoal: Shoal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holders_module, "SILENCE_S", 0.2)
    ref = shoal.file()
    listener, ended = Listener("127.0.0.1", 0), threading.Event()

    def serve() -> None:
        connection = listener.accept()
        assert connection is not None
        with connection:
            connection.receive()
            connection.send(PeerWelcome("silent"))
            ended.wait(60)

    thread = threading.Thread(target=serve)
    thread.start()
    shoal.holder("silent", listener.port, ref)
    shoal.holder("nobody", 1, ref)
    shoal.device("honest", ref)
    assert shoal.fetch(ref) == (SIZE, SIZE)
    assert shoal.fetched == ["silent", "nobody", "honest"]
    ended.set()
    thread.join()
    listener.close()


@pytest.mark.parametrize("how", ["small chunks", "one chunk"])
def test_a_device_that_drips_is_left(
    how: str, shoal: Shoal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is never silent, and would hold the download for days."""
    monkeypatch.setattr(holders_module, "SILENCE_S", 0.3)
    ref = shoal.file()
    listener, ended = Listener("127.0.0.1", 0), threading.Event()
    data = (shoal.coordinator.directory / ref.sha256).read_bytes()

    def drip(connection: Connection) -> None:
        if how == "small chunks":
            for offset in range(DRIPS):
                connection.send(BlockChunk(offset, SIZE), data[offset : offset + 1])
                ended.wait(0.05)
        else:
            frame = encode(BlockChunk(0, SIZE), SIZE // 4) + data
            for offset in range(DRIPS):
                connection._transport.send(frame[offset : offset + 1])
                ended.wait(0.05)

    def serve() -> None:
        connection = listener.accept()
        assert connection is not None
        with connection, contextlib.suppress(WireError, OSError):
            connection.receive()
            connection.send(PeerWelcome("drips"))
            connection.receive()
            drip(connection)
            dripped.append(DRIPS)

    dripped: list[int] = []
    thread = threading.Thread(target=serve)
    thread.start()
    shoal.holder("drips", listener.port, ref)
    shoal.device("honest", ref)
    assert shoal.fetch(ref) == (SIZE, SIZE)
    ended.set()
    thread.join()
    listener.close()
    assert (shoal.fetched, dripped) == (["drips", "honest"], [])


def test_the_source_behind_a_liar_is_not_blamed(shoal: Shoal) -> None:
    """The liar sends a damaged beginning and goes. The next device sends the rest, and all of it
    when the hash differs."""
    ref, listener = shoal.file(), Listener("127.0.0.1", 0)

    def serve() -> None:
        connection = listener.accept()
        assert connection is not None
        with connection:
            connection.receive()
            connection.send(PeerWelcome("liar"))
            connection.receive()
            connection.send(BlockChunk(0, SIZE), bytes(1000))

    thread = threading.Thread(target=serve)
    thread.start()
    shoal.holder("liar", listener.port, ref)
    shoal.device("honest", ref)
    assert shoal.fetch(ref) == (SIZE, SIZE)
    thread.join()
    listener.close()
    assert shoal.coordinator.sent == []
    assert shoal.fetched == ["liar", "honest"]


def test_for_small_files_nobody_is_asked(shoal: Shoal, monkeypatch: pytest.MonkeyPatch) -> None:
    ref = shoal.file()
    monkeypatch.setattr("agent.blocks.LEAST_BYTES", SIZE + 1)
    shoal.device("near", ref)
    assert shoal.fetch(ref) == (SIZE, 0)
    assert shoal.coordinator.asked == []


# ---- the device that sends ----------------------------------------------------------------------


@pytest.mark.parametrize("sha256", ["../../etc/passwd", "x", "", "a" * 64, "A" * 64])
def test_a_device_sends_nothing_but_its_artifacts(sha256: str, shoal: Shoal) -> None:
    endpoint = shoal.device("near").endpoints
    with connect_peer("asking", "near", endpoint) as connection:
        connection.send(FetchBlock(sha256, 0))
        assert connection.receive()[0] == RequestFailed(0, "the file is not here")
        connection.send(ProbePing(7))  # It goes on.
        connection.receive()


@pytest.mark.parametrize("offset", [-1, SIZE + 1, 2**62])
def test_an_offset_that_does_not_exist_breaks_nothing(offset: int, shoal: Shoal) -> None:
    ref = shoal.file()
    endpoint = shoal.device("near").endpoints
    with connect_peer("asking", "near", endpoint) as connection:
        connection.send(FetchBlock(ref.sha256, offset))
        if offset < 0:
            assert connection.receive()[0] == BlockChunk(0, SIZE)
        else:
            with pytest.raises(ConnectionLost):
                connection.receive()
    with connect_peer("asking", "near", endpoint) as connection:
        connection.send(FetchBlock(ref.sha256, SIZE - 1))
        assert len(connection.receive()[1]) == 1


def test_many_that_fetch_make_room_for_others(shoal: Shoal) -> None:
    ref = shoal.file()
    endpoint = shoal.device("near").endpoints
    opened = []
    for _ in range(MOST_FETCHING + 2):
        opened.append(connect_peer("asking", "near", endpoint))
        opened[-1].send(FetchBlock(ref.sha256, SIZE - 1))
        assert len(opened[-1].receive()[1]) == 1
    for connection in opened[:2]:
        with pytest.raises(ConnectionLost):
            connection.receive()
    opened[2].send(FetchBlock(ref.sha256, SIZE - 1))
    assert len(opened[2].receive()[1]) == 1
    for connection in opened:
        connection.close()
