"""Chooses the codes of one block by the rows that a text gives it.

The block's matrices are rounded in the order in which rows pass them. After each step the block
runs again, so that the next matrices see what the rounded ones make of the rows. They aim at the
outputs of the original block, and so make up for a part of the errors before them. The rows that
enter the block are the original model's. So a block's codes depend on no other block's width, and
any plan can use them.

Experts see the rows that the router sends them. An expert that no row reached is rounded to
nearest. The token table has no inputs but token ids: its groups are clipped.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from model.artifact import Tensor
from model.experts import STACKED, rows_of
from model.quantize import FloatArray, Format, QuantizedMatrix, Quantizer, quantize, stack
from model.quantizers.gptq import Inputs, gptq
from model.quantizers.grids import clipped
from model.reference import Observe, ReferenceModel
from model.spec import QUANTIZED_TENSORS, ModelSpec

Tensors = Mapping[str, npt.NDArray[np.float32]]
Seen = dict[tuple[str, int | None], FloatArray]
"""The rows that matrices take, by the names of ``model.reference.Observe``."""

_STEPS = {
    "embedding": (("project_in",),),
    "layer": (
        ("q", "k", "v"),
        ("o",),
        ("gate", "up", "shared_gate", "shared_up"),
        ("down", "shared_down"),
    ),
    "head": (("project_out",), ("lm_head",)),
}
"""The matrices of each kind of block that are rounded together, in the order of their rows."""

_SHARED_INPUT = {"k": "q", "v": "q", "gate": "up", "shared_gate": "shared_up"}

CANDIDATES: tuple[Quantizer, ...] = ("gptq", "clip", "rtn")
"""The quantizers that ``auto`` compares, with the favourite first."""

FAVOUR = 0.8
"""The favourite learns from less text while it is compared, so its error counts as this part."""

KEPT_BACK = 4
"""``auto`` keeps one of so many sequences back, to compare quantizers on."""

MOST_CLIPPED_BITS = 3
"""Up to this width, ``gptq`` clips groups. Wider grids are fine enough as they are, measured."""

_LOGITS = 1 << 23


class _SeenEnough(Exception):
    """Ends a pass through a block early."""


class BlockText:
    """The rows that enter one block, and what its original makes of them."""

    def __init__(
        self,
        spec: ModelSpec,
        block: int,
        tensors: Tensors,
        rows: Any,
        lengths: Sequence[int],
    ) -> None:
        """rows: token ids [n], or hidden [n, hidden] of sequences with these ``lengths``."""
        self.spec, self.block, self.tensors = spec, block, tensors
        self._rows, self._lengths = rows, list(lengths)
        self.seen, self.outputs = self.run(tensors)

    def rows_before(self, tensors: Mapping[str, Tensor], matrix: str) -> Seen:
        """Run the block with other tensors as far as this matrix. Returns the rows seen."""
        seen: Seen = {}

        def observe(name: str, expert: int | None, rows: FloatArray) -> None:
            seen[name, expert] = rows
            if name == matrix and expert is None:  # Experts come one by one.
                raise _SeenEnough

        with contextlib.suppress(_SeenEnough):
            self._pass(tensors, observe)
        return seen

    def run(self, tensors: Mapping[str, Tensor]) -> tuple[Seen, FloatArray]:
        """Run the block with other tensors. Returns the rows seen, and the outputs.

        The head's outputs are the rows before its last matrix: logits may not fit in memory.
        """
        seen: Seen = {}

        def observe(name: str, expert: int | None, rows: FloatArray) -> None:
            seen[name, expert] = rows

        return seen, self._pass(tensors, observe)

    def _pass(self, tensors: Mapping[str, Tensor], observe: Observe) -> FloatArray:
        model = ReferenceModel(self.spec, [tensors], first_block=self.block, observe=observe)
        if self.block == self.spec.head_block:
            return model.before_logits(self._rows)
        return model.forward_sequences(self._rows, self._lengths)

    def part(self, first: bool) -> BlockText:
        """Return the text that quantizers learn from, or else the sequences kept back.

        A single sequence is both.
        """
        count = len(self._lengths)
        if count == 1:
            return self
        held = set(range(KEPT_BACK - 1, count, KEPT_BACK)) or {count - 1}
        ends = np.cumsum(self._lengths)
        chosen = [index for index in range(count) if (index in held) != first]
        rows = [self._rows[ends[index] - self._lengths[index] : ends[index]] for index in chosen]
        lengths = [self._lengths[index] for index in chosen]
        return BlockText(self.spec, self.block, self.tensors, np.concatenate(rows), lengths)

    def error(self, tensors: Mapping[str, Tensor]) -> float:
        """Return the squared error of the block's outputs with other tensors."""
        _, outputs = self.run(tensors)
        if "lm_head.weight" not in tensors:  # An encoder's head has none either.
            return float(np.square(outputs - self.outputs).sum(dtype=np.float64))
        total, table = 0.0, tensors["lm_head.weight"]
        step = max(1, _LOGITS // max(1, len(outputs)))
        for begin in range(0, table.shape[0], step):
            part = slice(begin, begin + step)
            own = table.dequantize(part) if isinstance(table, QuantizedMatrix) else table[part]
            logits = outputs @ own.T - self.outputs @ self.tensors["lm_head.weight"][part].T
            total += float(np.square(logits).sum(dtype=np.float64))
        return total


def prepared_block(text: BlockText, fmt: Format, quantizer: Quantizer) -> dict[str, Tensor]:
    """Return a block's tensors with its matrices in a group-wise format.

    Raises CheckpointError for weights that cannot be stored.
    """
    if quantizer == "auto":
        return _best(text, fmt)
    if quantizer == "gptq":
        return _gptq(text, fmt)
    return rounded_block(text.tensors, fmt, quantizer)


def rounded_block(tensors: Tensors, fmt: Format, quantizer: Quantizer) -> dict[str, Tensor]:
    """Do as ``prepared_block`` for a quantizer that needs no text: ``clip`` or ``rtn``."""
    return {
        name: tensor
        if name not in QUANTIZED_TENSORS
        else clipped(tensor, fmt)
        if quantizer == "clip"
        else quantize(tensor, fmt, name)
        for name, tensor in tensors.items()
    }


def _best(text: BlockText, fmt: Format) -> dict[str, Tensor]:
    """Return the block by the quantizer with the least error on sequences that it did not see."""
    learned, held = text.part(first=True), text.part(first=False)
    errors = {
        quantizer: held.error(prepared_block(learned, fmt, quantizer)) for quantizer in CANDIDATES
    }
    errors[CANDIDATES[0]] *= FAVOUR
    return prepared_block(text, fmt, min(CANDIDATES, key=lambda quantizer: errors[quantizer]))


def _gptq(text: BlockText, fmt: Format) -> dict[str, Tensor]:
    spec, block = text.spec, text.block
    made: dict[str, Tensor] = dict(text.tensors)
    if "tokens.weight" in made:
        made["tokens.weight"] = clipped(text.tensors["tokens.weight"], fmt)
    seen, changed = text.seen, "tokens.weight" in made
    for step in _STEPS[spec.block_kind(block)]:
        present = [name for name in step if f"{name}.weight" in made]
        if not present:
            continue
        if changed:
            last = _SHARED_INPUT.get(present[0], present[0])
            seen = text.rows_before(made, last)
        prepared: dict[tuple[str, int | None], Inputs] = {}
        for name in present:
            made[f"{name}.weight"] = _matrix(text, f"{name}.weight", seen, prepared, fmt)
        changed = True
    return made


def _matrix(
    text: BlockText,
    name: str,
    seen: Seen,
    prepared: dict[tuple[str, int | None], Inputs],
    fmt: Format,
) -> QuantizedMatrix:
    """Round a matrix, or those of all experts in it. ``prepared`` keeps shared inputs."""
    weights, module = text.tensors[name], name.removesuffix(".weight")
    where = _SHARED_INPUT.get(module, module)
    parts = []
    for expert, rows in _experts_of(text, name):
        key = where, expert
        if key not in seen or not len(seen[key]):  # The router sent no row here.
            parts.append(clipped(weights[rows], fmt))
            continue
        if key not in prepared:
            # Rows of an expert are those of other tokens as soon as the router decides otherwise.
            expected = text.seen[key] if expert is None and seen is not text.seen else None
            prepared[key] = Inputs.of(seen[key], fmt.group_size, expected)
        parts.append(gptq(weights[rows], prepared[key], fmt, clip=fmt.bits <= MOST_CLIPPED_BITS))
    return _stacked(parts)


def _experts_of(text: BlockText, name: str) -> Iterator[tuple[int | None, slice]]:
    """Yield (expert, its rows of a matrix); (None, all rows) of a matrix without experts."""
    if text.spec.block_kind(text.block) == "layer":
        layer = text.spec.layer(text.block)
        if layer.experts is not None and name in STACKED:
            first = layer.experts.first
            for expert in range(first, first + layer.experts.stored):
                yield expert, rows_of(layer, expert, name)
            return
    yield None, slice(0, len(text.tensors[name]))


def _stacked(parts: Sequence[QuantizedMatrix]) -> QuantizedMatrix:
    """Return the experts' matrices as one. Scales become fp32 if one of them needs it."""
    if len({part.scale_data.dtype for part in parts if part.scale_data is not None}) > 1:
        parts = [
            QuantizedMatrix(part.shape, part.format, part.data, part.scales(), part.zero_data)
            for part in parts
        ]
    return stack(parts)


def needed_bytes(spec: ModelSpec, tokens: int) -> int:
    """Return the memory that preparing takes: the largest block, its rows and moments."""
    shapes = [spec.block_tensors(block) for block in range(spec.block_count)]
    weights = max(sum(math.prod(shape) for shape in block.values()) for block in shapes)
    columns = max(
        shape[1] for block in shapes for name, shape in block.items() if name in QUANTIZED_TENSORS
    )
    widest = max(spec.hidden, columns)
    active = max(1 if one.experts is None else one.experts.active for one in spec.layers)
    return 4 * (2 * weights + 4 * columns**2 + 8 * active * tokens * widest)
