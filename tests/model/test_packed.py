"""Packed weights against the code of the tools that packed them (tests/make_packed.py)."""

from __future__ import annotations

import hashlib
import json
import shutil
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from model.artifact import read_block, values_of, write_artifact
from model.checkpoint import Checkpoint
from model.errors import CheckpointError, UnsupportedModelError
from model.families import Config, load_spec
from model.packed import unpacked
from model.quantize import Format, QuantizedMatrix
from model.reference import ReferenceModel
from model.safetensors import read_safetensors, write_safetensors
from model.spec import QUANTIZED_TENSORS
from model.weights import PlainTensor, StoredTensor
from tests.greedy import generate_greedy

FAMILIES = Path(__file__).parents[1] / "families"
PACKED = Path(__file__).parents[1] / "packed"
MODULES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}

MODELS: dict[str, tuple[str, Format | None]] = {
    "gptq": ("GPTQ 4 bits", Format(4, "rtn", 64, symmetric=True)),
    "awq": ("AWQ 4 bits", Format(4, "rtn", 32)),
    "compressed-int4": ("compressed-tensors int4", Format(4, "rtn", 32, symmetric=True)),
    "compressed-int8": ("compressed-tensors int8", Format(8, "rtn", 128, symmetric=True)),
    "compressed-fp8": ("fp8 (e4m3)", None),
    "fp8": ("fp8 (e4m3)", None),
    "mlx": ("MLX 4 bits", None),
    "bitsandbytes": ("bitsandbytes nf4", None),
    "bitsandbytes-int8": ("bitsandbytes 8 bits", Format(8, "rtn", 128, symmetric=True)),
}
"""The fixtures, the label of their matrices, and the format of codes that are kept."""

MATRICES: dict[str, tuple[Format | None, int]] = {
    "gptq-2": (Format(2, "rtn", 64, symmetric=True), 0),
    "gptq-3": (Format(3, "rtn", 64, symmetric=True), 0),
    "gptq-8": (Format(8, "rtn", 128, symmetric=True), 0),
    "gptq-v2": (Format(4, "rtn", 64), 0),
    "gptq-asymmetric": (Format(4, "rtn", 64), 0),
    "gptq-order": (None, 0),
    "compressed-asymmetric": (Format(4, "rtn", 32), 0),
    "mlx-8": (None, 0),
    "mlx-3": (None, 0),
    "mlx-6": (None, 0),
    "int8": (Format(8, "rtn", 128, symmetric=True), 1),
    "fp4": (None, 0),
    "mxfp4": (Format(5, "rtn", 32, symmetric=True), 0),
}
"""Single matrices: the format of kept codes, and the units in the last place that may differ.

bitsandbytes multiplies codes by scales first and by 1 / 127 after that.
"""


@pytest.mark.parametrize("name", MODELS)
def test_a_packed_model_equals_its_tool_and_transformers(name: str) -> None:
    golden = np.load(PACKED / name / "golden.npz")
    checkpoint = Checkpoint.open(PACKED / name)
    label, _ = MODELS[name]
    for layer in range(2):
        tensors = checkpoint.block(layer + 1)
        for canonical, module in MODULES.items():
            assert checkpoint.source_dtypes(layer + 1)[f"{canonical}.weight"] == label
            values = np.ascontiguousarray(tensors[f"{canonical}.weight"])
            found = hashlib.sha256(values.tobytes()).hexdigest()
            if name != "bitsandbytes-int8":  # See MATRICES: its values round otherwise.
                assert found == str(golden[f"model.layers.{layer}.{module}"]), module
    prompt = golden["prompt"].tolist()
    model = ReferenceModel.from_checkpoint(checkpoint)
    np.testing.assert_allclose(model.forward(prompt)[-1], golden["logits"], atol=1e-4)
    generation = generate_greedy(model, prompt, len(golden["continuation"]))
    assert generation.tokens == golden["continuation"].tolist()
    assert len(set(generation.tokens)) > 12


@pytest.mark.parametrize("name", MODELS)
def test_codes_are_kept_where_a_format_holds_them(name: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(PACKED / name)
    _, fmt = MODELS[name]
    assert checkpoint.native_format(1) == fmt
    assert checkpoint.native_formats() == ({} if fmt is None else {1: fmt, 2: fmt})
    assert checkpoint.own_codes(0) == {}
    assert checkpoint.lossless_format(0) == Format.of(16)
    if fmt is None:
        assert checkpoint.own_codes(1) == {}
        assert checkpoint.lossless_format(1) == Format.of(32)
        return
    assert checkpoint.lossless_format(1) == fmt
    asked = Format.of(fmt.bits)
    assert checkpoint.format_of(1, asked) == fmt
    assert checkpoint.format_of(0, asked) == asked
    assert checkpoint.format_of(1, Format.of(6)) == Format.of(6)
    artifact = write_artifact(tmp_path, 1, checkpoint.block_in(1, fmt), fmt)
    stored_format, stored = read_block(artifact.path, checkpoint.spec, 1)
    assert stored_format == fmt
    for name_, values in checkpoint.block(1).items():
        assert isinstance(stored[name_], QuantizedMatrix) == (name_ in QUANTIZED_TENSORS)
        np.testing.assert_array_equal(values_of(stored[name_]), values)


@pytest.mark.parametrize("name", MATRICES)
def test_a_matrix_equals_its_tool(name: str, tmp_path: Path) -> None:
    settings, parts, expected = matrix(name)
    fmt, ulps = MATRICES[name]
    start = "mlp.experts.down_proj_" if name == "mxfp4" else "m."
    tensor = opened(tmp_path, settings, {f"{start}{part}": one for part, one in parts.items()})
    assert tensor.shape == expected.shape
    values = tensor.float32()
    np.testing.assert_array_max_ulp(values, expected, maxulp=ulps)
    np.testing.assert_array_equal(tensor.float32(slice(1, 8, 2)), values[1:8:2])
    assert tensor.format == fmt
    codes = tensor.codes()
    assert (codes is None) == (fmt is None)
    if codes is not None:
        assert codes.format == fmt
        np.testing.assert_array_equal(codes.dequantize().reshape(values.shape), values)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize("shape", [(), (1, 1), (16,), (16, 1), (4, 2)])
def test_fp8_equals_torch(dtype: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    kind = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}[dtype]
    codes = np.arange(256, dtype=np.uint8).reshape(16, 16)
    scales = np.random.default_rng(0).random(shape, np.float32)
    parts: dict[str, Any] = {"m.weight": codes, "m.weight_scale": scales}
    write_safetensors(tmp_path / "model.safetensors", parts)
    as_type(tmp_path / "model.safetensors", {"m.weight": dtype})
    file = read_safetensors(tmp_path / "model.safetensors")
    settings = {"quant_method": "fp8", "weight_block_size": [4, 8]}
    config = Config(tmp_path / "config.json", {"quantization_config": settings})
    stored = {name: PlainTensor(file, name) for name in file.entries}
    (tensor,) = unpacked(config, stored).values()
    values = torch.from_numpy(codes).view(kind).float().numpy()
    wide = scales.reshape(1, 1) if scales.size == 1 else scales.reshape(len(scales), -1)
    wide = np.repeat(np.repeat(wide, 16 // len(wide), 0), 16 // wide.shape[1], 1)
    with np.errstate(invalid="ignore"):
        expected = values * wide
    np.testing.assert_array_equal(tensor.float32(), expected)
    np.testing.assert_array_equal(tensor.float32(slice(3, 11, 2)), expected[3:11:2])


@pytest.mark.parametrize("name", ["qwen3_moe", "phi3", "smollm3"])
def test_codes_of_experts_and_fused_matrices_are_kept(name: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FAMILIES / name, tmp_path / name))
    path = folder / "model.safetensors"
    file = read_safetensors(path)
    parts: dict[str, Any] = {}
    for key, entry in file.entries.items():
        values = parts[key] = np.array(file.float32(key))
        if len(entry.shape) == 2 and "_proj." in key:
            scales = np.abs(values).max(1, keepdims=True) / np.float32(127)
            parts |= {key: np.rint(values / scales).astype(np.int8), f"{key}_scale": scales}
    write_safetensors(path, parts)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
    }
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint, fmt = Checkpoint.open(folder), Format(8, "rtn", 128, symmetric=True)
    assert checkpoint.lossless_format(1) == fmt
    stored, decoded = checkpoint.block_in(1, fmt), checkpoint.block(1)
    plain = Checkpoint.open(FAMILIES / name).block(1)
    for canonical in QUANTIZED_TENSORS & stored.keys():
        codes = stored[canonical]
        assert isinstance(codes, QuantizedMatrix), canonical
        np.testing.assert_array_equal(codes.dequantize(), decoded[canonical])
        np.testing.assert_allclose(decoded[canonical], plain[canonical], atol=0.02)


def matrix(name: str) -> tuple[dict[str, Any], dict[str, Any], npt.NDArray[np.float32]]:
    """Return the settings, the parts and the values of a single matrix."""
    with np.load(PACKED / "matrices.npz") as stored:
        settings = json.loads(str(stored[f"{name}/settings"]))
        parts: dict[str, Any] = {}
        for key in stored.files:
            if key.startswith(f"{name}//"):
                parts[key.removeprefix(f"{name}//")] = stored[key]
            elif key.startswith(f"{name}/BF16/"):
                parts["BF16 " + key.removeprefix(f"{name}/BF16/")] = stored[key]
        return settings, parts, stored[f"{name}/values"]


def opened(folder: Path, settings: Mapping[str, Any], parts: Mapping[str, Any]) -> StoredTensor:
    """Write parts as a file, and return the one tensor that they make."""
    wide = frozenset(name.replace("BF16 ", "") for name in parts if "BF16 " in name)
    plain = {name.replace("BF16 ", ""): one for name, one in parts.items()}
    write_safetensors(folder / "model.safetensors", plain, bfloat16=wide)
    file = read_safetensors(folder / "model.safetensors")
    stored = {name: PlainTensor(file, name) for name in file.entries}
    config = Config(folder / "config.json", {"quantization_config": settings})
    (tensor,) = unpacked(config, stored).values()
    return tensor


def changed(tmp_path: Path, name: str, change: Callable[[dict[str, Any]], None]) -> Path:
    """Return a copy of a fixture with a changed config.json."""
    folder = Path(shutil.copytree(PACKED / name, tmp_path / name))
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("gptq", {"quant_method": "hqq"}, "weights quantized by 'hqq' are not read; read are GPTQ"),
        ("gptq", {"quant_method": None}, "AWQ|of an unknown method"),
        ("gptq", {"checkpoint_format": "marlin"}, 'checkpoint_format = "marlin" is not implem'),
        ("awq", {"version": "gemv"}, 'version = "gemv" is not implemented; get the model in AWQ'),
        ("awq", {"bits": 8}, "bits = 8 is not implemented; AWQ has 4 bits"),
        ("compressed-int4", {"format": "nvfp4-pack-quantized"}, '"nvfp4-pack-quantized" is not'),
        ("compressed-int4", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse weights"),
        ("gptq", {"quant_method": "auto-round", "packing_format": "x"}, 'packing_format = "x" is'),
    ],
)
def test_a_method_that_is_not_read_is_named(
    name: str, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = changed(tmp_path, name, lambda config: config.update(settings))
    for open_model in (Checkpoint.open, load_spec):
        if name == "gptq" and settings == {"quant_method": None}:
            continue
        if settings == {"bits": 8} and open_model is load_spec:
            continue
        with pytest.raises(UnsupportedModelError, match=message) as caught:
            open_model(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("gptq", {"group_size": 32}, "has 1 groups in 64 columns, but config.json makes them 32"),
        ("gptq", {"group_size": "x"}, "group_size must be a size"),
        ("gptq", {"bits": 0}, "bits must be an integer"),
        ("fp8", {"weight_block_size": [64, 64]}, "but its other parts make it"),
        ("fp8", {"weight_block_size": 3}, "weight_block_size of a packed matrix must be two sizes"),
    ],
)
def test_settings_that_the_weights_contradict(
    name: str, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = changed(tmp_path, name, lambda config: config.update(settings))
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", MODELS)
def test_hostile_parts_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    """Each part of a matrix is removed, cut, and stored as another type."""
    folder = Path(shutil.copytree(PACKED / name, tmp_path / name))
    path = folder / "model.safetensors"
    file = read_safetensors(path)
    start = "model.layers.0.mlp.down_proj."
    whole = {key: file.map(key).copy() for key in file.entries}
    patterns = frozenset(key for key, one in file.entries.items() if one.dtype == "BF16")
    floats = [key for key, one in file.entries.items() if one.dtype.startswith("F8")]
    ignored = ("weight_format", "g_idx", "quant_state", "quant_map", "weight_scale_inv")
    for key in (key for key in whole if key.startswith(start)):
        damaged: dict[str, dict[str, Any]] = {
            "missing": {one: whole[one] for one in whole if one != key},
            "flat": whole | {key: whole[key].reshape(-1)[:-1]},
            "type": whole | {key: whole[key].astype(np.float64)},
        }
        for how, tensors in damaged.items():
            if key.endswith(ignored) and how == "missing":
                continue
            if key.endswith("weight_format"):
                continue
            write_safetensors(path, tensors, bfloat16=patterns - {key})
            if floats and how != "type":
                as_type(path, dict.fromkeys(set(floats) & tensors.keys(), "F8_E4M3"))
            with pytest.raises((CheckpointError, UnsupportedModelError)) as caught:
                Checkpoint.open(folder)
            assert "\n" not in str(caught.value), (key, how)


def as_type(path: Path, dtypes: Mapping[str, str]) -> None:
    """Change the types of some tensors in a header, to those that numpy does not have."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    for name, dtype in dtypes.items():
        header[name]["dtype"] = dtype
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def test_scales_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    settings, parts, _ = matrix("gptq-v2")
    parts["scales"] = np.full_like(parts["scales"], np.nan)
    tensor = opened(tmp_path, settings, {f"m.{part}": one for part, one in parts.items()})
    for read in (tensor.float32, tensor.codes):
        with pytest.raises(CheckpointError, match=r"scales of 'm\.qweight' hold NaN"):
            read()


def test_the_last_group_may_be_shorter(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    parts: dict[str, Any] = {
        "m.qweight": random.integers(-(2**31), 2**31, (96 // 8, 32), np.int64).astype(np.int32),
        "m.qzeros": random.integers(-(2**31), 2**31, (2, 4), np.int64).astype(np.int32),
        "m.scales": random.random((2, 32)).astype(np.float16),
    }
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": False}
    tensor = opened(tmp_path, settings, parts)
    words = parts["m.qweight"].view(np.uint32)
    codes = np.stack([words >> shift & 15 for shift in range(0, 32, 4)], 1).reshape(96, 32)
    zeros = np.stack([parts["m.qzeros"].view(np.uint32) >> shift & 15 for shift in range(0, 32, 4)])
    zeros = (zeros.transpose(1, 2, 0).reshape(2, 32) + 1) & 15
    group = np.arange(96) // 64
    scales = parts["m.scales"].astype(np.float32)
    expected = (codes.astype(np.float32) - zeros[group]) * scales[group]
    np.testing.assert_array_equal(tensor.float32(), expected.T)
    kept = tensor.codes()
    assert kept is not None
    np.testing.assert_array_equal(kept.dequantize(), expected.T)


def test_groups_beyond_the_scales_are_named(tmp_path: Path) -> None:
    settings, parts, _ = matrix("gptq-order")
    parts["g_idx"] = parts["g_idx"] + 7
    tensor = opened(tmp_path, settings, {f"m.{part}": one for part, one in parts.items()})
    with pytest.raises(CheckpointError, match="names groups beyond 2"):
        tensor.float32()


def test_an_old_file_of_settings_beside_the_config_is_read(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(PACKED / "gptq", tmp_path / "gptq"))
    config = json.loads((folder / "config.json").read_text())
    settings = config.pop("quantization_config")
    del settings["quant_method"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(json.dumps(settings))
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.native_format(1) == MODELS["gptq"][1]
    (folder / "quantize_config.json").write_text(json.dumps(settings | {"more": 1}))
    assert Checkpoint.open(folder).fingerprint != checkpoint.fingerprint


def test_biases_of_zeros_that_old_tools_added_are_left_out(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(PACKED / "gptq", tmp_path / "gptq"))
    path = folder / "model.safetensors"
    file = read_safetensors(path)
    tensors = {key: file.map(key).copy() for key in file.entries}
    bias = "model.layers.0.mlp.down_proj.bias"
    write_safetensors(path, tensors | {bias: np.zeros(64, np.float16)})
    Checkpoint.open(folder)
    write_safetensors(path, tensors | {bias: np.ones(64, np.float16)})
    with pytest.raises(UnsupportedModelError, match="not part of the architecture"):
        Checkpoint.open(folder)


def test_reading_holds_one_block(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(PACKED / "gptq")
    weights = sum(size.size for size in checkpoint.block(1).values())
    tracemalloc.start()
    try:
        for _ in range(3):
            for block in (1, 2):
                write_artifact(tmp_path, block, checkpoint.block_in(block, Format.of(8)), Format(8))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 12 * weights
