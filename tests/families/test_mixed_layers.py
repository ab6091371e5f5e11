"""Gemma 2 and 3, OLMo 2 and 3, EXAONE 4: what their configs mean, as published and as saved now."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.checkpoint import Checkpoint
from model.errors import CheckpointError, UnsupportedModelError
from model.families import Config, Piece, load_spec
from model.families.gemma import normalizer
from model.reference import ReferenceModel
from model.spec import LayerSpec, ModelSpec, RopeSpec
from tests.parity import FAMILIES, Golden

GEMMA3_1B = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "eos_token_id": [1, 106],
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "vocab_size": 262144,
}
GEMMA3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "eos_token_id": [1, 106],
    "mm_tokens_per_image": 256,
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {"hidden_size": 1152},
}
GEMMA2_2B = {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "bos_token_id": 2,
    "eos_token_id": 1,
    "hidden_size": 2304,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "rope_theta": 10000.0,
    "torch_dtype": "float32",
}
OLMO3_7B = {
    "model_type": "olmo3",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500000,
    "sliding_window": 4096,
    "vocab_size": 100278,
}
EXAONE4 = {
    "model_type": "exaone4",
    "hidden_size": 5120,
    "head_dim": 128,
    "intermediate_size": 27392,
    "num_hidden_layers": 6,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 1000000,
    "sliding_window": 4096,
    "sliding_window_pattern": "LLLG",
    "vocab_size": 102400,
}


def spec_of(directory: Path, config: dict[str, Any]) -> ModelSpec:
    (directory / "config.json").write_text(json.dumps(config))
    return load_spec(directory)


def test_gemma3_1b_as_published(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, GEMMA3_1B)
    sliding, full = spec.layers[0], spec.layers[5]
    assert [layer == full for layer in spec.layers] == [n % 6 == 5 for n in range(26)]
    assert sliding.rope == RopeSpec(10000.0)
    assert sliding.sliding_window == 512
    assert full == replace(sliding, rope=RopeSpec(1e6), sliding_window=None)
    assert (full.norm_position, full.qk_norm, full.activation) == ("both", "head", "gelu_tanh")
    assert full.score_factor == 1 / 16
    assert spec.tied_head
    assert spec.logit_cap is None
    assert spec.eos_tokens == (1, 106)
    assert spec.max_context == 32768


def test_gemma3_4b_leaves_most_to_defaults(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, GEMMA3_4B)
    full = spec.layers[5]
    assert full.rope is not None
    assert (full.rope.theta, full.rope.scaling, full.rope.factor) == (1e6, "linear", 8.0)
    assert spec.layers[0].rope == RopeSpec(10000.0)
    assert (full.heads, full.kv_heads, full.head_dim, spec.vocab) == (8, 4, 256, 262208)
    # The scaled context is stated as it is, and the factor does not stretch it again.
    assert spec.max_context == 131072
    assert spec.eos_tokens == (1, 106)
    assert spec.bos_token == 2


def test_gemma2_2b_as_published(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, GEMMA2_2B)
    assert [layer.sliding_window for layer in spec.layers] == [4096, None] * 13
    assert {layer.score_cap for layer in spec.layers} == {50.0}
    assert spec.logit_cap == 30.0
    uncapped = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    spec = spec_of(tmp_path, GEMMA2_2B | uncapped)
    assert {layer.score_cap for layer in spec.layers} == {None}
    assert spec.logit_cap is None


def test_olmo3_scales_rotary_positions_of_full_layers_alone(tmp_path: Path) -> None:
    scaling = {"rope_type": "linear", "factor": 8.0}
    spec = spec_of(tmp_path, OLMO3_7B | {"rope_scaling": scaling})
    assert [layer.sliding_window for layer in spec.layers] == [4096, 4096, 4096, None] * 8
    assert spec.layers[0].rope == RopeSpec(5e5)
    full = spec.layers[3]
    assert full.rope is not None
    assert (full.rope.scaling, full.rope.factor, full.rope.theta) == ("linear", 8.0, 5e5)
    assert (full.norm_position, full.qk_norm) == ("output", "width")
    by_kind = {"full_attention": {"rope_type": "default", "rope_theta": 7.0}}
    spec = spec_of(tmp_path, OLMO3_7B | {"rope_theta": 9.0, "rope_parameters": by_kind})
    assert spec.layers[0].rope == RopeSpec(9.0)
    assert spec.layers[3].rope == RopeSpec(7.0)


def test_exaone4_patterns(tmp_path: Path) -> None:
    window = 4096
    spec = spec_of(tmp_path, EXAONE4)
    expected = [window, window, window, None, window, None]
    assert [layer.sliding_window for layer in spec.layers] == expected
    assert [layer.rope is None for layer in spec.layers] == [each is None for each in expected]
    spec = spec_of(tmp_path, EXAONE4 | {"sliding_window_pattern": 3})
    assert [layer.sliding_window for layer in spec.layers] == [window, window, None] * 2
    spec = spec_of(tmp_path, EXAONE4 | {"sliding_window": None, "sliding_window_pattern": None})
    assert {(layer.sliding_window, layer.rope) for layer in spec.layers} == {(None, RopeSpec(1e6))}
    for pattern in ("", "LXG", 0):
        with pytest.raises(CheckpointError, match="sliding_window_pattern"):
            spec_of(tmp_path, EXAONE4 | {"sliding_window_pattern": pattern})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "rope_parameters"),
        ({"layer_types": ["chunked_attention"] * 26}, "chunked_attention"),
        ({"model_type": "gemma3n_text"}, "embeddings per layer"),
        (
            {"model_type": "gemma3n", "architectures": ["Gemma3nForConditionalGeneration"]},
            "embeddings per layer",
        ),
        ({"model_type": "gemma4_text"}, "embeddings per layer"),
        ({"model_type": "cohere2"}, "parallel residual"),
    ],
)
def test_what_is_missing_is_named(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        spec_of(tmp_path, GEMMA3_1B | change)


def test_attention_to_later_tokens_makes_an_encoder(tmp_path: Path) -> None:
    assert spec_of(tmp_path, GEMMA3_1B | {"use_bidirectional_attention": True}).encodes
    assert not spec_of(tmp_path, GEMMA3_1B | {"use_bidirectional_attention": False}).encodes


@pytest.mark.parametrize(
    "change",
    [{"layer_types": ["full_attention"]}, {"sliding_window": None}, {"sliding_window_pattern": 0}],
)
def test_contradictions_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=next(iter(change))):
        spec_of(tmp_path, GEMMA3_1B | change)


def test_embeddings_are_scaled_as_the_model_was_trained() -> None:
    """The root is rounded to the type of the weights: what torch's conversions give."""

    def rounded(hidden: int, **values: Any) -> float:
        return normalizer(Config(Path("config.json"), values), hidden)

    sizes = (640, 1152, 2304, 2560, 3072, 3584, 3840, 5376)
    wanted = [25.25, 34.0, 48.0, 50.5, 55.5, 59.75, 62.0, 73.5]
    assert [rounded(size, torch_dtype="bfloat16") for size in sizes] == wanted
    assert rounded(640, dtype="float16") == 25.296875
    assert rounded(640, dtype="float32") == pytest.approx(640**0.5, rel=1e-7)
    assert rounded(640) == pytest.approx(640**0.5, rel=1e-7)


def test_scaling_a_large_table_takes_no_second_one() -> None:
    """A view of a file is read-only, and is left as it is."""
    own = np.ones((3, 2), np.float32)
    scaled = Piece("tokens", scale=34.0).apply(own)
    assert np.shares_memory(scaled, own)
    assert (scaled == 34).all()
    view = np.ones((3, 2), np.float32)
    view.flags.writeable = False
    assert (Piece("tokens", scale=34.0).apply(view) == 34).all()
    assert (view == 1).all()


def copied(directory: Path, name: str) -> tuple[Path, dict[str, Any]]:
    model = directory / name
    shutil.copytree(FAMILIES / name, model)
    return model, json.loads((model / "config.json").read_text())


def test_old_and_new_configs_say_the_same(tmp_path: Path) -> None:
    """The fixture has fields of 2025. Newer ones state parameters by kind of layer."""
    model, config = copied(tmp_path, "gemma3")
    before = load_spec(model)
    ropes = {
        "full_attention": {"rope_theta": config.pop("rope_theta"), **config.pop("rope_scaling")},
        "sliding_attention": {"rope_theta": config.pop("rope_local_base_freq")},
    }
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config |= {"rope_parameters": ropes, "layer_types": kinds}
    assert spec_of(model, config) == before


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model.", "model."])
def test_a_model_that_sees_has_one_note(
    prefix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = copied(tmp_path, "gemma3-sees")
    renamed(model / "model.safetensors", lambda name: with_prefix(name, prefix))
    with caplog.at_level(logging.WARNING):
        checkpoint = Checkpoint.open(model)
        Checkpoint.open(model)
    note = "not used: the language model runs alone"
    assert [message.endswith(note) for message in caplog.messages] == [True]
    assert "multi_modal_projector, vision_tower" in caplog.text
    logits = ReferenceModel.from_checkpoint(checkpoint).forward(Golden.load(model).prompt)
    np.testing.assert_allclose(logits, Golden.load(model).logits, atol=1e-4)


def test_a_strange_tensor_inside_its_layers_is_still_refused(tmp_path: Path) -> None:
    model, _ = copied(tmp_path, "gemma3-sees")

    strange = "language_model.model.layers.1.self_attn.k_gate.weight"
    of_vision = "vision_tower.post_layernorm.weight"
    renamed(model / "model.safetensors", {of_vision: strange}.get)
    with pytest.raises(UnsupportedModelError, match="k_gate"):
        Checkpoint.open(model)


def with_prefix(name: str, prefix: str) -> str:
    for known in ("language_model.model.", "model.language_model."):
        name = name.replace(known, prefix)
    return name


def renamed(path: Path, rename: Callable[[str], str | None]) -> None:
    """Rewrite a safetensors file with other names of tensors. None leaves a name."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + size])
    header = {rename(name) or name: entry for name, entry in entries.items()}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


def changed_layers(change: Callable[[LayerSpec], LayerSpec]) -> Callable[[ModelSpec], ModelSpec]:
    return lambda spec: replace(spec, layers=tuple(map(change, spec.layers)))


UNDONE: dict[str, tuple[list[str], Callable[[ModelSpec], ModelSpec]]] = {
    "windows": (
        ["gemma2", "gemma3", "gemma3-sees", "olmo3", "exaone4"],
        changed_layers(lambda layer: replace(layer, sliding_window=None)),
    ),
    "score caps": (["gemma2"], changed_layers(lambda layer: replace(layer, score_cap=None))),
    "logit cap": (["gemma2"], lambda spec: replace(spec, logit_cap=None)),
    "score scale": (
        ["gemma2", "gemma3"],
        changed_layers(lambda layer: replace(layer, score_scale=None)),
    ),
    "one rope": (
        ["gemma3", "gemma3-sees", "olmo3"],
        lambda spec: changed_layers(lambda layer: replace(layer, rope=spec.layers[0].rope))(spec),
    ),
    "rotary everywhere": (
        ["exaone4"],
        lambda spec: changed_layers(lambda layer: replace(layer, rope=spec.layers[0].rope))(spec),
    ),
    "norms of one head": (
        ["exaone4", "gemma3"],
        changed_layers(lambda layer: replace(layer, qk_norm="none")),
    ),
    "norm position": (
        ["olmo2", "olmo3", "exaone4"],
        changed_layers(lambda layer: replace(layer, norm_position="pre")),
    ),
}


@pytest.mark.parametrize("feature", UNDONE)
def test_fixtures_exercise_each_feature(feature: str) -> None:
    """Without it, numbers are far from transformers'."""
    names, undo = UNDONE[feature]
    for name in names:
        golden = Golden.load(FAMILIES / name)
        checkpoint = Checkpoint.open(FAMILIES / name)
        blocks = [checkpoint.block(block) for block in range(checkpoint.spec.block_count)]
        logits = ReferenceModel(undo(checkpoint.spec), blocks).forward(golden.prompt)
        assert np.abs(logits - golden.logits).max() > 0.02, name


def test_starcoder2_has_the_window_in_all_layers(tmp_path: Path) -> None:
    """transformers reads no layer_types of this architecture."""
    directory = FAMILIES / "starcoder2"
    values = json.loads((directory / "config.json").read_text())
    for kinds in (["full_attention"], ["full_attention", "sliding_attention"]):
        count = values["num_hidden_layers"]
        layers = {"layer_types": (kinds * count)[:count], "sliding_window": 9}
        (tmp_path / "config.json").write_text(json.dumps(values | layers))
        assert {layer.sliding_window for layer in load_spec(tmp_path).layers} == {9}
