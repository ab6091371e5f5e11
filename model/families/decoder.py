"""Decoders like Llama: pre-norm RMSNorm, rotary positions, a gated MLP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

from model.errors import CheckpointError
from model.families.config import Config
from model.spec import MAX_SIZE, LayerSpec, ModelSpec, QkNorm, RopeScaling, RopeSpec

LAYER = "layers.{layer}."
"""The start of the names of a layer's modules."""

_SCALINGS: Mapping[str, RopeScaling] = {
    "default": "none",
    "linear": "linear",
    "dynamic": "dynamic",
    "llama3": "llama3",
}

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
    # Absent means 4096 to the architecture's own config class. Newer checkpoints say null.
    window = config.values.get("sliding_window", 4096)
    windows = [None if window is None else config.size("sliding_window", 4096)]
    kinds = set(config.strings("layer_types"))
    if kinds and kinds != {"full_attention" if window is None else "sliding_attention"}:
        raise config.unsupported("layer_types", sorted(kinds), "mixed windows need another type")
    return rotary_decoder(config, windows=windows * config.layer_count())


def qwen2(config: Config) -> ModelSpec:
    return rotary_decoder(config, qkv_bias=True, windows=_qwen_windows(config))


def qwen3(config: Config) -> ModelSpec:
    bias = config.flag("attention_bias", False)
    return rotary_decoder(
        config,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="head",
        windows=_qwen_windows(config),
        head_dim=128,
    )


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
        return _qwen_windows(config)
    window = config.size("sliding_window") if config.has("sliding_window") else None
    return [None if rotated else window for rotated in _rotated_layers(config)]


def _qwen_windows(config: Config) -> list[int | None]:
    """Return each layer's window by layer_types, or else for layers from max_window_layers on."""
    count = config.layer_count()
    window = None
    if (
        config.flag("use_sliding_window", False)
        and config.values.get("sliding_window", 0) is not None
    ):
        window = config.size("sliding_window", 4096)
    kinds = config.strings("layer_types")
    if not kinds:
        # Zero full layers are valid here, so this is not a size.
        first = config.values.get("max_window_layers", 28)
        if type(first) is not int or first < 0:
            raise CheckpointError(f"{config.path}: max_window_layers must be a number of layers")
        return [window if layer >= first else None for layer in range(count)]
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
    tied: bool = False,
) -> ModelSpec:
    """Describe pre-norm RMSNorm, rotary and gated MLP, which Llama and its relatives share.

    head_dim, theta, tied: what an absent head_dim, rope_theta and tie_word_embeddings mean.
    """
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    kv_heads = config.size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise CheckpointError(
            f"{config.path}: num_attention_heads {heads} is no multiple of "
            f"num_key_value_heads {kv_heads}"
        )
    head_dim = config.size("head_dim", head_dim or max(hidden // heads, 1))
    rope, context = rope_spec(config, head_dim, theta)
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


def rope_spec(config: Config, head_dim: int, theta: float = 10000.0) -> tuple[RopeSpec, int]:
    """Return rotary parameters and usable context, from the old fields or ``rope_parameters``.

    ``theta`` is the architecture's own rope_theta.
    """
    context = config.size("max_position_embeddings")
    scaling = (
        config.nested("rope_scaling") or config.nested("rope_parameters") or Config(config.path, {})
    )
    if any(isinstance(value, dict) for value in scaling.values.values()):
        raise config.unsupported("rope_parameters", "...", "one set for all layers is")
    for source in (config, scaling):
        if source.number("partial_rotary_factor", 1.0) != 1.0:
            raise config.unsupported(
                "partial_rotary_factor",
                source.values["partial_rotary_factor"],
                "only rotation of the whole head is",
            )
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    if kind not in _SCALINGS:
        raise config.unsupported("rope_type", kind, f"known: {', '.join(_SCALINGS)}")
    if head_dim % 2 or (kind == "dynamic" and head_dim < 4):
        raise CheckpointError(f"{config.path}: head_dim {head_dim} cannot be rotated")
    theta = scaling.number("rope_theta", config.number("rope_theta", theta))
    if kind == "default":
        return RopeSpec(theta), context
    factor = scaling.number("factor")
    if factor < 1:
        raise CheckpointError(f"{config.path}: rope factor must be at least 1, not {factor}")
    if kind != "llama3":
        usable = min(int(context * factor), MAX_SIZE - 1)
        return RopeSpec(theta, _SCALINGS[kind], factor, context), usable
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    if low >= high:
        raise CheckpointError(f"{config.path}: low_freq_factor must be below high_freq_factor")
    trained = scaling.size("original_max_position_embeddings")
    return RopeSpec(theta, cast(RopeScaling, kind), factor, trained, low, high), context
