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

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "gemma2-2b": {
        "model_type": "gemma2",
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3-1b": {
        "model_type": "gemma3_text",
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 26,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "vocab_size": 262144,
        "max_position_embeddings": 32768,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
    },
    "llama-1b": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
    "olmo2-1b": {
        "model_type": "olmo2",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": 100352,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    },
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
    "tinyllama": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
    },
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
