"""Decoders with constants between their parts, which are folded into the weights on reading.

Granite and MiniCPM multiply embeddings, what a layer adds, and logits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from model.families.config import Config
from model.families.decoder import LAYER, LLAMA_NAMES, rotary_decoder, with_layers
from model.families.sources import Source, scaled, stacked
from model.spec import ModelSpec

_ADDED = ("o", "down")
"""The modules whose results are added to the hidden state."""

GRANITE_HYBRID_NAMES = LLAMA_NAMES | {
    "gate": LAYER + "shared_mlp.input_linear",
    "up": LAYER + "shared_mlp.input_linear",
    "down": LAYER + "shared_mlp.output_linear",
}


def granite(config: Config) -> ModelSpec:
    bias = config.flag("attention_bias", False)
    spec = rotary_decoder(
        config, qkv_bias=bias, out_bias=bias, mlp_bias=config.flag("mlp_bias", False)
    )
    return with_layers(spec, score_scale=config.number("attention_multiplier", 1.0))


def granite_sources(
    config: Config, spec: ModelSpec, block: int, sources: Mapping[str, Source]
) -> dict[str, Source]:
    residual = config.number("residual_multiplier", 1.0)
    return (
        dict(sources)
        | scaled(sources, ("tokens",), config.number("embedding_multiplier", 1.0))
        | scaled(sources, _ADDED, residual)
        | scaled(sources, ("lm_head",), 1 / config.number("logits_scaling", 1.0))
    )


def granite_hybrid(config: Config) -> ModelSpec:
    """Describe Granite 4 where all layers are attention and none has experts."""
    kinds = set(config.strings("layer_types") or config.strings("layers_block_type"))
    if kinds - {"attention", "full_attention"} or not kinds:
        raise config.lacking("state-space layers (mamba in layer_types)")
    if config.values.get("num_local_experts", 8):
        raise config.lacking("experts beside a shared MLP (num_local_experts)")
    position = config.values.get("position_embedding_type")
    if position not in ("rope", "nope", None):
        raise config.unsupported("position_embedding_type", position, "known: rope, nope")
    bias = config.flag("attention_bias", False)
    spec = with_layers(
        rotary_decoder(config, qkv_bias=bias, out_bias=bias),
        ffn=config.size("shared_intermediate_size", 1024),
        score_scale=config.number("attention_multiplier", 1.0),
    )
    return spec if position == "rope" else with_layers(spec, rope=None)


def granite_hybrid_sources(
    config: Config, spec: ModelSpec, block: int, sources: Mapping[str, Source]
) -> dict[str, Source]:
    parts = dict(sources)
    if spec.block_kind(block) == "layer":
        parts = stacked(sources, spec.block_tensors(block), ("gate", "up"))
    return granite_sources(config, spec, block, parts)


def minicpm(config: Config) -> ModelSpec:
    """Describe MiniCPM and MiniCPM4, whose config names come from its authors' code."""
    if config.values.get("sparse_config"):
        raise config.lacking("sparse attention (sparse_config)")
    if config.values.get("num_experts"):
        raise config.lacking("experts of MiniCPM (num_experts)")
    bias = config.flag("attention_bias", False)
    return rotary_decoder(config, qkv_bias=bias, out_bias=bias, tied=True)


def minicpm_sources(
    config: Config, spec: ModelSpec, block: int, sources: Mapping[str, Source]
) -> dict[str, Source]:
    depth = config.number("scale_depth", 1.0) / math.sqrt(len(spec.layers))
    width = spec.hidden / config.size("dim_model_base", 1)
    return (
        dict(sources)
        | scaled(sources, ("tokens",), config.number("scale_emb", 1.0))
        | scaled(sources, _ADDED, depth)
        | scaled(sources, ("lm_head",), 1 / width)
    )
