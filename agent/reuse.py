"""Experts that other files of the block cache have, for a file that is wanted.

A member whose team has changed needs other experts of the same layers. Most of them are in the
files of its earlier share, or in those of whole layers. They are copied, and only the rest is sent.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from model.artifact import SHA256
from model.errors import CheckpointError
from model.expert_parts import (
    HASH_BYTES,
    ExpertParts,
    expert_hashes,
    expert_parts,
    read_range,
)
from model.safetensors import SafetensorsFile, read_safetensors
from wire.messages import BlockRef

log = logging.getLogger(__name__)

HEAD_BYTES = 8 << 10
"""The beginning of a file, which has its header. The coordinator's have less than half of it."""


@dataclass(frozen=True, slots=True)
class Run:
    """The bytes [begin, end) of a wanted file.

    ``path`` has them, ``shift`` bytes later. None: no file here has them.
    """

    begin: int
    end: int
    path: Path | None = None
    shift: int = 0

    def read(self, at: int) -> Iterator[bytes]:
        """Yield the bytes from ``at`` on, if ``path`` has them. Raises CheckpointError."""
        if self.path is None or at >= self.end:
            return
        try:
            with self.path.open("rb") as file:
                yield from read_range(file, max(at, self.begin) + self.shift, self.end + self.shift)
        except OSError as error:  # It made room for another file just now.
            raise CheckpointError(f"{self.path}: cannot be read: {error}") from error


class ExpertsHere:
    """The files of a cache that may have experts in common with a wanted one."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: list[SafetensorsFile] | None = None

    def may_have(self, ref: BlockRef) -> bool:
        """Whether a file of this block is here, so that a look at its experts may pay."""
        return bool(ref.experts) and any(
            file.metadata.get("block") == str(ref.block) for file in self._all()
        )

    def runs(self, ref: BlockRef, head: Path) -> list[Run]:
        """Divide a wanted file into what is here and what is not, in the order of its bytes.

        ``head`` has its first HEAD_BYTES or more. Empty if none of its experts are here. Raises
        CheckpointError if the file cannot be divided.
        """
        wanted = read_safetensors(head, ref.size_bytes)
        hashes = _divided(ref.experts)
        parts = expert_parts(wanted, len(hashes))
        found: list[Run] = []
        known = self._known(wanted, parts, set(hashes))
        for expert, one in enumerate(hashes):
            if one in known:
                path, places = known[one]
                found += [
                    Run(begin, end, path, there - begin)
                    for (begin, end), (there, _) in zip(parts.of(expert), places, strict=True)
                ]
        return _with_gaps(sorted(found, key=lambda run: run.begin), ref.size_bytes)

    def _known(
        self, wanted: SafetensorsFile, parts: ExpertParts, hashes: set[bytes]
    ) -> dict[bytes, tuple[Path, list[tuple[int, int]]]]:
        """Where experts with these hashes are: a file, and ranges of its bytes."""
        known: dict[bytes, tuple[Path, list[tuple[int, int]]]] = {}
        for file in self._all():
            if hashes <= known.keys():
                break
            if _kind(file) != _kind(wanted):
                continue
            array, _, step = parts.arrays[0]
            entry = file.entries.get(array)
            count = 0 if entry is None else entry.size_bytes // step
            try:
                theirs = expert_parts(file, count)
                if theirs.steps != parts.steps:
                    continue
                for expert, one in enumerate(expert_hashes(file.path, theirs)):
                    if one in hashes:
                        known.setdefault(one, (file.path, theirs.of(expert)))
            except CheckpointError as error:  # It may have made room for another file just now.
                log.info("no experts are taken from a file: %s", error)
        return known

    def _all(self) -> list[SafetensorsFile]:
        """The artifacts of layers that are here."""
        if self._files is None:
            self._files = []
            for path in self._directory.iterdir():
                if SHA256.fullmatch(path.name) and path.is_file():
                    try:
                        self._files.append(read_safetensors(path))
                    except CheckpointError:
                        continue  # Another kind of file, or a damaged one.
        return self._files


def _divided(hashes: bytes) -> Sequence[bytes]:
    return [hashes[at : at + HASH_BYTES] for at in range(0, len(hashes), HASH_BYTES)]


def _kind(file: SafetensorsFile) -> dict[str, str]:
    """The metadata that two files of one block and format share."""
    return {key: value for key, value in file.metadata.items() if key != "shapes"}


def _with_gaps(found: Sequence[Run], size_bytes: int) -> list[Run]:
    """Join runs that go on in one file, and put what nobody has between them."""
    runs: list[Run] = []
    for run in found:
        at = runs[-1].end if runs else 0
        if run.begin > at:
            runs.append(Run(at, run.begin))
        elif runs and runs[-1].path == run.path and runs[-1].shift == run.shift:
            runs[-1] = replace(runs[-1], end=run.end)
            continue
        runs.append(run)
    if runs and runs[-1].end < size_bytes:
        runs.append(Run(runs[-1].end, size_bytes))
    return runs
