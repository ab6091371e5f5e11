"""LoRA adapters against what peft merges (tests/make_adapters.py)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.adapters import NO_ADAPTER
from model.artifact import write_artifact
from model.checkpoint import Checkpoint
from model.errors import CheckpointError, ModelError, UnsupportedModelError
from model.quantize import Format
from model.reference import ReferenceModel
from model.safetensors import read_safetensors, write_safetensors
from tests.greedy import generate_greedy

ADAPTERS = Path(__file__).parents[1] / "adapters"
FIXTURES = Path(__file__).parents[1] / "fixtures"
FAMILIES = Path(__file__).parents[1] / "families"
PACKED = Path(__file__).parents[1] / "packed"
BASES = {
    "plain": "llama",
    "patterns": "qwen2",
    "embedding": "mistral",
    "head": "qwen2",
    "biases": "opt-pre",
    "gpt2": "gpt2",
    "fused": "phi3",
}


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ADAPTERS / "plain", tmp_path / "plain"))


def put(folder: Path, **settings: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def renamed(folder: Path, rename: Callable[[str], str]) -> Path:
    path = folder / "adapter_model.safetensors"
    file = read_safetensors(path)
    write_safetensors(path, {rename(name): file.map(name).copy() for name in file.entries})
    return folder


@pytest.mark.parametrize(("name", "base"), BASES.items())
def test_a_merged_model_equals_peft(name: str, base: str) -> None:
    golden = np.load(ADAPTERS / name / "golden.npz")
    folder = next(path for path in (FIXTURES / base, FAMILIES / base) if path.exists())
    checkpoint = Checkpoint.open(folder, str(ADAPTERS / name))
    changed = [key for key in golden.files if key.startswith("tensors/")]
    assert changed
    for key in changed:
        tensor = checkpoint.tensors[key.removeprefix("tensors/")]
        np.testing.assert_allclose(tensor.float32(), golden[key], atol=1e-6)
    prompt = golden["prompt"].tolist()
    model = ReferenceModel.from_checkpoint(checkpoint)
    np.testing.assert_allclose(model.forward(prompt)[-1], golden["logits"], atol=2e-4)
    generation = generate_greedy(model, prompt, len(golden["continuation"]))
    assert generation.tokens == golden["continuation"].tolist()
    alone = ReferenceModel.from_checkpoint(Checkpoint.open(folder))
    untouched = generate_greedy(alone, prompt, len(generation.tokens))
    assert untouched.tokens != generation.tokens


def test_a_checkpoint_may_lack_the_prefix_of_its_names(tmp_path: Path) -> None:
    # GPT-2 on the hub does, and so do models that were saved without their head.
    folder = Path(shutil.copytree(FAMILIES / "gpt2", tmp_path / "gpt2"))
    path = folder / "model.safetensors"
    file = read_safetensors(path)
    tensors = {name.removeprefix("transformer."): file.map(name).copy() for name in file.entries}
    write_safetensors(path, tensors)
    golden = np.load(ADAPTERS / "gpt2" / "golden.npz")
    merged = Checkpoint.open(folder, str(ADAPTERS / "gpt2"))
    model = ReferenceModel.from_checkpoint(merged)
    logits = model.forward(golden["prompt"].tolist())[-1]
    np.testing.assert_allclose(logits, golden["logits"], atol=2e-4)


def test_rows_of_transposed_matrices_are_merged_alone() -> None:
    merged = Checkpoint.open(FAMILIES / "gpt2", str(ADAPTERS / "gpt2"))
    tensor = merged.tensors["transformer.h.0.attn.c_attn.weight"]
    np.testing.assert_allclose(tensor.float32(slice(2, 9)), tensor.float32()[2:9], atol=1e-6)


def test_an_adapter_belongs_to_the_fingerprint(plain: Path) -> None:
    alone = Checkpoint.open(FIXTURES / "llama").fingerprint
    before = Checkpoint.open(FIXTURES / "llama", str(plain)).fingerprint
    put(plain, lora_alpha=9)
    after = Checkpoint.open(FIXTURES / "llama", str(plain)).fingerprint
    assert len({alone, before, after}) == 3
    assert Checkpoint.open(FIXTURES / "llama", NO_ADAPTER).fingerprint == alone


def test_a_packed_base_is_merged_and_quantized_anew(tmp_path: Path, plain: Path) -> None:
    path = plain / "adapter_model.safetensors"
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    a, b = np.ones((4, 64), np.float32), np.ones((64, 4), np.float32)
    write_safetensors(path, {name.format("A"): a, name.format("B"): b})
    base, merged = (Checkpoint.open(PACKED / "gptq", one) for one in (None, str(plain)))
    changed = merged.block(1)["q.weight"] - base.block(1)["q.weight"]
    np.testing.assert_allclose(changed, np.full((64, 64), 8.0), atol=1e-5)
    assert "q.weight" not in merged.own_codes(1)
    assert "k.weight" in merged.own_codes(1)
    assert merged.lossless_format(1) == Format.of(32)
    native = base.native_format(1)
    assert native is not None
    assert merged.native_format(1) == native
    write_artifact(tmp_path, 1, merged.block_in(1, native), native)


def test_an_adapter_beside_weights_must_be_decided(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FIXTURES / "llama", tmp_path / "both"))
    for path in (ADAPTERS / "plain").glob("adapter*"):
        shutil.copy(path, folder)
    with pytest.raises(CheckpointError, match=rf"give `--adapter {folder}` .* `--adapter none`"):
        Checkpoint.open(folder)
    alone = Checkpoint.open(folder, NO_ADAPTER).block(1)["q.weight"]
    merged = Checkpoint.open(folder, str(folder)).block(1)["q.weight"]
    assert not np.array_equal(alone, merged)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "adapters of the kind 'IA3' are not merged, only LORA"),
        ({"use_dora": True}, r"DoRA \(use_dora\) is not merged; merge it with peft"),
        ({"target_parameters": ["experts"]}, "LoRA of fused experts"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which changes the base's"),
        ({"layer_replication": [[0, 2]]}, "repeated layers"),
        ({"rank_pattern": {"(a+)+": 4}}, r"rank_pattern has the pattern '\(a\+\)\+', which is not"),
        ({"r": 5}, "the rank 5, but its matrices have 4"),
        ({"lora_alpha": "x"}, "lora_alpha must be a number"),
        ({"r": 10**8}, "r must be an integer in"),
    ],
)
def test_what_peft_would_compute_otherwise_is_refused(
    plain: Path, settings: dict[str, Any], message: str
) -> None:
    put(plain, **settings)
    with pytest.raises(ModelError, match=message) as caught:
        Checkpoint.open(FIXTURES / "llama", str(plain))
    assert "\n" not in str(caught.value)


def test_damaged_folders_are_named(plain: Path, tmp_path: Path) -> None:
    def refusal(folder: Path, kind: type[ModelError] = CheckpointError) -> str:
        with pytest.raises(kind) as caught:
            Checkpoint.open(FIXTURES / "llama", str(folder))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "not an adapter: it has no adapter_config.json" in refusal(tmp_path)
    wrong = Path(shutil.copytree(plain, tmp_path / "wrong"))
    renamed(wrong, lambda name: name.replace("q_proj.lora_A", "q_proj.lora_magnitude_vector"))
    assert "is no part of a LoRA that can be merged" in refusal(wrong, UnsupportedModelError)
    half = Path(shutil.copytree(plain, tmp_path / "half"))
    renamed(half, lambda name: name.replace("0.self_attn.q_proj.lora_A", "5.self_attn.q.lora_A"))
    assert "needs both matrices of a LoRA" in refusal(half)
    other = Path(shutil.copytree(plain, tmp_path / "other"))
    renamed(other, lambda name: name.replace("self_attn.q_proj", "mixer.q_proj"))
    assert "which the model does not have; it is an adapter of example/llama" in refusal(other)
    small = Path(shutil.copytree(plain, tmp_path / "small"))
    renamed(small, lambda name: name.replace("v_proj", "o_proj"))
    assert "but the model's is [32, 32]: it belongs to another model" in refusal(small)
    (plain / "adapter_model.safetensors").rename(plain / "adapter_model.bin")
    assert "adapter_model.bin can run any code and is never read" in refusal(plain)
