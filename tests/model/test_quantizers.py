"""Codes that a quantizer chooses: how they are rounded, what they gain, and how they are kept."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest

from model.artifact import Tensor, read_block, values_of, write_artifact
from model.checkpoint import Checkpoint
from model.errors import CheckpointError, UnsupportedModelError
from model.loss_estimate import plan_loss
from model.quantize import PREPARED, Format, QuantizedMatrix, Quantizer, quantize
from model.quantizers.blocks import BlockText, prepared_block
from model.quantizers.gptq import Inputs, column_order, gptq, inverse_triangle
from model.quantizers.grids import clipped
from model.quantizers.prepared import (
    MOST_BITS,
    TEXT_FILE,
    Prepared,
    Recipe,
    quantized,
    text_sequences,
)
from model.reference import ReferenceModel
from model.spec import QUANTIZED_TENSORS
from tests.damaged import changed, overflowing

TESTS = Path(__file__).parents[1]
LLAMA = Checkpoint.open(TESTS / "fixtures" / "llama")
MODELS = {
    name: Checkpoint.open(TESTS / name)
    for name in (
        "fixtures/llama",  # gated, a head of its own
        "fixtures/opt-pre",  # a tied head
        "fixtures/opt-post",  # post-norm, with projections
        "families/qwen2_moe",  # experts, and an MLP beside them
        "families/gpt_oss",  # clipped experts with biases
        "families/gemma2",
    )
}
Weights = npt.NDArray[np.float32]


NEAR = 1e-3
"""So near to the middle of two codes, processors round either way."""


def textbook(
    weights: Weights, rows: Weights, fmt: Format, order: npt.NDArray[np.intp], damping: float
) -> tuple[Weights, npt.NDArray[np.bool_]]:
    """Round by the paper's first form: a column at a time, with the whole inverse, in fp64.

    The inverse without a column is found by one step of Gaussian elimination. Return the values,
    and the rows in which each value was clearly nearer to one code than to the next.
    """
    left = weights.astype(np.float64)
    moments = rows.T.astype(np.float64) @ rows / len(rows)
    moments += damping * moments.diagonal().mean() * np.eye(len(moments))
    inverse = np.linalg.inv(moments)
    values = np.empty_like(left)
    scale = zero = np.empty(0)
    clear = np.ones(len(weights), np.bool_)
    top, remaining = 2**fmt.bits - 1, set(range(weights.shape[1]))
    for place, column in enumerate(order):
        if place % fmt.group_size == 0:
            start = column // fmt.group_size * fmt.group_size
            group = left[:, start : start + fmt.group_size]
            low, high = np.minimum(group.min(1), 0), np.maximum(group.max(1), 0)
            exact = (high - low) / top
            scale = exact.astype(np.float16)
            scale = np.where(scale < exact, np.nextafter(scale, np.float16(np.inf)), scale)
            scale = scale.astype(np.float64)
            zero = np.clip(np.rint(-low / scale), 0, top)
        steps = left[:, column] / scale
        clear &= np.abs(steps - np.floor(steps) - 0.5) > NEAR
        code = np.clip(np.rint(steps) + zero, 0, top)
        values[:, column] = (code - zero) * scale
        error = (left[:, column] - values[:, column]) / inverse[column, column]
        remaining.remove(int(column))
        others = sorted(remaining)
        left[:, others] -= np.outer(error, inverse[column, others])
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return values.astype(np.float32), clear


def heavy_tailed(rows: int, columns: int, seed: int = 0) -> Weights:
    random = np.random.default_rng(seed)
    return (random.standard_t(4, (rows, columns)) * 0.05).astype(np.float32)


def correlated(rows: int, columns: int, seed: int = 1) -> Weights:
    """Inputs as hidden rows are: few directions, and some large columns."""
    random = np.random.default_rng(seed)
    mixed = random.normal(size=(rows, 24)) @ random.normal(size=(24, columns))
    mixed += random.normal(size=(rows, columns))
    return (mixed * random.lognormal(0, 1, columns)).astype(np.float32)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("columns", [128, 160])
def test_rounding_equals_the_textbook(bits: int, columns: int) -> None:
    weights, rows = heavy_tailed(12, columns), correlated(400, columns)
    fmt = Format.of(bits, "rtn", 64)
    inputs = Inputs.of(rows, 64)
    found = gptq(weights, inputs, fmt, clip=False)
    expected, clear = textbook(weights, rows, fmt, inputs.order, 0.01)
    assert np.count_nonzero(clear) >= len(clear) / 3
    np.testing.assert_array_equal(found.dequantize()[clear], expected[clear])


def test_columns_go_by_groups_with_large_inputs_first() -> None:
    diagonal = np.array([1, 2, 9, 8, 5, 5, 100], np.float32)
    assert column_order(diagonal, 2).tolist() == [6, 2, 3, 4, 5, 1, 0]


def test_the_triangle_squares_to_the_damped_inverse() -> None:
    rows = correlated(300, 150)
    moments = rows.T @ rows / np.float32(len(rows))
    upper = inverse_triangle(moments, 0.01).astype(np.float64)
    assert not np.tril(upper, -1).any()
    damped = moments + 0.01 * moments.diagonal().mean() * np.eye(150)
    np.testing.assert_allclose(upper.T @ upper @ damped, np.eye(150), atol=2e-3)


def test_inputs_that_say_nothing_are_damped_until_they_can_be_inverted() -> None:
    weights, fmt = heavy_tailed(8, 64), Format.of(4)
    for rows in (np.zeros((5, 64), np.float32), np.full((5, 64), 1e18, np.float32)):
        found = gptq(weights, Inputs.of(rows, 64), fmt, clip=False).dequantize()
        assert np.isfinite(found).all()
        np.testing.assert_allclose(found, weights, atol=0.5)


def test_a_matrix_aims_at_what_the_original_rows_give() -> None:
    """With rows that were changed before, the outputs come closer to the original's."""
    weights, rows = heavy_tailed(32, 64), correlated(600, 64)
    changed = rows + np.float32(0.3) * np.roll(rows, 1, axis=1)
    fmt, wanted = Format.of(4), rows @ weights.T

    def error(matrix: QuantizedMatrix) -> float:
        return float(np.square(changed @ matrix.dequantize().T - wanted).sum())

    plain = error(gptq(weights, Inputs.of(changed, 64), fmt))
    assert error(gptq(weights, Inputs.of(changed, 64, rows), fmt)) < 0.5 * plain


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_clipped_matrix_is_never_farther_than_a_rounded_one(bits: int, symmetric: bool) -> None:
    weights = heavy_tailed(40, 100)
    fmt = Format.of(bits, "rtn", 32, symmetric)
    errors = [
        float(np.square(matrix.dequantize() - weights).sum())
        for matrix in (clipped(weights, fmt), quantize(weights, fmt))
    ]
    assert errors[0] <= errors[1]
    assert bits > 3 or errors[0] < 0.9 * errors[1]


def a_text(checkpoint: Checkpoint, seed: int = 0) -> tuple[tuple[int, ...], ...]:
    random = np.random.default_rng(seed)
    drawn = random.integers(0, checkpoint.spec.vocab, (12, 32))
    return tuple(tuple(int(token) for token in one) for one in drawn)


def prepared(checkpoint: Checkpoint, quantizer: Quantizer, directory: Path) -> Checkpoint:
    """A checkpoint with codes by random tokens, as most of these models have no tokenizer."""
    recipe = Recipe(quantizer, a_text(checkpoint))
    return checkpoint.quantized_by(Prepared(checkpoint, recipe, directory / "quantized"))


def blocks_of(checkpoint: Checkpoint) -> list[BlockText]:
    """Each block with the rows of a text that enter it."""
    text = a_text(checkpoint)
    rows: Any = np.concatenate([np.asarray(one) for one in text])
    found = []
    for block in range(checkpoint.spec.block_count):
        found.append(
            BlockText(checkpoint.spec, block, checkpoint.block(block), rows, list(map(len, text)))
        )
        rows = found[-1].outputs
    return found


@pytest.mark.thorough
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("name", MODELS)
def test_no_quantizer_disturbs_outputs_more_than_rounding(name: str, bits: int) -> None:
    totals: dict[Quantizer, float] = dict.fromkeys(("rtn", *PREPARED), 0.0)
    for text in blocks_of(MODELS[name]):
        for quantizer in totals:
            made = prepared_block(text, Format.of(bits, quantizer), quantizer)
            assert made.keys() == text.tensors.keys()
            scale = float(np.square(text.outputs).sum()) or 1.0
            totals[quantizer] += text.error(made) / scale
    assert totals["gptq"] < 0.8 * totals["rtn"]
    assert totals["auto"] < 0.9 * totals["rtn"]
    assert totals["clip"] < 1.01 * totals["rtn"]


def plan_kl(checkpoint: Checkpoint, bits: int) -> float:
    formats = [
        checkpoint.format_of(block, Format.of(bits)) for block in range(checkpoint.spec.block_count)
    ]
    return plan_loss(
        checkpoint, formats, a_text(checkpoint, seed=1), lambda *_: None, lambda: False
    )


def test_a_model_loses_less_on_a_text_that_was_not_looked_at(tmp_path: Path) -> None:
    rounded = plan_kl(LLAMA, 3)
    assert plan_kl(prepared(LLAMA, "gptq", tmp_path), 3) < 0.9 * rounded
    assert plan_kl(prepared(LLAMA, "clip", tmp_path), 3) < rounded


def test_codes_are_made_once_and_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    first = quantized(LLAMA, "gptq", tmp_path)
    fmt, count = Format.of(3), LLAMA.spec.block_count
    assert first.prepared is not None
    early = [first.kept(block, fmt) for block in range(2)]
    assert first.prepared.made == 2

    again = quantized(LLAMA, "gptq", tmp_path)
    assert again.prepared is not None
    for block in range(count):
        again.kept(block, fmt)
    assert again.prepared.made == count - 2
    same_values(again.kept(1, fmt), early[1])

    # In any order, and with a file that was damaged, the codes are the same.
    damaged = next((tmp_path / "quantized" / again.fingerprint).glob("?" * 64))
    damaged.write_bytes(b"damaged")
    fresh = quantized(LLAMA, "gptq", tmp_path / "fresh")
    for block in reversed(range(count)):
        same_values(fresh.kept(block, fmt), again.kept(block, fmt))
    assert again.prepared.made == count - 1


@pytest.mark.parametrize("quantizer", ["clip", "gptq", "auto"])
@pytest.mark.parametrize("block", [1, 2])
def test_weights_that_are_no_numbers_are_named(
    quantizer: Quantizer, block: int, tmp_path: Path
) -> None:
    """A damaged layer spoiled the rows of all later ones, whose matrices were then to blame."""

    def damage(weights: Weights) -> Weights:
        weights[3, 5] = np.nan
        return weights

    damaged = prepared(changed(tmp_path / "m", damage, "up"), quantizer, tmp_path)
    fmt = Format.of(4, quantizer)
    if quantizer == "clip" and block == 2:  # It looks at no other layer.
        damaged.block_in(block, fmt)
        return
    with pytest.raises(CheckpointError, match=r"^layer 0: up\.weight holds NaN"):
        damaged.block_in(block, fmt)
    assert not list((tmp_path / "quantized").rglob("*.json")), "no damaged codes are kept"


def test_quantizers_are_compared_for_models_that_encode(tmp_path: Path) -> None:
    """The head of such a model has no logits."""
    checkpoint = prepared(Checkpoint.open(TESTS / "encoders" / "bert"), "auto", tmp_path)
    fmt = Format.of(4, "auto")
    for block in range(checkpoint.spec.block_count):
        assert checkpoint.block_in(block, fmt).keys() == checkpoint.spec.block_tensors(block).keys()


@pytest.mark.filterwarnings("error")
def test_rows_that_are_no_numbers_are_said_to_be_so(tmp_path: Path) -> None:
    checkpoint = prepared(overflowing(tmp_path / "m"), "gptq", tmp_path)
    for block in (1, 2):
        with pytest.raises(UnsupportedModelError, match="outputs of layer 0 are not finite: use"):
            checkpoint.block_in(block, Format.of(4, "gptq"))


def test_a_failure_between_two_blocks_changes_no_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows had passed a block twice when the next attempt went on."""
    fmt, last = Format.of(3, "gptq"), LLAMA.spec.head_block
    expected = tensors_of(prepared(LLAMA, "gptq", tmp_path / "one"), last, fmt)
    checkpoint = prepared(LLAMA, "gptq", tmp_path / "two")
    read = Checkpoint.block

    def failing(self: Checkpoint, block: int) -> Any:
        if block == 2:
            raise CheckpointError("the disk hangs")
        return read(self, block)

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "block", failing)
        with pytest.raises(CheckpointError, match="hangs"):
            checkpoint.block_in(last, fmt)
    same_values(tensors_of(checkpoint, last, fmt), expected)


@pytest.mark.parametrize("passages", [1, 2, 5])
def test_a_short_text_is_enough_to_compare_quantizers(passages: int, tmp_path: Path) -> None:
    words = "\n\n".join(["a few words to look at"] * passages)
    checkpoint = quantized(LLAMA, "auto", tmp_path, words)
    assert len(text_sequences(LLAMA, words)) == passages
    assert checkpoint.kept(1, Format.of(3)).keys() == LLAMA.block(1).keys()


def tensors_of(checkpoint: Checkpoint, block: int, fmt: Format) -> dict[str, Tensor]:
    """A block's tensors, none of which is kept as codes."""
    return {name: cast(Tensor, one) for name, one in checkpoint.block_in(block, fmt).items()}


def same_values(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        np.testing.assert_array_equal(values_of(tensor), values_of(other[name]))


def test_the_identity_names_weights_quantizer_and_text(tmp_path: Path) -> None:
    words = "one text of a few words, which is short\n\nand another passage of it"
    identities = [
        checkpoint.fingerprint
        for checkpoint in (
            LLAMA,
            quantized(LLAMA, "clip", tmp_path),
            quantized(LLAMA, "gptq", tmp_path),
            quantized(LLAMA, "gptq", tmp_path, words),
            quantized(LLAMA, "auto", tmp_path, words),
            quantized(MODELS["fixtures/opt-pre"], "gptq", tmp_path, words),
        )
    ]
    assert len(set(identities)) == len(identities)
    assert quantized(LLAMA, "clip", tmp_path, words).fingerprint == identities[1]
    assert quantized(LLAMA, "gptq", tmp_path, words).fingerprint == identities[3]
    assert quantized(LLAMA, "gptq", tmp_path).weights_fingerprint == LLAMA.fingerprint
    assert quantized(LLAMA, "rtn", tmp_path) is LLAMA


def test_a_text_beside_the_model_comes_before_the_built_in_one(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(LLAMA.directory, model)
    words = "a text that belongs to this model"
    built_in = text_sequences(Checkpoint.open(model), None)
    (model / TEXT_FILE).write_text(words, encoding="utf-8")
    beside = text_sequences(Checkpoint.open(model), None)
    assert beside == text_sequences(LLAMA, words) != built_in
    with pytest.raises(UnsupportedModelError, match="--scheme-text FILE"):
        text_sequences(LLAMA, " \n\n ")


@pytest.mark.parametrize("quantizer", PREPARED)
@pytest.mark.parametrize("name", MODELS)
def test_artifacts_hold_the_codes_in_the_format_of_rounded_ones(
    name: str, quantizer: Quantizer, tmp_path: Path
) -> None:
    checkpoint = prepared(MODELS[name], quantizer, tmp_path)
    for block in range(checkpoint.spec.block_count):
        fmt = Format.of(3, quantizer)
        artifact = write_artifact(tmp_path, block, checkpoint.block_in(block, fmt), fmt)
        stored_format, stored = read_block(artifact.path, checkpoint.spec, block)
        assert stored_format == fmt == Format.of(3)
        same_values(stored, checkpoint.kept(block, fmt))
        for tensor, original in checkpoint.block(block).items():
            if tensor not in QUANTIZED_TENSORS:
                np.testing.assert_array_equal(values_of(stored[tensor]), original)


def test_wide_codes_and_floats_are_rounded_as_ever(tmp_path: Path) -> None:
    checkpoint = quantized(LLAMA, "gptq", tmp_path)
    for bits in (8, 16):
        fmt = Format.of(bits, "gptq")
        assert bits > MOST_BITS
        assert not checkpoint.is_prepared(1, fmt)
        assert checkpoint.kept(1, fmt) == {}
    assert checkpoint.lossless_format(1) == LLAMA.lossless_format(1)
    assert not (tmp_path / "quantized").exists()


def test_codes_of_packed_files_are_kept_at_their_own_bits(tmp_path: Path) -> None:
    plain = Checkpoint.open(TESTS / "packed" / "gptq")
    checkpoint = prepared(plain, "gptq", tmp_path)
    native = checkpoint.native_format(1)
    assert native is not None
    assert native == plain.native_format(1)
    same_values(checkpoint.kept(1, native), plain.own_codes(1, native))
    other = Format.of(3 if native.bits != 3 else 4)
    assert checkpoint.is_prepared(1, other)
    assert not checkpoint.is_prepared(1, native)
    model = ReferenceModel(plain.spec, [checkpoint.kept(1, other)], first_block=1)
    assert model.blocks == range(1, 2)
