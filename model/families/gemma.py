"""Gemma: norms that add one, and scaled embeddings.

Gemma 2 and 3 also have norms around attention and MLP, windows in most layers, and caps.

Source: the Gemma 2 and Gemma 3 reports. Defaults are those of their config classes in transformers,
because published configs leave most fields out.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from model.families.config import Config
from model.families.decoder import LAYER, LLAMA_NAMES, rotary_decoder, with_layers
from model.families.encoders import VECTOR
from model.families.mixed import (
    FULL,
    SLIDING,
    layer_kinds,
    ropes,
    windows,
    with_ropes,
    without_ropes,
)
from model.families.sources import Source, changed, scaled
from model.spec import LayerSpec, ModelSpec

GEMMA2_NAMES = LLAMA_NAMES | {
    "attn_out_norm": LAYER + "post_attention_layernorm",
    "mlp_norm": LAYER + "pre_feedforward_layernorm",
    "mlp_out_norm": LAYER + "post_feedforward_layernorm",
}

_SIZES = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
_NORMS = ("attn_norm", "attn_out_norm", "mlp_norm", "mlp_out_norm", "q_norm", "k_norm", "norm")


def gemma(config: Config) -> ModelSpec:
    """Describe the first Gemma. Its `gelu` has always meant the tanh form."""
    bias = config.flag("attention_bias", False)
    spec = rotary_decoder(config, qkv_bias=bias, out_bias=bias, head_dim=256, tied=True)
    activation = config.text("hidden_activation", config.text("hidden_act", "gelu"))
    if activation not in ("gelu", "gelu_pytorch_tanh"):
        raise config.unsupported("hidden_activation", activation, "known: gelu_pytorch_tanh")
    _refuse_later_tokens(config)
    return with_layers(spec, activation="gelu_tanh")


def gemma2(config: Config) -> ModelSpec:
    config = config.with_defaults(_SIZES | {"vocab_size": 256000, "max_position_embeddings": 8192})
    _refuse_later_tokens(config)
    spec = _decoder(config, layer_kinds(config, 2))
    cap = _cap(config, "attn_logit_softcapping", 50.0)
    layers = tuple(replace(layer, score_cap=cap) for layer in spec.layers)
    return replace(spec, layers=layers, logit_cap=_cap(config, "final_logit_softcapping", 30.0))


def gemma3(config: Config) -> ModelSpec:
    """Describe the text of Gemma 3: rotary parameters of each kind, and norms of q and k."""
    config = config.with_defaults(
        _SIZES | {"vocab_size": 262208, "max_position_embeddings": 131072}
    )
    if config.has("attn_logit_softcapping"):
        # transformers reads it and does not use it.
        value = config.values["attn_logit_softcapping"]
        raise config.unsupported("attn_logit_softcapping", value, "Gemma 3 has none")
    pattern = config.size("sliding_window_pattern", config.size("_sliding_window_pattern", 6))
    kinds = layer_kinds(config, pattern)
    by_kind = ropes(
        config,
        config.size("head_dim"),
        config.size("max_position_embeddings"),
        {FULL: ("rope_theta", 1e6), SLIDING: ("rope_local_base_freq", 10000.0)},
    )
    encodes = config.flag("use_bidirectional_attention", False)
    spec = _decoder(without_ropes(config), kinds, qk_norm="head")
    layers = with_ropes(spec.layers, kinds, by_kind)
    if encodes:  # EmbeddingGemma. Its window reaches half as far to either side.
        layers = tuple(
            replace(
                layer,
                bidirectional=True,
                sliding_window=layer.sliding_window and layer.sliding_window // 2 + 1,
            )
            for layer in layers
        )
        return replace(spec, layers=layers, output=VECTOR, tied_head=False)
    return replace(spec, layers=layers, logit_cap=_cap(config, "final_logit_softcapping", None))


def gemma_sources(
    config: Config, spec: ModelSpec, block: int, sources: dict[str, Source]
) -> dict[str, Source]:
    """Add one to the weights of norms, and scale embeddings. The head's table is not scaled."""
    return (
        sources
        | scaled(sources, ("tokens",), normalizer(config, spec.hidden))
        | changed(sources, _NORMS, add=1.0)
    )


def normalizer(config: Config, hidden: int) -> float:
    """Return the factor of embeddings, sqrt(hidden) in the type that the model was trained in.

    In bfloat16 it is 50.5 instead of 50.596 for 2560. Google's code and transformers compute with
    that. A config without a type has the exact root.
    """
    root = np.float32(math.sqrt(hidden))
    match config.text("dtype", config.text("torch_dtype", "float32")):
        case "float16":
            return float(np.float16(root))
        case "bfloat16":
            # Round to the nearest, the even one of two: the upper half of the 32 bits.
            bits = int(root.view(np.uint32))
            bits += 0x7FFF + (bits >> 16 & 1)
            return float(np.uint32(bits & 0xFFFF0000).view(np.float32))
    return float(root)


def _decoder(config: Config, kinds: list[str], **features: Any) -> ModelSpec:
    """Describe what Gemma 2 and 3 share. ``features`` are those of ``rotary_decoder``."""
    bias = config.flag("attention_bias", False)
    spec = rotary_decoder(
        config,
        qkv_bias=bias,
        out_bias=bias,
        windows=windows(config, kinds, 4096),
        **features,
    )
    activation = config.activation("hidden_activation", "gelu_pytorch_tanh")
    scale = config.number("query_pre_attn_scalar", 256.0) ** -0.5

    def own(layer: LayerSpec) -> LayerSpec:
        return replace(layer, norm_position="both", activation=activation, score_scale=scale)

    return replace(spec, layers=tuple(map(own, spec.layers)))


def _refuse_later_tokens(config: Config) -> None:
    if config.flag("use_bidirectional_attention", False):
        raise config.lacking("attention to later tokens (use_bidirectional_attention)")


def _cap(config: Config, key: str, default: float | None) -> float | None:
    """Return a cap. Null means none, and an absent one ``default``."""
    return None if config.values.get(key, default) is None else config.number(key, default)
