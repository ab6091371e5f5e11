"""OPT: layer norms, learned positions, and no gate in the MLP."""

from __future__ import annotations

from model.errors import CheckpointError
from model.families.config import Config
from model.families.decoder import LAYER
from model.spec import LayerSpec, ModelSpec

OPT_NAMES = {
    "tokens": "embed_tokens",
    "positions": "embed_positions",
    "project_in": "project_in",
    "attn_norm": LAYER + "self_attn_layer_norm",
    "q": LAYER + "self_attn.q_proj",
    "k": LAYER + "self_attn.k_proj",
    "v": LAYER + "self_attn.v_proj",
    "o": LAYER + "self_attn.out_proj",
    "mlp_norm": LAYER + "final_layer_norm",
    "up": LAYER + "fc1",
    "down": LAYER + "fc2",
    "norm": "final_layer_norm",
    "project_out": "project_out",
}


def opt(config: Config) -> ModelSpec:
    """Describe OPT."""
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    if hidden % heads:
        raise CheckpointError(
            f"{config.path}: hidden_size {hidden} is no multiple of num_attention_heads {heads}"
        )
    if not config.flag("layer_norm_elementwise_affine", True):
        raise config.unsupported(
            "layer_norm_elementwise_affine", False, "only layer norms with weights are"
        )
    bias = config.flag("enable_bias", True)
    pre_norm = config.flag("do_layer_norm_before", True)
    layer = LayerSpec(
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn=config.size("ffn_dim"),
        norm="layernorm",
        norm_eps=1e-5,
        norm_position="pre" if pre_norm else "post",
        activation=config.activation("activation_function", "relu"),
        gated=False,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
    )
    context = config.size("max_position_embeddings")
    return ModelSpec(
        vocab=config.size("vocab_size"),
        hidden=hidden,
        embed_dim=config.size("word_embed_proj_dim", hidden),
        max_context=context,
        layers=(layer,) * config.layer_count(),
        learned_positions=context + 2,
        position_offset=2,
        final_norm=pre_norm and not config.flag("_remove_final_layer_norm", False),
        tied_head=config.flag("tie_word_embeddings", True),
        bos_token=config.bos_token(),
        eos_tokens=config.tokens("eos_token_id"),
    )
