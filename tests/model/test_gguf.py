"""The GGUF container: damaged and hostile files, and the values of all types."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from model.checkpoint import Checkpoint
from model.errors import CheckpointError, ModelError, UnsupportedModelError
from model.gguf import Alternating, GgufTensor, read_gguf, read_parts
from model.gguf_types import READ_TYPES, TYPES, dequantize, kept_codes, kept_format
from model.quantize import Format, quantize
from tests.gguf_files import ALIGNMENT, NUMBERS, Gguf, Tensor, plain, random_blocks, tiny

GOLDEN = Path(__file__).parents[1] / "gguf" / "golden.npz"
QUANTIZED = sorted(set(READ_TYPES) - {"F32"})


# ---- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUANTIZED)
def test_values_equal_those_of_the_gguf_package_to_the_bit(name: str) -> None:
    golden = np.load(GOLDEN)
    rows, expected = golden[f"{name}.rows"], golden[f"{name}.values"]
    values = dequantize(TYPES[NUMBERS[name]], rows, expected.shape[1])
    np.testing.assert_array_equal(values.view(np.uint32), expected.view(np.uint32))
    assert len(np.unique(values)) > 20


KEPT = ("MXFP4", "Q4_0", "Q5_0", "Q8_0")


@pytest.mark.parametrize("name", KEPT)
def test_kept_codes_have_the_same_values(name: str) -> None:
    golden, kind = np.load(GOLDEN), TYPES[NUMBERS[name]]
    rows, expected = golden[f"{name}.rows"], golden[f"{name}.values"]
    codes = kept_codes(kind, rows, expected.shape[1])
    if name != "MXFP4":
        assert {-1, 1} <= set(np.sign(codes.scales().ravel()).tolist())
    assert codes.format == kept_format(kind)
    np.testing.assert_array_equal(codes.dequantize(), expected)


def test_infinite_scales_are_refused(tmp_path: Path) -> None:
    model = tiny("Q8_0")
    stored = model.tensors["blk.0.ffn_up.weight"]
    data = np.array(np.inf, np.float16).tobytes() + bytes(32) + stored.data[34:]
    model.tensors = {**model.tensors, "blk.0.ffn_up.weight": Tensor("Q8_0", stored.shape, data)}
    checkpoint = Checkpoint.open(model.write(tmp_path / "x.gguf"))
    with pytest.raises(CheckpointError, match=r"'blk\.0\.ffn_up\.weight' holds NaN or infinite"):
        checkpoint.own_codes(1)
    values = checkpoint.block(1)["up.weight"]
    assert np.isnan(values[0, 0])
    with pytest.raises(CheckpointError, match="NaN, infinite or absurdly large"):
        quantize(values, Format.of(4))


def test_other_types_keep_no_codes() -> None:
    kept = {kind.name for kind in TYPES.values() if kept_format(kind) is not None}
    assert kept == set(KEPT)


@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (5, 96), (1027, 160)])
def test_odd_shapes_are_read_by_rows(tmp_path: Path, rows: int, columns: int) -> None:
    stored = random_blocks("Q4_0", (rows, columns), np.random.default_rng(0))
    file = read_gguf(Gguf({}, {"a": plain([1.0]), "x": stored}).write(tmp_path / "x.gguf"))
    tensor = GgufTensor(file, "x", (rows, columns))
    whole = tensor.float32()
    assert whole.shape == (rows, columns)
    for part in (slice(0, 1), slice(rows // 2, rows), slice(0, rows, 3)):
        np.testing.assert_array_equal(tensor.float32(part), whole[part])
    codes = tensor.codes()
    assert codes is not None
    np.testing.assert_array_equal(codes.dequantize(), whole)


def test_rows_of_heads_are_put_in_order(tmp_path: Path) -> None:
    values = np.arange(16, dtype=np.float32)
    matrix = np.repeat(values[:, None], 32, axis=1)
    file = read_gguf(Gguf({}, {"w": plain(matrix), "b": plain(values)}).write(tmp_path / "x.gguf"))
    expected = [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]
    weight = GgufTensor(file, "w", (16, 32), pairs=8)
    assert weight.float32()[:, 0].tolist() == expected
    assert weight.float32(slice(3, 6))[:, 5].tolist() == expected[3:6]
    assert GgufTensor(file, "b", (16,), pairs=8).float32().tolist() == expected


def test_parts_turned_and_added(tmp_path: Path) -> None:
    stack = np.arange(3 * 4 * 8, dtype=np.float32).reshape(3, 4, 8)
    file = read_gguf(Gguf({}, {"x": plain(stack)}).write(tmp_path / "x.gguf"))
    assert np.array_equal(GgufTensor(file, "x", (3, 4, 8)).float32(), stack)
    assert np.array_equal(GgufTensor(file, "x", (3, 4, 8)).float32(slice(1, 3)), stack[1:])
    assert np.array_equal(GgufTensor(file, "x", (4, 8), part=(4, 8)).float32(), stack[1])
    turned = GgufTensor(file, "x", (8, 4), part=(8, 12), transposed=True)
    assert np.array_equal(turned.float32(), stack[2].T)
    assert np.array_equal(turned.float32(slice(2, 4)), stack[2].T[2:4])
    row = GgufTensor(file, "x", (8,), part=(5, 6), add=-1.0)
    assert np.array_equal(row.float32(), stack[1, 1] - 1)


@pytest.mark.parametrize("kind", ["F32", "MXFP4", "Q8_0"])
def test_two_tensors_whose_rows_take_turns(tmp_path: Path, kind: str) -> None:
    random, shape = np.random.default_rng(3), (3, 2, 64)
    gate, up = (
        plain(random.normal(0, 1, shape)) if kind == "F32" else random_blocks(kind, shape, random)
        for _ in range(2)
    )
    file = read_gguf(Gguf({}, {"gate": gate, "up": up}).write(tmp_path / "x.gguf"))
    first, second = (GgufTensor(file, name, shape) for name in ("gate", "up"))
    both = Alternating(first, second)
    values = both.float32()
    assert both.shape == values.shape == (3, 4, 64)
    np.testing.assert_array_equal(values[:, 0::2], first.float32())
    np.testing.assert_array_equal(values[:, 1::2], second.float32())
    np.testing.assert_array_equal(both.float32(slice(1, 2)), values[1:2])
    codes = both.codes()
    assert (codes is None) == (kind == "F32")
    if codes is not None:
        assert codes.format == both.format
        np.testing.assert_array_equal(codes.dequantize().reshape(values.shape), values)


# ---- files that are not what they seem ---------------------------------------------------------


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_gguf(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_git_lfs_pointer_and_web_page(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "git lfs pull" in refused(path)
    with pytest.raises(CheckpointError, match="git lfs pull"):
        Checkpoint.open(path)
    path.write_bytes(b"<!DOCTYPE html><html>")
    assert "web page" in refused(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="no GGUF file, nor its beginning"):
        Checkpoint.open(path)


def test_versions_and_byte_order(tmp_path: Path) -> None:
    model = tiny()
    for version in (2, 3):
        model.version = version
        assert Checkpoint.open(model.write(tmp_path / f"{version}.gguf")).spec.vocab == 48
    model.version = 1
    assert "only versions 2 and 3" in refused(model.write(tmp_path / "x.gguf"))
    model.version = 4
    assert "version 4" in refused(model.write(tmp_path / "x.gguf"))
    model.version = 3 << 24
    assert "big-endian" in refused(model.write(tmp_path / "x.gguf"))


@pytest.mark.parametrize("kept", [4, 12, 23, 24, 100, 600])
def test_truncated_headers(tmp_path: Path, kept: int) -> None:
    whole = tiny().write(tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "x.gguf"
    path.write_bytes(whole[:kept])
    assert "fetch it again" in refused(path)


def test_truncated_data(tmp_path: Path) -> None:
    path = tiny().write(tmp_path / "x.gguf")
    size_bytes = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size_bytes - 4097)
    message = refused(path)
    assert f"the header describes {size_bytes} bytes" in message
    assert "download is not complete" in message


def claims(tensors: int = 0, entries: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, entries) + rest


KEY = struct.pack("<Q", 1) + b"k"
HUGE = 2**63


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (claims(tensors=HUGE), "tensors"),
        (claims(entries=HUGE), "metadata entries"),
        (claims(entries=1, rest=struct.pack("<Q", HUGE)), "bytes in one name"),
        (claims(entries=1, rest=KEY + struct.pack("<IQ", 8, HUGE)), "bytes"),
        (claims(entries=1, rest=KEY + struct.pack("<IQ", 8, 10**6)), "beyond its end"),
        (claims(entries=1, rest=KEY + struct.pack("<IIQ", 9, 4, HUGE)), "items in one array"),
        (claims(entries=1, rest=KEY + struct.pack("<IIQ", 9, 4, 10**6)), "beyond its end"),
        (claims(entries=1, rest=KEY + struct.pack("<IIQQ", 9, 8, 9, HUGE)), "beyond its end"),
        (claims(entries=1, rest=KEY + struct.pack("<IIQ", 9, 9, 1)), "arrays in arrays"),
        (claims(entries=1, rest=KEY + struct.pack("<I", 13)), "unknown type 13"),
        (claims(entries=1, rest=KEY + struct.pack("<IB", 7, 2)), "neither true nor false"),
        (claims(entries=2, rest=(KEY + struct.pack("<IB", 0, 2)) * 2), "'k' twice"),
        (claims(entries=1, rest=struct.pack("<Q", 1) + b"\xff"), "not UTF-8"),
    ],
)
def test_headers_that_lie_take_no_memory(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content + bytes(100))
    tracemalloc.start()
    try:
        assert words in refused(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (Tensor("F32", (), b""), "0 axes"),
        (Tensor("F32", (1,) * 5, b"0000"), "5 axes"),
        (Tensor("F32", (0, 4), b""), r"shape \[0, 4\]"),
        (Tensor("F32", (2**40, 2**40), b""), "shape"),
        (Tensor("F32", (2**21, 2**21), b""), "shape"),
        (Tensor("Q4_0", (2, 33), bytes(64)), r"shape \[2, 33\] as Q4_0"),
        (Tensor("Q4_K", (2, 128), bytes(288)), "as Q4_K"),
        (Tensor("F32", (2,), bytes(8), number=99), "unknown type 99; get another quantization"),
        (Tensor("F32", (2,), bytes(8), number=5), "unknown type 5"),
        (Tensor("F32", (2,), bytes(8), offset=4), "no multiple of 32"),
        (Tensor("F32", (2,), bytes(8), offset=2**63), "no multiple"),
        (Tensor("F32", (2,), bytes(8), offset=2**40), "the header describes"),
        (Tensor("F32", (2,), bytes(8), offset=0), "overlaps another"),
    ],
)
def test_tensors_that_lie(tmp_path: Path, tensor: Tensor, words: str) -> None:
    path = Gguf({}, {"a": plain([1.0]), "x": tensor}).write(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match=words):
        read_gguf(path)


@pytest.mark.parametrize("alignment", [0, 4, 7, 2**30, -8, 32.0, "32"])
def test_absurd_alignments(tmp_path: Path, alignment: Any) -> None:
    path = Gguf({"general.alignment": alignment}, {"a": plain([1.0])}).write(tmp_path / "x.gguf")
    assert "alignment" in refused(path)


def test_another_alignment_is_followed(tmp_path: Path) -> None:
    header, _ = Gguf({"general.alignment": 64}, {"a": plain([1.0, 2.0])}).header()
    path = tmp_path / "x.gguf"
    path.write_bytes(header + bytes(-len(header) % 64) + struct.pack("<ff", 5, 7))
    assert GgufTensor(read_gguf(path), "a", (2,)).float32().tolist() == [5, 7]


def test_a_tensor_twice(tmp_path: Path) -> None:
    header, _ = Gguf({}, {"a": plain([1.0]), "b": plain([1.0])}).header()
    path = tmp_path / "x.gguf"
    path.write_bytes(header.replace(b"\x01\0\0\0\0\0\0\0b", b"\x01\0\0\0\0\0\0\0a") + bytes(99))
    assert "'a' twice" in refused(path)


def test_types_that_are_not_read_are_named(tmp_path: Path) -> None:
    model = tiny()
    tensors = dict(model.tensors)
    tensors["blk.0.ffn_up.weight"] = Tensor("IQ2_XXS", (1, 256), bytes(66))
    model.tensors = tensors
    with pytest.raises(UnsupportedModelError, match=r"stored as IQ2_XXS.*get another quantization"):
        Checkpoint.open(model.write(tmp_path / "x.gguf"))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@example(places=[(921, 8)], cut=None)  # Numbers that were values are taken for scales.
@given(
    places=st.lists(
        st.tuples(st.integers(0, 1100), st.sampled_from([0, 1, 7, 8, 9, 32, 127, 128, 255])),
        min_size=1,
        max_size=4,
    ),
    cut=st.none() | st.integers(0, 1500),
)
def test_changed_headers_are_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory,
    places: list[tuple[int, int]],
    cut: int | None,
) -> None:
    """Whatever the header says, it is read as it is or refused, and takes little memory."""
    path = tmp_path_factory.getbasetemp() / "fuzzed.gguf"
    path.unlink(missing_ok=True)
    content = bytearray(tiny().write(path).read_bytes())
    for place, value in places:
        content[place] = value
    path.write_bytes(content[:cut])
    message = ""
    tracemalloc.start()
    try:
        checkpoint = Checkpoint.open(path)
        for block in range(checkpoint.spec.block_count):
            checkpoint.block(block)
    except ModelError as error:
        message = str(error)
    finally:
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert "\n" not in message
    assert peak_bytes < 4 << 20


# ---- split files -------------------------------------------------------------------------------


def split(folder: Path, parts: int = 3) -> list[Path]:
    """Write a model in parts, as llama.cpp's gguf-split does."""
    model = tiny()
    names = list(model.tensors)
    paths = []
    for part in range(parts):
        marks = {"split.no": part, "split.count": parts, "split.tensors.count": len(names)}
        file = Gguf(
            (dict(model.metadata) if part == 0 else {}) | marks,
            {name: model.tensors[name] for name in names[part::parts]},
        )
        paths.append(file.write(folder / f"tiny-Q8_0-{part + 1:05}-of-{parts:05}.gguf"))
    return paths


def test_split_files_are_one_model(tmp_path: Path) -> None:
    whole = Checkpoint.open(tiny().write(tmp_path / "whole.gguf"))
    folder = tmp_path / "parts"
    folder.mkdir()
    paths = split(folder)
    for given_path in (*paths, folder):
        parts = Checkpoint.open(given_path)
        assert parts.spec == whole.spec
        for name, values in whole.block(1).items():
            np.testing.assert_array_equal(parts.block(1)[name], values)


def test_split_files_that_are_not_whole(tmp_path: Path) -> None:
    paths = split(tmp_path)
    paths[1].rename(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"00002-of-00003\.gguf: missing; all 3 parts"):
        Checkpoint.open(paths[0])
    paths[2].rename(paths[1])
    paths[0].rename(paths[2])
    (tmp_path / "other").rename(paths[0])
    with pytest.raises(CheckpointError, match="not part 1 of 3"):
        read_parts(paths[0])
    paths[0].rename(tmp_path / "alone.gguf")
    with pytest.raises(CheckpointError, match="one of 3 parts of a model"):
        Checkpoint.open(tmp_path / "alone.gguf")


def test_parts_change_the_fingerprint(tmp_path: Path) -> None:
    paths = split(tmp_path)
    before = Checkpoint.open(paths[0]).fingerprint
    assert Checkpoint.open(paths[2]).fingerprint == before
    content = bytearray(paths[2].read_bytes())
    paths[2].unlink()
    paths[2].write_bytes(content)
    assert Checkpoint.open(paths[0]).fingerprint != before


def test_metadata_that_contradicts_the_tensors(tmp_path: Path) -> None:
    for change, words in {
        "llama__embedding_length": (64, "has shape"),
        "llama__attention__head_count": (5, "no multiple|multiple"),
        "llama__block_count": (2, "is in none of its files|blk.1"),
        "llama__attention__value_length": (4, "another width"),
        "llama__context_length": (None, "has no llama.context_length"),
        "llama__feed_forward_length": ([64, 32], "between layers|64"),
        "llama__attention__layer_norm_rms_epsilon": ("tiny", "must be a number"),
        "llama__attention__head_count_kv": (0, "num_key_value_heads"),
    }.items():
        value, expected = words
        changes: dict[str, Any] = {change: value}
        path = tiny(**changes).write(tmp_path / f"{change}.gguf")
        with pytest.raises((CheckpointError, UnsupportedModelError), match=expected):
            Checkpoint.open(path)


def test_padding_is_as_the_writer_says(tmp_path: Path) -> None:
    """The writer of these tests aligns as the format does, so that the others prove something."""
    path = tiny().write(tmp_path / "x.gguf")
    assert all(entry.begin % ALIGNMENT == 0 for entry in read_gguf(path).entries.values())
