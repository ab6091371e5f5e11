from __future__ import annotations

import errno
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.artifact import file_sha256, read_block, write_artifact
from model.checkpoint import Checkpoint
from model.costs import stored_bytes
from model.errors import CheckpointError
from model.quantize import BITS, Format, QuantizedMatrix, quantize
from model.safetensors import read_safetensors

FIXTURES = Path(__file__).parents[1] / "fixtures"
FORMATS = [
    *(Format.of(bits) for bits in BITS),
    Format(4, "rtn", 128, True),
    Format.of(3, "truncate"),
]


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint.open(FIXTURES / "opt-post")


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_round_trip(checkpoint: Checkpoint, tmp_path: Path, fmt: Format) -> None:
    for block in range(checkpoint.spec.block_count):
        tensors = checkpoint.block(block)
        artifact = write_artifact(tmp_path, block, tensors, fmt)
        assert artifact.path == tmp_path / artifact.sha256
        assert artifact.sha256 == file_sha256(artifact.path)
        assert artifact.size_bytes == artifact.path.stat().st_size
        header_bytes = struct.unpack("<Q", artifact.path.read_bytes()[:8])[0]
        assert artifact.size_bytes == 8 + header_bytes + artifact.payload_bytes
        assert artifact.payload_bytes == stored_bytes(checkpoint.spec, block, fmt)
        found, stored = read_block(artifact.path, checkpoint.spec, block)
        assert found == fmt
        for name, tensor in stored.items():
            if isinstance(tensor, QuantizedMatrix):
                expected = quantize(tensors[name], fmt).dequantize()
                np.testing.assert_array_equal(tensor.dequantize(), expected)
                assert tensor.data.flags.aligned
            else:
                np.testing.assert_array_equal(tensor, tensors[name])
                assert not tensor.flags.writeable


def test_contents_decide_every_byte(checkpoint: Checkpoint, tmp_path: Path) -> None:
    tensors = checkpoint.block(1)
    first = write_artifact(tmp_path / "a", 1, tensors, Format(4))
    again = write_artifact(tmp_path / "b", 1, dict(reversed(tensors.items())), Format(4))
    assert first.sha256 == again.sha256
    assert first.path.read_bytes() == again.path.read_bytes()
    assert write_artifact(tmp_path / "a", 1, tensors, Format(4)).path == first.path
    assert len(list((tmp_path / "a").iterdir())) == 1
    assert write_artifact(tmp_path, 2, tensors, Format(4)).sha256 != first.sha256


@pytest.mark.parametrize(
    ("fmt", "block"), [(Format(4), 1), (Format.of(3, "truncate"), 4), (Format.of(16), 4)], ids=str
)
def test_every_flipped_header_byte_is_noticed(
    checkpoint: Checkpoint, tmp_path: Path, fmt: Format, block: int
) -> None:
    artifact = write_artifact(tmp_path, block, checkpoint.block(block), fmt)
    original = artifact.path.read_bytes()
    header_end = 8 + struct.unpack("<Q", original[:8])[0]
    tampered = tmp_path / "tampered"
    for index in range(header_end):
        data = bytearray(original)
        data[index] ^= 1
        tampered.write_bytes(data)
        with pytest.raises(CheckpointError):
            read_block(tampered, checkpoint.spec, block)


def test_truncation_and_extension_are_noticed(checkpoint: Checkpoint, tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path, 1, checkpoint.block(1), Format(4))
    original = artifact.path.read_bytes()
    tampered = tmp_path / "tampered"
    for size in [*range(64), *range(64, len(original), 997), len(original) - 1]:
        tampered.write_bytes(original[:size])
        with pytest.raises(CheckpointError):
            read_block(tampered, checkpoint.spec, 1)
    tampered.write_bytes(original + b"\0")
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        read_block(tampered, checkpoint.spec, 1)


def rewritten(path: Path, change: Any) -> Path:
    """A copy whose header has gone through ``change``, with the payload as it was."""
    data = path.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:end])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    copy = path.with_name("rewritten")
    copy.write_bytes(struct.pack("<Q", len(text)) + text + data[end:])
    return copy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["__metadata__"].update(version="2"), "version '2' instead of 1"),
        (lambda h: h["__metadata__"].update(extra="1"), "exactly the keys"),
        (lambda h: h["__metadata__"].update(bits="7"), "bits must be one of"),
        (lambda h: h["__metadata__"].update(bits="04"), "not in canonical form"),
        (lambda h: h["__metadata__"].update(bits="-4"), "bits must be a number"),
        (lambda h: h["__metadata__"].update(symmetric="yes"), "symmetric must be"),
        (lambda h: h["__metadata__"].update(symmetric="true"), "no stored zeros"),
        (lambda h: h["__metadata__"].update(shapes="{}"), "has dtype"),
        (lambda h: h["__metadata__"].update(shapes="[" * 9000), "not a valid block file"),
        (lambda h: h["__metadata__"].update(shapes='{"q.weight":[1,2,3]}'), "two sizes"),
        (lambda h: h["__metadata__"].update(shapes='{"evil":[1,2]}'), "must name matrices"),
        (lambda h: h.update(evil=h.pop("q.weight.zeros")), "zeros: expected uint8"),
        (lambda h: h.update(evil=h.pop("q.weight.codes")), "no codes or no scales"),
        (lambda h: h.update(reversed(h.items())) or h.update(a=h.pop("q.bias")), "canonical"),
    ],
)
def test_lies_are_noticed(
    checkpoint: Checkpoint, tmp_path: Path, change: Any, message: str
) -> None:
    artifact = write_artifact(tmp_path, 1, checkpoint.block(1), Format(4))
    with pytest.raises(CheckpointError, match=message):
        read_block(rewritten(artifact.path, change), checkpoint.spec, 1)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scales_from_a_peer_must_be_sane(
    checkpoint: Checkpoint, tmp_path: Path, value: float
) -> None:
    artifact = write_artifact(tmp_path, 1, checkpoint.block(1), Format(4))
    begin = read_safetensors(artifact.path).entries["up.weight.scales"].begin
    data = bytearray(artifact.path.read_bytes())
    data[begin : begin + 2] = np.float16(value).tobytes()
    artifact.path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"up\.weight\.scales holds NaN"):
        read_block(artifact.path, checkpoint.spec, 1)


def test_another_block_or_model_is_not_accepted(checkpoint: Checkpoint, tmp_path: Path) -> None:
    spec = checkpoint.spec
    artifact = write_artifact(tmp_path, 1, checkpoint.block(1), Format(4))
    with pytest.raises(CheckpointError, match="holds block 1, expected 2"):
        read_block(artifact.path, spec, 2)
    foreign = Checkpoint.open(FIXTURES / "llama").spec
    with pytest.raises(CheckpointError, match="missing or not of layer 0"):
        read_block(artifact.path, foreign, 1)
    tensors = checkpoint.block(1)
    tensors["up.weight"] = tensors["up.weight"][:-1]
    lying = write_artifact(tmp_path, 1, tensors, Format(4))
    with pytest.raises(CheckpointError, match=r"up\.weight has shape"):
        read_block(lying.path, spec, 1)


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"attn_norm\.weight holds NaN"):
        write_artifact(tmp_path, 1, {"attn_norm.weight": np.full(4, np.nan)}, Format(4))
    with pytest.raises(CheckpointError, match=r"q\.weight holds NaN"):
        write_artifact(tmp_path, 1, {"q.weight": np.full((4, 4), np.inf)}, Format(4))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_full_disk_leaves_nothing_behind(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if moment == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        write_artifact(tmp_path, 1, checkpoint.block(1), Format(4))
    assert list(tmp_path.iterdir()) == []


def test_a_read_block_holds_one_file_descriptor(checkpoint: Checkpoint, tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path, 1, checkpoint.block(1), Format(4))
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir()))
    tensors = [read_block(artifact.path, checkpoint.spec, 1) for _ in range(5)]
    assert len(list(descriptors.iterdir())) <= before + len(tensors)


def test_missing_files_are_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_block(tmp_path / "absent", checkpoint.spec, 1)
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        file_sha256(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_block(tmp_path, checkpoint.spec, 1)
