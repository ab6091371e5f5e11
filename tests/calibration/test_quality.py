"""Sensitivities against whole models that are built and run anew for each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.base import Backend, BackendError, BackendUnavailable, Capabilities
from backends.registry import BACKENDS, backend_class
from calibration.quality import students
from calibration.quality.blocks import (
    BlockSensitivity,
    check_plans,
    measure_plan_kl,
    measure_quality,
    random_plans,
)
from calibration.quality.students import Options
from calibration.store import CalibrationStore
from model.checkpoint import Checkpoint
from model.divergence import divergences
from model.passages import built_in_text, passages_of, split_passages
from model.quantize import Format, quantize, weight_error
from model.reference import ReferenceModel
from model.spec import QUANTIZED_TENSORS
from tests.damaged import overflowing

FIXTURES = Path(__file__).parents[1] / "fixtures"
BITS = (3, 8)


def texts(checkpoint: Checkpoint) -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(0, checkpoint.spec.vocab, count).tolist() for count in (9, 2, 14)]


def brute_force(
    checkpoint: Checkpoint, formats: Sequence[Format | None], sequences: Sequence[Sequence[int]]
) -> float:
    """KL of a plan in fp64, from two whole models."""
    blocks = []
    for block, fmt in enumerate(formats):
        tensors: dict[str, Any] = dict(checkpoint.block(block))
        for name in QUANTIZED_TENSORS & set(tensors) if fmt else ():
            assert fmt is not None
            tensors[name] = quantize(tensors[name], fmt)
        blocks.append(tensors)
    teacher = ReferenceModel.from_checkpoint(checkpoint, np.float64)
    student = ReferenceModel(checkpoint.spec, blocks, dtype=np.float64)
    divergences: list[float] = []
    for sequence in sequences:
        expected, got = (_log_chances(model.forward(sequence)) for model in (teacher, student))
        divergences += (np.exp(expected) * (expected - got)).sum(axis=1).tolist()
    return float(np.mean(divergences))


def _log_chances(logits: Any) -> Any:
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def alone(checkpoint: Checkpoint, block: int, fmt: Format) -> list[Format | None]:
    return [fmt if index == block else None for index in range(checkpoint.spec.block_count)]


@pytest.fixture
def backend() -> Backend:
    for name in BACKENDS:
        try:
            backend_class(name).probe()
        except BackendUnavailable:
            continue
        return backend_class(name)()
    pytest.skip("no backend is available")


@pytest.mark.parametrize("fixture", ["llama", "opt-post", "opt-pre", "qwen3", "mistral"])
def test_sensitivities_are_those_of_whole_models(fixture: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(FIXTURES / fixture)
    sequences = texts(checkpoint)
    steps: list[tuple[int, int]] = []
    found = measure_quality(
        checkpoint,
        BITS,
        sequences,
        Options(progress=lambda done, total: steps.append((done, total))),
        directory=tmp_path / "work",
    )
    places = [(block, bits) for block in range(checkpoint.spec.block_count) for bits in BITS]
    assert [(item.block, item.bits) for item in found] == places
    for item in found:
        fmt = Format.of(item.bits)
        expected = brute_force(checkpoint, alone(checkpoint, item.block, fmt), sequences)
        assert item.kl == pytest.approx(expected, rel=1e-2, abs=1e-8)
        matrices = {
            name: tensor
            for name, tensor in checkpoint.block(item.block).items()
            if name in QUANTIZED_TENSORS
        }
        worst = max(weight_error(tensor, fmt) for tensor in matrices.values())
        assert item.weight_error == pytest.approx(worst)
        assert item.normalized_weight_error == pytest.approx(worst / 2**item.bits)
    assert steps == [(done, len(steps) - 1) for done in range(len(steps))]
    assert list((tmp_path / "work").iterdir()) == []


def test_a_backend_gives_the_same(backend: Backend, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(FIXTURES / "llama")
    sequences = texts(checkpoint)
    slow = measure_quality(checkpoint, (2, 4), sequences)
    fast = measure_quality(checkpoint, (2, 4), sequences, Options(backend), directory=tmp_path)
    for one, other in zip(slow, fast, strict=True):
        assert other.kl == pytest.approx(one.kl, rel=1e-2, abs=1e-8)
        assert other.weight_error == one.weight_error


def test_a_width_that_the_backend_lacks_runs_as_the_reference(
    backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(FIXTURES / "llama")
    sequences = texts(checkpoint)
    known = backend.probe()
    fewer = {bits: container for bits, container in known.container_bits.items() if bits >= 16}
    probe = staticmethod(lambda: Capabilities(known.backend, known.version, fewer))
    monkeypatch.setattr(type(backend), "probe", probe)
    slow = measure_quality(checkpoint, (4,), sequences)
    fast = measure_quality(checkpoint, (4,), sequences, Options(backend), directory=tmp_path)
    assert [item.kl for item in fast] == pytest.approx([item.kl for item in slow], rel=1e-2)


def test_truncation_is_measured_as_truncation() -> None:
    checkpoint = Checkpoint.open(FIXTURES / "opt-pre")
    sequences = texts(checkpoint)
    found = measure_quality(checkpoint, (4,), sequences, scheme="truncate")
    fmt = Format.of(4, "truncate")
    for item in found:
        expected = brute_force(checkpoint, alone(checkpoint, item.block, fmt), sequences)
        assert item.kl == pytest.approx(expected, rel=1e-2, abs=1e-8)


def test_32_bits_change_nothing() -> None:
    checkpoint = Checkpoint.open(FIXTURES / "llama")
    found = measure_quality(checkpoint, (32,), texts(checkpoint))
    assert [(item.kl, item.weight_error) for item in found] == [(0.0, 0.0)] * len(found)


def test_memory_for_no_block_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(FIXTURES / "opt-post")
    sequences = texts(checkpoint)
    kept = measure_quality(checkpoint, BITS, sequences)
    monkeypatch.setattr(students, "_KEPT_SHARE", 0.0)
    monkeypatch.setattr(students, "_LOGITS", checkpoint.spec.vocab * 3)
    assert [item.kl for item in measure_quality(checkpoint, BITS, sequences)] == pytest.approx(
        [item.kl for item in kept], rel=1e-3, abs=1e-9
    )


def test_an_interrupted_run_is_taken_up(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(FIXTURES / "llama")
    sequences = texts(checkpoint)
    store = CalibrationStore(tmp_path / "quality.json")
    whole = measure_quality(checkpoint, BITS, sequences)

    def interrupt(done: int, total: int) -> None:
        if done > 2 * total / 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_quality(
            checkpoint,
            BITS,
            sequences,
            Options(progress=interrupt),
            store=store,
            directory=tmp_path,
        )
    totals: set[int] = set()
    counted = Options(progress=lambda done, total: totals.add(total))
    again = measure_quality(checkpoint, BITS, sequences, counted, store=store, directory=tmp_path)
    assert [item.kl for item in again] == pytest.approx([item.kl for item in whole])
    head = checkpoint.spec.head_block
    (total,) = totals
    assert head < total < head + (head + 1) * (head + 2) // 2
    # And then there is nothing left to do.
    totals.clear()
    third = measure_quality(checkpoint, BITS, sequences, counted, store=store)
    assert (third, totals) == (again, set())
    assert {path.name for path in tmp_path.iterdir()} == {"quality.json", "quality.json.lock"}


def test_another_text_or_format_is_another_measurement(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(FIXTURES / "llama")
    sequences = texts(checkpoint)
    store = CalibrationStore(tmp_path / "quality.json")
    first = measure_quality(checkpoint, (4,), sequences, store=store)
    assert measure_quality(checkpoint, (4,), sequences[:2], store=store) != first
    assert measure_quality(checkpoint, (4,), sequences, group_size=32, store=store) != first
    assert measure_quality(checkpoint, (4,), sequences, store=store) == first


def test_the_divergence_of_a_mixed_plan(backend: Backend, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(FIXTURES / "opt-post")
    sequences = texts(checkpoint)
    count = checkpoint.spec.block_count
    formats = [None if block % 3 == 0 else Format.of((2, 4)[block % 2]) for block in range(count)]
    expected = brute_force(checkpoint, formats, sequences)
    for chosen in (None, backend):
        found = measure_plan_kl(checkpoint, formats, sequences, Options(chosen), tmp_path)
        assert found == pytest.approx(expected, rel=1e-2)
    assert measure_plan_kl(checkpoint, [None] * count, sequences) == 0.0
    with pytest.raises(ValueError, match="formats"):
        measure_plan_kl(checkpoint, formats[1:], sequences)


def test_predictions_are_sums() -> None:
    checkpoint = Checkpoint.open(FIXTURES / "llama")
    sequences = texts(checkpoint)
    qualities = measure_quality(checkpoint, (3, 4), sequences)
    plans = random_plans(checkpoint.spec.block_count, (3, 4), 2)
    checks = check_plans(checkpoint, qualities, plans, sequences)
    for plan, check in zip(plans, checks, strict=True):
        assert check.bits == plan
        kls = [item.kl for item in qualities if plan[item.block] == item.bits]
        assert check.predicted_kl == pytest.approx(sum(kls))
        formats = [Format.of(bits) for bits in plan]
        expected = brute_force(checkpoint, formats, sequences)
        assert check.measured_kl == pytest.approx(expected, rel=1e-2)


def test_random_plans_are_mixed_and_the_same_each_time() -> None:
    plans = random_plans(10, (2, 4, 8), 5)
    assert plans == random_plans(10, (2, 4, 8), 5)
    assert all(len(plan) == 10 and len(set(plan)) > 1 for plan in plans)
    assert random_plans(3, (4,), 1) == [(4, 4, 4)]


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0, 30.0])
def test_divergences_in_fp32_are_those_in_fp64(size: float) -> None:
    random = np.random.default_rng(0)
    expected = (4 * random.standard_normal((5, 3000))).astype(np.float32)
    # A shift of all logits changes nothing.
    got = (expected + size * random.standard_normal(expected.shape) + 2).astype(np.float32)
    one, other = (_log_chances(logits.astype(np.float64)) for logits in (expected, got))
    exact = (np.exp(one) * (one - other)).sum(axis=1)
    assert divergences(expected, got) == pytest.approx(exact, rel=2e-3)
    assert divergences(expected, expected).max() == 0


@pytest.mark.parametrize(
    ("sequences", "message"),
    [([], "no calibration text"), ([[]], "0 tokens"), ([[1, 10**6]], "token ids"),
     ([[1] * 10**4], "tokens: the model takes")],
)  # fmt: skip
def test_unusable_texts(sequences: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure_quality(Checkpoint.open(FIXTURES / "llama"), (4,), sequences)


def test_predictions_that_are_no_numbers_spoil_no_other_measurements(tmp_path: Path) -> None:
    """A NaN among them made the whole file of a device's calibration one that is damaged."""
    checkpoint = overflowing(tmp_path / "model")
    store = CalibrationStore(tmp_path / "calibration.json")
    store.put({"of": "the device"}, (1.0,))
    with (
        np.errstate(all="ignore"),
        pytest.raises(BackendError, match="predictions are not finite numbers"),
    ):
        measure_quality(checkpoint, [8], [[1, 2, 3, 4]], store=store)
    assert store.get({"of": "the device"}) == (1.0,)


def test_passages() -> None:
    assert passages_of("one\ntwo\n\n\n three  \n") == ["one two", "three"]
    pieces = split_passages([[1, 2, 3, 4, 5], [6], [7, 8]], sequence_tokens=2)
    assert pieces == [[1, 2], [3, 4], [7, 8]]
    assert split_passages([[1, 2, 3, 4, 5]], 3, max_tokens=4) == [[1, 2, 3]]
    assert split_passages([[1, 2, 3], [4, 5, 6]], 8, max_tokens=5) == [[1, 2, 3], [4, 5]]


def test_the_built_in_text_is_a_few_hundred_words() -> None:
    passages = built_in_text()
    assert len(passages) >= 10
    assert 500 < sum(len(passage.split()) for passage in passages) < 1500
    assert all(passage.isascii() for passage in passages)


def test_normalized_weight_error() -> None:
    assert BlockSensitivity(0, 4, 0.1, 0.32).normalized_weight_error == pytest.approx(0.02)
