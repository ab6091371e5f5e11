"""A file as the sequence of messages that carries it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from wire import limits
from wire.messages import BlockChunk


def file_chunks(path: Path, offset: int, end: int = 0) -> Iterator[tuple[BlockChunk, bytes]]:
    """Yield the messages and payloads that carry the bytes [offset, end) of the file at ``path``.

    An end of 0 is that of the file. Each step reads one chunk. Raises OSError if the file is
    shorter than ``offset``, or becomes shorter meanwhile.
    """
    with path.open("rb") as file:
        total = path.stat().st_size
        if offset > total:
            raise OSError(f"{path} was cut short")  # The receiver has more of it.
        offset = file.seek(max(offset, 0))
        end = min(end, total) if end > 0 else total
        while offset < end:
            data = file.read(min(limits.FILE_CHUNK_BYTES, end - offset))
            if not data:
                raise OSError(f"{path} was cut short")
            yield BlockChunk(offset, total), data
            offset += len(data)
