"""The values that config.json would hold, read from a GGUF file by its architecture.

Each function takes the file's metadata, and returns a config for ``model.families``. Options that a
file cannot hold have the values of the published models.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from model.errors import CheckpointError, UnsupportedModelError
from model.gguf_metadata import GgufMetadata
from model.spec import MAX_LAYERS, MAX_SIZE, POOLING_KEY

Values = dict[str, Any]
"""The values that config.json would hold."""


def _decoder(model: GgufMetadata, model_type: str) -> Values:
    """Return what the configs of decoders like Llama have in common."""
    heads, hidden = model.size("attention.head_count"), model.size("embedding_length")
    if not heads or not hidden:
        raise CheckpointError(f"{model.path}: the metadata has no heads, or no width")
    layers = model.size("block_count")
    if not 0 < layers <= MAX_LAYERS:
        raise CheckpointError(f"{model.path}: {layers} layers in the metadata are absurd")
    head_dim = model.size("attention.key_length", max(hidden // heads, 1))
    if model.size("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModelError(
            f"{model.path}: values of another width than keys are not implemented"
        )
    if not head_dim or head_dim % 2:
        raise CheckpointError(f"{model.path}: heads of {head_dim} columns cannot be rotated")
    ends, expert_width = model.end_tokens(), model.size("expert_feed_forward_length", 0)
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": model.size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": model.size("feed_forward_length", expert_width or None),
        "max_position_embeddings": model.size("context_length"),
        "vocab_size": model.entry("token_embd.weight").shape[0],
        "tie_word_embeddings": "output.weight" not in model.places,
        "attention_bias": "blk.0.attn_q.bias" in model.places,
        "mlp_bias": "blk.0.ffn_up.bias" in model.places,
        "bos_token_id": model.token("bos"),
        "eos_token_id": ends or None,
    } | _rope(model, head_dim)


def _rms(model: GgufMetadata) -> Values:
    return {"rms_norm_eps": model.number("attention.layer_norm_rms_epsilon")}


def _rope(model: GgufMetadata, head_dim: int) -> Values:
    values: Values = {"rope_theta": model.number("rope.freq_base", 10000.0)}
    turned = model.size("rope.dimension_count", head_dim)
    if turned != head_dim:
        values["partial_rotary_factor"] = turned / head_dim
    scaling = _rope_scaling(model, turned, values["rope_theta"])
    if scaling is not None:
        values["rope_scaling"] = scaling
    return values


def _rope_scaling(model: GgufMetadata, columns: int, theta: float) -> Values | None:
    kind = model.metadata.get(f"{model.name}.rope.scaling.type", "none")
    trained = model.size("rope.scaling.original_context_length", model.size("context_length"))
    if "rope_factors_long.weight" in model.places:
        return {
            "rope_type": "longrope",
            "long_factor": model.numbers("rope_factors_long.weight"),
            "short_factor": model.numbers("rope_factors_short.weight"),
            "original_max_position_embeddings": trained,
        }
    if "rope_freqs.weight" in model.places:
        return _llama3_scaling(model, columns, theta, trained)
    if kind == "none":
        old = model.number("rope.scale_linear", 1.0)
        return None if old == 1 else {"rope_type": "linear", "factor": old}
    if kind == "linear":
        return {"rope_type": "linear", "factor": model.number("rope.scaling.factor")}
    if kind != "yarn":
        raise UnsupportedModelError(
            f"{model.path}: rotary scaling {str(kind)[:40]!r} is not implemented"
        )
    scaling: Values = {
        "rope_type": "yarn",
        "factor": model.number("rope.scaling.factor"),
        "original_max_position_embeddings": trained,
    }
    for name, keys in _YARN.items():
        for key in keys:
            if model.has(f"rope.scaling.{key}"):
                scaling[name] = model.number(f"rope.scaling.{key}")
    # llama.cpp compares it with an mscale of 1.
    for_all = model.number("rope.scaling.yarn_log_multiplier", 0.0)
    return scaling | ({"mscale": 1.0, "mscale_all_dim": for_all} if for_all else {})


_YARN = {
    "attention_factor": ("attn_factor", "yarn_attn_factor"),
    "beta_fast": ("yarn_beta_fast",),
    "beta_slow": ("yarn_beta_slow",),
}


def _llama3_scaling(model: GgufMetadata, columns: int, theta: float, trained: int) -> Values:
    """Return the parameters of llama3 scaling that make the factors in ``rope_freqs``.

    The file has only the factors. Parameters that give the same ones are as good. If none are
    found, the factors stand as they are: longrope with equal factors for short and long texts.
    """
    factors = np.array(model.numbers("rope_freqs.weight"))
    if len(factors) * 2 != columns or not np.isfinite(factors).all() or (factors < 1).any():
        raise CheckpointError(f"{model.path}: tensor 'rope_freqs.weight' does not fit the heads")
    frequencies = theta ** -(np.arange(0, columns, 2) / columns)
    largest = float(factors.max())
    for low, high in _LLAMA3_BANDS:
        for original in (*_CONTEXTS, *_trained_context(factors, frequencies, low, high)):
            turns = original * frequencies / (2 * math.pi)
            smooth = np.clip((turns - low) / (high - low), 0, 1)
            if np.allclose(1 / ((1 - smooth) / largest + smooth), factors, rtol=1e-5, atol=0):
                return {
                    "rope_type": "llama3",
                    "factor": largest,
                    "low_freq_factor": low,
                    "high_freq_factor": high,
                    "original_max_position_embeddings": original,
                }
    return {
        "rope_type": "longrope",
        "short_factor": factors.tolist(),
        "long_factor": factors.tolist(),
        "attention_factor": 1.0,
        "original_max_position_embeddings": trained,
    }


_LLAMA3_BANDS = ((1.0, 4.0), (1.0, 32.0))
"""The low_freq_factor and high_freq_factor of known models."""
_CONTEXTS = (8192, 4096, 16384, 32768)


def _trained_context(
    factors: npt.NDArray[np.float64], frequencies: npt.NDArray[np.float64], low: float, high: float
) -> list[int]:
    """Return the trained context that gives these factors, if any does.

    It follows from the factor in the middle of the band. If no factor is in the band, the context
    has bounds, and each one between them gives the same factors.
    """
    largest, waves = factors.max(), 2 * math.pi / frequencies
    if largest == 1:
        return []
    smooth = (1 / factors - 1 / largest) / (1 - 1 / largest)
    middle = int(np.abs(smooth - 0.5).argmin())
    if 0.01 < smooth[middle] < 0.99:
        context = (low + (high - low) * smooth[middle]) * waves[middle]
    else:
        context = math.ceil(high * waves[smooth > 0.5].max(initial=0))
    return [round(context)] if 0.5 < context < MAX_SIZE - 1 else []


def _ropes_by_kind(
    model: GgufMetadata, values: Values, theta: float, sliding_theta: float
) -> Values:
    """Return the rotary parameters by kind of layer, in place of those of all layers.

    theta, sliding_theta: where the file has none. Scaling is for layers without a window.
    """
    del values["rope_theta"]
    full = values.pop("rope_scaling", None) or {"rope_type": "default"}
    return {
        "full_attention": full | {"rope_theta": model.number("rope.freq_base", theta)},
        "sliding_attention": {
            "rope_type": "default",
            "rope_theta": model.number("rope.freq_base_swa", sliding_theta),
        },
    }


def _layer_types(sliding: list[bool]) -> list[str]:
    return ["sliding_attention" if item else "full_attention" for item in sliding]


def whole_texts(model: GgufMetadata) -> Values:
    """Return what a file says about models that read whole texts, which most leave out."""
    values: Values = {} if model.flag("attention.causal", True) else {"is_causal": False}
    pooling = model.size("pooling_type", 0)
    if not pooling:
        return values
    if pooling not in _POOLINGS:
        raise UnsupportedModelError(
            f"{model.path}: pooling of the type {pooling} is not implemented; "
            "get the model's safetensors"
        )
    return values | {POOLING_KEY: _POOLINGS[pooling]}


_POOLINGS = {1: "mean", 2: "cls", 3: "lasttoken"}
"""llama.cpp's numbers of poolings. 4 gives scores of a reranker."""


def llama(model: GgufMetadata) -> Values:
    """Return the config of Llama, Mistral or Mixtral, which one architecture stands for."""
    values = _decoder(model, "llama") | _rms(model)
    window = model.size("attention.sliding_window", 0)
    if window:
        values |= {"model_type": "mistral", "sliding_window": window}
    return values | ({"model_type": "mixtral"} | _routed(model) if _has_experts(model) else {})


def _has_experts(model: GgufMetadata) -> bool:
    return model.size("expert_count", 0) > 0


def _routed(model: GgufMetadata) -> Values:
    return {
        "num_local_experts": model.size("expert_count"),
        "num_experts_per_tok": model.size("expert_used_count"),
    }


def gpt_oss(model: GgufMetadata) -> Values:
    values = _decoder(model, "gpt_oss") | _rms(model) | _routed(model)
    # The file cannot say it, and all published models have it.
    scaling = values.get("rope_scaling", {"rope_type": "default"})
    values["rope_scaling"] = scaling | {"truncate": False}
    return values | {
        "intermediate_size": model.size("expert_feed_forward_length"),
        "sliding_window": model.size("attention.sliding_window", 128),
        "layer_types": _layer_types(model.windows(2)),
    }


def qwen_moe(model_type: str, *, normalized: bool) -> Callable[[GgufMetadata], Values]:
    """Return the reader of a config whose files do not say whether weights are normalized."""

    def config(model: GgufMetadata) -> Values:
        shared = model.size("expert_shared_feed_forward_length", 0)
        width = model.size("expert_feed_forward_length")
        return (
            _decoder(model, model_type)
            | _rms(model)
            | _routed(model)
            | {
                "moe_intermediate_size": width,
                "norm_topk_prob": model.flag("expert_weights_norm", normalized),
            }
            | ({"shared_expert_intermediate_size": shared} if shared else {})
        )

    return config


def granitemoe(model: GgufMetadata) -> Values:
    values = granite(model) | _routed(model)
    shared = model.size("expert_shared_feed_forward_length", 0)
    if shared:
        return values | {"model_type": "granitemoeshared", "shared_intermediate_size": shared}
    return values | {"model_type": "granitemoe"}


def mistral3(model: GgufMetadata) -> Values:
    """Return the config of Ministral 3, or of Mistral Small 3, which scales no queries."""
    values = _decoder(model, "mistral") | _rms(model)
    beta = model.number("attention.temperature_scale", 0.0)
    if not beta:
        return values | {"sliding_window": model.size("attention.sliding_window", 0) or None}
    scaling = values.get("rope_scaling") or {"rope_type": "default"}
    return values | {
        "model_type": "ministral3",
        "rope_scaling": scaling | {"llama_4_scaling_beta": beta},
    }


def ernie(model: GgufMetadata) -> Values:
    values = _decoder(model, "ernie4_5") | _rms(model)
    return values | {"use_bias": values["attention_bias"]}


def plain(model_type: str) -> Callable[[GgufMetadata], Values]:
    """Return the reader of a config without options of its own."""
    return lambda model: _decoder(model, model_type) | _rms(model)


def gemma(model: GgufMetadata) -> Values:
    return _decoder(model, "gemma") | _rms(model) | {"hidden_activation": "gelu_pytorch_tanh"}


def gemma2(model: GgufMetadata) -> Values:
    values = gemma(model)
    return values | {
        "model_type": "gemma2",
        "query_pre_attn_scalar": _query_scalar(values, 46),
        "attn_logit_softcapping": model.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": model.number("final_logit_softcapping", 30.0),
        "sliding_window": model.size("attention.sliding_window", 4096),
        "layer_types": _layer_types(model.windows(2)),
    }


def gemma3(model: GgufMetadata) -> Values:
    values = gemma(model)
    window = model.size("attention.sliding_window", 0)
    cap = model.number("final_logit_softcapping", 0.0)
    return values | {
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": _query_scalar(values, 62),
        "rope_parameters": _ropes_by_kind(model, values, 1e6, 10000.0),
        "final_logit_softcapping": cap or None,
        "sliding_window": window or None,
        "layer_types": _layer_types(model.windows(6 if window else 1)),
    }


def _query_scalar(values: Values, largest: int) -> int:
    """Return the scalar of scores. The files lack it; only the largest model has its own."""
    if values["num_hidden_layers"] == largest:
        return int(values["hidden_size"] // values["num_attention_heads"])
    return int(values["head_dim"])


def phi3(model: GgufMetadata) -> Values:
    values = _decoder(model, "phi3") | _rms(model)
    trained = model.size("rope.scaling.original_context_length", model.size("context_length"))
    return values | {
        "original_max_position_embeddings": trained,
        "sliding_window": model.size("attention.sliding_window", 0) or None,
    }


def granite(model: GgufMetadata) -> Values:
    values = _decoder(model, "granite") | _rms(model)
    if not _has_experts(model):  # The metadata of Granite 4 has another width.
        values["intermediate_size"] = _mlp_width(model)
    return values | {
        "attention_multiplier": model.number("attention.scale", 1 / values["head_dim"] ** 0.5),
        "embedding_multiplier": model.number("embedding_scale", 1.0),
        "residual_multiplier": model.number("residual_scale", 1.0),
        "logits_scaling": model.number("logit_scale", 1.0),
    }


def minicpm(model: GgufMetadata) -> Values:
    values = _decoder(model, "minicpm") | _rms(model)
    root, hidden = values["num_hidden_layers"] ** 0.5, values["hidden_size"]
    return values | {
        "scale_emb": model.number("embedding_scale", 12.0),
        "scale_depth": _rounded(model.number("residual_scale", 1.4 / root) * root),
        "dim_model_base": round(hidden / model.number("logit_scale", hidden / 256)),
    }


def _mlp_width(model: GgufMetadata) -> int:
    return model.entry("blk.0.ffn_up.weight").shape[0]


def _rounded(value: float) -> float:
    """Undo the rounding of a quotient to float32."""
    return float(f"{value:.6g}")


def starcoder2(model: GgufMetadata) -> Values:
    return _decoder(model, "starcoder2") | {
        "norm_epsilon": model.number("attention.layer_norm_epsilon"),
        "use_bias": "blk.0.attn_q.bias" in model.places,
        "hidden_act": "gelu_pytorch_tanh",
    }


def stablelm(model: GgufMetadata) -> Values:
    return _decoder(model, "stablelm") | {
        "layer_norm_eps": model.number("attention.layer_norm_epsilon"),
        "use_qkv_bias": "blk.0.attn_q.bias" in model.places,
        "use_parallel_residual": model.flag("use_parallel_residual", False),
        "qk_layernorm": "blk.0.attn_q_norm.weight" in model.places,
    }


def gpt2(model: GgufMetadata) -> Values:
    values = _decoder(model, "gpt2")
    names = {
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings",
    }
    return {name: values[known] for name, known in names.items()} | {
        "model_type": "gpt2",
        "n_inner": _mlp_width(model),  # The metadata has four times the hidden width.
        "layer_norm_epsilon": model.number("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
        **{key: values[key] for key in ("vocab_size", "bos_token_id", "eos_token_id")},
        "tie_word_embeddings": values["tie_word_embeddings"],
    }


def olmo2(model: GgufMetadata) -> Values:
    values = _decoder(model, "olmo2") | _rms(model)
    window = model.size("attention.sliding_window", 0)
    if not window:
        return values
    theta = values["rope_theta"]
    return values | {
        "model_type": "olmo3",
        "sliding_window": window,
        "layer_types": _layer_types(model.windows(4)),
        "rope_parameters": _ropes_by_kind(model, values, theta, theta),
    }


def exaone4(model: GgufMetadata) -> Values:
    values = _decoder(model, "exaone4") | _rms(model)
    window = model.size("attention.sliding_window", 0)
    kinds = _layer_types(model.windows(4 if window else 1))
    return values | {"sliding_window": window or None, "layer_types": kinds}


def smollm3(model: GgufMetadata) -> Values:
    return _decoder(model, "smollm3") | _rms(model) | {"no_rope_layer_interval": 4}
