"""Having files made, on real sockets: who may ask, who may deliver, and what is checked."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import pytest

from coordinator.config import CoordinatorConfig
from coordinator.errors import AgentFailed, MakingFailed
from coordinator.files import compiled
from coordinator.roster.members import Member
from coordinator.server import Coordinator
from model.checkpoint import Checkpoint
from model.spec import ModelSpec
from tests.coordinator.test_members import PROFILE, hello, next_message
from wire import limits
from wire.async_connection import AsyncConnection
from wire.errors import ConnectionLost
from wire.messages import (
    BlockChunk,
    BlockRef,
    BlocksHello,
    Done,
    FetchBlock,
    FileRef,
    FilesMade,
    MakeFiles,
    RequestFailed,
    UnloadStage,
)

SPEC = Checkpoint.open(Path(__file__).parents[1] / "fixtures" / "llama").spec
BLOCKS = {block: bytes([block]) * 1000 * (block + 1) for block in (1, 2)}
LIMIT_BYTES = 100_000


def refs(*contents: bytes) -> tuple[FileRef, ...]:
    return tuple(FileRef(hashlib.sha256(content).hexdigest(), len(content)) for content in contents)


ASKED = MakeFiles(
    0,
    "chip",
    SPEC.to_dict(),
    tuple(
        BlockRef(hashlib.sha256(content).hexdigest(), len(content), block)
        for block, content in BLOCKS.items()
    ),
)


Test: TypeAlias = "Callable[[Shoal, AsyncConnection], Awaitable[None]]"


class Makers:
    """Makes two files of each block, or waits to be ended."""

    def __init__(self) -> None:
        self.calls = 0
        self.failure: Exception | None = None
        self.waits = False
        self.began, self.ended = threading.Event(), threading.Event()

    def version(self, backend: str) -> str | None:
        return "1" if backend == "chip" else None

    def make(
        self,
        backend: str,
        spec: ModelSpec,
        artifacts: Sequence[tuple[int, Path]],
        directory: Path,
        tick: Callable[[], None],
    ) -> Sequence[Path]:
        assert (backend, spec.hidden) == ("chip", SPEC.hidden)
        self.calls += 1
        if self.failure is not None:
            raise self.failure
        self.began.set()
        try:
            while self.waits:
                tick()
                self.ended.wait(0.01)
        finally:
            self.ended.set()
        made = []
        for block, path in artifacts:
            for copy in range(2):
                made.append(directory / f"{block}-{copy}")
                made[-1].write_bytes(made_of(path.read_bytes(), copy))
        return made


def made_of(content: bytes, copy: int) -> bytes:
    return b"made" + content[::-1] + bytes([copy])


MADE = [made_of(content, copy) for content in BLOCKS.values() for copy in range(2)]


class Shoal:
    """A coordinator's side, and connections of agents to it."""

    def __init__(self, directory: Path, makers: Makers | None) -> None:
        config = CoordinatorConfig("test", directory, "127.0.0.1", 0, "127.0.0.1", 0, False)
        config = replace(config, storage_bytes=LIMIT_BYTES, insecure=True)
        self.coordinator = Coordinator(config, lambda text: None, makers=makers)
        self.coordinator.prepare()
        self.artifacts = directory / "artifacts"
        self.port = 0
        self.connections: list[AsyncConnection] = []

    async def connect(self) -> AsyncConnection:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.connections.append(AsyncConnection(reader, writer))
        return self.connections[-1]

    async def join(self, device: str, *makes: tuple[str, str]) -> tuple[AsyncConnection, Member]:
        """An agent, and what the coordinator knows of it."""
        connection = await self.connect()
        message = replace(hello(device, device), profile=replace(PROFILE, makes=makes))
        await connection.send(message)
        await next_message(connection)
        member = self.coordinator.roster.find(device)
        assert member is not None
        return connection, member

    async def files(self, device: str) -> AsyncConnection:
        connection = await self.connect()
        await connection.send(BlocksHello(device))
        return connection


@pytest.fixture
def makers() -> Makers:
    return Makers()


def run(
    directory: Path,
    makers: Makers | None,
    test: Test,
) -> None:
    """``test`` gets a coordinator, and the control connection of `coral`, which was asked."""

    async def main() -> None:
        shoal = Shoal(directory, makers)
        async with shoal.coordinator.running() as shoal.port:
            control, member = await shoal.join("coral")
            asked = asyncio.ensure_future(member.request(UnloadStage, Done))
            try:
                assert isinstance(await next_message(control), UnloadStage)
                await asyncio.wait_for(test(shoal, control), 30)
            finally:
                asked.cancel()
                shoal.coordinator.stop()
                for connection in shoal.connections:
                    connection.close()
                with suppress(asyncio.CancelledError, AgentFailed):
                    await asked

    asyncio.run(main())


async def send(connection: AsyncConnection, wanted: FetchBlock, content: bytes) -> None:
    size = limits.FILE_CHUNK_BYTES
    for offset in range(wanted.offset, len(content), size):
        await connection.send(BlockChunk(offset, len(content)), content[offset : offset + size])


async def fetched(connection: AsyncConnection, ref: FileRef) -> bytes:
    await connection.send(FetchBlock(ref.sha256, 0))
    chunk, payload = await connection.receive(5)
    assert chunk == BlockChunk(0, ref.size_bytes)
    return bytes(payload)


async def is_dropped(connection: AsyncConnection) -> None:
    with pytest.raises(ConnectionLost):
        await next_message(connection)


def test_files_are_made_once_from_blocks_that_the_agent_has(tmp_path: Path, makers: Makers) -> None:
    async def test(shoal: Shoal, control: AsyncConnection) -> None:
        connection = await shoal.files("coral")
        await connection.send(ASKED)
        assert await next_message(connection) == FetchBlock(ASKED.blocks[0].sha256, 0)
        await connection.send(BlockChunk(0, len(BLOCKS[1])), BLOCKS[1][:700])
        connection.close()  # Cut off; the next attempt goes on from there.
        connection = await shoal.files("coral")
        await connection.send(ASKED)
        wanted = await next_message(connection)
        assert wanted == FetchBlock(ASKED.blocks[0].sha256, 700)
        await send(connection, wanted, BLOCKS[1])
        wanted = await next_message(connection)
        assert wanted == FetchBlock(ASKED.blocks[1].sha256, 0)
        await send(connection, wanted, BLOCKS[2])
        answer = await next_message(connection)
        assert answer == FilesMade(0, refs(*MADE))
        assert [await fetched(connection, ref) for ref in answer.files] == MADE
        await connection.send(ASKED)
        assert await next_message(connection) == answer
        assert makers.calls == 1
        # The same blocks of another description of the model are something else.
        spec = replace(SPEC, max_context=SPEC.max_context - 1)
        makers.failure = MakingFailed("compiler: cannot")
        await connection.send(replace(ASKED, spec=spec.to_dict()))
        assert await next_message(connection) == RequestFailed(0, "compiler: cannot")
        makers.failure = OSError(28, "No space left on device")
        await connection.send(replace(ASKED, spec=spec.to_dict()))
        failed = await next_message(connection)
        assert isinstance(failed, RequestFailed)
        assert "No space left" in failed.reason
        # What was dropped to make room is made again.
        (shoal.artifacts / answer.files[1].sha256).unlink()
        makers.failure = None
        await connection.send(ASKED)
        assert await next_message(connection) == answer
        # Damage is found however often it comes, and in all files at once.
        for _ in range(2):
            for ref, content in zip(answer.files, MADE, strict=True):
                (shoal.artifacts / ref.sha256).write_bytes(bytes(len(content)))
            await connection.send(ASKED)
            assert await next_message(connection) == answer
            assert [await fetched(connection, ref) for ref in answer.files] == MADE

    run(tmp_path, makers, test)
    assert not list((tmp_path / "made").glob(".*"))


@pytest.mark.parametrize("left", [700, len(BLOCKS[1])])
def test_what_a_power_cut_made_of_a_file_is_not_its_senders_fault(
    left: int, tmp_path: Path, makers: Makers
) -> None:
    """The part has its length, and zeros. It is fetched from its beginning."""

    async def test(shoal: Shoal, control: AsyncConnection) -> None:
        first, _ = ASKED.blocks
        (shoal.artifacts / f"{first.sha256}.part").write_bytes(bytes(left))
        connection = await shoal.files("coral")
        await connection.send(ASKED)
        if left < len(BLOCKS[1]):
            wanted = await next_message(connection)
            assert wanted == FetchBlock(first.sha256, left)
            await send(connection, wanted, BLOCKS[1])
        wanted = await next_message(connection)
        assert wanted == FetchBlock(first.sha256, 0)
        await send(connection, wanted, BLOCKS[1])
        wanted = await next_message(connection)
        assert isinstance(wanted, FetchBlock)
        await send(connection, wanted, BLOCKS[2])
        assert await next_message(connection) == FilesMade(0, refs(*MADE))

    run(tmp_path, makers, test)


def test_what_a_killed_coordinator_was_making_is_removed(tmp_path: Path) -> None:
    left = tmp_path / "made" / f"{compiled.MAKING}x"
    left.mkdir(parents=True)
    (left / "half").write_bytes(bytes(1 << 20))
    index = tmp_path / "made" / "index"
    index.touch()
    Shoal(tmp_path, None)
    assert list(index.parent.iterdir()) == [index]


def test_nobody_can(tmp_path: Path) -> None:
    async def test(shoal: Shoal, control: AsyncConnection) -> None:
        connection = await shoal.files("coral")
        await connection.send(ASKED)
        assert await next_message(connection) == FilesMade(0, ())

    run(tmp_path, None, test)


def test_an_agent_makes_them(tmp_path: Path, makers: Makers) -> None:
    async def test(shoal: Shoal, control: AsyncConnection) -> None:
        control, _ = await shoal.join("maker", ("chip", "2"), ("other", "1"))
        connection = await shoal.files("coral")

        async def asked() -> MakeFiles:
            await connection.send(ASKED)
            for content in BLOCKS.values() if not any(shoal.artifacts.iterdir()) else ():
                wanted = await next_message(connection)
                assert isinstance(wanted, FetchBlock)
                await send(connection, wanted, content)
            request = await next_message(control)
            assert isinstance(request, MakeFiles)
            assert (request.backend, request.blocks) == (ASKED.backend, ASKED.blocks)
            return request

        # Says so without having sent any.
        request = await asked()
        await control.send(FilesMade(request.request, refs(*MADE)))
        failed = await next_message(connection)
        assert isinstance(failed, RequestFailed)
        assert "maker: reported that it had made files, but did not send them" in failed.reason

        # Sends something else than it said.
        request = await asked()
        upload = await shoal.files("maker")
        await upload.send(FilesMade(request.request, refs(MADE[0])))
        wanted = await next_message(upload)
        assert isinstance(wanted, FetchBlock)
        await send(upload, wanted, bytes(len(MADE[0])))
        await is_dropped(upload)
        assert not (shoal.artifacts / refs(MADE[0])[0].sha256).exists()

        # More than the blocks can have become.
        upload = await shoal.files("maker")
        await upload.send(FilesMade(request.request, (FileRef("0" * 64, 1 << 40),)))
        await is_dropped(upload)
        await control.send(RequestFailed(request.request, "no more disk"))
        failed = await next_message(connection)
        assert failed == RequestFailed(0, "maker: no more disk")

        request = await asked()
        upload = await shoal.files("maker")
        await upload.send(FilesMade(request.request, refs(*MADE)))
        for content in MADE:
            wanted = await next_message(upload)
            assert isinstance(wanted, FetchBlock)
            await send(upload, wanted, content)
        assert await next_message(upload) == Done(request.request)
        await control.send(FilesMade(request.request, refs(*MADE)))
        assert await next_message(connection) == FilesMade(0, refs(*MADE))

    run(tmp_path, None, test)


def test_strangers_get_nothing_made(tmp_path: Path, makers: Makers) -> None:
    async def test(shoal: Shoal, control: AsyncConnection) -> None:
        await shoal.join("idle", ("chip", "1"))
        for device in ("idle", "nobody"):
            connection = await shoal.files(device)
            await connection.send(ASKED)
            await is_dropped(connection)
            connection = await shoal.files(device)
            await connection.send(FilesMade(1, refs(*MADE)))
            await is_dropped(connection)
        for wrong, reason in (
            (replace(ASKED, blocks=()), "no such blocks"),
            (replace(ASKED, blocks=ASKED.blocks * 20), "no such blocks"),
            (replace(ASKED, spec={"layers": 1}), "malformed"),
            (replace(ASKED, blocks=(BlockRef("../../etc/passwd", 9, 1),)), "no valid address"),
            (replace(ASKED, blocks=(BlockRef("0" * 64, 0, 1),)), "no valid address"),
            (replace(ASKED, blocks=(BlockRef("0" * 64, LIMIT_BYTES + 1, 1),)), "--storage"),
        ):
            connection = await shoal.files("coral")
            await connection.send(wrong)
            failed = await next_message(connection)
            assert isinstance(failed, RequestFailed)
            assert reason in failed.reason
        # Another block's bytes under this name.
        connection = await shoal.files("coral")
        await connection.send(ASKED)
        wanted = await next_message(connection)
        assert isinstance(wanted, FetchBlock)
        await send(connection, wanted, bytes(len(BLOCKS[1])))
        await is_dropped(connection)

    run(tmp_path, makers, test)
    assert makers.calls == 0
    assert not list((tmp_path / "artifacts").iterdir())


def test_making_ends_when_nobody_waits(tmp_path: Path, makers: Makers) -> None:
    makers.waits = True

    async def test(shoal: Shoal, control: AsyncConnection) -> None:
        connection = await shoal.files("coral")
        await connection.send(ASKED)
        for content in BLOCKS.values():
            wanted = await next_message(connection)
            assert isinstance(wanted, FetchBlock)
            await send(connection, wanted, content)
        assert await asyncio.to_thread(makers.began.wait, 10)
        connection.close()
        assert await asyncio.to_thread(makers.ended.wait, 10)

    run(tmp_path, makers, test)
