"""The block cache: artifacts on this device's disk by content hash, and the files made from them.

A download is hashed as it arrives. Files on disk are hashed again before or during use, because
storage rots (agent.integrity). A download that was cut off stays as a .part file and continues
later. The files used longest ago make room, whether artifacts or a backend's prepared weights.
Experts that files here have are not sent again (agent.reuse).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import shutil
import stat
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from agent.reuse import HEAD_BYTES, ExpertsHere
from model.aging import by_use
from model.artifact import SHA256, file_sha256
from model.durable import remove
from model.errors import CheckpointError
from model.partial import PartialFile
from wire import limits
from wire.connection import Connection
from wire.errors import ConnectionLost, ProtocolError
from wire.hygiene import clean
from wire.introduction import Caller
from wire.messages import (
    BlockChunk,
    BlockDamaged,
    BlockRef,
    BlocksHeld,
    BlocksHello,
    Done,
    Endpoint,
    FetchBlock,
    FileRef,
    FindHolders,
    Heartbeat,
    Holder,
    RequestFailed,
)
from wire.sizes import format_size

if TYPE_CHECKING:
    from agent.holders import Holders

log = logging.getLogger(__name__)

LEAST_BYTES = 1 << 20
"""For less, nobody is asked which devices have it."""

IDLE_S = 60.0
"""A connection to the coordinator that was idle for longer is made anew."""


class CacheError(Exception):
    """Blocks cannot be kept: too large for the limit, the disk is full, or the data is wrong."""


class ArrivedDamaged(CacheError):
    """The bytes that arrived are not the artifact. None of them are kept."""


class Gone(CacheError):
    """The coordinator's own file was damaged, and it could not make the file again."""


class BlockCache:
    """Artifacts and prepared weights under ``directory``, together at most ``limit_bytes``."""

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        self.in_use: Callable[[], Collection[str]] = frozenset
        """Returns the hashes of the artifacts that stages are loaded from. They are not evicted."""
        self._directory = directory
        self._prepared = directory / "prepared"
        self._limit_bytes = limit_bytes

    def path(self, sha256: str) -> Path:
        return self._directory / sha256

    def held(self, sha256: str) -> Path | None:
        """The artifact with this hash, or None. The hash may come from anyone."""
        return self.path(sha256) if self.find([sha256]) else None

    def find(self, sha256s: Iterable[str]) -> tuple[str, ...]:
        """Return those of the hashes whose artifacts are here. The hashes may come from anyone."""
        return tuple(
            sha256 for sha256 in sha256s if SHA256.fullmatch(sha256) and self.path(sha256).is_file()
        )

    def fetch(
        self,
        blocks: Sequence[FileRef],
        coordinator: Endpoint,
        device: str,
        on_progress: Callable[[int, int], None],
        *,
        caller: Caller | None = None,
        keep: Collection[str] = (),
        hashed: set[Path] | None = None,
        holders: Holders | None = None,
    ) -> int:
        """Make all ``blocks`` present and whole, and return the bytes that came over the network.

        ``on_progress`` gets (bytes present, bytes in all). Artifacts whose hashes are in ``keep``
        are not evicted. With ``hashed``, the caller checks files that were present already. The
        paths of fetched files are added to it. With ``holders``, files that other devices have come
        from them. Raises CacheError, WireError.
        """
        wanted = {ref.sha256: ref for ref in blocks}
        for ref in wanted.values():
            if not SHA256.fullmatch(ref.sha256) or ref.size_bytes <= 0:
                raise CacheError(f"{ref} has no valid address")
        total = sum(ref.size_bytes for ref in wanted.values())
        keep = {*keep, *self.in_use()}
        needed_bytes = total + self._held_bytes(keep - wanted.keys())
        if needed_bytes > self._limit_bytes:
            raise CacheError(
                f"the blocks need {format_size(needed_bytes)}, and the storage limit is "
                f"{format_size(self._limit_bytes)}: raise it with --storage"
            )
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            hash_present = hashed is None
            missing = [ref for ref in wanted.values() if not self._present(ref, hash_present)]
            self._evict({*wanted, *keep}, needed_bytes)
            present = total - sum(ref.size_bytes for ref in missing)
            on_progress(present, total)
            if not missing:
                return 0
            here, reused_bytes = ExpertsHere(self._directory), 0
            with _Source(coordinator, device, caller) as source:
                if holders is not None and total - present >= LEAST_BYTES:
                    holders.take(source.holders(missing))
                for ref in missing:
                    progress = partial(_advance, on_progress, present, total)
                    copied_bytes = self._assemble(source, here, ref, progress)
                    if not copied_bytes:
                        self._obtain(source, holders, ref, progress)
                    reused_bytes += copied_bytes
                    present += ref.size_bytes
                    if hashed is not None:
                        hashed.add(self.path(ref.sha256))
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise CacheError(
                    f"disk full while storing blocks in {self._directory}: "
                    f"free {format_size(total)} there, or lower --storage"
                ) from error
            raise CacheError(f"block cache {self._directory}: {error.strerror}") from error
        return sum(ref.size_bytes for ref in missing) - reused_bytes

    def prepare(self, blocks: Sequence[FileRef], size_bytes: int) -> Path | None:
        """Return a folder for ``size_bytes`` that a backend makes from ``blocks``, which are here.

        The same blocks have the same folder. None if the limit leaves no room for all.
        """
        wanted = {ref.sha256: ref.size_bytes for ref in blocks}
        home = self._prepared / hashlib.sha256("".join(wanted).encode()).hexdigest()
        keep = set(self.in_use())
        needed_bytes = sum(wanted.values()) + size_bytes + self._held_bytes(keep - wanted.keys())
        if needed_bytes > self._limit_bytes:
            return None
        try:
            self._evict({*wanted, *keep, home.name}, needed_bytes)
            if home.exists():
                os.utime(home)
        except OSError:
            return None
        return home

    def _held_bytes(self, sha256s: Collection[str]) -> int:
        return sum(self.path(sha256).stat().st_size for sha256 in self.find(sha256s))

    def remove(self, path: Path) -> None:
        """Remove an artifact, or all prepared weights that were kept together with this file.

        Raises CacheError if something remains.
        """
        if self._prepared in path.parents:
            path = path.parent
        try:
            remove(path)
        except OSError as error:
            raise CacheError(
                f"{path} is damaged and cannot be removed: {error.strerror}"
            ) from error

    def _present(self, ref: FileRef, hash_present: bool) -> bool:
        path = self.path(ref.sha256)
        if not path.exists():
            return False
        if not _is_whole(path, ref, hash_present):
            log.warning("%s is damaged: it is removed, and fetched again", path)
            remove(path)
            return False
        os.utime(path)
        return True

    def _assemble(
        self,
        source: _Source,
        here: ExpertsHere,
        ref: FileRef,
        on_progress: Callable[[int], None],
    ) -> int:
        """Make an artifact of experts that are here and of what the coordinator sends.

        Returns the bytes that were copied. If it is 0, the artifact must be fetched as a whole.
        Raises WireError, OSError.
        """
        if not isinstance(ref, BlockRef) or not here.may_have(ref):
            return 0
        path = self.path(ref.sha256)
        receive = partial(self._receive, source.connection, ref, on_progress)
        copied_bytes = 0
        try:
            with PartialFile(path, ref.size_bytes) as arriving:
                receive(arriving, min(HEAD_BYTES, ref.size_bytes))
            with PartialFile(path, ref.size_bytes) as arriving:
                for run in here.runs(ref, arriving.part):
                    if run.path is None:
                        receive(arriving, run.end)
                        continue
                    for piece in run.read(arriving.offset):
                        arriving.write(piece)
                        on_progress(arriving.offset)
                        copied_bytes += len(piece)
                if copied_bytes:
                    if arriving.finish():
                        return copied_bytes
                    log.warning("%s: experts that were here are damaged; it is fetched whole", ref)
        except (CheckpointError, ArrivedDamaged) as error:
            log.info("%s is fetched as a whole: %s", ref, error)
        return 0

    def _obtain(
        self,
        source: _Source,
        holders: Holders | None,
        ref: FileRef,
        on_progress: Callable[[int], None],
    ) -> None:
        """Fetch one artifact from a device that has it, else from the coordinator."""
        download = partial(self._download, ref=ref, on_progress=on_progress)
        if holders is not None and holders.obtain(ref, download):
            return
        try:
            download(source.connection)
        except ArrivedDamaged as error:
            log.warning("%s: the coordinator checks its own file", error)
            source.report(ref, partial(on_progress, 0))
            download(source.connection, is_last=True)

    def _download(
        self,
        connection: Connection,
        ref: FileRef,
        on_progress: Callable[[int], None],
        *,
        is_last: bool = False,
        patience_s: float | None = None,
    ) -> None:
        """Fetch one artifact; ``on_progress`` gets the bytes that are here.

        patience_s: the longest time for each FILE_CHUNK_BYTES. Raises ArrivedDamaged, WireError,
        OSError.
        """
        arrive = partial(
            self._arrives, connection, ref, on_progress, is_last=is_last, patience_s=patience_s
        )
        # The bytes of an earlier source may be the damaged ones. So this one sends all of them.
        if not arrive() and not arrive():
            raise ArrivedDamaged(f"{ref} arrived damaged (its hash differs)")

    def _arrives(
        self,
        connection: Connection,
        ref: FileRef,
        on_progress: Callable[[int], None],
        *,
        is_last: bool,
        patience_s: float | None,
    ) -> bool:
        """Fetch the rest of an artifact. False if earlier bytes were there and its hash differs.

        Nothing of it is here then. Raises ArrivedDamaged if the connection has sent all of it.
        """
        with PartialFile(self.path(ref.sha256), ref.size_bytes) as arriving:
            before = arriving.offset
            self._receive(
                connection,
                ref,
                on_progress,
                arriving,
                ref.size_bytes,
                is_last=is_last,
                patience_s=patience_s,
            )
            if arriving.finish():
                return True
            if before == 0:
                raise ArrivedDamaged(f"{ref} arrived damaged (its hash differs)")
            return False

    def _receive(
        self,
        connection: Connection,
        ref: FileRef,
        on_progress: Callable[[int], None],
        arriving: PartialFile,
        end: int,
        *,
        is_last: bool = False,
        patience_s: float | None = None,
    ) -> None:
        """Fetch an artifact's next bytes, up to ``end``. Raises as ``_arrives``."""
        began_s, before = time.monotonic(), arriving.offset
        if before >= end:
            return
        connection.send(FetchBlock(ref.sha256, before, 0 if end == ref.size_bytes else end))
        while arriving.offset < end:
            chunk, payload = connection.receive()
            if not is_last and isinstance(chunk, BlockChunk) and chunk.total != ref.size_bytes:
                arriving.drop()
                raise ArrivedDamaged(f"{ref} arrived damaged (its size differs)")
            if (
                not isinstance(chunk, BlockChunk)
                or not arriving.fits(chunk.offset, chunk.total, len(payload))
                or len(payload) > end - arriving.offset
            ):
                raise ProtocolError(f"{ref}: unexpected answer to a download")
            arriving.write(payload)
            on_progress(arriving.offset)
            chunks = 1 + (arriving.offset - before) / limits.FILE_CHUNK_BYTES
            if patience_s is not None and time.monotonic() - began_s > patience_s * chunks:
                raise ConnectionLost(f"{connection.peer} sends too slowly")

    def _evict(self, keep: set[str], needed_bytes: int) -> None:
        """Remove the files used longest ago, except ``keep``, until ``needed_bytes`` are free."""
        others = [
            path
            for path in self._directory.iterdir()
            if path.stem not in keep
            and SHA256.fullmatch(path.stem)
            and path.suffix in ("", ".part")
        ]
        if self._prepared.is_dir():
            others += [path for path in self._prepared.iterdir() if path.name not in keep]
        sizes = {path: _size_bytes(path) for path in others}
        used = needed_bytes + sum(sizes.values())
        for path in by_use(others):
            if used <= self._limit_bytes:
                break
            used -= sizes[path]
            remove(path)


class _Source:
    """The coordinator as a source of files, over a connection that can be replaced. A context."""

    def __init__(self, coordinator: Endpoint, device: str, caller: Caller | None) -> None:
        """Raises WireError."""
        self._coordinator, self._device, self._caller = coordinator, device, caller
        self._connection = self._connect()
        self._used_s = time.monotonic()

    def __enter__(self) -> _Source:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    @property
    def connection(self) -> Connection:
        """A connection for the next request. The coordinator closes idle ones. Raises WireError."""
        now_s = time.monotonic()
        if now_s - self._used_s > IDLE_S:
            self._connection.close()
            self._connection = self._connect()
        self._used_s = now_s
        return self._connection

    def holders(self, refs: Sequence[FileRef]) -> tuple[Holder, ...]:
        """Ask which devices have these files. Raises WireError."""
        self._connection.send(FindHolders(tuple(ref.sha256 for ref in refs)))
        answer = clean(self._connection.receive()[0])
        if not isinstance(answer, BlocksHeld):
            raise ProtocolError("unexpected answer to a question for files")
        return answer.holders

    def report(self, ref: FileRef, waiting: Callable[[], None]) -> None:
        """Have the coordinator check a file that arrived damaged, on a new connection.

        ``waiting`` is called now and then, and may raise to end the wait. Raises Gone, WireError.
        """
        self._connection.close()
        self._connection = self._connect()
        self._connection.send(BlockDamaged(ref.sha256))
        while True:
            answer = clean(self._connection.receive()[0])
            waiting()
            if isinstance(answer, Done):
                return
            if isinstance(answer, RequestFailed):
                raise Gone(f"{ref} arrived damaged: {answer.reason}")
            if not isinstance(answer, Heartbeat):
                raise ProtocolError(f"{ref}: unexpected answer to a report of damage")

    def _connect(self) -> Connection:
        connection = Connection.connect(self._coordinator, caller=self._caller)
        connection.set_receive_timeout(30.0)
        connection.send(BlocksHello(self._device))
        return connection


def _advance(
    on_progress: Callable[[int, int], None], before: int, total: int, arrived: int
) -> None:
    on_progress(before + arrived, total)


def _is_whole(path: Path, ref: FileRef, hash_present: bool) -> bool:
    if not path.is_file() or path.stat().st_size != ref.size_bytes:
        return False
    try:
        return not hash_present or file_sha256(path) == ref.sha256
    except CheckpointError:  # The file cannot be read.
        return False


def remove_leftovers(directory: Path) -> None:
    """Remove what a killed agent did not finish in its cache. Such names begin with a dot.

    The agent calls this after it has claimed the state directory and before it loads anything, so
    no other process writes there.
    """
    for folder, names, files in os.walk(directory):
        for name in [name for name in names if name.startswith(".")]:
            names.remove(name)
            shutil.rmtree(Path(folder, name), ignore_errors=True)
        for name in [name for name in files if name.startswith(".")]:
            with contextlib.suppress(OSError):
                Path(folder, name).unlink()


def _size_bytes(path: Path) -> int:
    """The size of a file, or of all files in a folder. What another load removes counts no more."""
    found = 0
    for folder, _, names in os.walk(path):
        found += sum(_size_bytes(Path(folder, name)) for name in names)
    with contextlib.suppress(FileNotFoundError):
        status = path.lstat()
        found += status.st_size * stat.S_ISREG(status.st_mode)
    return found
