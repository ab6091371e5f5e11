"""OLMo 2, OLMo 3 and EXAONE 4: norms of what attention and MLP add, and of q and k."""

from __future__ import annotations

from dataclasses import replace

from model.errors import CheckpointError
from model.families.config import Config
from model.families.decoder import LAYER, LLAMA_NAMES, rotary_decoder
from model.families.mixed import (
    FULL,
    SLIDING,
    layer_kinds,
    ropes,
    windows,
    with_ropes,
    without_ropes,
)
from model.spec import LayerSpec, ModelSpec

OLMO_NAMES = LLAMA_NAMES | {
    "attn_norm": LAYER + "post_attention_layernorm",
    "mlp_norm": LAYER + "post_feedforward_layernorm",
}


def olmo2(config: Config) -> ModelSpec:
    return _decoder(config, [None] * config.layer_count())


def olmo3(config: Config) -> ModelSpec:
    """Describe OLMo 3: windows in most layers, and scaled rotary positions in the others."""
    kinds = layer_kinds(config, 4)
    heads, context = config.size("num_attention_heads"), config.size("max_position_embeddings")
    head_dim = config.size("head_dim", max(config.size("hidden_size") // heads, 1))
    theta = "rope_theta", 5e5
    by_kind = ropes(config, head_dim, context, {FULL: theta, SLIDING: theta})
    spec = _decoder(without_ropes(config), windows(config, kinds, 4096))
    return replace(spec, layers=with_ropes(spec.layers, kinds, by_kind))


def exaone4(config: Config) -> ModelSpec:
    """Describe EXAONE 4. Where some layers have windows, the full ones have no rotary positions."""
    kinds = _exaone_kinds(config)
    spec = rotary_decoder(config, qk_norm="head", windows=windows(config, kinds, 4096))
    mixed = config.values.get("sliding_window", 4096) is not None

    def own(layer: LayerSpec, kind: str) -> LayerSpec:
        return _normed(config, replace(layer, rope=None) if mixed and kind == FULL else layer)

    layers = tuple(own(*pair) for pair in zip(spec.layers, kinds, strict=True))
    return replace(spec, layers=layers)


def _exaone_kinds(config: Config) -> list[str]:
    """Return each layer's kind. A pattern like LLLG is repeated, but the last layer is full."""
    count, pattern = config.layer_count(), config.values.get("sliding_window_pattern", 4)
    if config.strings("layer_types"):
        return layer_kinds(config, 1)
    if config.values.get("sliding_window", 4096) is None:
        return [FULL] * count
    if not isinstance(pattern, str):
        return layer_kinds(config, config.size("sliding_window_pattern", 4))
    if not pattern or set(pattern) - {"L", "G"}:
        raise CheckpointError(f"{config.path}: sliding_window_pattern must be like LLLG")
    marks = [pattern[layer % len(pattern)] for layer in range(count - 1)]
    return [SLIDING if mark == "L" else FULL for mark in marks] + [FULL]


def _decoder(config: Config, own_windows: list[int | None]) -> ModelSpec:
    bias = config.flag("attention_bias", False)
    spec = rotary_decoder(
        config, qkv_bias=bias, out_bias=bias, qk_norm="width", windows=own_windows
    )
    return replace(spec, layers=tuple(_normed(config, layer) for layer in spec.layers))


def _normed(config: Config, layer: LayerSpec) -> LayerSpec:
    return replace(layer, norm_position="output", norm_eps=config.number("rms_norm_eps", 1e-5))
