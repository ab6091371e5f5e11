"""A file that arrives in pieces. The pieces stay on disk, and the next attempt continues there."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from model.durable import remove

_READ_BYTES = 1 << 20


class PartialFile:
    """A file ``<sha256>.part``, which becomes ``<sha256>`` once it is whole. Use as a context."""

    def __init__(self, target: Path, size_bytes: int) -> None:
        """``target`` is named by the hash of its ``size_bytes``. Raises OSError."""
        self._target = target
        self.part = target.with_name(f"{target.name}.part")
        """Where its bytes are until it is whole."""
        if self.part.is_dir():
            remove(self.part)
        self._size_bytes = size_bytes
        self._digest = hashlib.sha256()
        self.offset = 0
        """The bytes that are here."""
        self._file = self.part.open("ab+")
        if self._file.seek(0, os.SEEK_END) > size_bytes:
            self._file.truncate(0)  # Too long to be a part of this file.
        self._file.seek(0)
        while piece := self._file.read(_READ_BYTES):
            self._digest.update(piece)
            self.offset += len(piece)

    def __enter__(self) -> PartialFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def complete(self) -> bool:
        return self.offset == self._size_bytes

    def fits(self, offset: int, total: int, count: int) -> bool:
        """Whether ``count`` bytes at ``offset`` of a file of ``total`` are the next ones."""
        left = self._size_bytes - self.offset
        return (offset, total) == (self.offset, self._size_bytes) and 0 < count <= left

    def write(self, piece: bytes | memoryview) -> None:
        """Append the next bytes. Raises OSError."""
        self._file.write(piece)
        self._digest.update(piece)
        self.offset += len(piece)

    def drop(self) -> None:
        """Start over, and forget the bytes that are here. Raises OSError."""
        self._file.truncate(0)
        self._digest, self.offset = hashlib.sha256(), 0

    def finish(self) -> bool:
        """Keep the complete file under its hash. If the hash differs, drop it and return False.

        The file is on the disk before it has its name. Raises OSError.
        """
        if self._digest.hexdigest() != self._target.name:
            self._file.close()
            self.part.unlink(missing_ok=True)
            return False
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self.part.replace(self._target)
        return True
