"""Decoders with layer norms, which have biases: GPT-2, StarCoder2, StableLM 2."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from model.errors import CheckpointError
from model.families.config import Config
from model.families.decoder import LAYER, LLAMA_NAMES, rotary_decoder, with_layers
from model.families.sources import Source, scaled, stacked
from model.spec import LayerSpec, ModelSpec

STARCODER2_NAMES = LLAMA_NAMES | {"up": LAYER + "mlp.c_fc", "down": LAYER + "mlp.c_proj"}

_H = "h.{layer}."
GPT2_NAMES = {
    "tokens": "wte",
    "positions": "wpe",
    "attn_norm": _H + "ln_1",
    "q": _H + "attn.c_attn",
    "k": _H + "attn.c_attn",
    "v": _H + "attn.c_attn",
    "o": _H + "attn.c_proj",
    "mlp_norm": _H + "ln_2",
    "up": _H + "mlp.c_fc",
    "down": _H + "mlp.c_proj",
    "norm": "ln_f",
}


def starcoder2(config: Config) -> ModelSpec:
    window = config.size("sliding_window") if config.has("sliding_window") else None
    windows = [window] * config.layer_count()  # transformers reads no layer_types here.
    bias = config.flag("use_bias", True)
    spec = rotary_decoder(
        config, qkv_bias=bias, out_bias=bias, mlp_bias=bias, windows=windows, tied=True
    )
    return with_layers(
        spec,
        norm="layernorm",
        norm_eps=config.number("norm_epsilon", 1e-5),
        activation=config.activation("hidden_act", "gelu_pytorch_tanh"),
        gated=False,
    )


def stablelm(config: Config) -> ModelSpec:
    """Describe StableLM, the first ones and StableLM 2 1.6B."""
    if config.flag("use_parallel_residual", False):
        raise config.lacking("attention and MLP in parallel (use_parallel_residual)")
    if config.flag("qk_layernorm", False):
        raise config.lacking("layer norms of q and k with a weight for each head (qk_layernorm)")
    spec = rotary_decoder(config, qkv_bias=config.flag("use_qkv_bias", False), partial=0.25)
    return with_layers(spec, norm="layernorm", norm_eps=config.number("layer_norm_eps", 1e-5))


def gpt2(config: Config) -> ModelSpec:
    hidden, heads = config.size("n_embd"), config.size("n_head")
    if hidden % heads:
        raise CheckpointError(f"{config.path}: n_embd {hidden} is no multiple of n_head {heads}")
    layer = LayerSpec(
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn=config.size("n_inner", 4 * hidden),
        norm="layernorm",
        norm_eps=config.number("layer_norm_epsilon", 1e-5),
        norm_position="pre",
        activation=config.activation("activation_function", "gelu_new"),
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
    )
    context = config.size("n_positions")
    return ModelSpec(
        vocab=config.size("vocab_size"),
        hidden=hidden,
        embed_dim=hidden,
        max_context=context,
        layers=(layer,) * config.layer_count("n_layer"),
        learned_positions=context,
        position_offset=0,
        final_norm=True,
        tied_head=config.flag("tie_word_embeddings", True),
        bos_token=config.bos_token(),
        eos_tokens=config.tokens("eos_token_id"),
    )


def gpt2_sources(
    config: Config, spec: ModelSpec, block: int, sources: Mapping[str, Source]
) -> dict[str, Source]:
    """Matrices are stored [in, out]. Options on the scale of scores are folded into q."""
    if spec.block_kind(block) != "layer":
        return dict(sources)
    parts = stacked(sources, spec.block_tensors(block), "qkv")
    for name, source in parts.items():
        if name.partition(".")[0] in ("q", "k", "v", "o", "up", "down") and "weight" in name:
            parts[name] = tuple(replace(piece, transposed=True) for piece in source)
    scale = 1.0
    if not config.flag("scale_attn_weights", True):
        scale = math.sqrt(spec.layer(block).head_dim)
    if config.flag("scale_attn_by_inverse_layer_idx", False):
        scale /= block
    return parts | scaled(parts, ("q",), scale)
