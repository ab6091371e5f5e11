"""Descriptions of experts, of configs and of peers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.shapes import SHAPES, shape_spec
from model.errors import CheckpointError, UnsupportedModelError
from model.experts import ExpertCounts, busiest
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


def chosen(random: np.random.Generator, preference: np.ndarray[Any, Any], rows: int) -> Any:
    """The experts [row, active] of rows that prefer some of them."""
    scores = preference + random.gumbel(size=(rows, len(preference)))
    return np.argsort(scores, axis=1)[:, -8:]


def crowded(chosen: Any, held: tuple[int, ...], at_once: int) -> float:
    """How much more the busiest device has to do than its part, counted."""
    owners = np.repeat(np.arange(len(held)), held)[chosen]
    taken = np.stack([(owners == one).sum(1) for one in range(len(held))], axis=1)
    taken = taken.reshape(-1, at_once, len(held)).sum(1)
    return float((taken / (at_once * 8 * np.array(held) / sum(held))).max(1).mean())


@pytest.mark.parametrize("held", [(64, 64), (96, 32), (43, 43, 42)])
@pytest.mark.parametrize("rows", [1, 32])
@pytest.mark.parametrize("strength", [0.0, 0.8, 1.5])
def test_a_texts_counts_tell_how_much_the_busiest_device_has_to_do(
    held: tuple[int, ...], rows: int, strength: float
) -> None:
    random = np.random.default_rng(1)
    preferences = [strength * random.normal(size=128) for _ in range(12)]
    text = tuple(
        tuple(np.bincount(chosen(random, one, 256).ravel(), minlength=128).tolist())
        for one in preferences
    )
    counts = ExpertCounts(text)
    found = busiest(held, 8, rows, counts)
    others = [chosen(random, one, 32 * 128) for one in preferences]
    real = float(np.mean([crowded(one, held, rows) for one in others]))
    assert found == pytest.approx(real, rel=0.04)
    assert busiest(held, 8, rows, ExpertCounts(text)) == found
    uniform = busiest(held, 8, rows)
    if strength == 0:
        assert uniform == pytest.approx(real, rel=0.04)
    if strength == 1.5 and rows == 32:
        assert abs(found - real) < abs(uniform - real)


def test_layers_of_another_number_of_experts_do_not_count() -> None:
    skewed = tuple([100] * 4 + [0] * 4)
    both = ExpertCounts((skewed, (1,) * 16))
    assert busiest((4, 4), 2, 1, both) == busiest((4, 4), 2, 1, ExpertCounts((skewed,)))
    assert busiest((4, 4), 2, 1, both) > 1.9
    assert busiest((4, 4), 2, 1, ExpertCounts(())) == 1.0
