from __future__ import annotations

import json
from math import prod
from pathlib import Path

import pytest

from calibration.shapes import SHAPES, shape_spec
from model.errors import CheckpointError, UnsupportedModelError


@pytest.mark.parametrize(
    ("shape", "million_weights"),
    # Published sizes; a tied head is counted once.
    [
        ("gemma2-2b", 2614),
        ("gemma3-1b", 1000),
        ("gemma3-4b", 3880),
        ("granite4-micro", 3403),
        ("llama-1b", 1236),
        ("llama-3b", 3213),
        ("llama-8b", 8030),
        ("mistral-7b", 7248),
        ("olmo2-1b", 1485),
        ("opt-350m", 331),
        ("phi3-mini", 3821),
        ("qwen2.5-0.5b", 494),
        ("qwen2.5-1.5b", 1544),
        ("qwen2.5-7b", 7616),
        ("qwen3-0.6b", 596),
        ("qwen3-1.7b", 1721),
        ("qwen3-4b", 4022),
        ("qwen3-8b", 8191),
        ("smollm2-1.7b", 1711),
        ("smollm3-3b", 3075),
        ("tinyllama", 1100),
    ],
)
def test_shapes_have_as_many_weights_as_their_models(shape: str, million_weights: int) -> None:
    spec = shape_spec(shape)
    blocks = range(spec.block_count - 1 if spec.tied_head else spec.block_count)
    weights = sum(prod(size) for block in blocks for size in spec.block_tensors(block).values())
    assert weights / 1e6 == pytest.approx(million_weights, rel=0.01)


def test_a_config_file_is_a_shape(tmp_path: Path) -> None:
    path = tmp_path / "custom.json"
    path.write_text(json.dumps(dict(SHAPES["tinyllama"]) | {"num_hidden_layers": 3}))
    assert shape_spec(str(path)).layers == shape_spec("tinyllama").layers[:3]


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff"])
def test_a_file_that_is_no_config(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "custom.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"custom\.json"):
        shape_spec(str(path))


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="llama-1b"):
        shape_spec("llama-9000b")
    with pytest.raises(CheckpointError, match="cannot be read"):
        shape_spec(str(tmp_path / "none.json"))
    path = tmp_path / "new.json"
    path.write_text('{"model_type": "abacus"}')
    with pytest.raises(UnsupportedModelError, match="abacus"):
        shape_spec(str(path))
