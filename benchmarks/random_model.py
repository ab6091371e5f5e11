"""Checkpoints of random weights in Llama's shape, for benchmarks of whole shoals."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from model.families import load_spec
from model.safetensors import write_safetensors
from model.spec import ModelSpec

TOKENIZER = Path(__file__).parents[1] / "examples" / "tiny-opt" / "model"
VOCAB = 8192
KV_SHARE = 4
"""The query heads that share a key and value head."""
SEED = 7


@dataclass(frozen=True, slots=True)
class Shape:
    hidden: int
    ffn: int
    layers: int
    heads: int


def make_model(
    directory: Path, shape: Shape, context_tokens: int, *, vocab: int = VOCAB
) -> ModelSpec:
    """Write a checkpoint of random weights into ``directory``, unless it is there."""
    hidden, ffn, kv_rows = shape.hidden, shape.ffn, shape.hidden // KV_SHARE
    if not (directory / "model.safetensors").exists():
        directory.mkdir(parents=True, exist_ok=True)
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": ffn,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.heads // KV_SHARE,
            "max_position_embeddings": context_tokens,
            "vocab_size": vocab,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": None,
        }
        (directory / "config.json").write_text(json.dumps(config))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(TOKENIZER / name, directory / name)
        random = np.random.default_rng(SEED)
        shapes = {"model.embed_tokens.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden)}
        for layer in range(shape.layers):
            prefix = f"model.layers.{layer}."
            shapes |= {
                prefix + "self_attn.q_proj.weight": (hidden, hidden),
                prefix + "self_attn.k_proj.weight": (kv_rows, hidden),
                prefix + "self_attn.v_proj.weight": (kv_rows, hidden),
                prefix + "self_attn.o_proj.weight": (hidden, hidden),
                prefix + "mlp.gate_proj.weight": (ffn, hidden),
                prefix + "mlp.up_proj.weight": (ffn, hidden),
                prefix + "mlp.down_proj.weight": (hidden, ffn),
            }
        tensors = {name: _random_matrix(random, size) for name, size in shapes.items()}
        for layer in range(shape.layers):
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"model.layers.{layer}.{norm}.weight"] = np.ones(hidden, np.float16)
        tensors["model.norm.weight"] = np.ones(hidden, np.float16)
        write_safetensors(directory / "model.safetensors", tensors)
    return load_spec(directory)


def _random_matrix(random: np.random.Generator, size: tuple[int, int]) -> npt.NDArray[np.float16]:
    values = random.standard_normal(size, np.float32)
    values *= np.float32(size[1] ** -0.5)
    return values.astype(np.float16)
