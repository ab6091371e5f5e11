"""The reference forward pass against what transformers computed for the same checkpoints."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.artifact import write_artifact
from model.checkpoint import Checkpoint
from model.quantize import Format
from model.reference import ReferenceModel
from model.spec import LayerSpec, ModelSpec
from tests.greedy import generate_greedy

FIXTURES = Path(__file__).parents[1] / "fixtures"
NAMES = sorted(path.parent.name for path in FIXTURES.glob("*/golden.npz"))


def test_all_families_have_a_fixture() -> None:
    expected = "llama llama-dynamic llama-linear mistral opt-post opt-pre qwen2 qwen3"
    assert expected.split() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_equals_transformers(name: str) -> None:
    golden = np.load(FIXTURES / name / "golden.npz")
    model = ReferenceModel.from_checkpoint(Checkpoint.open(FIXTURES / name))
    prompt = golden["prompt"].tolist()
    np.testing.assert_allclose(model.forward(prompt), golden["logits"], atol=1e-4)
    generation = generate_greedy(model, prompt, len(golden["continuation"]))
    assert generation.tokens == golden["continuation"].tolist()
    np.testing.assert_allclose(generation.margins, golden["margins"], atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_float64_and_float32_agree(name: str) -> None:
    golden = np.load(FIXTURES / name / "golden.npz")
    model = ReferenceModel.from_checkpoint(Checkpoint.open(FIXTURES / name), np.float64)
    logits = model.forward(golden["prompt"])
    assert logits.dtype == np.float64
    np.testing.assert_allclose(logits, golden["logits"], atol=5e-5)


@pytest.mark.parametrize("name", NAMES)
def test_chunks_and_rollback_give_the_same_rows(name: str) -> None:
    golden = np.load(FIXTURES / name / "golden.npz")
    tokens = np.concatenate([golden["prompt"], golden["continuation"]])[:90]
    model = ReferenceModel.from_checkpoint(Checkpoint.open(FIXTURES / name))
    whole = model.forward(tokens)
    model.forward(tokens[:50])
    model.forward(np.zeros(7, np.int64), 40)
    parts = [model.forward(tokens[begin : begin + 10], begin) for begin in range(40, 90, 10)]
    np.testing.assert_allclose(np.concatenate(parts), whole[40:], atol=1e-4)


def test_stages_compose_to_the_model() -> None:
    checkpoint = Checkpoint.open(FIXTURES / "opt-post")
    blocks = [checkpoint.block(block) for block in range(checkpoint.spec.block_count)]
    whole = ReferenceModel(checkpoint.spec, blocks)
    first = ReferenceModel(checkpoint.spec, blocks[:2])
    second = ReferenceModel(checkpoint.spec, blocks[2:], first_block=2)
    hidden = first.forward([5, 6, 7])
    assert hidden.shape == (3, checkpoint.spec.hidden)
    np.testing.assert_array_equal(second.forward(hidden), whole.forward([5, 6, 7]))


@pytest.mark.parametrize(("name", "bits"), [("llama-linear", 16), ("qwen3", 16), ("opt-pre", 32)])
def test_16_bit_sources_survive_16_bits_exactly(name: str, bits: int, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(FIXTURES / name)
    artifacts = [
        write_artifact(tmp_path, block, checkpoint.block(block), Format.of(bits))
        for block in range(checkpoint.spec.block_count)
    ]
    stored = ReferenceModel.from_artifacts(
        checkpoint.spec, [(item.block, item.path) for item in artifacts]
    )
    original = ReferenceModel.from_checkpoint(checkpoint)
    np.testing.assert_array_equal(stored.forward([1, 2, 3]), original.forward([1, 2, 3]))


def test_quantized_models_approach_the_original(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(FIXTURES / "qwen2")
    original = ReferenceModel.from_checkpoint(checkpoint).forward([1, 2, 3, 4])
    errors = []
    for bits in (3, 4, 5, 6, 8):
        artifacts = [
            write_artifact(tmp_path, block, checkpoint.block(block), Format.of(bits))
            for block in range(checkpoint.spec.block_count)
        ]
        pairs = [(item.block, item.path) for item in artifacts]
        logits = ReferenceModel.from_artifacts(checkpoint.spec, pairs).forward([1, 2, 3, 4])
        errors.append(float(np.abs(logits - original).max()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        ("relu", lambda x: max(x, 0.0)),
        ("silu", lambda x: x / (1 + math.exp(-x))),
        ("gelu", lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2)))),
        (
            "gelu_tanh",
            lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        ),
    ],
)
def test_activations(activation: Any, expected: Any) -> None:
    values = [-6.0, -1.5, -0.1, 0.0, 0.3, 2.0, 7.0]
    width = len(values)
    layer = LayerSpec(
        hidden=width, heads=1, kv_heads=1, head_dim=width, ffn=width, norm="layernorm",
        norm_eps=1e-5, norm_position="post", activation=activation, gated=False,
        qkv_bias=False, out_bias=False, mlp_bias=True,
    )  # fmt: skip
    spec = ModelSpec(
        vocab=4, hidden=width, embed_dim=width, max_context=8, layers=(layer,),
        learned_positions=0, position_offset=0, final_norm=False, tied_head=False,
        bos_token=None, eos_tokens=(),
    )  # fmt: skip
    # All but the MLP's bias is zero: the second norm then sees the activated bias alone.
    tensors = {name: np.zeros(shape, np.float32) for name, shape in layer.tensors().items()}
    tensors["down.weight"] = np.eye(width, dtype=np.float32)
    tensors["up.bias"] = np.array(values, np.float32)
    tensors["mlp_norm.weight"] += 1
    row = ReferenceModel(spec, [tensors], first_block=1, dtype=np.float64).forward(
        np.zeros((1, width))
    )[0]
    activated = np.array([expected(value) for value in values])
    normed = (activated - activated.mean()) / np.sqrt(activated.var() + 1e-5)
    np.testing.assert_allclose(row, normed, atol=1e-6)


def test_window_sees_itself_and_the_rows_before() -> None:
    checkpoint = Checkpoint.open(FIXTURES / "mistral")
    spec = checkpoint.spec
    narrow = replace(spec, layers=tuple(replace(layer, sliding_window=1) for layer in spec.layers))
    blocks = [checkpoint.block(block) for block in range(spec.block_count)]
    model = ReferenceModel(narrow, blocks)
    alone = model.forward([9])
    np.testing.assert_allclose(model.forward([3, 4, 9])[-1:], alone, atol=1e-4)
