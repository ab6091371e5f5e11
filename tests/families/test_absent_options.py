"""An option that config.json leaves out means what the architecture's own class says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model.families import load_spec
from model.spec import ModelSpec, RopeSpec
from tests.parity import FAMILIES


def without(folder: Path, name: str, *keys: str) -> ModelSpec:
    """What a fixture's config.json means without some options."""
    values = json.loads((FAMILIES / name / "config.json").read_text())
    left = {key: value for key, value in values.items() if key not in keys}
    (folder / "config.json").write_text(json.dumps(left))
    return load_spec(folder)


@pytest.mark.parametrize(
    ("name", "eps"),
    [
        ("ernie4_5", 1e-5),
        ("exaone4", 1e-5),
        ("gemma2", 1e-6),
        ("glm", 1.5625e-7),
        ("glm4", 1.5625e-7),
        ("gpt_oss", 1e-5),
        ("granite", 1e-6),
        ("ministral3", 1e-5),
        ("mixtral", 1e-5),
        ("olmo2", 1e-5),
        ("olmo3", 1e-5),
        ("phi3", 1e-5),
        ("qwen3_moe", 1e-6),
        ("smollm3", 1e-6),
    ],
)
def test_the_constant_of_norms_is_that_of_the_architecture(
    tmp_path: Path, name: str, eps: float
) -> None:
    assert {layer.norm_eps for layer in without(tmp_path, name, "rms_norm_eps").layers} == {eps}


def test_gpt_oss_has_its_scaling_unless_the_config_says_another(tmp_path: Path) -> None:
    layers = without(tmp_path, "gpt_oss", "rope_parameters", "rope_scaling").layers
    rope = layers[0].rope
    assert isinstance(rope, RopeSpec)
    assert (rope.scaling, rope.factor, rope.truncated) == ("yarn", 32.0, False)
    assert (rope.theta, rope.original_context) == (150000.0, 4096)
