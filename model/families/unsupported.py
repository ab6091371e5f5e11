"""Features that known architectures need and that are not implemented, for messages."""

from __future__ import annotations

from collections.abc import Mapping

from model.families.config import Config

_DELTA = "gated-delta attention (layers of linear_attention), whose state cannot be rolled back"
_STATE_SPACE = "state-space layers (Mamba)"
_RECURRENT = "recurrent layers in place of attention"
_CONVOLUTION = "convolution layers (conv in layer_types), whose state cannot be rolled back"
_ENCODER = "its kind of encoder"
_CROSS = "an encoder with cross-attention"
_LATENT = "latent attention (compressed keys and values, MLA)"
_LINEAR = "linear attention"
_PARALLEL = "attention and MLP side by side on one input (parallel residual)"
_ALIBI = "ALiBi positions"
_SQUARED = "the squared ReLU activation"
_GEMMA_3N = "embeddings per layer, alternating updates (AltUp) and shared keys and values"
_EXPERTS = "its kind of experts"
_IMAGES = "a vision part, and rotary positions in several axes"
_OWN_CODE = "tensor names of its authors' own code"

MISSING: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "olmo_hybrid", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text",
            "qwen3_next",
        ),
        _DELTA,
    ),
    **dict.fromkeys(
        (
            "bamba", "falcon_h1", "falcon_mamba", "jamba", "mamba", "mamba2", "nemotron_h",
            "plamo2", "zamba", "zamba2",
        ),
        _STATE_SPACE,
    ),
    **dict.fromkeys(("recurrent_gemma", "rwkv", "rwkv7", "xlstm"), _RECURRENT),
    **dict.fromkeys(("lfm2", "lfm2_moe", "lfm2_vl"), _CONVOLUTION),
    **dict.fromkeys(
        (
            "albert", "deberta", "deberta-v2", "electra", "eurobert", "gte", "nomic_bert",
        ),
        _ENCODER,
    ),
    **dict.fromkeys(
        ("bart", "marian", "mbart", "mt5", "pegasus", "t5", "t5gemma", "umt5", "whisper"), _CROSS
    ),
    **dict.fromkeys(
        (
            "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "kimi_k2",
            "longcat_flash", "minicpm3",
        ),
        _LATENT,
    ),
    **dict.fromkeys(("bailing_hybrid", "kimi_linear", "minimax"), _LINEAR),
    **dict.fromkeys(
        ("codegen", "cohere", "cohere2", "falcon", "gpt_neox", "gptj", "persimmon", "phi"),
        _PARALLEL,
    ),
    **dict.fromkeys(("bloom", "mpt"), _ALIBI),
    **dict.fromkeys(("arcee", "nemotron"), _SQUARED),
    **dict.fromkeys(
        (
            "idefics3", "llava", "mllama", "paligemma", "qwen2_5_vl", "qwen2_vl", "qwen3_vl",
            "smolvlm",
        ),
        _IMAGES,
    ),
    **dict.fromkeys(("baichuan", "chatglm", "internlm2", "qwen", "exaone"), _OWN_CODE),
    "apertus": "the xIELU activation",
    "bitnet": "ternary weights with norms inside attention and MLP",
    **dict.fromkeys(("gemma3n", "gemma3n_text"), _GEMMA_3N),
    **dict.fromkeys(
        ("gemma4", "gemma4_text"),
        "embeddings per layer, shared keys and values and heads of two widths",
    ),
    "gpt_bigcode": "one key and value head beside learned positions",
    "gpt_neo": "attention without scale, with local layers",
    "llama4": "chunked attention",
    "llama4_text": "chunked attention",
    "olmo": "layer norms without weights",
    "phimoe": "experts that are chosen by sparsemixer",
}  # fmt: skip
"""Maps a model_type to the feature that it lacks here."""

_BY_LAYER_TYPE = {
    "linear_attention": _DELTA,
    "mamba": _STATE_SPACE,
    "conv": _CONVOLUTION,
    "chunked_attention": "chunked attention",
}
_BY_KEY = {
    "kv_lora_rank": _LATENT,
    "mamba_d_state": _STATE_SPACE,
    "ssm_cfg": _STATE_SPACE,
    "alibi": _ALIBI,
    "is_encoder_decoder": _CROSS,
    "n_routed_experts": _EXPERTS,
    "num_local_experts": _EXPERTS,
    "num_experts": _EXPERTS,
    "vision_config": _IMAGES,
}


def missing_feature(config: Config) -> str | None:
    """Return the feature that a model of an unknown architecture lacks here, as far as known.

    The table knows some architectures. Of others, options in the config tell.
    """
    if config.model_type in MISSING:
        return MISSING[config.model_type]
    kinds = config.values.get("layer_types")
    for kind, feature in _BY_LAYER_TYPE.items():
        if isinstance(kinds, list) and kind in kinds:
            return feature
    return next((feature for key, feature in _BY_KEY.items() if config.values.get(key)), None)
