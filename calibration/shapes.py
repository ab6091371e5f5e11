"""Shapes of models, to measure a device without the models' weights."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.errors import CheckpointError
from model.families import Config, describe, read_config_file
from model.spec import ModelSpec


def _decoder(
    model_type: str,
    hidden: int,
    ffn: int,
    layers: int,
    heads: tuple[int, int, int],
    vocab: int,
    context: int,
    **fields: Any,
) -> dict[str, Any]:
    """Return the config of a rotary decoder. ``heads`` are query heads, KV heads and their width.

    ``fields`` are those that few models have.
    """
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": heads[2],
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "tie_word_embeddings": True,
    } | fields


_UNTIED = {"tie_word_embeddings": False}
_LLAMA3 = {"rope_theta": 500000.0, "rms_norm_eps": 1e-5}
_QWEN = {"rope_theta": 1e6}

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "gemma2-2b": _decoder("gemma2", 2304, 9216, 26, (8, 4, 256), 256000, 8192),
    "gemma3-1b": _decoder(
        "gemma3_text", 1152, 6912, 26, (4, 1, 256), 262144, 32768, sliding_window=512
    ),
    "gemma3-4b": _decoder(
        "gemma3_text", 2560, 10240, 34, (8, 4, 256), 262208, 131072, sliding_window=1024
    ),
    "granite4-micro": _decoder(
        "granitemoehybrid",
        2560,
        8192,
        40,
        (40, 8, 64),
        100352,
        131072,
        shared_intermediate_size=8192,
        layer_types=["attention"] * 40,
        num_local_experts=0,
        position_embedding_type="rope",
    ),
    "llama-1b": _decoder("llama", 2048, 8192, 16, (32, 8, 64), 128256, 131072, **_LLAMA3),
    "llama-3b": _decoder("llama", 3072, 8192, 28, (24, 8, 128), 128256, 131072, **_LLAMA3),
    "llama-8b": _decoder(
        "llama", 4096, 14336, 32, (32, 8, 128), 128256, 131072, **_LLAMA3, **_UNTIED
    ),
    "mistral-7b": _decoder(
        "mistral", 4096, 14336, 32, (32, 8, 128), 32768, 32768, sliding_window=None, **_UNTIED
    ),
    "olmo2-1b": _decoder(
        "olmo2", 2048, 8192, 16, (16, 16, 128), 100352, 4096, rope_theta=5e5, **_UNTIED
    ),
    "opt-350m": {
        "model_type": "opt",
        "hidden_size": 1024,
        "word_embed_proj_dim": 512,
        "ffn_dim": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "activation_function": "relu",
        "do_layer_norm_before": False,
    },
    "phi3-mini": _decoder(
        "phi3", 3072, 8192, 32, (32, 32, 96), 32064, 4096, sliding_window=2047, **_UNTIED
    ),
    "qwen2.5-0.5b": _decoder("qwen2", 896, 4864, 24, (14, 2, 64), 151936, 32768, **_QWEN),
    "qwen2.5-1.5b": _decoder("qwen2", 1536, 8960, 28, (12, 2, 128), 151936, 32768, **_QWEN),
    "qwen2.5-7b": _decoder(
        "qwen2", 3584, 18944, 28, (28, 4, 128), 152064, 32768, **_QWEN, **_UNTIED
    ),
    "qwen3-0.6b": _decoder("qwen3", 1024, 3072, 28, (16, 8, 128), 151936, 40960, **_QWEN),
    "qwen3-1.7b": _decoder("qwen3", 2048, 6144, 28, (16, 8, 128), 151936, 40960, **_QWEN),
    "qwen3-30b-a3b": _decoder(
        "qwen3_moe",
        2048,
        6144,
        48,
        (32, 4, 128),
        151936,
        40960,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        **_QWEN,
        **_UNTIED,
    ),
    "qwen3-4b": _decoder("qwen3", 2560, 9728, 36, (32, 8, 128), 151936, 40960, **_QWEN),
    "qwen3-8b": _decoder("qwen3", 4096, 12288, 36, (32, 8, 128), 151936, 40960, **_QWEN, **_UNTIED),
    "smollm2-1.7b": _decoder("llama", 2048, 8192, 24, (32, 32, 64), 49152, 8192),
    "smollm3-3b": _decoder("smollm3", 2048, 11008, 36, (16, 4, 128), 128256, 65536),
    "tinyllama": _decoder(
        "llama", 2048, 5632, 22, (32, 4, 64), 32000, 2048, rms_norm_eps=1e-5, **_UNTIED
    ),
}
"""The fields of each model's published config.json that shape it."""

_NO_DIRECTORY = Path(os.devnull)


def shape_spec(shape: str) -> ModelSpec:
    """Return the model that ``shape`` names: one of SHAPES, or the path of a config.json.

    Raises CheckpointError for anything else, UnsupportedModelError for an architecture that is not
    implemented.
    """
    if shape in SHAPES:
        return describe(Config(Path(shape), SHAPES[shape]), _NO_DIRECTORY)
    path = Path(shape)
    if path.suffix != ".json":
        known = ", ".join(sorted(SHAPES))
        raise CheckpointError(f"shape {shape!r}: known are {known}, or the path of a config.json")
    return describe(read_config_file(path), _NO_DIRECTORY)


def write_shape(shape: str, directory: Path) -> Path:
    """Make a model's folder in ``directory`` that has only a config.json, and return its path.

    Raises as ``shape_spec``.
    """
    shape_spec(shape)
    path = Path(shape).absolute()
    folder = directory / (shape if shape in SHAPES else path.parent.name or "model")
    folder.mkdir()
    text = json.dumps(SHAPES[shape]) if shape in SHAPES else path.read_text(encoding="utf-8")
    (folder / "config.json").write_text(text, encoding="utf-8")
    return folder
