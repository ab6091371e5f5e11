"""Files made by another machine: an agent asks, serves its blocks, and checks what it gets."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from agent.blocks import BlockCache, CacheError
from agent.files import FileExchange
from backends.base import BackendError, FilesMissing
from model.checkpoint import Checkpoint
from model.errors import CheckpointError
from wire.connection import Connection, Listener
from wire.errors import ProtocolError, WireError
from wire.messages import (
    BlockChunk,
    BlockDamaged,
    BlockRef,
    BlocksHello,
    Done,
    Endpoint,
    FetchBlock,
    FileRef,
    FilesMade,
    Heartbeat,
    MakeFiles,
    Message,
    RequestFailed,
)

SPEC = Checkpoint.open(Path(__file__).parents[1] / "fixtures" / "llama").spec
BLOCK = b"a block" * 100
MADE = [b"first", b"and second"]


def ref(content: bytes) -> FileRef:
    return FileRef(hashlib.sha256(content).hexdigest(), len(content))


class Coordinator:
    """Answers the requests of one agent as the test says, one connection after the other."""

    def __init__(self) -> None:
        self.listener = Listener("127.0.0.1", 0)
        self.threads: list[threading.Thread] = []

    def serve(self, *answers: Callable[[Connection], None]) -> None:
        def run() -> None:
            for answer in answers:
                connection = self.listener.accept()
                assert connection is not None
                with connection:
                    assert isinstance(connection.receive()[0], BlocksHello)
                    answer(connection)
                    with suppress(WireError):
                        connection.receive()  # Until the agent goes.

        self.threads.append(threading.Thread(target=run, daemon=True))
        self.threads[-1].start()


@pytest.fixture
def coordinator() -> Iterator[Coordinator]:
    coordinator = Coordinator()
    yield coordinator
    coordinator.listener.close()
    for thread in coordinator.threads:
        thread.join(60)


@pytest.fixture
def block(tmp_path: Path) -> tuple[int, Path]:
    path = tmp_path / "block"
    path.write_bytes(BLOCK)
    return 1, path


def exchange(
    coordinator: Coordinator,
    tmp_path: Path,
    limit_bytes: int = 1 << 20,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> FileExchange:
    cache = BlockCache(tmp_path / "cache", limit_bytes)
    port = coordinator.listener.port
    return FileExchange("pi", cache, Endpoint("127.0.0.1", port), None, progress)


def answering(*messages: Message) -> Callable[[Connection], None]:
    def answer(connection: Connection) -> None:
        asked, _ = connection.receive()
        assert isinstance(asked, MakeFiles)
        assert (asked.request, asked.backend, asked.blocks) == (
            0,
            "chip",
            (BlockRef(ref(BLOCK).sha256, len(BLOCK), 1),),
        )
        for message in messages:
            connection.send(message)

    return answer


def sending(*contents: bytes) -> Callable[[Connection], None]:
    """What is fetched: the files one after the other, whatever their hashes."""

    def answer(connection: Connection) -> None:
        for content in contents:
            assert isinstance(connection.receive()[0], FetchBlock)
            connection.send(BlockChunk(0, len(content)), content)

    return answer


def told(answer: Message, *contents: bytes) -> Callable[[Connection], None]:
    """What a report of damage is answered with, and the files that are fetched after it."""

    def run(connection: Connection) -> None:
        assert isinstance(connection.receive()[0], BlockDamaged)
        connection.send(answer)
        sending(*contents)(connection)

    return run


def test_blocks_are_sent_from_where_they_are_wanted(
    coordinator: Coordinator, tmp_path: Path, block: tuple[int, Path]
) -> None:
    received = []

    def answer(connection: Connection) -> None:
        answering(Heartbeat(), FetchBlock(ref(BLOCK).sha256, 600))(connection)
        received.append(connection.receive())
        connection.send(FilesMade(0, tuple(map(ref, MADE))))

    coordinator.serve(answer, sending(*MADE))
    paths = exchange(coordinator, tmp_path).supply("chip", SPEC, [block])
    assert [path.read_bytes() for path in paths] == MADE
    ((chunk, payload),) = received
    assert chunk == BlockChunk(600, len(BLOCK))
    assert bytes(payload) == BLOCK[600:]


@pytest.mark.parametrize(
    ("answer", "error", "reason"),
    [
        (FilesMade(0, ()), FilesMissing, "neither the coordinator nor any agent"),
        (RequestFailed(0, "compiler: no"), BackendError, "^compiler: no$"),
        (FetchBlock("0" * 64, 0), ProtocolError, "unexpected answer to MakeFiles"),
        (FilesMade(0, (FileRef("../x", 3),)), CacheError, "no valid address"),
        (FilesMade(0, (FileRef("0" * 64, 1 << 30),)), CacheError, "storage limit"),
    ],
)
def test_answers_that_are_of_no_use(
    answer: Message,
    error: type[Exception],
    reason: str,
    coordinator: Coordinator,
    tmp_path: Path,
    block: tuple[int, Path],
) -> None:
    coordinator.serve(answering(answer))
    with pytest.raises(error, match=reason):
        exchange(coordinator, tmp_path).supply("chip", SPEC, [block])


def test_what_comes_is_what_was_made(
    coordinator: Coordinator, tmp_path: Path, block: tuple[int, Path]
) -> None:
    made = FilesMade(0, (ref(MADE[0]),))
    coordinator.serve(answering(made), sending(b"f1rst"), told(Done(0), b"f1rst"))
    with pytest.raises(CacheError, match="arrived damaged"):
        exchange(coordinator, tmp_path).supply("chip", SPEC, [block])


def test_files_that_are_damaged_at_the_coordinator_are_made_again(
    coordinator: Coordinator, tmp_path: Path, block: tuple[int, Path]
) -> None:
    made = FilesMade(0, (ref(MADE[0]),))
    gone = told(RequestFailed(0, "the coordinator's own file is damaged and was removed"))
    coordinator.serve(answering(made), sending(b"f1rst"), gone, answering(made), sending(MADE[0]))
    (path,) = exchange(coordinator, tmp_path).supply("chip", SPEC, [block])
    assert path.read_bytes() == MADE[0]


def test_no_files_are_asked_for_a_damaged_block(coordinator: Coordinator, tmp_path: Path) -> None:
    damaged = tmp_path / hashlib.sha256(BLOCK).hexdigest()
    damaged.write_bytes(BLOCK[:-1] + b"X")
    with pytest.raises(CheckpointError, match="damaged"):
        exchange(coordinator, tmp_path).supply("chip", SPEC, [(1, damaged)])


def test_the_stage_does_not_make_room_for_its_own_files(
    coordinator: Coordinator, tmp_path: Path
) -> None:
    made = FilesMade(0, tuple(map(ref, MADE)))
    cached = tmp_path / "cache" / ref(BLOCK).sha256
    cached.parent.mkdir()
    cached.write_bytes(BLOCK)
    old = cached.with_name("1" * 64)
    old.write_bytes(bytes(100))
    needed = len(BLOCK) + sum(map(len, MADE))
    coordinator.serve(answering(made), sending(*MADE))
    exchange(coordinator, tmp_path, needed).supply("chip", SPEC, [(1, cached)])
    assert cached.exists()
    assert not old.exists()
    coordinator.serve(answering(made))
    with pytest.raises(CacheError, match="storage limit"):
        exchange(coordinator, tmp_path, needed - 1).supply("chip", SPEC, [(1, cached)])


def test_room_is_made_while_other_loads_remove_files(
    coordinator: Coordinator, tmp_path: Path, block: tuple[int, Path]
) -> None:
    """A link without a target is listed, and gone when it is looked at."""
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / ("2" * 64)).symlink_to("gone")
    old = cache / ("1" * 64)
    old.write_bytes(bytes(100))
    needed = sum(map(len, MADE))
    coordinator.serve(answering(FilesMade(0, tuple(map(ref, MADE)))), sending(*MADE))
    exchange(coordinator, tmp_path, needed).supply("chip", SPEC, [block])
    assert not old.exists()


class Cancelled(Exception):
    """The user went away."""


def test_waiting_ends_when_nobody_waits(
    coordinator: Coordinator, tmp_path: Path, block: tuple[int, Path]
) -> None:
    def cancelled(done: int, total: int) -> None:
        raise Cancelled

    coordinator.serve(answering(Heartbeat()))
    with pytest.raises(Cancelled):
        exchange(coordinator, tmp_path, progress=cancelled).supply("chip", SPEC, [block])


def test_files_for_a_backend_evict_none_that_a_stage_is_loaded_from(
    coordinator: Coordinator, tmp_path: Path, block: tuple[int, Path]
) -> None:
    """The limit has room for either, and the stage was there first."""
    loaded, other = b"of a stage" * 50, b"of no stage" * 50
    made = b"made" * 100
    exchanged = exchange(coordinator, tmp_path, len(loaded) + len(made) + 100)
    cache = exchanged.cache
    for content in (loaded, other):
        cache.path(ref(content).sha256).parent.mkdir(exist_ok=True)
        cache.path(ref(content).sha256).write_bytes(content)
    os.utime(cache.path(ref(loaded).sha256), (1, 1))
    cache.in_use = lambda: {ref(loaded).sha256}
    answers = answering(FilesMade(0, (ref(made),)))
    coordinator.serve(answers, sending(made))
    (path,) = exchanged.supply("chip", SPEC, [block])
    assert path.read_bytes() == made
    assert cache.find([ref(loaded).sha256, ref(other).sha256]) == (ref(loaded).sha256,)
