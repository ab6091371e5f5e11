"""Descriptions of experts, of configs and of peers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from calibration.shapes import SHAPES, shape_spec
from model.errors import CheckpointError, UnsupportedModelError
from model.families import Config, describe
from model.spec import ExpertSpec, ModelSpec


@pytest.mark.parametrize(
    "changes",
    [
        {"active": 9},
        {"active": 0},
        {"count": 1 << 30},
        {"first": 5, "held": 4},
        {"held": -1},
        {"scoring": "best"},
        {"limit": -1.0},
        {"normalized": 1},
        {"unknown": 1},
    ],
    ids=str,
)
def test_experts_of_a_peer_are_checked(changes: dict[str, Any]) -> None:
    spec = shape_spec("qwen3-30b-a3b")
    plain = replace(spec, layers=spec.layers[:1]).to_dict()
    plain["layers"][0]["experts"] |= {"count": 8, "active": 2}
    assert ModelSpec.from_dict(plain).layers[0].experts == ExpertSpec(8, 2)
    plain["layers"][0]["experts"] |= changes
    with pytest.raises(UnsupportedModelError, match="malformed model description"):
        ModelSpec.from_dict(plain)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_experts_per_tok": 300}, "300 exceeds the 128 experts"),
        ({"mlp_only_layers": "all"}, "mlp_only_layers must be a list"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size is missing"),
    ],
    ids=str,
)
def test_configs_of_experts_are_checked(
    values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = Config(tmp_path / "config.json", dict(SHAPES["qwen3-30b-a3b"]) | values)
    with pytest.raises(CheckpointError, match=message):
        describe(config, tmp_path)
    described = describe(Config(tmp_path / "config.json", SHAPES["qwen3-30b-a3b"]), tmp_path)
    assert described.layers[0].experts == ExpertSpec(128, 8)
    dense = dict(SHAPES["qwen3-30b-a3b"]) | {"mlp_only_layers": [0], "decoder_sparse_step": 2}
    layers = describe(Config(tmp_path / "config.json", dense), tmp_path).layers
    assert [layer.experts is not None for layer in layers[:4]] == [False, True, False, True]
    assert [layer.ffn for layer in layers[:2]] == [6144, 768]
