from __future__ import annotations

import hashlib
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from agent.blocks import BlockCache, CacheError, remove_leftovers
from wire.connection import Connection, Listener
from wire.errors import WireError
from wire.messages import (
    BlockChunk,
    BlockDamaged,
    BlockRef,
    BlocksHello,
    Done,
    Endpoint,
    FetchBlock,
    Heartbeat,
)

CHUNK = 1000


@dataclass
class BlockServer:
    """A coordinator's block side, with faults to order."""

    listener: Listener
    blocks: dict[str, bytes] = field(default_factory=dict)
    offsets: list[int] = field(default_factory=list)
    cut_after: int | None = None
    reports: list[str] = field(default_factory=list)
    own: dict[str, bytes] = field(default_factory=dict)
    """What a block that is reported as damaged is replaced with."""

    def add(self, block: int, data: bytes) -> BlockRef:
        sha256 = hashlib.sha256(data).hexdigest()
        self.blocks[sha256] = data
        return BlockRef(sha256, len(data), block)

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint("127.0.0.1", self.listener.port)

    def serve(self) -> None:
        while (connection := self.listener.accept()) is not None:
            try:
                self._answer(connection)
            except WireError:
                pass
            finally:
                connection.close()

    def _answer(self, connection: Connection) -> None:
        assert connection.receive()[0] == BlocksHello("device")
        while True:
            request, _ = connection.receive()
            if isinstance(request, BlockDamaged):
                self.reports.append(request.sha256)
                self.blocks |= self.own
                connection.send(Heartbeat())
                connection.send(Done(0))
                continue
            assert isinstance(request, FetchBlock)
            self.offsets.append(request.offset)
            data = self.blocks[request.sha256]
            for offset in range(request.offset, len(data), CHUNK):
                if self.cut_after is not None and offset >= self.cut_after:
                    return
                connection.send(BlockChunk(offset, len(data)), data[offset : offset + CHUNK])


@pytest.fixture
def server() -> Iterator[BlockServer]:
    server = BlockServer(Listener("127.0.0.1", 0))
    thread = threading.Thread(target=server.serve)
    thread.start()
    yield server
    server.listener.close()
    thread.join()


Fetch = Callable[..., int]


@pytest.fixture
def fetch(server: BlockServer) -> Fetch:
    def run(cache: BlockCache, *refs: BlockRef) -> int:
        return cache.fetch(refs, server.endpoint, "device", lambda done, total: None)

    return run


def test_blocks_arrive_once_and_stay(server: BlockServer, fetch: Fetch, tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 1 << 20)
    refs = [server.add(number, os.urandom(4321 + number)) for number in range(3)]
    assert fetch(cache, *refs) == sum(ref.size_bytes for ref in refs)
    for ref in refs:
        assert cache.path(ref.sha256).read_bytes() == server.blocks[ref.sha256]
    server.listener.close()
    assert fetch(cache, *refs) == 0


def test_progress_ends_at_the_total(server: BlockServer, tmp_path: Path) -> None:
    ref = server.add(0, os.urandom(2500))
    steps: list[tuple[int, int]] = []
    BlockCache(tmp_path, 1 << 20).fetch(
        [ref], server.endpoint, "device", lambda done, total: steps.append((done, total))
    )
    assert steps == [(0, 2500), (1000, 2500), (2000, 2500), (2500, 2500)]


def test_a_cut_download_goes_on_where_it_stopped(
    server: BlockServer, fetch: Fetch, tmp_path: Path
) -> None:
    cache = BlockCache(tmp_path, 1 << 20)
    ref = server.add(0, os.urandom(5000))
    server.cut_after = 2000
    with pytest.raises(WireError):
        fetch(cache, ref)
    server.cut_after = None
    fetch(cache, ref)
    assert server.offsets == [0, 2000]
    assert cache.path(ref.sha256).read_bytes() == server.blocks[ref.sha256]


def test_damaged_data_is_not_kept(server: BlockServer, fetch: Fetch, tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 1 << 20)
    data = os.urandom(3000)
    ref = server.add(0, data)
    server.blocks[ref.sha256] = data[:-1] + bytes([data[-1] ^ 1])
    with pytest.raises(CacheError, match="arrived damaged"):
        fetch(cache, ref)
    assert list(tmp_path.iterdir()) == []
    server.blocks[ref.sha256] = data
    fetch(cache, ref)
    assert cache.path(ref.sha256).read_bytes() == data


def test_a_server_that_sends_too_much_is_refused(
    server: BlockServer, fetch: Fetch, tmp_path: Path
) -> None:
    ref = server.add(0, os.urandom(3000))
    server.blocks[ref.sha256] += b"more"
    with pytest.raises(WireError, match="unexpected answer"):
        fetch(BlockCache(tmp_path, 1 << 20), ref)


def test_the_least_recently_used_block_makes_room(
    server: BlockServer, fetch: Fetch, tmp_path: Path
) -> None:
    cache = BlockCache(tmp_path, 2500)
    old, recent, new = (server.add(number, os.urandom(1000)) for number in range(3))
    for age, ref in ((100, old), (50, recent)):
        fetch(cache, ref)
        os.utime(cache.path(ref.sha256), (1e9 - age, 1e9 - age))
    fetch(cache, new)
    assert not cache.path(old.sha256).exists()
    assert cache.path(recent.sha256).exists()
    assert cache.path(new.sha256).exists()


def test_what_was_used_before_the_clock_was_set_back_makes_room_first(
    server: BlockServer, fetch: Fetch, tmp_path: Path
) -> None:
    """Otherwise each load would fetch again what another one has just brought, for a year."""
    cache = BlockCache(tmp_path, 2500)
    stale, recent, new = (server.add(number, os.urandom(1000)) for number in range(3))
    fetch(cache, stale)
    next_year_s = time.time() + 365 * 86400
    os.utime(cache.path(stale.sha256), (next_year_s, next_year_s))
    fetch(cache, recent)
    fetch(cache, new)
    assert not cache.path(stale.sha256).exists()
    assert cache.path(recent.sha256).exists()


def test_more_than_the_limit_is_refused_before_anything_moves(
    server: BlockServer, fetch: Fetch, tmp_path: Path
) -> None:
    ref = server.add(0, os.urandom(3000))
    with pytest.raises(CacheError, match="storage limit"):
        fetch(BlockCache(tmp_path, 2999), ref)
    assert server.offsets == []


def prepared(cache: BlockCache, size_bytes: int, *refs: BlockRef) -> Path:
    """As a backend that prepares weights of the blocks ``refs``."""
    home = cache.prepare(refs, size_bytes)
    assert home is not None
    home.mkdir(parents=True, exist_ok=True)
    (home / "weights").write_bytes(bytes(size_bytes))
    return home


def test_prepared_weights_are_part_of_the_limit(
    server: BlockServer, fetch: Fetch, tmp_path: Path
) -> None:
    cache = BlockCache(tmp_path, 5000)
    a, b, c = (server.add(number, os.urandom(1000)) for number in range(3))
    fetch(cache, a)
    of_a = prepared(cache, 1500, a)
    os.utime(of_a, (1e9, 1e9))
    os.utime(cache.path(a.sha256), (1e9 + 1, 1e9 + 1))
    fetch(cache, b)
    assert of_a.is_dir()  # 3500 bytes.
    assert cache.prepare([b], 1600) != of_a  # 5100 with these: the oldest makes room.
    assert not of_a.exists()
    assert cache.path(a.sha256).exists()
    of_b = prepared(cache, 2500, b)
    fetch(cache, c)  # 4500 with b and of_b.
    assert not cache.path(a.sha256).exists()
    assert of_b.is_dir()
    # What a stage is loaded from stays, however old it is; what else is there goes.
    for path in (of_b, cache.path(b.sha256)):
        os.utime(path, (1e9, 1e9))
    assert cache.prepare([b], 4000) == of_b
    assert of_b.is_dir()
    assert cache.find([b.sha256, c.sha256]) == (b.sha256,)


def test_blocks_come_before_what_is_prepared_of_them(
    server: BlockServer, fetch: Fetch, tmp_path: Path
) -> None:
    cache = BlockCache(tmp_path, 2500)
    small, large = server.add(0, os.urandom(1000)), server.add(1, os.urandom(2500))
    fetch(cache, small)
    assert cache.prepare([small], 1501) is None
    home = prepared(cache, 1500, small)
    fetch(cache, large)
    assert cache.find([small.sha256, large.sha256]) == (large.sha256,)
    assert not home.exists()


def test_what_a_killed_agent_left_is_removed(
    server: BlockServer, fetch: Fetch, tmp_path: Path
) -> None:
    remove_leftovers(tmp_path / "none")
    cache = BlockCache(tmp_path, 1 << 20)
    ref = server.add(0, os.urandom(1000))
    fetch(cache, ref)
    home = prepared(cache, 1500, ref)
    before = sorted(tmp_path.rglob("*"))
    for left in (".products-abc", "prepared/.new-abc", f"prepared/{home.name}/.new-abc"):
        (tmp_path / left / "deep").mkdir(parents=True)
        (tmp_path / left / "deep" / "weights").write_bytes(b"1")
    for left in (".write-test-abc", f"prepared/{home.name}/.partial-abc"):
        (tmp_path / left).write_bytes(b"1")
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("sha256", ["", "../../etc/passwd", "A" * 64, "0" * 63])
def test_an_address_that_is_no_hash_is_refused(fetch: Fetch, tmp_path: Path, sha256: str) -> None:
    with pytest.raises(CacheError, match="no valid address"):
        fetch(BlockCache(tmp_path, 1 << 20), BlockRef(sha256, 10, 0))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_named(server: BlockServer, fetch: Fetch, tmp_path: Path) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("this machine does not let us mount a file system")
    try:
        with pytest.raises(CacheError, match="disk full"):
            fetch(BlockCache(tmp_path, 1 << 20), server.add(0, os.urandom(200_000)))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("damage", ["flipped", "shorter", "longer"])
def test_a_block_that_arrives_damaged_is_reported_and_comes_again(
    server: BlockServer, fetch: Fetch, tmp_path: Path, damage: str
) -> None:
    cache, data = BlockCache(tmp_path, 1 << 20), os.urandom(3000)
    ref = server.add(0, data)
    server.own[ref.sha256] = data
    server.blocks[ref.sha256] = {
        "flipped": bytes([data[0] ^ 1]) + data[1:],
        "shorter": data[:-1],
        "longer": data + b"x",
    }[damage]
    assert fetch(cache, ref) == len(data)
    assert server.reports == [ref.sha256]
    assert cache.path(ref.sha256).read_bytes() == data


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _become_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "something").write_text("")


@pytest.mark.parametrize(
    "damage",
    [_flip, _become_directory, lambda path: path.write_bytes(b""), lambda path: path.unlink()],
    ids=["flipped", "directory", "empty", "gone"],
)
def test_what_lies_there_damaged_is_fetched_again(
    server: BlockServer,
    fetch: Fetch,
    tmp_path: Path,
    damage: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    cache = BlockCache(tmp_path, 1 << 20)
    refs = [server.add(number, os.urandom(3000)) for number in range(2)]
    fetch(cache, *refs)
    damage(cache.path(refs[0].sha256))
    caplog.clear()
    assert fetch(cache, *refs) == 3000
    assert cache.path(refs[0].sha256).read_bytes() == server.blocks[refs[0].sha256]
    assert len(caplog.records) <= 1


def test_swapped_blocks_are_fetched_again(
    server: BlockServer, fetch: Fetch, tmp_path: Path
) -> None:
    cache = BlockCache(tmp_path, 1 << 20)
    refs = [server.add(number, os.urandom(3000)) for number in range(2)]
    fetch(cache, *refs)
    one, other = (cache.path(ref.sha256) for ref in refs)
    one.rename(tmp_path / "aside")
    other.rename(one)
    (tmp_path / "aside").rename(other)
    assert fetch(cache, *refs) == 6000


def test_a_caller_that_checks_itself_is_told_what_came(server: BlockServer, tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 1 << 20)
    old, new = (server.add(number, os.urandom(3000)) for number in range(2))
    cache.fetch([old], server.endpoint, "device", lambda done, total: None)
    came: set[Path] = set()
    cache.fetch([old, new], server.endpoint, "device", lambda done, total: None, hashed=came)
    assert came == {cache.path(new.sha256)}
