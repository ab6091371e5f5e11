"""Rounded layers against the formats that shoal stores, and widths that it does not store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from backends.registry import backend_class
from calibration.quality.blocks import measure_blocks
from calibration.quality.students import Options, students_of
from evaluation.losses import Target, measure_losses
from model.checkpoint import Checkpoint
from model.errors import CheckpointError
from model.quantize import Format, Scheme, quantize
from paper.study import truncation_error
from studies.rounding import (
    ORIGINAL,
    RoundedModel,
    Rounding,
    histogram,
    truncated,
    weight_errors,
)

FIXTURE = Path(__file__).parents[1] / "fixtures" / "opt-post"
TRUNCATION, NEAREST = Rounding("truncate", 32), Rounding("rtn", 32)


def weights(seed: int = 0) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.random.default_rng(seed).standard_normal((24, 96)).astype(np.float32)


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_truncation_is_that_of_the_storage_format(bits: int) -> None:
    stored = quantize(weights(), Format.of(bits, "truncate", 32)).dequantize()
    np.testing.assert_allclose(truncated(weights(), bits), stored, rtol=2e-6)
    np.testing.assert_array_equal(TRUNCATION.matrix(weights(), bits), stored)


@pytest.mark.parametrize("bits", [10, 12, 16, 24])
def test_other_widths_keep_the_same_rule(bits: int) -> None:
    original, found = weights(), truncated(weights(), bits)
    step = np.abs(original).max() / 2.0 ** (bits - 1)
    # Towards zero, by less than one step. The largest positive value loses a whole one.
    assert np.all(np.abs(found) <= np.abs(original) + 1e-7)
    assert np.abs(found - original).max() <= step * (1 + 1e-3)
    codes = found / step
    np.testing.assert_allclose(codes, np.round(codes), atol=2.0 ** (bits - 23))
    error = float(np.abs(found - original).max())
    assert error == pytest.approx(truncation_error(original.astype(float), bits), rel=0.01)


def test_a_width_that_a_scheme_does_not_store_is_refused() -> None:
    with pytest.raises(ValueError, match="bits must be one of"):
        NEAREST.matrix(weights(), 10)
    assert NEAREST.matrix(weights(), ORIGINAL) is not None
    assert (str(TRUNCATION), str(NEAREST)) == ("truncate", "rtn 32")


@pytest.mark.parametrize("bits", [8, 10])
def test_weights_that_are_no_numbers_are_refused_at_any_width(bits: int) -> None:
    damaged = weights()
    damaged[0, 0] = np.nan
    with pytest.raises(CheckpointError, match="holds NaN"):
        TRUNCATION.matrix(damaged, bits)


@pytest.mark.parametrize("scheme", ["truncate", "rtn"])
def test_a_rounded_model_loses_what_its_stored_form_loses(scheme: Scheme) -> None:
    checkpoint = Checkpoint.open(FIXTURE)
    tokens = tuple(np.load(FIXTURE / "golden.npz")["prompt"].tolist())
    bits = (ORIGINAL, 4, 8, 3, ORIGINAL)
    stored = [None if width == ORIGINAL else Format.of(width, scheme, 32) for width in bits]
    as_is = [None] * len(bits)
    steps: list[tuple[int, int]] = []
    (found,) = measure_losses(
        checkpoint,
        {"stored": stored, "rounded": as_is, "original": as_is},
        {0: Target(tokens, 1)},
        Options(backend_class("onnx_cpu")()),
        lambda done, total: steps.append((done, total)),
        with_original=True,
        sources={"rounded": RoundedModel(checkpoint, bits, Rounding(scheme, 32))},
    )
    stored_loss, rounded_loss = found["stored"][0], found["rounded"][0]
    assert rounded_loss.nats == pytest.approx(stored_loss.nats, rel=1e-5)
    assert rounded_loss.kl == pytest.approx(stored_loss.kl, rel=1e-3)
    assert found["original"][0].kl == pytest.approx(0, abs=1e-9)
    # Embedding and three layers: of the original, and of each run.
    assert steps == [(done, 16) for done in range(17)]


def test_one_layer_alone_loses_what_a_calibration_measures() -> None:
    checkpoint = Checkpoint.open(FIXTURE)
    sequences = [np.load(FIXTURE / "golden.npz")["prompt"].tolist()]
    formats = [Format.of(width, "rtn", 32) for width in (3, 4)]
    wanted = {block: formats for block in (1, 2, 3)}
    measured = measure_blocks(checkpoint, wanted, sequences, Options())
    expected = {(one.block, one.bits): one.kl for one in measured}
    steps: list[tuple[int, int]] = []
    told = Options(progress=lambda done, total: steps.append((done, total)))
    found: dict[tuple[int, int], float] = {}
    with students_of(checkpoint, sequences, told, None) as students:
        students.expect(4 + 4 + 3 + 2)
        final = students.teach(wanted)
        for block in wanted:
            tensors = checkpoint.block(block)
            others = ((width, NEAREST.tensors(tensors, width)) for width in (3, 4))
            kls = students.replaced(block, others, final)
            found |= {(block, width): kl for width, kl in kls.items()}
    assert found == pytest.approx(expected, rel=1e-3)
    assert steps[-1] == (13, 13)


def test_weight_errors_are_normalized_by_the_width() -> None:
    checkpoint = Checkpoint.open(FIXTURE)
    found = weight_errors(checkpoint, 1, (4, 8, 12), TRUNCATION)
    from model.spec import QUANTIZED_TENSORS

    matrices = [w for name, w in checkpoint.block(1).items() if name in QUANTIZED_TENSORS]
    for bits, error in found.items():
        worst = max(truncation_error(matrix.astype(float), bits) for matrix in matrices)
        assert error == pytest.approx(worst / 2**bits, rel=1e-3)
    with pytest.raises(ValueError, match="2 widths for 5 blocks"):
        RoundedModel(checkpoint, (4, 4), TRUNCATION)


def test_every_weight_of_the_layers_is_counted() -> None:
    checkpoint = Checkpoint.open(FIXTURE)
    counts, largest = histogram(
        checkpoint, [1, 2, 3], np.linspace(-0.1, 0.1, 5), lambda done, total: None
    )
    layer = 4 * 32 * 32 + 2 * 32 * 48
    assert counts.sum() == 3 * layer
    assert counts[0] > 0
    assert largest > 0.3
