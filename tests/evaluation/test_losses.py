"""Losses against transformers, and divergences against whole models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.base import BackendError
from backends.registry import backend_class
from calibration.quality.students import BY_REFERENCE, Options
from evaluation import losses as module
from evaluation.losses import Loss, Target, measure_losses, nats
from model.checkpoint import Checkpoint
from model.quantize import Format, quantize
from model.reference import ReferenceModel
from model.spec import QUANTIZED_TENSORS
from tests.damaged import overflowing

FIXTURES = Path(__file__).parents[1] / "fixtures"

TRANSFORMERS_LOSSES = {
    "llama": 6.3493242263793945,
    "opt-pre": 5.842154502868652,
    "opt-post": 5.805604934692383,
    "qwen3": 5.785480976104736,
    "mistral": 6.289383411407471,
    "qwen2": 6.341010570526123,
    "llama-linear": 6.0692524909973145,
    "llama-dynamic": 6.263704299926758,
}
"""``model(input_ids=prompt, labels=prompt).loss`` of transformers 5.24, in fp32."""


def prompt_of(fixture: str) -> tuple[int, ...]:
    return tuple(np.load(FIXTURES / fixture / "golden.npz")["prompt"].tolist())


def whole(loss: Loss) -> tuple[float, ...]:
    assert loss.kl is not None
    assert loss.original_nats is not None
    return loss.tokens, loss.nats, loss.kl, loss.original_nats


@pytest.mark.parametrize("fixture", TRANSFORMERS_LOSSES)
def test_the_loss_is_that_of_transformers(fixture: str) -> None:
    checkpoint = Checkpoint.open(FIXTURES / fixture)
    tokens = prompt_of(fixture)
    formats = [None] * checkpoint.spec.block_count
    steps: list[tuple[int, int]] = []
    (found,) = measure_losses(
        checkpoint,
        {"as it is": formats},
        {5: Target(tokens, 1)},
        Options(backend_class("onnx_cpu")()),
        lambda done, total: steps.append((done, total)),
        with_original=True,
    )
    loss = found["as it is"][5]
    assert loss.tokens == len(tokens) - 1
    assert loss.nats / loss.tokens == pytest.approx(TRANSFORMERS_LOSSES[fixture], rel=2e-6)
    assert loss.original_nats == loss.nats
    assert loss.kl == pytest.approx(0, abs=1e-9)
    assert steps[-1][0] == steps[-1][1]


def expected(
    checkpoint: Checkpoint, formats: list[Format], target: Target
) -> tuple[float, float, float, float]:
    """The same sums in fp64, from two whole models."""
    blocks = []
    for block, fmt in enumerate(formats):
        tensors: dict[str, Any] = dict(checkpoint.block(block))
        for name in QUANTIZED_TENSORS & set(tensors):
            tensors[name] = quantize(tensors[name], fmt)
        blocks.append(tensors)
    student = ReferenceModel(checkpoint.spec, blocks, dtype=np.float64)
    teacher = ReferenceModel.from_checkpoint(checkpoint, np.float64)
    logs = []
    for model in (student, teacher):
        logits = model.forward(target.tokens)[target.first - 1 : -1]
        logs.append(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
    wanted = np.asarray(target.tokens[target.first :])
    got, original = (-log[np.arange(len(wanted)), wanted].sum() for log in logs)
    kl = (np.exp(logs[1]) * (logs[1] - logs[0])).sum()
    return len(wanted), got, kl, original


def test_several_runs_and_targets_are_those_of_whole_models(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Chunks are so small that each has one or two targets; logits come in parts, too."""
    monkeypatch.setattr(module, "CHUNK_TOKENS", 30)
    monkeypatch.setattr(module, "_LOGITS", 1000)
    checkpoint = Checkpoint.open(FIXTURES / "qwen3")
    tokens = prompt_of("qwen3")
    count = checkpoint.spec.block_count
    targets = {3: Target(tokens, 1), 1: Target(tokens[:9], 4), 8: Target(tokens[5:20], 14)}
    runs = {
        "4": [Format.of(4)] * count,
        "mixed": [Format.of(bits) for bits in ([3, 8, 16] * count)[:count]],
    }
    found: dict[str, dict[int, Loss]] = {name: {} for name in runs}
    chunks = 0
    for chunk in measure_losses(
        checkpoint, runs, targets, BY_REFERENCE, lambda *_: None, with_original=True
    ):
        chunks += 1
        for name, some in chunk.items():
            found[name] |= some
    assert chunks == 2
    for name, formats in runs.items():
        for item, target in targets.items():
            assert whole(found[name][item]) == pytest.approx(
                expected(checkpoint, formats, target), rel=1e-4, abs=1e-5
            )


@pytest.mark.parametrize("with_original", [True, False])
def test_predictions_that_are_no_numbers_have_no_loss(with_original: bool, tmp_path: Path) -> None:
    checkpoint = overflowing(tmp_path / "model")
    formats = [Format.of(8)] * checkpoint.spec.block_count
    measured = measure_losses(
        checkpoint,
        {"a": formats},
        {0: Target((1, 2, 3, 4), 1)},
        BY_REFERENCE,
        lambda *_: None,
        with_original=with_original,
    )
    with (
        np.errstate(all="ignore"),
        pytest.raises(BackendError, match="predictions are not finite numbers"),
    ):
        list(measured)


def test_without_the_original_there_is_no_divergence() -> None:
    checkpoint = Checkpoint.open(FIXTURES / "llama")
    runs = {"8": [Format.of(8)] * checkpoint.spec.block_count}
    (found,) = measure_losses(
        checkpoint,
        runs,
        {0: Target(prompt_of("llama"), 1)},
        BY_REFERENCE,
        lambda *_: None,
        with_original=False,
    )
    loss = found["8"][0]
    assert (loss.kl, loss.original_nats) == (None, None)
    assert loss.nats / loss.tokens == pytest.approx(TRANSFORMERS_LOSSES["llama"], rel=0.01)


def test_chances_of_far_logits_do_not_overflow() -> None:
    logits = np.asarray([[1e4, -1e4, 0.0]], np.float32)
    assert nats(logits, np.asarray([0])) == pytest.approx([0.0])
    assert nats(logits, np.asarray([1])) == pytest.approx([2e4])


@pytest.mark.parametrize("first", [0, 3, 4])
def test_an_expected_token_follows_another(first: int) -> None:
    with pytest.raises(ValueError, match="before the first expected"):
        Target((1, 2, 3), first)
