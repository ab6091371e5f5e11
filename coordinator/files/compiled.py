"""Has files made that a backend needs beside its blocks, such as compiled ones.

A device that cannot make the files asks the coordinator, and names the blocks by hash. The
coordinator's machine makes them if it can. Otherwise an agent that can gets the blocks, makes the
files and sends them back. They are kept with the artifacts and fetched like them. Their key is made
of the blocks and the version of the tool. Losing the index costs time, never correctness.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from coordinator.errors import AgentFailed, CoordinatorError, MakingFailed
from coordinator.files.artifacts import ArtifactStore
from coordinator.roster.measurements import in_thread
from coordinator.roster.members import Member, Roster
from model.bounded import read_json
from model.errors import Cancelled, ModelError
from model.spec import ModelSpec
from wire import limits
from wire.async_connection import AsyncConnection
from wire.errors import ProtocolError
from wire.messages import (
    BlockChunk,
    Done,
    FetchBlock,
    FileRef,
    FilesMade,
    Heartbeat,
    MakeFiles,
    RequestFailed,
)

log = logging.getLogger(__name__)

UPLOAD_IDLE_S = 30.0

MAKING = ".making-"
"""The names of folders in which files are made begin so."""

MAX_FILES_PER_BLOCK = 64
MADE_FACTOR = 4
MADE_BYTES = 64 << 20
"""An agent may send files of MADE_FACTOR times the blocks' bytes, and this many more.

Compilers were seen to add a tenth."""


class Makers(Protocol):
    """Makes files on this machine. The coordinator itself knows no backend."""

    def version(self, backend: str) -> str | None:
        """The version of the backend's tool on this machine, or None without one."""

    def make(
        self,
        backend: str,
        spec: ModelSpec,
        artifacts: Sequence[tuple[int, Path]],
        directory: Path,
        tick: Callable[[], None],
    ) -> Sequence[Path]:
        """Make the files in ``directory``, and return them.

        tick: is called now and then, and may raise to end the work.
        Raises MakingFailed, ModelError, OSError.
        """


class Workshop:
    """Has files made for agents that carry out a request, one set at a time."""

    def __init__(
        self, store: ArtifactStore, roster: Roster, state_dir: Path, here: Makers | None
    ) -> None:
        """Make no files on this machine if ``here`` is None."""
        self._store = store
        self._roster = roster
        self._index = state_dir / "made"
        self._here = here
        self._lock = asyncio.Lock()
        self._expected: dict[str, tuple[int, int]] = {}
        """The most files and bytes that each device that makes files may send."""

    def prepare(self) -> None:
        """Remove what a killed coordinator was making. Its state directory is claimed."""
        for left in self._index.glob(f"{MAKING}*"):
            shutil.rmtree(left, ignore_errors=True)

    async def serve(self, device: str, request: MakeFiles, connection: AsyncConnection) -> None:
        """Answer an agent's request, and send heartbeats until then.

        Raises WireError if the agent goes away. The work then ends.
        """
        member = self._roster.find(device)
        if member is None or not member.is_asked:
            raise ProtocolError(f"{connection.peer} wants files that nobody asked it to use")
        making = asyncio.ensure_future(self._made(member, request, connection))
        try:
            while not making.done():
                await connection.send(Heartbeat())
                await asyncio.wait({making}, timeout=limits.HEARTBEAT_S)
            try:
                files = making.result()
            except (CoordinatorError, ModelError) as error:
                await connection.send(RequestFailed(request.request, str(error)))
            except OSError as error:
                reason = f"the coordinator cannot keep files: {error.strerror or error}"
                await connection.send(RequestFailed(request.request, reason))
            else:
                await connection.send(FilesMade(request.request, files))
        finally:
            making.cancel()
            await asyncio.gather(making, return_exceptions=True)

    async def take(self, device: str, made: FilesMade, connection: AsyncConnection) -> None:
        """Fetch the files that an agent made, then answer. Raises WireError, CoordinatorError."""
        if device not in self._expected:
            raise ProtocolError(f"{connection.peer} offers files that nobody asked for")
        count, size_bytes = self._expected[device]
        if len(made.files) > count or sum(ref.size_bytes for ref in made.files) > size_bytes:
            raise ProtocolError(f"{connection.peer} offers more files or bytes than were asked for")
        for ref in made.files:
            await self._fetch(ref, connection, made.files)
        await connection.send(Done(made.request))

    # ---- making ---------------------------------------------------------------------------------

    async def _made(
        self, member: Member, request: MakeFiles, connection: AsyncConnection
    ) -> tuple[FileRef, ...]:
        """The files, all in the store. None are returned if no machine can make them."""
        spec = ModelSpec.from_dict(request.spec)
        if not 0 < len(request.blocks) <= spec.block_count:
            raise MakingFailed("the model has no such blocks")
        async with self._lock:
            makers: list[tuple[str, Callable[[], Awaitable[tuple[FileRef, ...]]]]] = []
            here = self._here
            if here is not None:
                version = await asyncio.to_thread(here.version, request.backend)
                if version is not None:
                    makers.append((version, partial(self._make_here, here, spec, request)))
            for other in self._roster.members:
                version = dict(other.profile.makes).get(request.backend)
                if other is not member and version is not None:
                    makers.append((version, partial(self._make_on, other, request)))
            for version, _ in makers:
                known = await asyncio.to_thread(self._known, _key(request, version))
                if known is not None:
                    return known
            if not makers:
                return ()
            for ref in request.blocks:
                await self._fetch(ref, connection, request.blocks)
            version, make = makers[0]
            files = await make()
            self._remember(_key(request, version), files)
            return files

    async def _make_here(
        self, here: Makers, spec: ModelSpec, request: MakeFiles
    ) -> tuple[FileRef, ...]:
        paths = [self._store.path(ref.sha256) for ref in request.blocks]
        artifacts = [
            (ref.block, path) for ref, path in zip(request.blocks, paths, strict=True) if path
        ]
        if len(artifacts) < len(paths):
            raise MakingFailed("the blocks were deleted meanwhile to make room: load again")

        def work(
            on_step: Callable[[int, int], None], cancelled: Callable[[], bool]
        ) -> tuple[FileRef, ...]:
            def tick() -> None:
                if cancelled():
                    raise Cancelled

            self._index.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._index, prefix=MAKING) as name:
                made = here.make(request.backend, spec, artifacts, Path(name), tick)
                files: list[FileRef] = []
                for path in made:
                    files.append(FileRef(*self._store.adopt(path, {ref.sha256 for ref in files})))
                return tuple(files)

        log.info("making files for %s, beside %d blocks", request.backend, len(artifacts))
        return await in_thread("files", work, lambda step: None)

    async def _make_on(self, maker: Member, request: MakeFiles) -> tuple[FileRef, ...]:
        sent_bytes = sum(ref.size_bytes for ref in request.blocks)
        self._expected[maker.device] = (
            MAX_FILES_PER_BLOCK * len(request.blocks),
            MADE_FACTOR * sent_bytes + MADE_BYTES,
        )
        log.info("%s makes files for %s", maker.name, request.backend)
        try:
            made = await maker.request(
                partial(
                    MakeFiles, backend=request.backend, spec=request.spec, blocks=request.blocks
                ),
                FilesMade,
            )
        finally:
            del self._expected[maker.device]
        if not made.files or not await asyncio.to_thread(self._has_all, made.files):
            raise AgentFailed(maker.name, "reported that it had made files, but did not send them")
        return made.files

    # ---- what is kept ---------------------------------------------------------------------------

    def _known(self, key: str) -> tuple[FileRef, ...] | None:
        with contextlib.suppress(OSError, ValueError, TypeError):
            entries = read_json(self._index / key)
            files = tuple(FileRef(sha256, size_bytes) for sha256, size_bytes in entries)
            if files and self._has_all(files):
                return files
        return None

    def _remember(self, key: str, files: Sequence[FileRef]) -> None:
        content = json.dumps([[ref.sha256, ref.size_bytes] for ref in files])
        self._index.mkdir(parents=True, exist_ok=True)
        # If a crash cuts it short, it is no JSON, and the files are made again.
        (self._index / key).write_text(content, encoding="utf-8")

    def _has_all(self, refs: Sequence[FileRef]) -> bool:
        return all(map(self._has, refs))

    def _has(self, ref: FileRef) -> bool:
        """Whether an undamaged file is here. Hashing it costs less than work on a damaged one."""
        if not self._store.is_whole(ref.sha256):
            return False
        path = self._store.path(ref.sha256)
        if path is None or path.stat().st_size != ref.size_bytes:
            return False
        os.utime(path)
        return True

    async def _fetch(
        self, ref: FileRef, connection: AsyncConnection, beside: Sequence[FileRef]
    ) -> None:
        """Fetch a file from the agent at the other end, unless the store has it.

        The files ``beside`` it stay in the store. Raises WireError, StorageFull, OSError.
        """
        if await asyncio.to_thread(self._has, ref):
            return
        keep = {other.sha256 for other in beside}
        # The bytes of an earlier attempt may be wrong. Then the file comes from its beginning.
        if not await self._arrives(ref, connection, keep) and not await self._arrives(
            ref, connection, keep
        ):
            raise ProtocolError(f"{connection.peer} sent a file of another hash")

    async def _arrives(self, ref: FileRef, connection: AsyncConnection, keep: set[str]) -> bool:
        """Fetch the rest of a file. False if earlier bytes were there and its hash differs.

        Nothing of it is here then. Raises as ``_fetch``.
        """
        upload = await asyncio.to_thread(self._store.begin, ref.sha256, ref.size_bytes, keep)
        with upload:
            before = upload.offset
            if not upload.complete:
                await connection.send(FetchBlock(ref.sha256, upload.offset))
            while not upload.complete:
                chunk, payload = await connection.receive(UPLOAD_IDLE_S)
                if not isinstance(chunk, BlockChunk) or not upload.fits(
                    chunk.offset, chunk.total, len(payload)
                ):
                    raise ProtocolError(f"{connection.peer}: unexpected answer to a download")
                await asyncio.to_thread(upload.write, payload)
            if await asyncio.to_thread(upload.finish):
                return True
        if before == 0:
            raise ProtocolError(f"{connection.peer} sent a file of another hash")
        return False


def _key(request: MakeFiles, version: str) -> str:
    """The key of made files: the backend, the tool's version, the model and the blocks."""
    blocks = [[ref.block, ref.sha256] for ref in request.blocks]
    content = json.dumps([request.backend, version, request.spec, blocks], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
