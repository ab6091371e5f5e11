"""Measures what fewer bits do to a model, in one pass over its blocks and soon enough for a load.

``shoal calibrate --quality`` measures each block at each width. That costs as many passes as there
are blocks. Here each block is quantized once, at 4 bits. The original model, one student for each
block and one student with every block quantized go through the blocks together. So each block is
read once. A block's loss at another width is its loss at 4 bits times the ratio of the squared
weight errors, which a sample of its rows tells (docs/calibration.md). A block whose file has 4-bit
codes loses nothing there, and is measured at 3 bits.

It runs in numpy alone: no backend and no agent is needed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from model import costs
from model.artifact import Tensor
from model.checkpoint import Checkpoint
from model.divergence import divergences
from model.errors import Cancelled
from model.experts import ExpertCounts
from model.quantize import BITS, Format, QuantizedMatrix, Quantizer, own_format, quantize
from model.reference import Observe, ReferenceModel
from model.spec import QUANTIZED_TENSORS, ModelSpec

MEASURED_BITS = 4
"""The width that is measured. Losses there are far above rounding, and small enough to add up."""

NEXT_BITS = 3
"""The width that is measured of blocks whose file has codes of MEASURED_BITS."""

ESTIMATE_MARGIN = 1.25
"""Least factor on sums. A plan that exceeds its sum even so is found when it is measured whole."""

SEQUENCE_TOKENS = 64
LEAST_TOKENS, MOST_TOKENS = 64, 256

AIMED_FLOPS, MOST_FLOPS = 6e12, 4e13
"""Work that decides how many tokens are measured, and from which on nothing is."""

_SAMPLED_ROWS = 96
_ROWS = 1 << 10
"""Hidden rows that go through a block at once."""

_LOGITS = 1 << 23
"""Logits of one student that are in memory at once."""

OnStep = Callable[[int, int], None]
Rows = npt.NDArray[np.float32]
Tensors = Mapping[str, npt.NDArray[np.float32] | QuantizedMatrix]


class LossUnknown(Exception):
    """The losses of fewer bits could not be measured. The text is one clause that says why."""


@dataclass(frozen=True, slots=True)
class LossEstimate:
    """The KL divergence that each block adds, in nats per token, by bits.

    ``margin`` is what a plan's sum is multiplied with. ``tokens`` were run, in ``seconds``.
    ``plans`` maps the bits of all blocks to the measured divergence of that plan. ``experts``: how
    many of the tokens each expert got, by layer; None for a model without experts, and where an
    earlier version has measured.
    """

    blocks: tuple[Mapping[int, float], ...]
    margin: float
    tokens: int
    seconds: float
    plans: Mapping[tuple[int, ...], float] = field(default_factory=dict)
    experts: ExpertCounts | None = None


def affordable_tokens(spec: ModelSpec) -> int:
    """Return how many tokens a measurement should run. Raises LossUnknown for too large a model."""
    last = spec.head_block
    # Every student runs through the blocks behind its own; the original and the whole one too.
    flops = sum(
        costs.block_flops(spec, block, SEQUENCE_TOKENS) * (block + 2) for block in range(1, last)
    )
    flops += costs.block_flops(spec, last, SEQUENCE_TOKENS) * (last + 3)
    if flops * LEAST_TOKENS > MOST_FLOPS:
        raise LossUnknown("the model is too large to measure while it loads")
    tokens = int(AIMED_FLOPS / flops) // SEQUENCE_TOKENS * SEQUENCE_TOKENS
    return max(LEAST_TOKENS, min(MOST_TOKENS, tokens))


def needed_bytes(spec: ModelSpec) -> int:
    """Return the memory that a measurement takes: the largest block in fp32, and what it makes."""
    weights = max(
        sum(math.prod(shape) for shape in spec.block_tensors(block).values())
        for block in range(spec.block_count)
    )
    hidden = spec.block_count * MOST_TOKENS * spec.hidden
    return 6 * weights + 4 * hidden + 16 * min(_LOGITS, MOST_TOKENS * spec.vocab)


def estimate_losses(
    checkpoint: Checkpoint,
    sequences: Sequence[Sequence[int]],
    scheme: Quantizer,
    group_size: int,
    on_step: OnStep,
    cancelled: Callable[[], bool],
) -> LossEstimate:
    """Measure every block's loss at 4 bits and tell the other widths' from it.

    sequences: token ids, each sequence at most the model's context. on_step: gets (blocks done,
    blocks). Raises LossUnknown, Cancelled, model.errors.ModelError for unreadable weights.
    """
    started_s = time.monotonic()
    spec, last = checkpoint.spec, checkpoint.spec.head_block
    students = _Students(spec, sequences, cancelled)
    widths = {bits: Format.of(bits, scheme, group_size) for bits in BITS}
    ratios = []
    for block in range(spec.block_count):
        tensors, kept = dict(checkpoint.block(block)), checkpoint.own_codes(block)
        native = checkpoint.native_format(block)
        measured = NEXT_BITS if native and native.bits == MEASURED_BITS else MEASURED_BITS
        formats = {bits: own_format(native, fmt) for bits, fmt in widths.items()}
        ratios.append(_error_ratios(tensors, kept, formats, measured))
        before = students.advance(block, tensors)
        codes = checkpoint.kept(block, formats[measured])
        students.add(block, _quantized(tensors, codes, formats[measured]), before)
        on_step(block + 1, last + 1)
    singles, whole = students.losses()
    if not all(map(math.isfinite, (*singles, whole))):
        raise LossUnknown("the model's predictions are not finite numbers")
    total = math.fsum(singles)
    return LossEstimate(
        tuple(
            {bits: kl * ratio for bits, ratio in row.items()}
            for kl, row in zip(singles, ratios, strict=True)
        ),
        max(ESTIMATE_MARGIN, whole / total if total > 0 else 1.0),
        sum(map(len, sequences)),
        time.monotonic() - started_s,
        experts=students.experts(),
    )


def plan_loss(
    checkpoint: Checkpoint,
    formats: Sequence[Format],
    sequences: Sequence[Sequence[int]],
    on_step: OnStep,
    cancelled: Callable[[], bool],
) -> float:
    """Measure the KL divergence of a plan, one format per block. All else: ``estimate_losses``."""
    students = _Students(checkpoint.spec, sequences, cancelled)
    for block, fmt in enumerate(formats):
        tensors = dict(checkpoint.block(block))
        before = students.advance(block, tensors)
        codes = checkpoint.kept(block, fmt)
        students.add(block, _quantized(tensors, codes, fmt), before, alone=False)
        on_step(block + 1, len(formats))
    _, whole = students.losses()
    if not math.isfinite(whole):
        raise LossUnknown("the model's predictions are not finite numbers")
    return whole


class _Students:
    """The original model's hidden rows, and those of its students, at the same block."""

    def __init__(
        self, spec: ModelSpec, sequences: Sequence[Sequence[int]], cancelled: Callable[[], bool]
    ) -> None:
        self._spec = spec
        self._cancelled = cancelled
        self._lengths = [len(one) for one in sequences]
        self._count = sum(self._lengths)
        self._teacher: Rows = np.concatenate([np.asarray(one, np.int64) for one in sequences])
        self._whole = self._teacher
        self._singles: list[Rows] = []
        self._sums: list[float] = []
        self._expected: list[Rows] = []
        self._whole_sum = 0.0
        self._experts: list[tuple[int, ...]] = []

    def advance(self, block: int, tensors: Tensors) -> Rows:
        """Run the original and the students through an original block; its input before."""
        before = self._teacher
        model = ReferenceModel(self._spec, [tensors], first_block=block)
        if block == self._spec.head_block:
            self._expected = [self._logits(model, before[part]) for part in self._parts()]
            self._sums = [self._divergence(model, rows) for rows in self._singles]
        elif block > 0 and (experts := self._spec.layer(block).experts) is not None:
            counts = [0] * experts.count
            counting = ReferenceModel(
                self._spec, [tensors], first_block=block, observe=_counter(counts)
            )
            (self._teacher,) = self._run(counting, [before])
            self._singles = self._run(model, self._singles)
            self._experts.append(tuple(counts))
        else:
            self._teacher, *self._singles = self._run(model, [before, *self._singles])
        return before

    def add(self, block: int, changed: Tensors, before: Rows, *, alone: bool = True) -> None:
        """Run the wholly quantized model through a block, and ``alone`` add the block's student."""
        model = ReferenceModel(self._spec, [changed], first_block=block)
        if block == self._spec.head_block:
            self._whole_sum = self._divergence(model, self._whole)
            self._sums += [self._divergence(model, before)] if alone else []
        else:
            self._whole, *single = self._run(model, [self._whole, before][: 1 + alone])
            self._singles += single

    def experts(self) -> ExpertCounts | None:
        """How many rows of the original each expert got, in the layers so far."""
        return ExpertCounts(tuple(self._experts)) if self._experts else None

    def losses(self) -> tuple[list[float], float]:
        """Mean KL divergences, in nats: of each block alone, and of all together."""
        return [total / self._count for total in self._sums], self._whole_sum / self._count

    def _run(self, model: ReferenceModel, students: Sequence[Rows]) -> list[Rows]:
        """Run some students through a block, several at a time: larger products are faster."""
        done: list[Rows] = []
        together = max(1, _ROWS // self._count)
        for begin in range(0, len(students), together):
            if self._cancelled():
                raise Cancelled
            some = students[begin : begin + together]
            rows = model.forward_sequences(np.concatenate(some), self._lengths * len(some))
            done += np.split(rows, len(some))
        return done

    def _parts(self) -> list[slice]:
        step = max(1, _LOGITS // self._spec.vocab)
        return [slice(begin, begin + step) for begin in range(0, self._count, step)]

    def _logits(self, model: ReferenceModel, rows: Rows) -> Rows:
        if self._cancelled():
            raise Cancelled
        logits: Rows = model.forward(rows)
        return logits

    def _divergence(self, model: ReferenceModel, rows: Rows) -> float:
        """The sum over all positions."""
        return math.fsum(
            float(divergences(expected, self._logits(model, rows[part])).sum())
            for part, expected in zip(self._parts(), self._expected, strict=True)
        )


def _counter(counts: list[int]) -> Observe:
    """Return a function that counts the rows of each expert."""

    def observe(name: str, expert: int | None, rows: Rows) -> None:
        if name == "up" and expert is not None:
            counts[expert] += len(rows)

    return observe


def _quantized(
    tensors: dict[str, npt.NDArray[np.float32]], kept: Mapping[str, Tensor], fmt: Format
) -> Tensors:
    """Return a block's tensors in a format. ``tensors`` is emptied meanwhile."""
    return {
        name: kept[name]
        if name in kept
        else quantize(tensor, fmt, name)
        if name in QUANTIZED_TENSORS
        else tensor
        for name, tensor in ((name, tensors.pop(name)) for name in [*tensors])
    }


def _error_ratios(
    tensors: Mapping[str, npt.NDArray[np.float32]],
    kept: Mapping[str, QuantizedMatrix],
    formats: Mapping[int, Format],
    measured: int,
) -> dict[int, float]:
    """Bits -> squared weight error of a block, as a multiple of that at ``measured`` bits."""
    totals = dict.fromkeys(BITS, 0.0)
    for name, weights in tensors.items():
        if name not in QUANTIZED_TENSORS:
            continue
        step = max(1, len(weights) // _SAMPLED_ROWS)
        sample = np.ascontiguousarray(weights[::step])
        for bits, fmt in formats.items():
            if name in kept and kept[name].format == fmt:
                continue  # Stored as it is.
            matrix = quantize(sample, fmt, name)
            error = float(np.square(matrix.dequantize() - sample).mean(dtype=np.float64))
            totals[bits] += error * weights.size
    least = totals[measured]
    return {bits: total / least if least else 0.0 for bits, total in totals.items()}
