from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.artifact import write_artifact
from model.checkpoint import Checkpoint
from model.errors import CheckpointError, UnsupportedModelError
from model.quantize import Format
from model.safetensors import read_safetensors, write_safetensors

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / "llama", tmp_path / "llama"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / "mistral", tmp_path / "mistral"))


def safetensors(path: Path, header: object, payload: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + payload)


def entry(
    dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)
) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_fixtures_cover_shards_and_dtypes() -> None:
    assert len(list((FIXTURES / "mistral").glob("*.safetensors"))) > 2
    for name, dtype in (("llama", "F32"), ("llama-linear", "BF16"), ("qwen3", "F16")):
        assert set(Checkpoint.open(FIXTURES / name).source_dtypes(1).values()) == {dtype}


def test_blocks_have_the_shapes_of_the_spec() -> None:
    for directory in sorted(FIXTURES.iterdir()):
        checkpoint = Checkpoint.open(directory)
        for block in range(checkpoint.spec.block_count):
            tensors = checkpoint.block(block)
            shapes = {name: tensor.shape for name, tensor in tensors.items()}
            assert shapes == checkpoint.spec.block_tensors(block)
            assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float32)}


def test_tied_head_is_the_token_table() -> None:
    checkpoint = Checkpoint.open(FIXTURES / "qwen2")
    assert checkpoint.spec.tied_head
    head = checkpoint.block(checkpoint.spec.head_block)["lm_head.weight"]
    np.testing.assert_array_equal(head, checkpoint.block(0)["tokens.weight"])


def test_older_opt_checkpoints_name_tensors_without_model(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(FIXTURES / "opt-pre", tmp_path / "old"))
    file = read_safetensors(directory / "model.safetensors")
    renamed = {name.removeprefix("model."): np.array(file.map(name)) for name in file.entries}
    assert all(name.startswith("decoder.") for name in renamed)
    write_safetensors(directory / "model.safetensors", renamed)
    old, new = Checkpoint.open(directory), Checkpoint.open(FIXTURES / "opt-pre")
    for name, tensor in new.block(2).items():
        np.testing.assert_array_equal(old.block(2)[name], tensor)


def test_fingerprint_changes_with_any_file(sharded: Path) -> None:
    original = Checkpoint.open(sharded).fingerprint
    assert Checkpoint.open(sharded).fingerprint == original
    shard = sorted(sharded.glob("*.safetensors"))[1]
    os.utime(shard, ns=(0, 1))
    touched = Checkpoint.open(sharded).fingerprint
    assert touched != original
    config = sharded / "config.json"
    config.write_bytes(config.read_bytes() + b"\n")
    assert Checkpoint.open(sharded).fingerprint not in (original, touched)


def test_no_directory_and_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        Checkpoint.open(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"not a model: it has no config\.json"):
        Checkpoint.open(tmp_path)


def test_directory_without_weights(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    (llama / "golden.npz").unlink()  # It would be taken for weights of another framework.
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        Checkpoint.open(llama)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickles_are_refused_with_advice(llama: Path, name: str) -> None:
    (llama / "model.safetensors").rename(llama / name)
    with pytest.raises(CheckpointError, match="can run any code and are never read; convert"):
        Checkpoint.open(llama)


def test_a_renamed_pickle_is_no_safetensors_file(llama: Path) -> None:
    (llama / "model.safetensors").write_bytes(b"\x80\x02}q\x00(X\x04\x00\x00\x00" * 9)
    with pytest.raises(CheckpointError, match="not a safetensors file, but a pickle"):
        Checkpoint.open(llama)


def test_missing_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"{shard.name}: missing, but .*index\.json lists"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "c:x.safetensors",
     ".hidden.safetensors", "model.bin", "a\nb.safetensors", "", 5, None],
)  # fmt: skip
def test_index_cannot_name_other_files(sharded: Path, name: object) -> None:
    index = sharded / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["lm_head.weight"] = name
    index.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"only \.safetensors files beside it are read"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', "[" * 100_000, "\xff"])
def test_broken_index(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"index\.json: (not valid JSON|has no weight_map)"):
        Checkpoint.open(sharded)


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    shutil.copy(first, second)
    with pytest.raises(CheckpointError, match="is also in"):
        Checkpoint.open(sharded)


def test_numbers_of_64_bits_are_read(llama: Path) -> None:
    path, before = llama / "model.safetensors", Checkpoint.open(llama)
    expected = before.block(1)
    file = read_safetensors(path)
    tensors = {name: file.float32(name).astype(np.float64) for name in file.entries}
    write_safetensors(path, tensors)
    found = Checkpoint.open(llama)
    assert set(found.source_dtypes(1).values()) == {"F64"}
    assert found.lossless_format(1) == Format.of(32)
    assert all(np.array_equal(found.block(1)[name], values) for name, values in expected.items())


def test_missing_and_misshapen_tensors(llama: Path) -> None:
    path = llama / "model.safetensors"
    file = read_safetensors(path)
    tensors = {name: np.array(file.map(name)) for name in file.entries}
    name = "model.layers.1.mlp.up_proj.weight"
    kept = tensors.pop(name)
    write_safetensors(path, tensors)
    with pytest.raises(CheckpointError, match=f"'{name}' is in none of its files"):
        Checkpoint.open(llama)
    write_safetensors(path, tensors | {name: kept[:-1]})
    with pytest.raises(CheckpointError, match=r"has shape \[47, 32\], but config.json makes it"):
        Checkpoint.open(llama)
    write_safetensors(path, tensors | {name: kept.astype(np.int8)})
    with pytest.raises(CheckpointError, match="is stored as I8"):
        Checkpoint.open(llama)
    bias = {"model.layers.1.mlp.up_proj.bias": np.zeros(48, np.float32)}
    norm = {"model.layers.1.self_attn.q_norm.weight": np.ones(8, np.float32)}
    for unannounced in (bias, norm):
        write_safetensors(path, tensors | {name: kept} | unannounced)
        with pytest.raises(UnsupportedModelError, match="its options and the weights disagree"):
            Checkpoint.open(llama)
    derived = {"model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    write_safetensors(path, tensors | {name: kept} | derived)
    assert Checkpoint.open(llama).spec == Checkpoint.open(FIXTURES / "llama").spec


def test_every_truncation_is_noticed(llama: Path) -> None:
    path = llama / "model.safetensors"
    data = path.read_bytes()
    for size in [*range(40), 1000, len(data) // 2, len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError):
            Checkpoint.open(llama)


@pytest.mark.parametrize(
    ("header", "payload", "message"),
    [
        (b"{", b"", "not valid JSON"),
        (b"\xff\xfe", b"", "not valid JSON"),
        (b"[" * 50_000, b"", "not valid JSON"),
        (b'{"a": 1, "a": 2}', b"", "a key occurs twice"),
        (b"[]", b"", "not a JSON object"),
        (b"9" * 5000, b"", "not (valid JSON|a JSON object)"),
        ({"__metadata__": {"a": 1}}, b"", "must map strings to strings"),
        ({"a": 5}, b"", "needs exactly"),
        ({"a": entry() | {"more": 1}}, bytes(8), "needs exactly"),
        ({"a": entry(dtype="F4")}, bytes(8), "dtype 'F4' is not supported"),
        ({"a": entry(dtype=["F32"])}, bytes(8), "is not supported"),
        ({"a": entry(shape=[-1])}, bytes(8), "not a list of sizes"),
        ({"a": entry(shape=[True, 2])}, bytes(8), "not a list of sizes"),
        ({"a": entry(shape=[2.0])}, bytes(8), "not a list of sizes"),
        ({"a": entry(shape=[1] * 9)}, bytes(8), "not a list of sizes"),
        ({"a": entry(shape=[1 << 40, 1 << 40])}, bytes(8), "but its offsets span"),
        ({"a": entry(shape=[1 << 99])}, bytes(8), "not a list of sizes"),
        ({"a": entry(shape=[3])}, bytes(8), "has 12 bytes, but its offsets span 8"),
        ({"a": entry(offsets=[8, 0])}, bytes(8), "not a range"),
        ({"a": entry(offsets=[0, 8, 16])}, bytes(8), "not a range"),
        ({"a": entry(offsets=[-8, 0])}, bytes(8), "not a range"),
        ({"a": entry(offsets=[8, 16])}, bytes(16), "leaves a gap"),
        ({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12), "overlaps"),
        ({"a": entry(), "b": entry()}, bytes(8), "overlaps"),
        ({"a": entry()}, bytes(7), "truncated or damaged"),
        ({"a": entry()}, bytes(9), "truncated or damaged"),
    ],
)
def test_lying_headers(tmp_path: Path, header: object, payload: bytes, message: str) -> None:
    path = tmp_path / "lying.safetensors"
    safetensors(path, header, payload)
    with pytest.raises(CheckpointError, match=message):
        read_safetensors(path)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_damaged_headers_never_crash(data: st.DataObject) -> None:
    original = (FIXTURES / "llama" / "model.safetensors").read_bytes()
    header_end = 8 + struct.unpack("<Q", original[:8])[0]
    damaged = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, header_end - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "damaged.safetensors"
        path.write_bytes(damaged)
        with contextlib.suppress(CheckpointError):
            file = read_safetensors(path)
            for name, view in file.map_all().items():
                assert view.shape == file.entries[name].shape


def test_a_huge_header_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    with pytest.raises(CheckpointError, match="not a safetensors file, nor its beginning"):
        read_safetensors(path)


def test_quantizing_takes_the_memory_of_one_block(tmp_path: Path) -> None:
    """Eight layers of bf16 weights are turned into artifacts; only one is ever in memory."""
    hidden, ffn, layers, vocab = 256, 1024, 8, 512
    config = {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn,
        "num_hidden_layers": layers, "num_attention_heads": 4, "vocab_size": vocab,
        "max_position_embeddings": 128, "eos_token_id": None,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    names: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "lm_head.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name in "qkvo":
            names[f"{prefix}self_attn.{name}_proj.weight"] = (hidden, hidden)
        for name, shape in (
            ("gate", (ffn, hidden)),
            ("up", (ffn, hidden)),
            ("down", (hidden, ffn)),
        ):
            names[f"{prefix}mlp.{name}_proj.weight"] = shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            names[f"{prefix}{name}.weight"] = (hidden,)
    arrays = {name: np.full(shape, 0x3C00, np.uint16) for name, shape in names.items()}
    write_safetensors(tmp_path / "model.safetensors", arrays, bfloat16=frozenset(arrays))
    del arrays
    checkpoint = Checkpoint.open(tmp_path)
    shapes = checkpoint.spec.block_tensors(1).values()
    block_bytes = sum(4 * int(np.prod(shape)) for shape in shapes)
    tracemalloc.start()
    for block in range(checkpoint.spec.block_count):
        write_artifact(tmp_path / "out", block, checkpoint.block(block), Format(8))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 2 * block_bytes
