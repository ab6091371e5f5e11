"""gpt-oss as it is published: experts in MXFP4, whose rows alternate between gate and up."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from model.artifact import read_block, write_artifact
from model.checkpoint import Checkpoint
from model.quantize import Format, QuantizedMatrix
from model.safetensors import publish, read_safetensors, write_temporary
from tests.parity import FAMILIES

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""Source: OCP Microscaling Formats (MX) Specification, section 5.3.3."""

Array = npt.NDArray[np.float32]


@pytest.fixture
def packed(tmp_path: Path) -> tuple[Path, dict[str, Array]]:
    """The fixture with random nibbles as experts, and their values [experts, out, in]."""
    model = Path(shutil.copytree(FAMILIES / "gpt_oss", tmp_path / "packed"))
    file = read_safetensors(model / "model.safetensors")
    random, values = np.random.default_rng(0), {}
    arrays: dict[str, npt.NDArray[np.generic]] = {}
    for name in file.entries:
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inputs, outputs = file.entries[name].shape
            nibbles = random.integers(0, 16, (experts, outputs, inputs // 32, 32), np.uint8)
            scales = random.integers(119, 124, nibbles.shape[:3], np.uint8)
            arrays[f"{name}_blocks"] = nibbles[..., ::2] | nibbles[..., 1::2] << 4
            arrays[f"{name}_scales"] = scales
            steps = np.exp2(scales.astype(np.float32) - 127)
            values[name] = (E2M1[nibbles] * steps[..., None]).reshape(experts, outputs, inputs)
        else:
            arrays[name] = file.float32(name).astype(np.float16)
    temporary, _, _ = write_temporary(model, arrays, {}, frozenset())
    publish(temporary, model / "model.safetensors")
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"],
    }
    (model / "config.json").write_text(json.dumps(config))
    return model, values


def test_rows_of_gate_and_up_are_told_apart(packed: tuple[Path, dict[str, Array]]) -> None:
    model, values = packed
    checkpoint = Checkpoint.open(model)
    for block in range(1, checkpoint.spec.head_block):
        tensors, home = checkpoint.block(block), f"model.layers.{block - 1}.mlp.experts."
        gate_up, down = values[f"{home}gate_up_proj"], values[f"{home}down_proj"]
        columns = gate_up.shape[2]
        for name, expected in (
            ("gate", gate_up[:, ::2].reshape(-1, columns)),
            ("up", gate_up[:, 1::2].reshape(-1, columns)),
            ("down", down.reshape(-1, down.shape[2])),
        ):
            np.testing.assert_array_equal(tensors[f"{name}.weight"], expected)


def test_their_codes_are_kept(packed: tuple[Path, dict[str, Array]], tmp_path: Path) -> None:
    """Nothing is rounded: e2m1 numbers are whole steps in a symmetric format of 5 bits."""
    model, _ = packed
    checkpoint = Checkpoint.open(model)
    fmt = checkpoint.native_format(1)
    assert fmt == Format(5, "rtn", 32, symmetric=True)
    path = write_artifact(tmp_path, 1, checkpoint.block_in(1, fmt), fmt).path
    stored, original = read_block(path, checkpoint.spec, 1)[1], checkpoint.block(1)
    for name in ("gate.weight", "up.weight", "down.weight"):
        kept = stored[name]
        assert isinstance(kept, QuantizedMatrix)
        np.testing.assert_array_equal(kept.dequantize(), original[name])
