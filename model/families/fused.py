"""Decoders that store q, k and v, or gate and up, as one matrix: Phi-3 and its successors, GLM."""

from __future__ import annotations

from collections.abc import Mapping

from model.families.config import Config
from model.families.decoder import LAYER, LLAMA_NAMES, interleaved, rotary_decoder, with_layers
from model.families.sources import Source, stacked
from model.spec import ModelSpec

_GATE_UP = dict.fromkeys(("gate", "up"), LAYER + "mlp.gate_up_proj")
PHI3_NAMES = LLAMA_NAMES | dict.fromkeys("qkv", LAYER + "self_attn.qkv_proj") | _GATE_UP
GLM_NAMES = LLAMA_NAMES | _GATE_UP
GLM4_NAMES = GLM_NAMES | {
    "attn_out_norm": LAYER + "post_self_attn_layernorm",
    "mlp_out_norm": LAYER + "post_mlp_layernorm",
}


def phi3(config: Config) -> ModelSpec:
    """Describe Phi-3, Phi-3.5 and Phi-4, the mini ones and those of 14B."""
    # The architecture's own trained context comes before one in rope_scaling.
    config = config.with_defaults({"original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5})
    window = config.size("sliding_window") if config.has("sliding_window") else None
    return rotary_decoder(config, windows=[window] * config.layer_count(), partial=1.0)


def phi3_sources(
    _config: Config, spec: ModelSpec, block: int, sources: Mapping[str, Source]
) -> dict[str, Source]:
    if spec.block_kind(block) != "layer":
        return dict(sources)
    return stacked(sources, spec.block_tensors(block), "qkv", ("gate", "up"))


def glm(config: Config) -> ModelSpec:
    config = config.with_defaults({"rms_norm_eps": 1.5625e-7})
    bias = config.flag("attention_bias", True)
    return rotary_decoder(config, qkv_bias=bias, head_dim=128, partial=0.5)


def glm4(config: Config) -> ModelSpec:
    """Describe GLM-4 of 2025, with norms before and after attention and MLP."""
    return with_layers(glm(config), norm_position="both")


def glm_sources(
    config: Config, spec: ModelSpec, block: int, sources: Mapping[str, Source]
) -> dict[str, Source]:
    if spec.block_kind(block) != "layer":
        return dict(sources)
    parts = stacked(sources, spec.block_tensors(block), ("gate", "up"))
    return interleaved(config, spec, block, parts)
