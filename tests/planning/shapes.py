"""Shapes of published models, without weights."""

from __future__ import annotations

from model.spec import LayerSpec, ModelSpec


def llama_8b(layers: int = 32) -> ModelSpec:
    """The shape of Llama-3-8B, which the lab of four Pis of 8 GB describes."""
    layer = LayerSpec(
        hidden=4096,
        heads=32,
        kv_heads=8,
        head_dim=128,
        ffn=14336,
        norm="rmsnorm",
        norm_eps=1e-5,
        norm_position="pre",
        activation="silu",
        gated=True,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
    )
    return ModelSpec(
        vocab=128256,
        hidden=4096,
        embed_dim=4096,
        max_context=8192,
        layers=(layer,) * layers,
        learned_positions=0,
        position_offset=0,
        final_norm=True,
        tied_head=False,
        bos_token=128000,
        eos_tokens=(128001,),
    )
