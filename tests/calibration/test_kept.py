"""Losses of a model whose file has codes of its own: at their bits there is none."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from calibration.quality.blocks import measure_plan_kl, measure_quality
from coordinator.files.artifacts import ArtifactStore, Wanted
from model.checkpoint import Checkpoint
from model.costs import stored_bytes
from model.kept import weight_notes
from model.loss_estimate import estimate_losses, plan_loss
from model.quantize import Format
from model.weight_errors import weight_errors
from planning.build import RequestInput
from planning.sensitivity import with_lossless

FIXTURES = Path(__file__).parents[1] / "fixtures"
PACKED = Path(__file__).parents[1] / "packed"
SEQUENCES = [list(range(20, 60)), list(range(100, 140))]


@pytest.fixture(scope="module")
def gptq() -> Checkpoint:
    return Checkpoint.open(PACKED / "gptq")


@pytest.fixture(scope="module")
def int8() -> Checkpoint:
    return Checkpoint.open(PACKED / "compressed-int8")


def test_measured_sensitivities(gptq: Checkpoint) -> None:
    found = {(one.block, one.bits): one for one in measure_quality(gptq, (3, 4, 8), SEQUENCES)}
    for block in range(4):
        kept = block in (1, 2)
        assert (found[block, 4].kl == 0) == (found[block, 4].weight_error == 0) == kept
        assert found[block, 3].kl > 0
        assert found[block, 8].weight_error > 0
    formats = [Format.of(16), Format.of(4), Format.of(4), Format.of(16)]
    assert measure_plan_kl(gptq, formats, SEQUENCES) == 0


@pytest.mark.parametrize(("name", "bits"), [("gptq", 4), ("compressed-int8", 8)])
def test_estimated_losses(name: str, bits: int) -> None:
    checkpoint = Checkpoint.open(PACKED / name)
    known = estimate_losses(checkpoint, SEQUENCES, "rtn", 64, lambda *_: None, lambda: False)
    for block, row in enumerate(known.blocks):
        assert (row[bits] == 0) == (block in (1, 2))
        assert row[2] > row[3] > 0
        assert row[32] == 0
    formats = [checkpoint.format_of(k, Format.of(bits)) for k in (1, 2)]
    whole = [Format.of(16), *formats, Format.of(16)]
    assert plan_loss(checkpoint, whole, SEQUENCES, lambda *_: None, lambda: False) == 0


def test_an_assumed_loss_does_not_hold_for_kept_codes(gptq: Checkpoint) -> None:
    rows = with_lossless([{3: 0.5, 4: 0.1, 8: 0.01}] * 4, gptq)
    assert [row[4] for row in rows] == [0.1, 0, 0, 0.1]
    assert [row.get(16) for row in rows] == [0, None, None, 0]
    assert [row[32] for row in rows] == [0] * 4


def test_weight_errors_are_nothing(int8: Checkpoint, tmp_path: Path) -> None:
    errors = weight_errors(int8, [Format.of(4), Format.of(8)], tmp_path, lambda *_: None)
    assert [error[8] == 0 for error in errors] == [False, True, True, False]
    assert all(error[4] > 0 for error in errors)


def test_plans_count_the_bytes_of_the_files_own_groups(gptq: Checkpoint, tmp_path: Path) -> None:
    native = gptq.native_formats()
    request = RequestInput(gptq.spec, (4, 8), 64, native=native)
    own = Format(4, "rtn", 64, symmetric=True)
    assert [request.format_of(block, 4) == own for block in range(4)] == [False, True, True, False]
    assert request.format_of(1, 8) == Format.of(8)
    store = ArtifactStore(tmp_path)
    store.prepare()
    wanted = [Wanted(block, gptq.format_of(block, Format.of(4))) for block in range(4)]
    refs = store.quantize(gptq, wanted, lambda *_: None, lambda: False)
    for item, ref in zip(wanted, refs, strict=True):
        path: Any = store.path(ref.sha256)
        size = stored_bytes(gptq.spec, item.block, request.format_of(item.block, 4))
        assert 0 < path.stat().st_size - size < 4096
    known = store.known(gptq, [Format.of(4)])
    assert known == {(ref.block, 4): ref.sha256 for ref in refs}
    with pytest.raises(ValueError, match="native formats of blocks beyond 4"):
        RequestInput(gptq.spec, (4,), 64, native={9: own})


def test_a_plan_says_what_becomes_of_packed_weights(gptq: Checkpoint, tmp_path: Path) -> None:
    kept = "4-bit codes kept from the file (GPTQ): {} of 4 blocks"
    again = "{} from GPTQ 4 bits: {} of 4 blocks"
    assert weight_notes(gptq, (4, 4, 4, 4)) == [kept.format(2)]
    assert weight_notes(gptq, (16, 4, 8, 16)) == [
        kept.format(1),
        again.format("requantized", 1),
    ]
    assert weight_notes(gptq, (16, 16, 16, 16)) == [again.format("decoded", 2)]
    assert weight_notes(Checkpoint.open(FIXTURES / "llama"), (4,) * 5) == []
    shutil.copy(PACKED / "gptq" / "config.json", tmp_path)
    unread = Checkpoint.open_to_plan(tmp_path)
    (line,) = weight_notes(unread, (4, 4, 4, 4))
    assert line.startswith("packed weights, whose codes may be kept")
    assert line.endswith("not downloaded yet (gptq)")
    assert unread.native_formats() == {}
