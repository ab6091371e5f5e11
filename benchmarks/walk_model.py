"""A checkpoint whose answers repeat themselves as much as a measurement wants.

Its layers have random weights, which hardly change the embedding. The head makes of each token the
tokens that may follow it, all equally likely. So an answer is a walk. The vocabulary has regions
that no walk leaves:

- ``repeats``: 64 tokens in a ring. A greedy answer says again what the prompt said.
- ``half``: 64 tokens, each with two followers.
- ``misleads``: 64 tokens, each with 16 followers. Pairs of tokens recur, and mostly differ then.
- ``new``: a ring of all other tokens, so that an answer repeats nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.random_model import KV_SHARE, Shape
from model.families import load_spec
from model.safetensors import write_safetensors
from model.spec import ModelSpec

VOCAB = 8192
STATES = 64
FOLLOWERS = {"repeats": 1, "half": 2, "misleads": 16}
SEED = 11
DIM = 0.02
"""The weight of the layers' products in the hidden state."""

Table = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Region:
    """Tokens [first, first + count), each with its followers [count, n]."""

    first: int
    followers: Table

    def walk(self, tokens: int, seed: int) -> list[int]:
        """Return a walk of so many tokens."""
        random = np.random.default_rng(seed)
        at = int(random.integers(0, len(self.followers)))
        found = []
        for _ in range(tokens):
            found.append(self.first + at)
            at = int(random.choice(self.followers[at])) - self.first
        return found


def regions() -> dict[str, Region]:
    """Return the regions of the vocabulary, by their names."""
    random = np.random.default_rng(SEED)
    found, first = {}, 0
    for name, count in FOLLOWERS.items():
        # Rotating one order by different steps gives each token as many predecessors.
        order = random.permutation(STATES)
        place = np.argsort(order)
        steps = random.choice(np.arange(1, STATES), count, replace=False) if count > 1 else [1]
        table = np.stack([order[(place + step) % STATES] for step in steps], axis=1)
        found[name] = Region(first, table + first)
        first += STATES
    rest = VOCAB - first
    order = random.permutation(rest)
    table = order[(np.argsort(order) + 1) % rest][:, None]
    found["new"] = Region(first, table + first)
    return found


def make_walk_model(
    directory: Path, shape: Shape, context_tokens: int, *, wrong_share: float = 0.0
) -> ModelSpec:
    """Write the checkpoint into ``directory``, unless it is there.

    Models of different shapes walk alike, but for ``wrong_share`` of the tokens.
    """
    if not (directory / "model.safetensors").exists():
        directory.mkdir(parents=True, exist_ok=True)
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": shape.hidden,
            "intermediate_size": shape.ffn,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.heads // KV_SHARE,
            "max_position_embeddings": context_tokens,
            "vocab_size": VOCAB,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": None,
        }
        (directory / "config.json").write_text(json.dumps(config))
        (directory / "tokenizer.json").write_text(json.dumps(_tokenizer()))
        write_safetensors(directory / "model.safetensors", _tensors(shape, wrong_share))
    return load_spec(directory)


def _tokenizer() -> dict[str, Any]:
    """Each token is a word of its own. So each one shows in a stream."""
    return {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {
            "type": "WordLevel",
            "vocab": {f"t{token}": token for token in range(VOCAB)},
            "unk_token": "t0",
        },
    }


def _tensors(shape: Shape, wrong_share: float) -> dict[str, npt.NDArray[np.float16]]:
    hidden, kv_rows = shape.hidden, shape.hidden // KV_SHARE
    random = np.random.default_rng(SEED)

    def matrix(rows: int, columns: int, scale: float = 1.0) -> npt.NDArray[np.float16]:
        values = random.standard_normal((rows, columns), np.float32)
        values *= np.float32(scale * columns**-0.5)
        return values.astype(np.float16)

    # Rows of length 1, which are almost at right angles to each other.
    embedding = matrix(VOCAB, hidden)
    head = np.zeros((VOCAB, hidden), np.float32)
    wrong = np.random.default_rng(SEED + 1)
    for region in regions().values():
        count = len(region.followers)
        for at in range(count):
            is_wrong = wrong.random() < wrong_share
            followers = region.followers[(at + 1) % count if is_wrong else at]
            head[followers] += embedding[region.first + at]
    tensors = {
        "model.embed_tokens.weight": embedding,
        "lm_head.weight": head.astype(np.float16),
        "model.norm.weight": np.ones(hidden, np.float16),
    }
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        tensors |= {
            prefix + "self_attn.q_proj.weight": matrix(hidden, hidden),
            prefix + "self_attn.k_proj.weight": matrix(kv_rows, hidden),
            prefix + "self_attn.v_proj.weight": matrix(kv_rows, hidden),
            prefix + "self_attn.o_proj.weight": matrix(hidden, hidden, DIM),
            prefix + "mlp.gate_proj.weight": matrix(shape.ffn, hidden),
            prefix + "mlp.up_proj.weight": matrix(shape.ffn, hidden),
            prefix + "mlp.down_proj.weight": matrix(hidden, shape.ffn, DIM),
            prefix + "input_layernorm.weight": np.ones(hidden, np.float16),
            prefix + "post_attention_layernorm.weight": np.ones(hidden, np.float16),
        }
    return tensors
