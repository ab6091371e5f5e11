"""Quantized blocks on the coordinator's disk, and what makes room for them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from coordinator.errors import StorageFull
from coordinator.files.artifacts import ArtifactStore, Wanted
from model.checkpoint import Checkpoint
from model.quantize import Format

FIXTURES = Path(__file__).parents[1] / "fixtures"


def wanted(checkpoint: Checkpoint, bits: int) -> list[Wanted]:
    return [Wanted(block, Format.of(bits)) for block in range(checkpoint.spec.block_count)]


def make(store: ArtifactStore, checkpoint: Checkpoint, bits: int) -> list[Path]:
    refs = store.quantize(checkpoint, wanted(checkpoint, bits), lambda *_: None, lambda: False)
    paths = [store.path(ref.sha256) for ref in refs]
    assert None not in paths
    return [path for path in paths if path is not None]


def test_the_least_recently_used_make_room(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(FIXTURES / "llama")
    unlimited = ArtifactStore(tmp_path / "a")
    unlimited.prepare()
    sizes = {
        bits: sum(p.stat().st_size for p in make(unlimited, checkpoint, bits)) for bits in (4, 8)
    }
    limit = sizes[4] + sizes[8] + 3 * 4096
    store = ArtifactStore(tmp_path / "b", limit)
    store.prepare()
    old, new = make(store, checkpoint, 8), make(store, checkpoint, 4)
    for age, path in enumerate([*old, *new]):
        os.utime(path, ns=(age, age))
    make(store, checkpoint, 8)  # Used again: now the others are older.
    made = make(store, checkpoint, 3)
    assert all(path.exists() for path in made)
    assert not all(path.exists() for path in new)
    assert all(path.exists() for path in old)
    assert sum(path.stat().st_size for path in (tmp_path / "b" / "artifacts").iterdir()) <= limit
    # What was evicted is made again, and is the same.
    assert make(store, checkpoint, 4) == new


def test_blocks_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(FIXTURES / "llama")
    store = ArtifactStore(tmp_path, 60_000)
    store.prepare()
    with pytest.raises(StorageFull, match=r"larger --storage"):
        make(store, checkpoint, 32)
