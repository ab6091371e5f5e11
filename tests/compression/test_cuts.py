"""A smaller model is the original without the parts that a cut removes, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the extra torch")

import torch

from compression.cuts import Cut, Shape, cut_blocks, cut_spec, weights_of, whole
from compression.errors import CompressionError
from compression.folder import (
    can_cut_heads,
    check_source,
    cut_config,
    stored,
    write_folder,
)
from compression.importance import masked
from compression.network import Network
from compression.text import batch_of
from evaluation.losses import Target
from model.checkpoint import Checkpoint
from model.reference import ReferenceModel
from model.safetensors import bfloat16_to_float32
from model.tokenizer import Tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures"
KINDS = ("llama", "llama-dynamic", "mistral", "opt-post", "opt-pre", "qwen2", "qwen3")
WITH_HEADS = ("llama", "mistral", "qwen2", "qwen3")


def blocks_of(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    return [checkpoint.block(block) for block in range(checkpoint.spec.block_count)]


def prompt_of(fixture: str) -> tuple[int, ...]:
    return tuple(np.load(FIXTURES / fixture / "golden.npz")["prompt"].tolist())


def some_cut(checkpoint: Checkpoint) -> Cut:
    """Two of three layers, with other columns and heads in each."""
    first = checkpoint.spec.layers[0]
    heads: tuple[tuple[int, ...], ...] = (tuple(range(first.kv_heads)),) * 2
    if can_cut_heads(checkpoint):
        heads = ((1,), (0,))
    odd, late = tuple(range(1, first.ffn, 2)), tuple(range(first.ffn // 2, first.ffn))
    return Cut((0, 2), heads, (odd, late))


@pytest.mark.parametrize("fixture", KINDS)
def test_the_network_computes_what_the_reference_does(fixture: str) -> None:
    checkpoint = Checkpoint.open(FIXTURES / fixture)
    tokens = prompt_of(fixture)
    expected = ReferenceModel.from_checkpoint(checkpoint, np.float64).forward(tokens)
    network = Network(checkpoint.spec, blocks_of(checkpoint), torch.float64)
    padded = batch_of([Target(tokens, 1), Target((*tokens, 1, 1, 1), 1)])
    with torch.no_grad():
        found = network.forward(padded.tokens).logits
    np.testing.assert_allclose(found[0, : len(tokens)].numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("fixture", KINDS)
def test_a_cut_model_is_the_original_with_closed_gates(fixture: str) -> None:
    checkpoint = Checkpoint.open(FIXTURES / fixture)
    blocks, cut = blocks_of(checkpoint), some_cut(checkpoint)
    batch = batch_of([Target(prompt_of(fixture), 1)])
    original = Network(checkpoint.spec, blocks, torch.float64)
    smaller = Network(
        cut_spec(checkpoint.spec, cut), cut_blocks(checkpoint.spec, blocks, cut), torch.float64
    )
    with torch.no_grad():
        expected = masked(original, cut)(batch)
        found = smaller.forward(batch.tokens, at=batch.predicts)
        uncut = original.forward(batch.tokens, at=batch.predicts)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-12)
    assert len(found.hidden) == len(expected.hidden) == 3
    assert (found.logits - uncut.logits).abs().max() > 1e-3


@pytest.mark.parametrize("fixture", KINDS)
def test_a_folder_is_read_as_the_cut_model(fixture: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(FIXTURES / fixture)
    cut = some_cut(checkpoint)
    blocks = cut_blocks(checkpoint.spec, blocks_of(checkpoint), cut)
    folder = tmp_path / "made" / "small"
    for _ in range(2):  # The second time replaces the first.
        write_folder(checkpoint, cut, blocks, folder, "# small\n")
    made = Checkpoint.open(folder)
    assert made.spec == cut_spec(checkpoint.spec, cut)
    tokens = prompt_of(fixture)
    expected = ReferenceModel(made.spec, blocks).forward(tokens)
    found = ReferenceModel.from_checkpoint(made).forward(tokens)
    # A matrix that was read lies otherwise in memory, so its products may add up in another order.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    for block, tensors in enumerate(blocks):
        read = made.block(block)
        assert read.keys() == tensors.keys()
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(read[name], tensor)
    assert [path.name for path in folder.parent.iterdir()] == ["small"]
    assert made.source_dtypes(1) == checkpoint.source_dtypes(1)
    if (FIXTURES / fixture / "tokenizer.json").exists():
        Tokenizer.load(folder)


@pytest.mark.parametrize("fixture", WITH_HEADS)
def test_a_folder_with_fewer_heads_says_how_wide_they_are(fixture: str) -> None:
    checkpoint = Checkpoint.open(FIXTURES / fixture)
    assert can_cut_heads(checkpoint)
    values = cut_config(checkpoint, some_cut(checkpoint))
    first = checkpoint.spec.layers[0]
    assert values["head_dim"] == first.head_dim
    assert values["num_key_value_heads"] == 1
    assert values["num_attention_heads"] == first.heads // first.kv_heads


def test_heads_of_opt_stay_because_its_config_cannot_say_it() -> None:
    checkpoint = Checkpoint.open(FIXTURES / "opt-pre")
    assert not can_cut_heads(checkpoint)
    first = checkpoint.spec.layers[0]
    fewer = Cut((0,), ((0, 1),), (tuple(range(first.ffn)),))
    with pytest.raises(CompressionError, match=r"no config.json of opt describes 1 layers, 2 KV"):
        cut_config(checkpoint, fewer)


def test_weights_in_bf16_are_rounded_to_nearest_even() -> None:
    values = np.array([1.0, 1.00390625, 1.01171875, 1.00390637], np.float32)
    rounded = bfloat16_to_float32(stored(values, "BF16"))
    np.testing.assert_array_equal(rounded, np.array([1.0, 1.0, 1.015625, 1.0078125], np.float32))


def test_a_cut_without_removal_is_the_original() -> None:
    checkpoint = Checkpoint.open(FIXTURES / "llama")
    cut = whole(checkpoint.spec)
    assert cut.shape == Shape(3, 2, 48)
    assert cut_spec(checkpoint.spec, cut) == checkpoint.spec
    assert weights_of(cut_spec(checkpoint.spec, some_cut(checkpoint))) < weights_of(checkpoint.spec)
    assert Cut.from_dict(json.loads(json.dumps(cut.to_dict()))) == cut


def test_layers_of_unequal_width_are_refused() -> None:
    with pytest.raises(ValueError, match="as many heads"):
        Cut((0, 1), ((0,), (0, 1)), ((0,), (0,)))
    with pytest.raises(ValueError, match="in order"):
        Cut((1, 0), ((0,), (0,)), ((0,), (0,)))


FAMILIES = Path(__file__).parents[1] / "families"
COMPRESSED = ("exaone4", "ministral", "ministral3", "olmo2", "qwen2-yarn", "smollm3", "starcoder2")
REFUSED = {
    "gemma2": "gemma2 stores tokens.weight fused or scaled",
    "gpt2": "gpt2 stores q.weight fused or scaled",
    "mixtral": "models with experts cannot be compressed",
    "mistral3-sees": "no config.json of mistral3 describes 1 layers",
}


@pytest.mark.parametrize("family", COMPRESSED)
def test_further_families_are_computed_and_cut(family: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(FAMILIES / family)
    check_source(checkpoint)
    tokens = np.arange(3, 20)
    expected = ReferenceModel.from_checkpoint(checkpoint, np.float64).forward(tokens)
    network = Network(checkpoint.spec, blocks_of(checkpoint), torch.float64)
    with torch.no_grad():
        found = network.forward(torch.from_numpy(tokens)[None]).logits[0]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)
    cut = some_cut(checkpoint)
    blocks = cut_blocks(checkpoint.spec, blocks_of(checkpoint), cut)
    write_folder(checkpoint, cut, blocks, tmp_path / "small", "# small\n")
    assert Checkpoint.open(tmp_path / "small").spec == cut_spec(checkpoint.spec, cut)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_compressed_is_refused_by_name(family: str) -> None:
    checkpoint = Checkpoint.open(FAMILIES / family)
    with pytest.raises(CompressionError, match=REFUSED[family]):
        check_source(checkpoint)


@pytest.mark.parametrize(
    "folder",
    ["fp8", "compressed-fp8", "bitsandbytes", "bitsandbytes-int8", "mlx", "awq", "gptq"],
)
def test_every_kind_of_packed_weights_is_refused(folder: str) -> None:
    """Those whose codes no format of ours has became fp32 in a folder that said to be packed."""
    checkpoint = Checkpoint.open(FIXTURES.parent / "packed" / folder)
    with pytest.raises(CompressionError, match="it is quantized: give the original folder"):
        check_source(checkpoint)


@pytest.mark.parametrize("folder", ["bert", "bert-class", "mpnet", "qwen3-embed", "roberta"])
def test_a_model_that_encodes_texts_is_refused(folder: str) -> None:
    checkpoint = Checkpoint.open(FIXTURES.parent / "encoders" / folder)
    with pytest.raises(CompressionError, match="it encodes texts: only models that generate"):
        check_source(checkpoint)
