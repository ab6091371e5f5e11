"""Shares of a model: slices that together compute what the whole computes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from backends.base import TeamSum
from model.artifact import Tensor, read_block, store_block, values_of, write_artifact
from model.checkpoint import Checkpoint
from model.errors import UnsupportedModelError
from model.quantize import Format, QuantizedMatrix, quantize
from model.reference import Array, ReferenceModel
from model.share import Share, can_share, most_members, share_spec, share_tensors
from tests.team import run_together, shares_of

FIXTURES = Path(__file__).parents[1] / "fixtures"
NAMES = sorted(path.parent.name for path in FIXTURES.glob("*/golden.npz"))


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (1, 2, 2)])
@pytest.mark.parametrize("name", NAMES)
def test_a_team_equals_transformers(name: str, weights: tuple[int, ...]) -> None:
    checkpoint = Checkpoint.open(FIXTURES / name)
    spec = checkpoint.spec
    if spec.layers[0].kv_heads < len(weights):
        pytest.skip("the model has fewer KV heads than the team has members")
    golden = np.load(FIXTURES / name / "golden.npz")
    embedding = ReferenceModel(spec, [checkpoint.block(0)])
    blocks = [checkpoint.block(block) for block in range(1, spec.block_count)]
    hidden = embedding.forward(golden["prompt"])

    def member(share: Share, team_sum: TeamSum) -> Array:
        parts = [
            share_tensors(spec, block, tensors, share) for block, tensors in enumerate(blocks, 1)
        ]
        own = share_spec(spec, share)
        model = ReferenceModel(own, parts, first_block=1, team_sum=team_sum)
        rows = [model.forward(hidden[:9]), model.forward(hidden[9:], 9)]
        return np.concatenate(rows)

    shares = shares_of(spec, weights)
    logits = run_together([partial(member, share) for share in shares])
    np.testing.assert_allclose(np.concatenate(logits, axis=1), golden["logits"], atol=1e-4)


@pytest.mark.parametrize("fmt", [Format.of(bits) for bits in (32, 16, 8, 5, 4, 3)], ids=str)
def test_artifacts_of_shares_hold_the_same_numbers(fmt: Format, tmp_path: Path) -> None:
    spec = Checkpoint.open(FIXTURES / "llama").spec
    layer = replace(spec.layers[0], heads=8, kv_heads=4, head_dim=32, ffn=320, mlp_bias=True)
    spec = replace(spec, layers=(layer,))
    random = np.random.default_rng(fmt.bits)
    shares = shares_of(spec, (2, 1), fmt.group_size)
    for block in (1, spec.head_block):
        tensors = {
            name: random.standard_normal(shape, np.float32)
            for name, shape in spec.block_tensors(block).items()
        }
        _, whole = read_block(write_artifact(tmp_path, block, tensors, fmt).path, spec, block)
        written = [
            store_block(tmp_path, block, share_tensors(spec, block, whole, share), fmt)
            for share in shares
        ]
        parts = [
            read_block(file.path, share_spec(spec, share), block)[1]
            for file, share in zip(written, shares, strict=True)
        ]
        for name, tensor in whole.items():
            values = [values_of(part[name]) for part in parts]
            if name in ("attn_norm.weight", "mlp_norm.weight", "norm.weight", "down.bias"):
                assert all((value == tensor).all() for value in values)
            else:
                joined = np.concatenate(values, axis=int(name in ("o.weight", "down.weight")))
                np.testing.assert_array_equal(joined, values_of(tensor))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_columns_of_whole_groups(bits: int, symmetric: bool) -> None:
    random = np.random.default_rng(bits)
    fmt = Format.of(bits, group_size=32, symmetric=symmetric)
    checkpoint = Checkpoint.open(FIXTURES / "llama")
    layer = checkpoint.spec.layers[0]
    weights = random.standard_normal((layer.hidden, 32 * 7 + 5), np.float32)
    whole: dict[str, Tensor] = {"down.weight": quantize(weights, fmt)}
    values = values_of(whole["down.weight"])
    for begin, end in ((0, 96), (96, 160), (160, 229)):
        share = Share((0, 1), (begin, end), (0, 1))
        part = share_tensors(checkpoint.spec, 1, whole, share)["down.weight"]
        assert isinstance(part, QuantizedMatrix)
        np.testing.assert_array_equal(part.dequantize(), values[:, begin:end])
    with pytest.raises(ValueError, match="cut a group"):
        share_tensors(checkpoint.spec, 1, whole, Share((0, 1), (16, 96), (0, 1)))


def test_an_impossible_share_is_refused() -> None:
    spec = Checkpoint.open(FIXTURES / "llama").spec
    whole = Share.whole(spec)
    assert share_spec(spec, whole) == spec
    assert Share.from_tuple(whole.to_tuple()) == whole
    for share in (
        Share((0, 0), whole.columns, whole.vocab),
        Share(whole.kv_heads, (0, spec.layers[0].ffn + 1), whole.vocab),
        Share(whole.kv_heads, whole.columns, (-1, 5)),
    ):
        with pytest.raises(UnsupportedModelError):
            share_spec(spec, share)
    with pytest.raises(UnsupportedModelError):
        Share.from_tuple((0, 1))


def test_a_norm_over_all_heads_is_not_shared() -> None:
    """Its members would need each other's squares before attention."""
    spec = Checkpoint.open(FIXTURES / "llama").spec
    spec = replace(spec, layers=tuple(replace(layer, qk_norm="width") for layer in spec.layers))
    assert not can_share(spec)
    assert most_members(spec, 32) == 1
    with pytest.raises(UnsupportedModelError, match="over all heads"):
        share_spec(spec, Share.whole(spec))
