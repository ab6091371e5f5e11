"""Shapes of published models, without weights."""

from __future__ import annotations

from model.spec import LayerSpec, ModelSpec


def llama_8b(
    layers: int = 32, *, hidden: int = 4096, kv_heads: int = 8, ffn: int = 14_336
) -> ModelSpec:
    """The shape of Llama-3-8B, which the lab of four Pis of 8 GB describes, or a smaller one."""
    layer = LayerSpec(
        hidden=hidden,
        heads=32,
        kv_heads=kv_heads,
        head_dim=hidden // 32,
        ffn=ffn,
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
        hidden=hidden,
        embed_dim=hidden,
        max_context=8192,
        layers=(layer,) * layers,
        learned_positions=0,
        position_offset=0,
        final_norm=True,
        tied_head=False,
        bos_token=128000,
        eos_tokens=(128001,),
    )
