"""Measures each block's sensitivity: how much fewer bits in that block change the predictions.

The teacher is the original model. A student is the same model with one block quantized. The
block's sensitivity is the mean Kullback-Leibler divergence KL(teacher || student) of their
next-token distributions, over every position of a calibration text. The teacher runs once and
leaves the input of each block on disk. The students of a block start from that input. They run
together through the original blocks behind it, with one block in memory at a time.

Cost, for L blocks, B widths and N tokens: about L^2 / 2 * B * N tokens through a layer, L * (B + 1)
* N through the head; disk for L * N hidden rows; memory for two blocks in fp32, (B + 1) * N hidden
rows and a few rows of logits. More blocks are kept where memory is free.

Decoder layers run on a backend if one is given: it is several times as fast as the reference.
Embedding and head run on ``model.reference``, because a stage gives logits of a prompt's last row
only. Activations are fp32. The exception is a backend that always rounds them (its
``exact_container_bits`` is empty): the layers' sensitivities then include that rounding.

Source: DILEMMA, "Estimating LLM Performance After Layer-wise Quantization", for teacher, student
and weight error. This project measures the divergence of predictions instead of weights.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calibration.quality.students import (
    BY_REFERENCE,
    BlockSource,
    Options,
    Sequences,
    check_text,
    students_of,
    text_key,
)
from calibration.store import CalibrationStore
from model.checkpoint import Checkpoint
from model.quantize import DEFAULT_GROUP_SIZE, DEFAULT_SCHEME, Format, Quantizer


@dataclass(frozen=True, slots=True)
class BlockSensitivity:
    """The sensitivity of one block at one width, with every other block as it is.

    ``kl`` is the mean over positions, in nats. ``weight_error`` is max|w - w_b| over the matrices.
    """

    block: int
    bits: int
    kl: float
    weight_error: float

    @property
    def normalized_weight_error(self) -> float:
        """max|w - w_b| / 2^b, which is what DILEMMA bounds by delta."""
        return self.weight_error / 2.0**self.bits


@dataclass(frozen=True, slots=True)
class PlanCheck:
    """A plan's divergence: predicted as the sum over its blocks, and measured."""

    bits: tuple[int, ...]
    predicted_kl: float
    measured_kl: float


def measure_quality(
    checkpoint: Checkpoint,
    bits: Sequence[int],
    sequences: Sequences,
    options: Options = BY_REFERENCE,
    *,
    scheme: Quantizer = DEFAULT_SCHEME,
    group_size: int = DEFAULT_GROUP_SIZE,
    store: CalibrationStore | None = None,
    directory: Path | None = None,
) -> tuple[BlockSensitivity, ...]:
    """Measure the sensitivity of every block at each of ``bits``; sorted by block, then by width.

    sequences: token ids, each sequence at most the model's context.
    store: its results are not measured again. Each new one is stored at once, so that an
        interrupted run continues where it stopped.
    directory: holds hidden states and blocks meanwhile.

    Raises ValueError for unusable sequences, CheckpointError for unreadable or absurd weights and a
    full disk, BackendError if the backend fails.
    """
    check_text(checkpoint.spec, sequences)
    formats = {width: Format.of(width, scheme, group_size) for width in sorted(set(bits))}
    blocks = range(checkpoint.spec.block_count)
    key = text_key(checkpoint, sequences)
    if options.backend is not None:
        # Rounded activations make a block more sensitive than its weights alone do.
        key["backend"] = options.backend.probe().backend
    found: dict[tuple[int, int], tuple[float, ...]] = {}
    for block in blocks:
        for width, fmt in formats.items():
            own = _format_key(block, checkpoint.format_of(block, fmt))
            known = None if store is None else store.get(key | own)
            if known is not None and len(known) == 2:
                found[block, width] = known
    missing = {
        block: widths
        for block in blocks
        if (widths := [fmt for bits, fmt in formats.items() if (block, bits) not in found])
    }
    for quality in measure_blocks(checkpoint, missing, sequences, options, directory):
        values = quality.kl, quality.weight_error
        found[quality.block, quality.bits] = values
        if store is not None:
            fmt = checkpoint.format_of(quality.block, formats[quality.bits])
            store.put(key | _format_key(quality.block, fmt), values)
    return tuple(BlockSensitivity(*place, *values) for place, values in sorted(found.items()))


def measure_blocks(
    source: BlockSource,
    wanted: Mapping[int, Sequence[Format]],
    sequences: Sequences,
    options: Options,
    directory: Path | None = None,
) -> Generator[BlockSensitivity, None, None]:
    """Yield the sensitivity of each block in each of its wanted formats as soon as it is measured.

    Each original block is read from ``source`` once per pass, unless there is room to keep it.
    All else is as in ``measure_quality``.
    """
    check_text(source.spec, sequences)
    if not wanted:
        return
    with students_of(source, sequences, options, directory) as students:
        head = source.spec.head_block
        # The block, the blocks behind it, and the head.
        students.expect(head + sum(1 + head - block for block in wanted))
        final = students.teach(wanted)
        for block, formats in wanted.items():
            for width, values in students.changed(block, formats, final).items():
                yield BlockSensitivity(block, width, *values)


def measure_plans(
    source: BlockSource,
    plans: Sequence[Sequence[Format | None]],
    sequences: Sequences,
    options: Options,
    directory: Path | None = None,
) -> Generator[float, None, None]:
    """Yield the mean KL(original || plan) in nats of each plan, given as one format per block.

    The format None leaves a block as it is. All else is as in ``measure_blocks``. Raises ValueError
    if the number of formats is not the number of blocks.
    """
    check_text(source.spec, sequences)
    count = source.spec.block_count
    for formats in plans:
        if len(formats) != count:
            raise ValueError(f"{len(formats)} formats for a model with {count} blocks")
    if not plans:
        return
    with students_of(source, sequences, options, directory) as students:
        students.expect(count - 1 + count * len(plans))
        final = students.teach()
        for formats in plans:
            yield students.plan_kl(formats, final)


def measure_plan_kl(
    checkpoint: Checkpoint,
    formats: Sequence[Format | None],
    sequences: Sequences,
    options: Options = BY_REFERENCE,
    directory: Path | None = None,
) -> float:
    """Measure one plan as ``measure_plans`` does."""
    (kl,) = measure_plans(checkpoint, [formats], sequences, options, directory)
    return kl


def check_plans(
    checkpoint: Checkpoint,
    qualities: Sequence[BlockSensitivity],
    plans: Sequence[Sequence[int]],
    sequences: Sequences,
    options: Options = BY_REFERENCE,
    *,
    scheme: Quantizer = DEFAULT_SCHEME,
    group_size: int = DEFAULT_GROUP_SIZE,
    directory: Path | None = None,
) -> list[PlanCheck]:
    """Return predicted and measured divergence of plans, each given as the bits of every block.

    Raises KeyError for a width that ``qualities`` does not cover. All else: ``measure_plan_kl``.
    """
    kl = {(quality.block, quality.bits): quality.kl for quality in qualities}
    predicted = [sum(kl[place] for place in enumerate(plan)) for plan in plans]
    formats = [[Format.of(width, scheme, group_size) for width in plan] for plan in plans]
    measured = measure_plans(checkpoint, formats, sequences, options, directory)
    return [
        PlanCheck(tuple(plan), before, after)
        for plan, before, after in zip(plans, predicted, measured, strict=True)
    ]


def random_plans(block_count: int, bits: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """The same mixed plans every time. Each draws the blocks' widths from some of ``bits``."""
    random = np.random.default_rng(0)
    widths = sorted(set(bits))
    plans = []
    for _ in range(count):
        some = random.choice(widths, random.integers(min(2, len(widths)), len(widths) + 1), False)
        plans.append(tuple(int(width) for width in random.choice(some, block_count)))
    return plans


def _format_key(block: int, fmt: Format) -> dict[str, Any]:
    return {
        "block": block,
        "bits": fmt.bits,
        "scheme": fmt.scheme,
        "group": fmt.group_size,
        "symmetric": fmt.symmetric,
    }
