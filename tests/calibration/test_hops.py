"""The divergence of rounding at a boundary, against two halves of a model in fp64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.quality.hops import MEASURED_BITS, measure_hops, through_hop, worst_hops
from calibration.quality.students import Options
from calibration.store import CalibrationStore
from model.checkpoint import Checkpoint
from model.reference import ReferenceModel
from wire.activations import HopBits

FIXTURES = Path(__file__).parents[1] / "fixtures"


def texts(checkpoint: Checkpoint) -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(0, checkpoint.spec.vocab, count).tolist() for count in (9, 2, 14)]


def chances(logits: Any) -> Any:
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def brute_force(checkpoint: Checkpoint, boundary: int, bits: HopBits) -> float:
    """KL with the rows of one boundary rounded, from the model cut in two."""
    blocks = [checkpoint.block(block) for block in range(checkpoint.spec.block_count)]
    cut = boundary + 1
    results: list[float] = []
    for sequence in texts(checkpoint):
        # Each run has a cache of its own.
        first = ReferenceModel(checkpoint.spec, blocks[:cut], dtype=np.float64)
        rows = first.forward(sequence)
        sent = through_hop(rows.astype(np.float32), bits).astype(np.float64)
        logits = [
            ReferenceModel(
                checkpoint.spec, blocks[cut:], first_block=cut, dtype=np.float64
            ).forward(it)
            for it in (rows, sent)
        ]
        expected, got = map(chances, logits)
        results += (np.exp(expected) * (expected - got)).sum(axis=1).tolist()
    return float(np.mean(results))


@pytest.mark.parametrize("fixture", ["llama", "opt-post"])
def test_each_boundary_alone_is_what_cutting_the_model_there_gives(
    fixture: str, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(FIXTURES / fixture)
    hops = measure_hops(checkpoint, texts(checkpoint), directory=tmp_path)
    boundaries = range(checkpoint.spec.head_block)
    places = [(boundary, bits) for boundary in boundaries for bits in MEASURED_BITS]
    assert [(hop.boundary, hop.bits) for hop in hops] == places
    for hop in hops:
        # At 16 bits so little that fp32 sums of another order show.
        close = pytest.approx(
            brute_force(checkpoint, hop.boundary, hop.bits), rel=0.02 if hop.bits == 8 else 0.2
        )
        assert hop.kl == close
    worst = worst_hops(hops)
    assert list(worst) == list(MEASURED_BITS)
    assert worst[8] == max(hop.kl for hop in hops if hop.bits == 8)
    assert 0 < worst[16] < worst[8] / 100
    assert not list(tmp_path.iterdir())


def test_what_is_stored_is_not_measured_again(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(FIXTURES / "llama")
    store = CalibrationStore(tmp_path / "quality.json")
    steps: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        steps.append((done, total))

    def until_the_last(done: int, total: int) -> None:
        progress(done, total)
        if done == total - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_hops(
            checkpoint, texts(checkpoint), options=Options(progress=until_the_last), store=store
        )
    half = len(steps)
    counted = Options(progress=progress)
    first = measure_hops(checkpoint, texts(checkpoint), options=counted, store=store)
    assert len(steps) - half < half
    assert steps[-1][0] == steps[-1][1]
    count = len(steps)
    assert measure_hops(checkpoint, texts(checkpoint), options=counted, store=store) == first
    assert len(steps) == count
    wide = tuple(hop for hop in first if hop.bits == 16)
    assert measure_hops(checkpoint, texts(checkpoint), (16,), store=store) == wide
