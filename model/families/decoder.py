"""Decoders like Llama: pre-norm RMSNorm, rotary positions, a gated MLP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from model.errors import CheckpointError
from model.families.config import Config
from model.families.rope import rope_spec
from model.families.sources import Source, changed
from model.spec import LayerSpec, ModelSpec, QkNorm

LAYER = "layers.{layer}."
"""The start of the names of a layer's modules."""

LLAMA_NAMES = {
    "tokens": "embed_tokens",
    "attn_norm": LAYER + "input_layernorm",
    "q": LAYER + "self_attn.q_proj",
    "k": LAYER + "self_attn.k_proj",
    "v": LAYER + "self_attn.v_proj",
    "q_norm": LAYER + "self_attn.q_norm",
    "k_norm": LAYER + "self_attn.k_norm",
    "o": LAYER + "self_attn.o_proj",
    "mlp_norm": LAYER + "post_attention_layernorm",
    "gate": LAYER + "mlp.gate_proj",
    "up": LAYER + "mlp.up_proj",
    "down": LAYER + "mlp.down_proj",
    "norm": "norm",
}


def llama(config: Config) -> ModelSpec:
    bias = config.flag("attention_bias", False)
    return rotary_decoder(
        config, qkv_bias=bias, out_bias=bias, mlp_bias=config.flag("mlp_bias", False)
    )


def mistral(config: Config) -> ModelSpec:
    """Describe Mistral, and Ministral with windows in some layers (layer_types)."""
    # Absent means 4096 to the architecture's own config class. Newer checkpoints say null.
    window = config.values.get("sliding_window", 4096)
    if window is not None:
        window = config.size("sliding_window", 4096)
    windows = windows_by_type(config, window)
    return rotary_decoder(config, windows=windows or [window] * config.layer_count())


def ministral3(config: Config) -> ModelSpec:
    """Describe Ministral 3, up to the context from which it scales queries by their position."""
    config = config.with_defaults({"rms_norm_eps": 1e-5})
    window = config.size("sliding_window") if config.has("sliding_window") else None
    spec = rotary_decoder(config, windows=[window] * config.layer_count(), head_dim=128)
    rope = config.nested("rope_parameters") or config.nested("rope_scaling")
    if rope is None:
        raise CheckpointError(f"{config.path}: rope_parameters is missing")
    if not rope.values.get("llama_4_scaling_beta"):
        return spec
    unscaled = rope.size("original_max_position_embeddings", spec.max_context)
    return replace(spec, max_context=min(spec.max_context, unscaled))


def qwen2(config: Config) -> ModelSpec:
    return rotary_decoder(config, qkv_bias=True, windows=qwen_windows(config))


def qwen3(config: Config) -> ModelSpec:
    bias = config.flag("attention_bias", False)
    return rotary_decoder(
        config,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="head",
        windows=qwen_windows(config),
        head_dim=128,
    )


def ernie(config: Config) -> ModelSpec:
    config = config.with_defaults({"rms_norm_eps": 1e-5})
    bias = config.flag("use_bias", False)
    return rotary_decoder(
        config, qkv_bias=bias, out_bias=bias, mlp_bias=bias, head_dim=128, theta=5e5, tied=True
    )


def interleaved(
    _config: Config, spec: ModelSpec, block: int, sources: Mapping[str, Source]
) -> dict[str, Source]:
    """Change the sources of checkpoints whose rotary pairs are neighbouring rows."""
    if spec.block_kind(block) != "layer":
        return dict(sources)
    return dict(sources) | changed(sources, ("q", "k"), pairs=spec.layer(block).head_dim)


def smollm3(config: Config) -> ModelSpec:
    bias = config.flag("attention_bias", False)
    spec = rotary_decoder(
        config,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=config.flag("mlp_bias", False),
        windows=_smollm3_windows(config),
        theta=2e6,
        tied=True,
    )
    layers = tuple(
        layer if rotated else replace(layer, rope=None)
        for layer, rotated in zip(spec.layers, _rotated_layers(config), strict=True)
    )
    return replace(spec, layers=layers)


def _rotated_layers(config: Config) -> list[bool]:
    """Return which layers have rotary positions, by no_rope_layers (where 1 says that it has)."""
    count = config.layer_count()
    marks = config.values.get("no_rope_layers")
    if marks is None:
        interval = config.size("no_rope_layer_interval", 4)
        return [(layer + 1) % interval != 0 for layer in range(count)]
    if not isinstance(marks, list) or len(marks) < count or set(marks) - {0, 1}:
        raise CheckpointError(f"{config.path}: no_rope_layers must be a 0 or 1 for each layer")
    return [bool(mark) for mark in marks[:count]]


def _smollm3_windows(config: Config) -> list[int | None]:
    if config.strings("layer_types") or not config.flag("use_sliding_window", False):
        return qwen_windows(config)
    window = config.size("sliding_window") if config.has("sliding_window") else None
    return [None if rotated else window for rotated in _rotated_layers(config)]


def qwen_windows(config: Config) -> list[int | None]:
    """Return each layer's window by layer_types, or else for layers from max_window_layers on."""
    count = config.layer_count()
    window = None
    if (
        config.flag("use_sliding_window", False)
        and config.values.get("sliding_window", 0) is not None
    ):
        window = config.size("sliding_window", 4096)
    windows = windows_by_type(config, window)
    if windows is not None:
        return windows
    # Zero full layers are valid here, so this is not a size.
    first = config.values.get("max_window_layers", 28)
    if type(first) is not int or first < 0:
        raise CheckpointError(f"{config.path}: max_window_layers must be a number of layers")
    return [window if layer >= first else None for layer in range(count)]


def windows_by_type(config: Config, window: int | None) -> list[int | None] | None:
    """Return each layer's window by layer_types, or None without them."""
    kinds, count = config.strings("layer_types"), config.layer_count()
    if not kinds:
        return None
    if len(kinds) != count:
        raise CheckpointError(f"{config.path}: layer_types has {len(kinds)} of {count} layers")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise config.unsupported(
                "layer_types", kind, "known: full_attention, sliding_attention"
            )
        if kind == "sliding_attention" and window is None:
            raise CheckpointError(
                f"{config.path}: layer_types has sliding layers, but sliding_window is not in use"
            )
    return [window if kind == "sliding_attention" else None for kind in kinds]


def rotary_decoder(
    config: Config,
    *,
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: QkNorm = "none",
    windows: list[int | None] | None = None,
    head_dim: int | None = None,
    theta: float = 10000.0,
    partial: float | None = None,
    tied: bool = False,
) -> ModelSpec:
    """Describe pre-norm RMSNorm, rotary and gated MLP, which Llama and its relatives share.

    head_dim, theta, partial, tied: what an absent head_dim, rope_theta, partial_rotary_factor and
        tie_word_embeddings mean. ``partial`` is None if heads always turn whole.
    """
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    kv_heads = config.size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise CheckpointError(
            f"{config.path}: num_attention_heads {heads} is no multiple of "
            f"num_key_value_heads {kv_heads}"
        )
    head_dim = config.size("head_dim", head_dim or max(hidden // heads, 1))
    rope, context = rope_spec(config, head_dim, theta, partial)
    layers = tuple(
        LayerSpec(
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            ffn=config.size("intermediate_size"),
            norm="rmsnorm",
            norm_eps=config.number("rms_norm_eps", 1e-6),
            norm_position="pre",
            activation=config.activation("hidden_act", "silu"),
            gated=True,
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            mlp_bias=mlp_bias,
            qk_norm=qk_norm,
            rope=rope,
            sliding_window=window,
        )
        for window in windows or [None] * config.layer_count()
    )
    return ModelSpec(
        vocab=config.size("vocab_size"),
        hidden=hidden,
        embed_dim=hidden,
        max_context=context,
        layers=layers,
        learned_positions=0,
        position_offset=0,
        final_norm=True,
        tied_head=config.flag("tie_word_embeddings", tied),
        bos_token=config.bos_token(),
        eos_tokens=config.tokens("eos_token_id"),
    )


def with_layers(spec: ModelSpec, **features: Any) -> ModelSpec:
    """Return the model with other features in all its layers."""
    return replace(spec, layers=tuple(replace(layer, **features) for layer in spec.layers))
