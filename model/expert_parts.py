"""Where the experts of a layer lie in its file, and the hash of each.

The members of a team have whole experts. If the team changes, most experts that a device needs are
in files that it has already. Their hashes tell which, so that only the others are sent.

A tensor of experts has the rows of one after the other. So an expert is the same bytes in the file
of a whole layer and in those of all shares that have it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from model.errors import CheckpointError
from model.experts import STACKED
from model.safetensors import SafetensorsFile

HASH_BYTES = 16
"""The bytes of an expert's hash. A file of experts is compared with its whole SHA-256 as well."""

_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ExpertParts:
    """The parts of a file that its experts have: one in each stored array of a stacked tensor."""

    count: int
    arrays: tuple[tuple[str, int, int], ...]
    """Each array's name, its first byte in the file, and the bytes of one expert."""

    @property
    def steps(self) -> tuple[tuple[str, int], ...]:
        """Each array's name and one expert's bytes, which all shares of a layer have in common."""
        return tuple((name, step) for name, _, step in self.arrays)

    def of(self, expert: int) -> list[tuple[int, int]]:
        """Return the half-open ranges of bytes that an expert of this file has."""
        return [
            (begin + expert * step, begin + (expert + 1) * step) for _, begin, step in self.arrays
        ]


def expert_parts(file: SafetensorsFile, count: int) -> ExpertParts:
    """Return where the ``count`` experts lie in the artifact of a layer.

    Raises CheckpointError if its tensors cannot be divided so, as in the scheme "truncate", which
    has one scale for all rows.
    """
    arrays = []
    for name, entry in sorted(file.entries.items()):
        if not STACKED.isdisjoint((name, name.rpartition(".")[0])):
            step, rest = divmod(entry.size_bytes, count) if count > 0 else (0, 1)
            if rest or not step:
                raise CheckpointError(f"{file.path}: {name} is not that of {count} experts")
            arrays.append((name, entry.begin, step))
    if not arrays:
        raise CheckpointError(f"{file.path}: it has no experts")
    return ExpertParts(count, tuple(arrays))


def expert_hashes(path: Path, parts: ExpertParts) -> list[bytes]:
    """Return the hash of each expert of a file. Raises CheckpointError if it cannot be read."""
    hashes = []
    try:
        with path.open("rb") as file:
            for expert in range(parts.count):
                digest = hashlib.sha256()
                for begin, end in parts.of(expert):
                    for piece in read_range(file, begin, end):
                        digest.update(piece)
                hashes.append(digest.digest()[:HASH_BYTES])
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    return hashes


def read_range(file: BinaryIO, begin: int, end: int) -> Iterator[bytes]:
    """Yield the bytes [begin, end) in pieces. Raises OSError, also if the file is shorter."""
    file.seek(begin)
    while begin < end:
        piece = file.read(min(_READ_BYTES, end - begin))
        if not piece:
            raise OSError("the file was cut short")
        begin += len(piece)
        yield piece
