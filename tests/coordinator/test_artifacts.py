"""Quantized blocks on the coordinator's disk, and what makes room for them."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from coordinator.errors import MakingFailed, StorageFull
from coordinator.files.artifacts import HEADER_BYTES, ArtifactStore, Wanted
from model.artifact import file_sha256, read_block, values_of
from model.checkpoint import Checkpoint
from model.errors import Cancelled, UnsupportedModelError
from model.quantize import PREPARED, Format, Quantizer
from model.share import Share, share_spec, share_tensors
from model.spec import ModelSpec
from tests.team import shares_of
from wire.messages import BlockRef

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


def test_blocks_used_before_the_clock_was_set_back_make_room_first(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(FIXTURES / "llama")
    unlimited = ArtifactStore(tmp_path / "a")
    unlimited.prepare()
    limit = 3 * 4096 + sum(
        path.stat().st_size for bits in (4, 8) for path in make(unlimited, checkpoint, bits)
    )
    store = ArtifactStore(tmp_path / "b", limit)
    store.prepare()
    stale = make(store, checkpoint, 4)
    for path in stale:
        os.utime(path, (time.time() + 1e7, time.time() + 1e7))
    recent = make(store, checkpoint, 8)
    make(store, checkpoint, 3)
    assert not all(path.exists() for path in stale)
    assert all(path.exists() for path in recent)


@pytest.mark.parametrize(
    "index", ['{"version": 1}', '{"version": 1, "artifacts": {"0/x": 1}}', "[]", "", "\0" * 99]
)
def test_a_damaged_index_costs_time_alone(
    index: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = Checkpoint.open(FIXTURES / "llama")
    store = ArtifactStore(tmp_path)
    store.prepare()
    made = make(store, checkpoint, 4)
    (path,) = (tmp_path / "checkpoints").iterdir()
    path.write_text(index)
    assert make(store, checkpoint, 4) == made
    assert f"{path} is damaged or of another version: blocks are made again" in caplog.text


def test_blocks_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(FIXTURES / "llama")
    store = ArtifactStore(tmp_path, 60_000)
    store.prepare()
    with pytest.raises(StorageFull, match=r"larger --storage"):
        make(store, checkpoint, 32)


# ---- shares of a team --------------------------------------------------------------------------

FORMATS = [Format.of(32), Format.of(4, group_size=32)]


def shared(spec: ModelSpec, fmt: Format, shares: list[Share]) -> list[Wanted]:
    """All layers and the head for each member, member by member within a block."""
    blocks = range(1, spec.block_count)
    return [Wanted(block, fmt, share) for block in blocks for share in shares]


def obtain(
    store: ArtifactStore, checkpoint: Checkpoint, items: list[Wanted]
) -> tuple[BlockRef, ...]:
    return store.quantize(checkpoint, items, lambda *_: None, lambda: False)


def ready(directory: Path, limit_bytes: int | None = None) -> ArtifactStore:
    store = ArtifactStore(directory, limit_bytes)
    store.prepare()
    return store


def found(store: ArtifactStore, ref: BlockRef) -> Path:
    path = store.path(ref.sha256)
    assert path is not None
    return path


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: f"{fmt.bits} bits")
def test_shares_of_a_block_hold_its_own_numbers_and_nothing_else(
    tmp_path: Path, fmt: Format
) -> None:
    checkpoint = Checkpoint.open(FIXTURES / "qwen3")
    spec = checkpoint.spec
    shares = shares_of(spec, (2, 1), fmt.group_size)
    store = ready(tmp_path)
    items = shared(spec, fmt, shares)
    refs = obtain(store, checkpoint, items)
    assert [ref.block for ref in refs] == [item.block for item in items]
    for block in range(1, spec.block_count):
        (whole,) = obtain(store, checkpoint, [Wanted(block, fmt)])
        _, tensors = read_block(found(store, whole), spec, block)
        of_block = [ref for ref in refs if ref.block == block]
        parts = []
        for share, ref in zip(shares, of_block, strict=True):
            assert file_sha256(found(store, ref)) == ref.sha256
            own = share_spec(spec, share)
            room = Wanted(block, fmt, share).stored_bytes(spec) + HEADER_BYTES
            assert found(store, ref).stat().st_size == ref.size_bytes <= room
            parts.append(read_block(found(store, ref), own, block)[1])
        cut = "lm_head.weight" if block == spec.head_block else "down.weight"
        axis = 0 if block == spec.head_block else 1
        joined = np.concatenate([values_of(part[cut]) for part in parts], axis=axis)
        np.testing.assert_array_equal(joined, values_of(tensors[cut]))
        assert sum(ref.size_bytes for ref in of_block) < whole.size_bytes + 2 * HEADER_BYTES


def test_shares_are_made_once_and_known_by_the_parts_that_a_block_has(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(FIXTURES / "qwen3")
    fmt = FORMATS[0]
    one, other = shares_of(checkpoint.spec, (1, 1))
    items = shared(checkpoint.spec, fmt, [one, other])
    refs = obtain(ready(tmp_path), checkpoint, items)
    times = {path: path.stat().st_ino for path in (tmp_path / "artifacts").iterdir()}
    # The coordinator was started again.
    store = ready(tmp_path)
    assert obtain(store, checkpoint, items) == refs
    assert {path: path.stat().st_ino for path in (tmp_path / "artifacts").iterdir()} == times
    # Another part of the vocabulary changes nothing about a layer.
    more = Share(one.kv_heads, one.columns, (0, checkpoint.spec.vocab - 1))
    assert obtain(store, checkpoint, [Wanted(1, fmt, more)]) == refs[:1]
    head = checkpoint.spec.head_block
    assert obtain(store, checkpoint, [Wanted(head, fmt, more)]) != refs[-2:-1]
    # Nor is a share ever taken for the whole block.
    known = store.known(checkpoint, [fmt])
    assert not {ref.sha256 for ref in refs} & set(known.values())


def test_no_share_is_cut_out_of_a_damaged_block(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = Checkpoint.open(FIXTURES / "qwen3")
    fmt = FORMATS[1]
    share = shares_of(checkpoint.spec, (1, 1), fmt.group_size)[1]
    right = obtain(ready(tmp_path / "good"), checkpoint, [Wanted(2, fmt, share)])
    store = ready(tmp_path / "bad")
    (whole,) = obtain(store, checkpoint, [Wanted(2, fmt)])
    assert store.is_whole(whole.sha256)
    path = found(store, whole)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert obtain(store, checkpoint, [Wanted(2, fmt, share)]) == right
    assert f"{path} is damaged" in caplog.text
    assert file_sha256(path) == whole.sha256


@pytest.mark.parametrize("has_whole", [True, False])
def test_a_damaged_share_is_made_again(tmp_path: Path, has_whole: bool) -> None:
    checkpoint = Checkpoint.open(FIXTURES / "qwen3")
    fmt = FORMATS[1]
    share = shares_of(checkpoint.spec, (1, 1), fmt.group_size)[0]
    store = ready(tmp_path)
    (ref,) = obtain(store, checkpoint, [Wanted(3, fmt, share)])
    path = found(store, ref)
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    if not has_whole:
        for other in path.parent.iterdir():
            if other != path:
                other.unlink()
    assert store.can_make(ref.sha256)
    store.repair(ref.sha256)
    assert path.read_bytes() == good
    with pytest.raises(MakingFailed, match="load again"):
        ready(tmp_path).repair("0" * 64)


def test_a_kept_file_is_written_again_each_time_that_it_is_damaged(tmp_path: Path) -> None:
    store, data = ready(tmp_path), b"the words of a model"
    for _ in range(3):
        ref = store.keep(data)
        path = store.place(ref.sha256)
        for damage in (b"the words of a m0del", b""):
            path.write_bytes(damage)
            assert store.keep(data) == ref
            assert path.read_bytes() == data
            path.write_bytes(damage)
            store.repair(ref.sha256)
            assert path.read_bytes() == data
        path.unlink()
        assert store.can_make(ref.sha256)
        store.repair(ref.sha256)
        assert path.read_bytes() == data
    obtain(store, Checkpoint.open(FIXTURES / "qwen3"), [])
    assert not store.can_make(ref.sha256)


def test_shares_that_were_used_longest_ago_make_room(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(FIXTURES / "qwen3")
    spec, fmt = checkpoint.spec, FORMATS[0]
    shares = shares_of(spec, (1, 1))
    items = shared(spec, fmt, shares)
    refs = obtain(ready(tmp_path / "a"), checkpoint, items)
    largest = max(Wanted(block, fmt).stored_bytes(spec) for block in range(1, spec.block_count))
    limit = sum(ref.size_bytes for ref in refs) + largest + 2 * HEADER_BYTES
    store = ready(tmp_path / "b", limit)
    # The whole blocks do not all fit beside the shares. They go first, because they were cut.
    assert obtain(store, checkpoint, items) == refs
    assert all(store.path(ref.sha256) for ref in refs)
    assert sum(p.stat().st_size for p in (tmp_path / "b" / "artifacts").iterdir()) <= limit
    with pytest.raises(StorageFull, match="larger --storage"):
        obtain(ready(tmp_path / "c", limit // 2), checkpoint, items)


def test_cutting_reports_each_share_and_can_be_cancelled(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(FIXTURES / "qwen3")
    items = shared(checkpoint.spec, FORMATS[0], shares_of(checkpoint.spec, (1, 1)))
    steps: list[tuple[int, int]] = []
    with pytest.raises(Cancelled):
        ready(tmp_path).quantize(
            checkpoint, items, lambda *step: steps.append(step), lambda: len(steps) == 3
        )
    assert steps == [(done, len(items)) for done in (1, 2, 3)]


@pytest.mark.parametrize(
    ("share", "words"),
    [
        (Share((0, 1), (0, 16), (0, 100)), "layer 0 cannot be shared like this: .*group of 32"),
        (Share((0, 3), (0, 32), (0, 100)), r"a share of KV heads \[0, 3\) of 2 is invalid"),
    ],
)
def test_an_impossible_share_is_refused(tmp_path: Path, share: Share, words: str) -> None:
    checkpoint = Checkpoint.open(FIXTURES / "qwen3")
    with pytest.raises(UnsupportedModelError, match=words):
        obtain(ready(tmp_path), checkpoint, [Wanted(1, FORMATS[1], share)])


def test_a_share_of_a_checkpoint_that_has_changed_is_not_passed_off(tmp_path: Path) -> None:
    model = Path(shutil.copytree(FIXTURES / "qwen3", tmp_path / "model"))
    checkpoint = Checkpoint.open(model)
    share = shares_of(checkpoint.spec, (1, 1))[0]
    store = ready(tmp_path / "state")
    (ref,) = obtain(store, checkpoint, [Wanted(1, FORMATS[0], share)])
    for path in (tmp_path / "state" / "artifacts").iterdir():
        path.unlink()
    weights = model / "model.safetensors"
    data = np.frombuffer(bytearray(weights.read_bytes()), np.uint8)
    header = 8 + int(data[:8].view(np.uint64)[0])
    data[header:] = np.roll(data[header:], 4)
    weights.write_bytes(data.tobytes())
    with pytest.raises(MakingFailed, match="the checkpoint has changed"):
        store.repair(ref.sha256)


@pytest.mark.parametrize("quantizer", PREPARED)
def test_shares_and_repairs_have_the_codes_that_a_quantizer_chose(
    tmp_path: Path, quantizer: Quantizer
) -> None:
    plain, fmt = Checkpoint.open(FIXTURES / "qwen3"), Format.of(4, quantizer, 32)
    store = ready(tmp_path)
    checkpoint = store.prepared(plain, quantizer, "some words of a text to look at")
    shares = shares_of(checkpoint.spec, (2, 1), fmt.group_size)
    for block in (1, checkpoint.spec.head_block):
        items = [Wanted(block, fmt, share) for share in shares]
        refs = obtain(store, checkpoint, [Wanted(block, fmt), *items])
        codes = checkpoint.kept(block, fmt)
        for share, ref in zip(shares, refs[1:], strict=True):
            own = share_spec(checkpoint.spec, share)
            _, tensors = read_block(found(store, ref), own, block)
            wanted = share_tensors(checkpoint.spec, block, codes, share)
            assert tensors.keys() == wanted.keys()
            for name, tensor in tensors.items():
                np.testing.assert_array_equal(values_of(tensor), values_of(wanted[name]))
        # Rounded codes are other files, under a key of their own.
        assert obtain(store, plain, [Wanted(block, fmt)]) != refs[:1]
        assert obtain(store, checkpoint, [Wanted(block, fmt)]) == refs[:1]
        found(store, refs[0]).write_bytes(b"damaged")
        store.repair(refs[0].sha256)
        assert file_sha256(found(store, refs[0])) == refs[0].sha256
