"""Measures a smaller model at some bits: losses in torch, and answers as shoal gives them."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch.nn import functional

from backends.base import Backend
from compression.errors import CompressionError
from compression.importance import divergence_sum
from compression.network import Network
from compression.text import Batch
from evaluation import squad
from evaluation.kept import Kept
from evaluation.losses import OnStep
from evaluation.tasks import Tasks
from evaluation.work import Answering, add_answers_here
from model.artifact import read_block, values_of, write_artifact
from model.checkpoint import Checkpoint
from model.quantize import Format
from model.spec import ModelSpec
from model.tokenizer import Tokenizer

Blocks = Sequence[Mapping[str, npt.NDArray[Any]]]

ANSWER_SLOTS = 8
LOSSLESS_BITS = 16
"""Blocks from so many bits on are left as they are."""


def stored(checkpoint: Checkpoint, formats: Sequence[Format]) -> tuple[Blocks, int]:
    """Return the values of all blocks as devices get them in these formats, and their files' bytes.

    The codes are those of the checkpoint's quantizer. Raises ModelError.
    """
    blocks, total = [], 0
    for block, fmt in enumerate(formats):
        values, size_bytes = _stored(checkpoint, block, fmt)
        blocks.append(values)
        total += size_bytes
    return blocks, total


def _stored(
    checkpoint: Checkpoint, block: int, fmt: Format
) -> tuple[Mapping[str, npt.NDArray[Any]], int]:
    """Return the values of one block, and the bytes of its file."""
    with tempfile.TemporaryDirectory(prefix=".compress-") as name:
        tensors = checkpoint.block_in(block, fmt)
        path = write_artifact(Path(name), block, tensors, fmt).path
        size_bytes = path.stat().st_size
        if fmt.bits >= LOSSLESS_BITS:
            return checkpoint.block(block), size_bytes
        codes = read_block(path, checkpoint.spec, block)[1]
        return {key: values_of(tensor) for key, tensor in codes.items()}, size_bytes


def student_of(spec: ModelSpec, blocks: Blocks) -> Network:
    """Return the network of stored blocks. A tied head has the codes of its own block."""
    student = Network(spec, blocks)
    _put(student, spec.head_block, blocks[-1])
    return student


def _put(student: Network, block: int, values: Mapping[str, npt.NDArray[Any]]) -> None:
    student.blocks[block] = {
        name: torch.tensor(value, dtype=torch.float32) for name, value in values.items()
    }


def block_losses(
    teacher: Network,
    checkpoint: Checkpoint,
    formats: Sequence[Format],
    batches: Sequence[Batch],
    on_step: OnStep,
) -> list[dict[int, float]]:
    """Return for each block what its stored values alone add to KL(teacher || model), by bits."""
    blocks = range(checkpoint.spec.block_count)
    lossless = [checkpoint.block(block) for block in blocks]
    student = student_of(checkpoint.spec, lossless)
    base = losses(teacher, student, batches)[1]
    rows: list[dict[int, float]] = []
    for block in blocks:
        row = {}
        for fmt in formats:
            on_step(len(rows), len(blocks))
            added = 0.0
            if fmt.bits < LOSSLESS_BITS:
                _put(student, block, _stored(checkpoint, block, fmt)[0])
                added = max(0.0, losses(teacher, student, batches)[1] - base)
            row[fmt.bits] = added
        rows.append(row)
        _put(student, block, lossless[block])
    return rows


def losses(teacher: Network, student: Network, batches: Sequence[Batch]) -> tuple[float, float]:
    """Return the loss of the expected tokens and KL(teacher || student), in nats per token.

    Raises CompressionError if one is not finite.
    """
    nats, kl, expected_count, count = 0.0, 0.0, 0, 0
    with torch.no_grad():
        for batch in batches:
            logits = student.forward(batch.tokens).logits
            wanted = teacher.forward(batch.tokens, at=batch.predicts).logits
            kl += float(divergence_sum(wanted, logits[batch.predicts]))
            count += len(wanted)
            # What follows the last token is not known, so it has no loss.
            known = batch.predicts[:, :-1] & batch.real[:, 1:]
            following = batch.tokens[:, 1:][known]
            nats += float(
                functional.cross_entropy(logits[:, :-1][known], following, reduction="sum")
            )
            expected_count += len(following)
    if not math.isfinite(nats + kl):
        raise CompressionError(
            "a model's predictions are not finite numbers: its weights are damaged or too large"
        )
    return nats / expected_count, kl / count


def answers(
    checkpoint: Checkpoint,
    tasks: Tasks,
    formats: Sequence[Format],
    backend: Backend,
    threads: int,
    on_step: OnStep,
) -> tuple[float, float]:
    """Return exact match and F1, in percent, of a model's answers.

    It is loaded as shoal loads it. Raises ModelError and BackendError.
    """
    tokenizer = Tokenizer.load(checkpoint.directory)
    with Kept(None, {}) as kept:
        answering = Answering(backend, threads, exact=False, slots=ANSWER_SLOTS)
        add_answers_here(kept, tasks, "", checkpoint, formats, tokenizer, answering, on_step)
        exact, f1 = 0.0, 0.0
        for item, question in tasks.questions.items():
            found = kept.get("", "answer", item) or {}
            text = found.get("answer")
            if isinstance(text, str):
                scores = squad.scores(text, question.answers, "1.1") if question.answers else (0, 0)
                exact, f1 = exact + scores[0], f1 + scores[1]
    count = len(tasks.questions)
    return 100 * exact / count, 100 * f1 / count
