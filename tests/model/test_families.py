from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model import families
from model.errors import CheckpointError, ModelError, UnsupportedModelError
from model.families import load_spec
from model.families.unsupported import MISSING
from model.rotary import rotary_table
from model.spec import ModelSpec, RopeSpec

FIXTURES = Path(__file__).parents[1] / "fixtures"
FAMILIES = Path(__file__).parents[1] / "families"

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 256,
}
OPT: dict[str, Any] = {
    "model_type": "opt",
    "hidden_size": 64,
    "ffn_dim": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "vocab_size": 100,
    "max_position_embeddings": 256,
}
STABLELM = LLAMA | {"model_type": "stablelm"}
GRANITE4 = LLAMA | {
    "model_type": "granitemoehybrid",
    "layer_types": ["attention"] * 4,
    "num_local_experts": 0,
    "position_embedding_type": "nope",
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.0, 1.0, 1.0],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 64,
}


def spec_of(directory: Path, values: object, generation: object = None) -> ModelSpec:
    (directory / "config.json").write_text(json.dumps(values))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return load_spec(directory)


def test_llama_defaults(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, LLAMA)
    layer = spec.layers[0]
    assert (layer.heads, layer.kv_heads, layer.head_dim) == (8, 2, 8)
    assert (layer.norm, layer.norm_eps, layer.activation) == ("rmsnorm", 1e-6, "silu")
    assert layer.rope == RopeSpec(10000.0)
    assert not any((layer.qkv_bias, layer.out_bias, layer.mlp_bias))
    assert layer.qk_norm == "none"
    assert not spec.tied_head
    assert spec.max_context == 256


def test_opt_350m_style(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 32})
    assert (spec.embed_dim, spec.hidden, spec.projected) == (32, 64, True)
    assert (spec.final_norm, spec.tied_head) == (False, True)
    assert (spec.learned_positions, spec.position_offset) == (258, 2)
    assert spec.layers[0].norm_position == "post"
    assert spec.layers[0].rope is None


def test_opt_without_its_final_norm_or_biases(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, OPT | {"_remove_final_layer_norm": True, "enable_bias": False})
    assert not spec.final_norm
    assert not spec.layers[0].mlp_bias


def test_qwen2_windows(tmp_path: Path) -> None:
    qwen = LLAMA | {"model_type": "qwen2", "sliding_window": 16, "max_window_layers": 3}
    windows = [layer.sliding_window for layer in spec_of(tmp_path, qwen).layers]
    assert windows == [None] * 4
    qwen["use_sliding_window"] = True
    windows = [layer.sliding_window for layer in spec_of(tmp_path, qwen).layers]
    assert windows == [None, None, None, 16]
    qwen["layer_types"] = ["sliding_attention", "full_attention"] * 2
    windows = [layer.sliding_window for layer in spec_of(tmp_path, qwen).layers]
    assert windows == [16, None, 16, None]


def test_mistral_window_is_4096_unless_said(tmp_path: Path) -> None:
    mistral = LLAMA | {"model_type": "mistral"}
    assert spec_of(tmp_path, mistral).layers[0].sliding_window == 4096
    mistral["sliding_window"] = None
    assert spec_of(tmp_path, mistral).layers[0].sliding_window is None


def test_windows_of_mistral_and_ministral_follow_layer_types(tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention"] * 2
    for model_type in ("mistral", "ministral"):
        config = LLAMA | {"model_type": model_type, "sliding_window": 16, "layer_types": kinds}
        windows = [layer.sliding_window for layer in spec_of(tmp_path, config).layers]
        assert windows == [None, 16, None, 16]


def test_every_fourth_layer_of_smollm3_has_no_rotary_positions(tmp_path: Path) -> None:
    smollm3 = LLAMA | {"model_type": "smollm3"}
    spec = spec_of(tmp_path, smollm3)
    assert [layer.rope is None for layer in spec.layers] == [False, False, False, True]
    assert spec.layers[0].rope == RopeSpec(2e6)
    assert spec.tied_head
    marked = spec_of(tmp_path, smollm3 | {"no_rope_layers": [0, 1, 1, 1, 1]})
    assert [layer.rope is None for layer in marked.layers] == [True, False, False, False]
    windows = {"use_sliding_window": True, "sliding_window": 16}
    layers = spec_of(tmp_path, smollm3 | windows).layers
    assert [layer.sliding_window for layer in layers] == [None, None, None, 16]


def test_phi3_was_trained_with_4096_positions_unless_said(tmp_path: Path) -> None:
    phi3 = LLAMA | {"model_type": "phi3", "rope_scaling": LONGROPE}
    phi3["max_position_embeddings"] = 131072
    for options, trained in (({}, 4096), ({"original_max_position_embeddings": 8192}, 8192)):
        rope = spec_of(tmp_path, phi3 | options).layers[0].rope
        assert rope is not None
        assert rope.original_context == trained
        factor = math.log(131072 / trained) / math.log(trained)
        assert rope.attention_factor == pytest.approx(math.sqrt(1 + factor))


@pytest.mark.parametrize(
    ("options", "rotated"),
    [
        ({"model_type": "stablelm"}, 2),
        ({"model_type": "stablelm", "partial_rotary_factor": 0.5}, 4),
        ({"model_type": "stablelm", "rope_parameters": {"partial_rotary_factor": 0.75}}, 6),
        ({"model_type": "stablelm", "partial_rotary_factor": 1.0}, 0),
        ({"model_type": "glm"}, 64),
        ({"model_type": "glm4", "head_dim": 16}, 8),
        ({"model_type": "phi3"}, 0),
        ({"model_type": "phi3", "partial_rotary_factor": 0.75}, 6),
    ],
)
def test_heads_that_turn_in_part(tmp_path: Path, options: Any, rotated: int) -> None:
    layer = spec_of(tmp_path, LLAMA | options).layers[0]
    assert layer.rope == RopeSpec(1e4, rotated=rotated)


def test_ministral3_ends_where_it_would_scale_queries(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    config = LLAMA | {"model_type": "ministral3", "rope_parameters": rope}
    assert spec_of(tmp_path, config).max_context == 256
    config["rope_parameters"] = rope | {"llama_4_scaling_beta": 0.1}
    assert spec_of(tmp_path, config).max_context == 64


def test_granite4_without_rotary_positions(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, GRANITE4 | {"shared_intermediate_size": 96})
    assert {(layer.rope, layer.ffn) for layer in spec.layers} == {(None, 96)}


def test_unknown_architectures_are_refused_by_their_missing_feature(tmp_path: Path) -> None:
    for model_type, feature in MISSING.items():
        with pytest.raises(UnsupportedModelError, match=re.escape(f"not implemented: {feature}")):
            spec_of(tmp_path, LLAMA | {"model_type": model_type})
    for options, feature in (
        ({"layer_types": ["linear_attention"] * 4}, "gated-delta attention"),
        ({"kv_lora_rank": 64}, "latent attention"),
        ({"num_local_experts": 8}, "its kind of experts"),
        ({"vision_config": {"depth": 2}}, "a vision part"),
    ):
        with pytest.raises(UnsupportedModelError, match=f"new-one needs .* implemented: {feature}"):
            spec_of(tmp_path, LLAMA | {"model_type": "new-one"} | options)
    with pytest.raises(UnsupportedModelError, match=r'"new-one" is not implemented; known: \w'):
        spec_of(tmp_path, LLAMA | {"model_type": "new-one"})


def test_no_supported_architecture_is_said_to_lack_a_feature() -> None:
    assert not MISSING.keys() & families._FAMILIES.keys()


def test_qwen3_head_dim_is_128_unless_said(tmp_path: Path) -> None:
    assert spec_of(tmp_path, LLAMA | {"model_type": "qwen3"}).layers[0].head_dim == 128


@pytest.mark.parametrize(
    ("options", "rope", "context"),
    [
        ({"rope_theta": 5e5}, RopeSpec(5e5), 256),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, RopeSpec(5e5), 256),
        ({"rope_scaling": None}, RopeSpec(1e4), 256),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5e5},
            RopeSpec(5e5, "linear", 2.0, 256),
            512,
        ),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
            RopeSpec(1e4, "dynamic", 4.0, 256),
            1024,
        ),
        (
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 5e5,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
            RopeSpec(5e5, "llama3", 8.0, 64, 1.0, 4.0),
            256,
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            RopeSpec(1e4, "yarn", 4.0, 256, attention_factor=0.1 * math.log(4) + 1),
            1024,
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "yarn",
                    "original_max_position_embeddings": 64,
                    "mscale": 0.5,
                    "mscale_all_dim": 1.0,
                    "beta_fast": 16,
                    "truncate": False,
                }
            },
            RopeSpec(
                1e4,
                "yarn",
                4.0,
                64,
                beta_fast=16.0,
                truncated=False,
                attention_factor=(0.05 * math.log(4) + 1) / (0.1 * math.log(4) + 1),
            ),
            256,
        ),
        (
            {"rope_scaling": LONGROPE},
            RopeSpec(
                1e4,
                "longrope",
                original_context=64,
                attention_factor=math.sqrt(1 + math.log(4) / math.log(64)),
                short_factors=(1.0, 1.0, 1.0, 1.0),
                long_factors=(1.0, 2.0, 3.0, 4.0),
            ),
            256,
        ),
        (
            {
                "rope_scaling": LONGROPE | {"rope_type": "su", "attention_factor": 1.5},
                "original_max_position_embeddings": 128,
            },
            RopeSpec(
                1e4,
                "longrope",
                original_context=128,
                attention_factor=1.5,
                short_factors=(1.0, 1.0, 1.0, 1.0),
                long_factors=(1.0, 2.0, 3.0, 4.0),
            ),
            256,
        ),
    ],
)
def test_rope_in_old_and_new_configs(tmp_path: Path, options: Any, rope: Any, context: int) -> None:
    spec = spec_of(tmp_path, LLAMA | options)
    assert spec.layers[0].rope == rope
    assert spec.max_context == context


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (None, None, ()),
        (2, None, (2,)),
        ([2, 5], None, (2, 5)),
        (2, {"eos_token_id": [7, 8]}, (7, 8)),
        (2, {"eos_token_id": 7}, (7,)),
        (2, {"eos_token_id": None}, (2,)),
        (2, {}, (2,)),
    ],
)
def test_eos_tokens(
    tmp_path: Path, config: Any, generation: Any, expected: tuple[int, ...]
) -> None:
    spec = spec_of(tmp_path, LLAMA | {"eos_token_id": config}, generation)
    assert spec.eos_tokens == expected


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (
            LLAMA | {"model_type": "mamba"},
            "mamba needs what is not implemented: state-space layers",
        ),
        (LLAMA | {"hidden_act": "quick_gelu"}, "hidden_act"),
        (OPT | {"activation_function": "tanh"}, "activation_function"),
        (OPT | {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine"),
        (LLAMA | {"quantization_config": {"bits": 4}}, "an unknown method are not read; read are"),
        (LLAMA | {"quantization_config": {"quant_method": "aqlm"}}, "by 'aqlm' are not read"),
        (LLAMA | {"is_encoder_decoder": True}, "is_encoder_decoder"),
        (LLAMA | {"is_causal": False}, "is_causal"),
        (LLAMA | {"pruned_heads": {"1": [2]}}, "pruned_heads"),
        (LLAMA | {"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        (
            LLAMA | {"partial_rotary_factor": 0.5},
            "partial_rotary_factor.* turn whole",
        ),
        (LLAMA | {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (LLAMA | {"rope_scaling": {"rope_type": "proportional"}}, 'rope_type = "proportional"'),
        (LLAMA | {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "one set"),
        (
            LLAMA | {"model_type": "qwen2", "layer_types": ["chunked_attention"] * 4},
            "chunked_attention",
        ),
        (STABLELM | {"qk_layernorm": True}, "layer norms of q and k.*qk_layernorm"),
        (STABLELM | {"use_parallel_residual": True}, "in parallel.*use_parallel_residual"),
        (GRANITE4 | {"layer_types": ["mamba", "attention"] * 2}, "state-space layers"),
        (GRANITE4 | {"layer_types": None}, "state-space layers"),
        (GRANITE4 | {"num_local_experts": 8}, "experts beside a shared MLP"),
        (LLAMA | {"model_type": "minicpm", "sparse_config": {"topk": 64}}, "sparse attention"),
        (LLAMA | {"model_type": "gemma", "hidden_activation": "silu"}, "hidden_activation"),
    ],
)
def test_what_would_change_the_numbers_is_refused(tmp_path: Path, values: Any, named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        spec_of(tmp_path, values)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ([], "not a JSON object"),
        ({}, "model_type is missing"),
        ({"model_type": 5}, "model_type must be a string"),
        (LLAMA | {"hidden_size": "64"}, "hidden_size must be an integer"),
        (LLAMA | {"hidden_size": True}, "hidden_size must be an integer"),
        (LLAMA | {"vocab_size": -1}, "vocab_size must be an integer"),
        (LLAMA | {"vocab_size": 10**30}, "vocab_size must be an integer"),
        (LLAMA | {"num_hidden_layers": 10**6}, "num_hidden_layers = 1000000 is absurd"),
        (LLAMA | {"num_key_value_heads": 3}, "is no multiple of num_key_value_heads"),
        (LLAMA | {"head_dim": 7}, "head_dim 7 cannot be rotated"),
        (STABLELM | {"partial_rotary_factor": 0.4}, "head_dim 8, of which 0.4 turn, cannot"),
        (STABLELM | {"partial_rotary_factor": 2}, "head_dim 8, of which 2 turn, cannot"),
        (LLAMA | {"model_type": "smollm3", "no_rope_layers": [1, 0]}, "no_rope_layers"),
        (LLAMA | {"model_type": "smollm3", "no_rope_layers": [1, 0, 2, 1]}, "no_rope_layers"),
        (LLAMA | {"rope_scaling": {"type": "longrope"}}, "short_factor is missing"),
        (LLAMA | {"rope_scaling": LONGROPE | {"long_factor": [1.0]}}, "must have 4 numbers"),
        (LLAMA | {"rope_scaling": LONGROPE | {"long_factor": [1, 2, 3, 0]}}, "positive"),
        (LLAMA | {"rope_scaling": {"type": "yarn", "factor": 0.5}}, "at least 1"),
        (LLAMA | {"rope_scaling": {"type": "yarn", "rope_theta": 1}}, "rope_theta must be above 1"),
        (LLAMA | {"model_type": "ministral3"}, "rope_parameters is missing"),
        (LLAMA | {"rms_norm_eps": 0}, "rms_norm_eps must be a positive number"),
        (LLAMA | {"rms_norm_eps": float("inf")}, "rms_norm_eps must be a positive number"),
        (LLAMA | {"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a number"),
        (LLAMA | {"attention_bias": 1}, "attention_bias must be true or false"),
        (LLAMA | {"eos_token_id": "2"}, "eos_token_id must be a token id"),
        (LLAMA | {"rope_scaling": [1]}, "rope_scaling must be an object"),
        (LLAMA | {"rope_scaling": {"type": "linear"}}, "factor is missing"),
        (LLAMA | {"rope_scaling": {"type": "linear", "factor": 0.5}}, "at least 1"),
        (LLAMA | {"architectures": "Llama"}, "architectures must be a list"),
        (OPT | {"num_attention_heads": 7}, "no multiple of num_attention_heads"),
        (LLAMA | {"model_type": "qwen2", "max_window_layers": -1}, "max_window_layers"),
        (LLAMA | {"model_type": "qwen2", "layer_types": ["full_attention"]}, "has 1 of 4"),
        (
            LLAMA | {"model_type": "qwen2", "layer_types": ["sliding_attention"] * 4},
            "sliding_window is not in use",
        ),
    ],
)
def test_malformed_configs_are_named(tmp_path: Path, values: Any, named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        spec_of(tmp_path, values)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_unreadable_configs(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"config\.json: not valid JSON"):
        load_spec(tmp_path)


def test_specs_survive_messages() -> None:
    for config in sorted((*FIXTURES.glob("*/config.json"), *FAMILIES.glob("*/config.json"))):
        spec = load_spec(config.parent)
        assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_old_and_new_config_of_one_model_agree(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(FIXTURES / "llama-linear", tmp_path / "m"))
    config = json.loads((directory / "config.json").read_text())
    old = load_spec(directory)
    scaling = config.pop("rope_scaling")
    config["rope_parameters"] = {
        "rope_type": scaling.pop("type"), "rope_theta": config.pop("rope_theta"), **scaling
    }  # fmt: skip
    assert spec_of(directory, config) == old


@pytest.mark.parametrize("model", [FIXTURES / "llama", FAMILIES / "phi3-long"], ids=str)
@pytest.mark.parametrize("value", [None, -1, 0, "x", [], {}, 1.5, True, 10**40, float("nan")])
def test_descriptions_from_a_peer_never_crash(value: object, model: Path) -> None:
    """Each field of a spec, its layers and their rope replaced by nonsense: refused or harmless."""
    plain = json.dumps(load_spec(model).to_dict())
    paths: list[tuple[object, ...]] = [(key,) for key in json.loads(plain)]
    paths += [("layers", 1, key) for key in json.loads(plain)["layers"][0]]
    paths += [("layers", 1, "rope", key) for key in json.loads(plain)["layers"][0]["rope"]]
    refused = 0
    for path in paths:
        values = json.loads(plain)
        target = values
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value
        try:
            spec = ModelSpec.from_dict(values)
        except UnsupportedModelError:
            refused += 1
        else:
            assert all(np.prod(shape) > 0 for shape in spec.block_tensors(1).values())
            layer = spec.layers[1]
            if layer.rope is not None:
                with np.errstate(all="ignore"):
                    rotary_table(layer.rope, layer.head_dim, 4)
    assert refused > 20
    with pytest.raises(ModelError):
        ModelSpec.from_dict({"layers": value})
