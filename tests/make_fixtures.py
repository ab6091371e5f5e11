"""Make the tiny checkpoints under tests/fixtures and what transformers computes with them.

Run by hand, in an environment of its own, whenever a fixture is added or changed:

    python -m venv /tmp/fixtures && /tmp/fixtures/bin/pip install torch transformers tokenizers
    /tmp/fixtures/bin/python tests/make_fixtures.py [name ...]

There are two tables. MODELS are the fixtures over which tests of every part run, so they are few.
FAMILIES go to tests/families, and only tests/families/test_parity.py runs over them: one for each
family, and for each option of a family that changes the numbers.

Each directory holds a model as save_pretrained writes it, and golden.npz. One of MODELS also has a
byte-level tokenizer:

    prompt        int64 [n]
    logits        float32 [n, vocab], of every position of the prompt
    continuation  int64 [96, or 48 of a family], greedy, computed token by token with the cache
    margins       float32, as long, by how much each token's logit beat the next

Weights are random, so the seed is searched until every margin is above MIN_MARGIN: a test may then
demand equal tokens of any implementation that is right to 1e-4.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

FIXTURES = Path(__file__).parent / "fixtures"
FAMILY_FIXTURES = Path(__file__).parent / "families"
MIN_MARGIN = 4e-3
NEW_TOKENS = 96
FAMILY_TOKENS = 48
FAMILY_PROMPT = 24
FAMILY_DISTINCT = 20
"""The fewest distinct tokens of a family's continuation: repeating one token would prove little."""
VOCAB = 260
PROMPT = "The quick brown fox jumps."

CHATML = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '\n' + message['content'] }}"
    "{{ '</s>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)

OPT = {
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 160,
    "vocab_size": VOCAB,
    "init_std": 0.15,
    "bos_token_id": 256,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
    "vocab_size": VOCAB,
    "initializer_range": 0.2,
    "bos_token_id": 256,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 48,
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "opt-pre": ("opt", OPT),
    "opt-post": ("opt", OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 24}),
    "llama": ("llama", LLAMA | {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear": (
        "llama",
        LLAMA
        | {
            "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.5},
            "attention_bias": True,
            "mlp_bias": True,
            "head_dim": 12,
        },
    ),
    "llama-dynamic": (
        "llama",
        LLAMA
        | {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0},
            "max_position_embeddings": 64,
        },
    ),
    "mistral": ("mistral", LLAMA | {"sliding_window": 20}),
    "qwen2": (
        "qwen2",
        LLAMA
        | {
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 24,
            "max_window_layers": 2,
        },
    ),
    "qwen3": (
        "qwen3",
        LLAMA | {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
}
STORED_DTYPES = {"llama-linear": torch.bfloat16, "qwen3": torch.float16}
OLD_CONFIG = ("llama-linear",)  # written as transformers 4 did: rope_theta and rope_scaling
SHARD_SIZES = {"mistral": "40KB"}


@dataclass(frozen=True)
class Family:
    """How a fixture of FAMILIES is made.

    model_type, options: what transformers builds it from.
    stored: the type of the stored weights.
    prompt_tokens: random ones.
    embedding_scale: of the token table after it is drawn. A large table drowns the layers where the
        head is tied to it, and the continuation repeats one token.
    rewrite: changes config.json after saving, to that of a model which transformers does not have,
        or that older versions of it wrote.
    """

    model_type: str
    options: dict[str, Any]
    stored: torch.dtype = torch.float16
    prompt_tokens: int = FAMILY_PROMPT
    embedding_scale: float = 1.0
    rewrite: Callable[[dict[str, Any]], None] = lambda config: None


def rewrite_as_minicpm(config: dict[str, Any]) -> None:
    """Name Granite's constants as MiniCPM does, which transformers knows by its authors' code."""
    for key in (
        "embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling",
    ):  # fmt: skip
        del config[key]
    config |= {
        "architectures": ["MiniCPMForCausalLM"],
        "model_type": "minicpm",
        "scale_emb": 3,
        "scale_depth": 0.7,
        "dim_model_base": 16,
        "rope_scaling": config.pop("rope_parameters"),
    }
    config["rope_theta"] = config["rope_scaling"].pop("rope_theta")


SMALL: dict[str, Any] = LLAMA | {
    "vocab_size": 128,
    "max_position_embeddings": 96,
    "bos_token_id": 1,
    "initializer_range": 0.3,
}

GEMMA: dict[str, Any] = SMALL | {
    "head_dim": 16,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 2,
    "sliding_window": 10,
}
GEMMA3: dict[str, Any] = GEMMA | {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 3000.0, "factor": 4.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    },
}
SIGLIP = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def as_gemma3_of_2025(config: dict[str, Any]) -> None:
    """Rewrite as published: rotary parameters in old fields, layer kinds by a pattern."""
    ropes = config.pop("rope_parameters")
    config["rope_theta"] = ropes["full_attention"].pop("rope_theta")
    config["rope_scaling"] = ropes["full_attention"]
    config["rope_local_base_freq"] = ropes["sliding_attention"]["rope_theta"]
    config["torch_dtype"] = config.pop("dtype")
    del config["layer_types"]
    config["sliding_window_pattern"] = 2


def as_gemma3_that_sees(config: dict[str, Any]) -> None:
    """Rewrite as published: most of text_config is left to defaults, the type to the whole."""
    text = config["text_config"]
    for key in ("attention_bias", "bos_token_id", "dtype", "model_type", "rms_norm_eps"):
        text.pop(key, None)
    config["torch_dtype"] = config.pop("dtype")


GPT2 = {
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_inner": 80,
    "n_positions": 96,
    "vocab_size": 128,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GRANITE = {
    "embedding_multiplier": 4.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.25,
    "logits_scaling": 0.5,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 24,
}
LONG_PHI = SMALL | {
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.75,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.1, 1.3, 1.5, 1.8, 2.2],
        "long_factor": [1.2, 1.9, 3.0, 5.0, 7.0, 9.0],
    },
}

FAMILIES: dict[str, Family] = {
    "ernie4_5": Family("ernie4_5", SMALL | {"use_bias": True, "head_dim": 16}),
    "exaone4": Family(
        "exaone4",
        SMALL
        | {
            "head_dim": 16,
            "sliding_window": 10,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": LLAMA3_ROPE,
        },
    ),
    "exaone4-full": Family(
        "exaone4",
        SMALL | {"sliding_window": None, "layer_types": ["full_attention"] * 3},
    ),
    "gemma": Family(
        "gemma", SMALL | {"head_dim": 16, "initializer_range": 0.5}, embedding_scale=0.3
    ),
    "gemma2": Family(
        "gemma2",
        GEMMA | {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 8.0},
        torch.bfloat16,
    ),
    "gemma3": Family(
        "gemma3_text",
        GEMMA3 | {"tie_word_embeddings": True},
        torch.bfloat16,
        embedding_scale=0.15,
        rewrite=as_gemma3_of_2025,
    ),
    "gemma3-sees": Family(
        "gemma3",
        SMALL
        | {
            "text_config": GEMMA3 | {"tie_word_embeddings": True},
            "tie_word_embeddings": True,
            "vision_config": SIGLIP,
            "mm_tokens_per_image": 1,
            "image_token_index": 1000,
        },
        torch.bfloat16,
        embedding_scale=0.15,
        rewrite=as_gemma3_that_sees,
    ),
    "glm": Family("glm", SMALL | {"head_dim": 16}),
    "glm4": Family("glm4", SMALL | {"head_dim": 16}),
    "gpt2": Family("gpt2", GPT2),
    "gpt2-scores": Family(
        "gpt2", GPT2 | {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True}
    ),
    "granite": Family("granite", SMALL | GRANITE),
    "granite4-micro": Family(
        "granitemoehybrid",
        SMALL
        | GRANITE
        | {
            "layer_types": ["attention"] * 3,
            "num_local_experts": 0,
            "mamba_n_heads": 2,
            "shared_intermediate_size": 48,
            "intermediate_size": 64,
            "position_embedding_type": "rope",
            "tie_word_embeddings": True,
        },
        embedding_scale=0.2,
    ),
    "minicpm4": Family(
        "granite",
        SMALL
        | {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.7 / math.sqrt(3),
            "attention_multiplier": 8**-0.5,
            "logits_scaling": 2.0,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 96,
                "short_factor": [1.0, 1.2, 1.5, 2.0],
                "long_factor": [1.1, 1.6, 2.5, 4.0],
            },
        },
        rewrite=rewrite_as_minicpm,
    ),
    "ministral": Family(
        "ministral",
        SMALL
        | {
            "head_dim": 8,
            "sliding_window": 10,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
    ),
    "ministral3": Family(
        "ministral3",
        SMALL
        | {
            "head_dim": 16,
            "rope_parameters": YARN
            | {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 72},
        },
    ),
    "mistral3-sees": Family(
        "mistral3",
        {
            "text_config": SMALL
            | {
                "model_type": "ministral3",
                "head_dim": 16,
                "intermediate_size": 32,
                "tie_word_embeddings": False,
                "rope_parameters": YARN
                | {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 72},
            },
            "tie_word_embeddings": False,
            "vision_config": SIGLIP | {"model_type": "pixtral", "head_dim": 4},
        },
    ),
    "olmo2": Family("olmo2", SMALL | {"attention_bias": True}),
    "olmo3": Family(
        "olmo3",
        SMALL
        | {
            "num_hidden_layers": 4,
            "sliding_window": 10,
            "rope_parameters": {
                "full_attention": YARN | {"rope_theta": 3000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
        },
    ),
    "phi3": Family("phi3", SMALL | {"sliding_window": 20}),
    "phi3-long": Family("phi3", LONG_PHI | {"original_max_position_embeddings": 16}),
    "phi3-short": Family("phi3", LONG_PHI | {"original_max_position_embeddings": 80}),
    "qwen2-yarn": Family("qwen2", SMALL | {"rope_parameters": YARN}),
    "qwen3-yarn": Family(
        "qwen3",
        SMALL
        | {
            "head_dim": 16,
            "rope_parameters": YARN | {"attention_factor": 1.3, "truncate": False, "beta_fast": 8},
        },
    ),
    "smollm3": Family("smollm3", SMALL | {"no_rope_layers": [1, 0, 1]}),
    "stablelm2": Family(
        "stablelm",
        SMALL | {"num_attention_heads": 2, "num_key_value_heads": 2, "use_qkv_bias": True},
    ),
    "starcoder2": Family("starcoder2", SMALL | {"sliding_window": 20}),
}

EXPERTS: dict[str, Any] = SMALL | {
    "vocab_size": 64,
    "num_hidden_layers": 2,
    "num_experts": 5,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
"""Experts as wide as a quantization group."""

FAMILIES |= {
    "granitemoe": Family(
        "granitemoe",
        EXPERTS
        | {
            "intermediate_size": 32,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.0,
        },
    ),
    "mixtral": Family("mixtral", EXPERTS | {"intermediate_size": 32}),
    "qwen2_moe": Family(
        "qwen2_moe",
        EXPERTS
        | {
            "num_hidden_layers": 3,
            "shared_expert_intermediate_size": 64,
            "decoder_sparse_step": 2,
            "use_sliding_window": True,
            "sliding_window": 12,
        },
    ),
    "qwen3_moe": Family(
        "qwen3_moe", EXPERTS | {"head_dim": 16, "num_experts_per_tok": 3, "norm_topk_prob": True}
    ),
    "gpt_oss": Family(
        "gpt_oss",
        EXPERTS
        | {
            "intermediate_size": 32,
            "head_dim": 8,
            "sliding_window": 12,
            "swiglu_limit": 1.5,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 4.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 24,
            },
        },
    ),
}


def main(names: list[str]) -> None:
    torch.set_num_threads(1)  # Two would wait for each other at such sizes.
    for name in names or [*MODELS, *FAMILIES]:
        seed = make(name) if name in MODELS else make_family(name)
        directory = (FIXTURES if name in MODELS else FAMILY_FIXTURES) / name
        size_bytes = sum(path.stat().st_size for path in directory.iterdir())
        print(f"{name}: seed {seed}, {size_bytes / 1000:.0f} KB")  # noqa: T201 - a command


def make(name: str) -> int:
    """Write one fixture, searching the seed; returns it."""
    model_type, options = MODELS[name]
    prompt = tokenizer().encode(PROMPT).ids
    family = Family(model_type, options, STORED_DTYPES.get(name, torch.float32))
    seed, model, golden = search(name, family, prompt, NEW_TOKENS, 12)
    directory = save(FIXTURES / name, model.to(family.stored), golden, SHARD_SIZES.get(name, "1GB"))
    if name in OLD_CONFIG:
        rewrite_as_old_config(directory / "config.json")
    tokenizer().save(str(directory / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHATML}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    allow_reading(directory)
    return seed


def make_family(name: str) -> int:
    """Write one fixture of FAMILIES, searching the seed; returns it."""
    family = FAMILIES[name]
    vocab = SMALL["vocab_size"]
    prompt = np.random.default_rng(0).integers(0, vocab, family.prompt_tokens).tolist()
    seed, model, golden = search(name, family, prompt, FAMILY_TOKENS, FAMILY_DISTINCT)
    directory = save(FAMILY_FIXTURES / name, model.to(family.stored), golden, "1GB")
    config = json.loads((directory / "config.json").read_text())
    family.rewrite(config)
    (directory / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    allow_reading(directory)
    return seed


def search(
    name: str, family: Family, prompt: list[int], new_tokens: int, distinct: int
) -> tuple[int, Any, Any]:
    """Return the first seed whose model continues by wide margins, the model and its golden."""
    for seed in range(1000):
        model = random_model(family, seed)
        with torch.no_grad():
            golden = compute(model, prompt, new_tokens)
        if golden["margins"].min() > MIN_MARGIN and len(set(golden["continuation"])) > distinct:
            return seed, model, golden
    raise SystemExit(f"{name}: no seed gives margins above {MIN_MARGIN}")


def save(directory: Path, model: Any, golden: Any, shard_size: str) -> Path:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    model.save_pretrained(directory, max_shard_size=shard_size)
    (directory / "generation_config.json").unlink(missing_ok=True)
    np.savez_compressed(directory / "golden.npz", **golden)
    return directory


def allow_reading(directory: Path) -> None:
    for path in directory.iterdir():
        path.chmod(0o644)


def random_model(family: Family, seed: int) -> torch.nn.Module:
    """Weights, biases and norms all random, and exactly what the stored dtype can hold."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family.model_type](**family.options)
    config._attn_implementation = "eager"
    kind = AutoModelForCausalLM
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = AutoModelForImageTextToText
    model = kind.from_config(config).eval().float()
    scales = [buffer for key, buffer in model.named_buffers() if key.endswith("embed_scale")]
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(family.embedding_scale)
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(0, 0.1)
            elif parameter.dim() == 1:  # A norm is 1 or, where 1 is added to it, 0.
                parameter.add_(torch.empty_like(parameter).normal_(0, 0.2))
            parameter.copy_(parameter.to(family.stored).float())
        for scale in scales:  # Rounded like weights where the model runs as stored.
            scale.copy_(scale.to(family.stored).float())
    return model


def compute(model: Any, prompt: list[int], new_tokens: int) -> Any:
    output = model(torch.tensor([prompt]), use_cache=True)
    logits = output.logits[0].float().numpy()
    last, continuation, margins = output.logits[0, -1], [], []
    for _ in range(new_tokens):
        best = torch.topk(last, 2)
        continuation.append(int(best.indices[0]))
        margins.append(float(best.values[0] - best.values[1]))
        if margins[-1] <= MIN_MARGIN:
            break
        output = model(
            torch.tensor([continuation[-1:]]),
            past_key_values=output.past_key_values,
            use_cache=True,
        )
        last = output.logits[0, -1]
    return {
        "prompt": np.array(prompt),
        "logits": logits,
        "continuation": np.array(continuation),
        "margins": np.array(margins, np.float32),
    }


def rewrite_as_old_config(path: Path) -> None:
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config, indent=2) + "\n")


def tokenizer() -> Tokenizer:
    """One token per byte, in GPT-2's printable alphabet, and four special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    result = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    result.decoder = decoders.ByteLevel()
    result.add_special_tokens(["<s>", "</s>", "<pad>", "<unk>"])
    result.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", len(alphabet))]
    )
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
