"""Files that a backend needs beside its blocks, made by or for another machine of the shoal.

The asking agent names the blocks by hash, and serves those that the coordinator lacks. The making
agent serves the files that it made. The block cache verifies the hash of every file that arrives.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from agent.blocks import BlockCache, Gone
from backends.base import Artifacts, BackendError, FilesMissing
from backends.registry import backend_class
from model.artifact import SHA256, file_sha256
from model.errors import CheckpointError
from model.spec import ModelSpec
from wire.chunks import file_chunks
from wire.connection import Connection
from wire.errors import ProtocolError
from wire.hygiene import clean
from wire.introduction import Caller
from wire.messages import (
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

SILENCE_S = 30.0


@dataclass(frozen=True, slots=True)
class FileExchange:
    """Exchanges files with the coordinator on behalf of one running request.

    progress: called with (done, total) now and then; it may raise to end the exchange.
    """

    device: str
    cache: BlockCache
    coordinator: Endpoint
    caller: Caller | None
    progress: Callable[[int, int], None]

    def supply(self, backend: str, spec: ModelSpec, artifacts: Artifacts) -> list[Path]:
        """Return the files that ``backend`` needs beside these blocks, in the cache.

        Raises FilesMissing if nobody can make them, BackendError if making fails, CacheError,
        WireError.
        """
        paths = {_sha256_of(path): path for _, path in artifacts}
        refs = tuple(
            BlockRef(sha256, path.stat().st_size, block)
            for (block, path), sha256 in zip(artifacts, paths, strict=True)
        )
        try:
            return self._obtain(backend, spec, refs, paths)
        except Gone:  # The coordinator's files were damaged, and are made again now.
            return self._obtain(backend, spec, refs, paths)

    def _obtain(
        self, backend: str, spec: ModelSpec, refs: tuple[BlockRef, ...], paths: Mapping[str, Path]
    ) -> list[Path]:
        """Obtain files for artifacts by hash. Gone if the coordinator's files were damaged."""
        with self._connect() as connection:
            connection.send(MakeFiles(0, backend, spec.to_dict(), refs))
            answer = self._serve(connection, paths, self._waiting(refs))
        if isinstance(answer, RequestFailed):
            raise BackendError(answer.reason)
        if not isinstance(answer, FilesMade):
            raise ProtocolError(f"{connection.peer}: unexpected answer to MakeFiles")
        if not answer.files:
            raise FilesMissing("neither the coordinator nor any agent here can make them")
        self.cache.fetch(
            answer.files,
            self.coordinator,
            self.device,
            self.progress,
            caller=self.caller,
            keep=paths,
        )
        return [self.cache.path(ref.sha256) for ref in answer.files]

    def make(self, request: MakeFiles) -> FilesMade:
        """Make files for another device, and hand them to the coordinator.

        Raises BackendError, ModelError, CacheError, WireError.
        """
        spec = ModelSpec.from_dict(request.spec)
        self.cache.fetch(
            request.blocks, self.coordinator, self.device, self.progress, caller=self.caller
        )
        artifacts = [(ref.block, self.cache.path(ref.sha256)) for ref in request.blocks]
        waiting = self._waiting(request.blocks)
        try:
            with tempfile.TemporaryDirectory(prefix="shoal-files-") as name:
                made = backend_class(request.backend).make_files(
                    spec, artifacts, Path(name), waiting
                )
                paths = [(file_sha256(path), path) for path in made]
                files = tuple(FileRef(sha256, path.stat().st_size) for sha256, path in paths)
                answer = FilesMade(request.request, files)
                with self._connect() as connection:
                    connection.send(answer)
                    if not isinstance(self._serve(connection, dict(paths), waiting), Done):
                        raise ProtocolError(f"{connection.peer}: unexpected answer to FilesMade")
        except OSError as error:
            raise BackendError(f"cannot make files: {error.strerror or error}") from error
        return answer

    def _connect(self) -> Connection:
        connection = Connection.connect(self.coordinator, caller=self.caller)
        connection.set_receive_timeout(SILENCE_S)
        connection.send(BlocksHello(self.device))
        return connection

    def _waiting(self, blocks: Iterable[FileRef]) -> Callable[[], None]:
        """Return a function that sends a heartbeat, and ends a cancelled request."""
        return partial(self.progress, 0, sum(ref.size_bytes for ref in blocks))

    def _serve(
        self, connection: Connection, paths: Mapping[str, Path], waiting: Callable[[], None]
    ) -> Message:
        """Send files of ``paths`` by hash on request, and return the message that ends this."""
        while True:
            message = clean(connection.receive()[0])
            waiting()
            if isinstance(message, FetchBlock) and message.sha256 in paths:
                path = paths[message.sha256]
                for chunk, payload in file_chunks(path, message.offset, message.end):
                    connection.send(chunk, payload)
                    waiting()
            elif not isinstance(message, Heartbeat):
                return message


def _sha256_of(path: Path) -> str:
    """Return the hash of an artifact. Raises CheckpointError if its name is another hash."""
    sha256 = file_sha256(path)
    if SHA256.fullmatch(path.name) and sha256 != path.name:
        raise CheckpointError(f"{path}: the file is damaged; fetch it again")
    return sha256
