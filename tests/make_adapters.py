"""Make the LoRA adapters under tests/adapters, and what peft computes with them.

Run by hand, in an environment of its own, whenever a fixture is added or changed:

    python -m venv /tmp/adapters && /tmp/adapters/bin/pip install torch transformers tokenizers peft
    /tmp/adapters/bin/python -m tests.make_adapters [name ...]

Each directory holds an adapter as peft's save_pretrained writes it, and golden.npz:

    prompt, logits (of its last position), continuation    of the merged model, in float32
    tensors/<name>   float32 values of the second layer's tensors that merge_and_unload changed, and
                     of those outside layers
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

ADAPTERS = Path(__file__).parent / "adapters"
FIXTURES = Path(__file__).parent / "fixtures"
FAMILIES = Path(__file__).parent / "families"
NEW_TOKENS = 48

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}),
    "patterns": (
        "qwen2",
        {
            "r": 4,
            "lora_alpha": 6,
            "use_rslora": True,
            "target_modules": LINEAR,
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 8},
            "alpha_pattern": {r".*\.layers\.[01]\.mlp\.(gate|up)_proj": 3},
        },
    ),
    "embedding": ("mistral", {"r": 2, "lora_alpha": 4, "target_modules": ["embed_tokens"]}),
    "head": (
        "qwen2",
        {
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["up_proj"],
            "modules_to_save": ["lm_head", "input_layernorm"],
        },
    ),
    "biases": (
        "opt-pre",
        {"r": 4, "lora_alpha": 4, "target_modules": ["fc1", "q_proj"], "bias": "lora_only"},
    ),
    "gpt2": ("gpt2", {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "c_proj"]}),
    "fused": ("phi3", {"r": 2, "lora_alpha": 4, "target_modules": ["qkv_proj", "gate_up_proj"]}),
}
"""The base model, and the settings of LoRA."""


def base_folder(name: str) -> Path:
    return next(path for path in (FIXTURES / name, FAMILIES / name) if path.exists())


def make(name: str) -> None:
    base, settings = CASES[name]
    torch.manual_seed(0)
    folder = base_folder(base)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = {key: one.detach().clone() for key, one in model.state_dict().items()}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if parameter.requires_grad:  # Also B, which begins as zeros.
                parameter.add_(torch.randn_like(parameter) * (0.02 if "norm" in key else 0.1))
    directory = ADAPTERS / name
    shutil.rmtree(directory, ignore_errors=True)
    adapted.save_pretrained(directory)
    (directory / "README.md").unlink(missing_ok=True)
    path = directory / "adapter_config.json"
    described = json.loads(path.read_text()) | {"base_model_name_or_path": f"example/{base}"}
    path.write_text(json.dumps(described, indent=1) + "\n")
    merged = adapted.merge_and_unload().eval()
    golden: dict[str, Any] = {}
    for key, one in merged.state_dict().items():
        if not torch.equal(one, before[key]) and not re.search(r"\.0\.|\.2\.", key):
            golden[f"tensors/{key}"] = one.float().numpy()
    prompt = np.load(folder / "golden.npz")["prompt"].tolist()
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            last = merged(torch.tensor([tokens])).logits[0, -1]
            golden.setdefault("logits", last.numpy())
            tokens.append(int(last.argmax()))
    golden |= {"prompt": np.array(prompt), "continuation": np.array(tokens[len(prompt) :])}
    np.savez_compressed(directory / "golden.npz", **golden)
    for path in directory.iterdir():
        path.chmod(0o644)


def main(names: list[str]) -> None:
    ADAPTERS.mkdir(exist_ok=True)
    for name in names or CASES:
        make(name)
        size_bytes = sum(path.stat().st_size for path in (ADAPTERS / name).iterdir())
        print(f"{name}: {size_bytes / 1000:.0f} KB")  # noqa: T201 - a command


if __name__ == "__main__":
    main(sys.argv[1:])
