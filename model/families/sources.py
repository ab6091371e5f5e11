"""Where a canonical tensor is read in a checkpoint, and what is done to it on reading.

Whatever is linear and constant is folded into the weights here, so that no backend knows of it:
fused or transposed matrices, interleaved rotary pairs, multipliers, norms that add one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from model.quantize import QuantizedMatrix

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A stored tensor, or a part of it. The steps run in the order of the fields.

    index: of the first axis: one expert of a stacked tensor [experts, ...].
    transposed: the matrix is stored [in, out].
    rows: half-open range of the first axis, (begin, end, step).
    pairs: rows are heads this wide, whose rotary pairs lie side by side (2 i, 2 i + 1). They become
        (i, i + width / 2). 0: nothing is moved.
    turned: (width, turned): rows are heads this wide, of which only the first ``turned`` rows are
        rotary pairs (i, i + turned / 2). They become (i, i + width / 2), and the other rows fill
        the rest of both halves.
    scale, add: value * scale + add.
    """

    name: str
    index: int | None = None
    transposed: bool = False
    rows: tuple[int, int, int] | None = None
    pairs: int = 0
    turned: tuple[int, int] | None = None
    scale: float = 1.0
    add: float = 0.0

    def shape_of(self, stored: Shape) -> Shape:
        """Return the shape after all steps. Raises ValueError if a step does not fit."""
        shape = stored
        if self.index is not None:
            if len(shape) < 2 or not 0 <= self.index < shape[0]:
                raise ValueError(f"has no part {self.index}")
            shape = shape[1:]
        if self.transposed:
            if len(shape) != 2:
                raise ValueError("is no matrix")
            shape = shape[::-1]
        if self.rows is not None:
            begin, end, step = self.rows
            if not shape or end > shape[0]:
                raise ValueError(f"has no rows up to {end}")
            shape = (len(range(begin, end, step)), *shape[1:])
        if self.pairs and (not shape or shape[0] % self.pairs or self.pairs % 2):
            raise ValueError(f"is not divided into heads of {self.pairs} rows")
        if self.turned is not None and (not shape or shape[0] % self.turned[0]):
            raise ValueError(f"is not divided into heads of {self.turned[0]} rows")
        return shape

    def apply(self, stored: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Return the values after all steps, a view of ``stored`` where possible.

        Writable ``stored`` is changed, because a copy would double the memory of a large table.
        """
        values = stored if self.index is None else stored[self.index]
        if self.transposed:
            values = values.T
        if self.rows is not None:
            values = values[slice(*self.rows)]
        if self.pairs:
            heads = values.reshape(-1, self.pairs // 2, 2, *values.shape[1:])
            values = heads.swapaxes(1, 2).reshape(values.shape)
        if self.turned is not None:
            heads = values.reshape(-1, self.turned[0], *values.shape[1:])
            values = heads[:, _halves(*self.turned)].reshape(values.shape)
        if self.scale != 1:
            place = values if values.flags.writeable else None
            values = np.multiply(values, np.float32(self.scale), out=place)
        if self.add:
            values = values + np.float32(self.add)
        return values

    @property
    def keeps_codes(self) -> bool:
        """Whether the steps move whole rows alone, so that a row's codes stay as they are."""
        return not self.transposed and self.scale == 1 and not self.add

    def apply_codes(self, stored: QuantizedMatrix, shape: Shape) -> QuantizedMatrix:
        """Do the steps on the codes of a tensor of this shape, if ``keeps_codes``."""
        rows = np.arange(stored.shape[0])
        moved = np.asarray(self.apply(rows.reshape(shape[:-1])), np.intp).reshape(-1)
        return stored if np.array_equal(moved, rows) else stored.take(moved)


Source = tuple[Piece, ...]
"""Pieces one below the other: the rows of the second follow those of the first."""


def _halves(width: int, turned: int) -> npt.NDArray[np.intp]:
    """Return which row of a head each of its rows becomes, as ``Piece.turned`` says."""
    rows, half, still = np.arange(width), turned // 2, turned + (width - turned) // 2
    return np.concatenate([rows[:half], rows[turned:still], rows[half:turned], rows[still:]])


def shape_of(pieces: list[Shape]) -> Shape:
    """Return the shape of pieces one below the other. Raises ValueError if widths differ."""
    first, *others = pieces
    if any(shape[1:] != first[1:] for shape in others):
        raise ValueError("has parts of different widths")
    return (sum(shape[0] for shape in pieces), *first[1:]) if others else first


def stacked(
    sources: Mapping[str, Source], shapes: Mapping[str, Shape], *groups: Sequence[str]
) -> dict[str, Source]:
    """Return sources in which the modules of a group are rows of one stored matrix, in order.

    sources: each module of a group names that whole matrix.
    shapes: of the canonical tensors.
    """
    parts = dict(sources)
    for group in groups:
        begin = 0
        for module in group:
            end = begin + shapes[f"{module}.weight"][0]
            parts |= changed(sources, (module,), rows=(begin, end, 1))
            begin = end
    return parts


def changed(
    sources: Mapping[str, Source], modules: Sequence[str], **steps: Any
) -> dict[str, Source]:
    """Return the sources of the weights and biases of some modules, with other steps."""
    return {
        name: tuple(replace(piece, **steps) for piece in source)
        for name, source in sources.items()
        if name.rpartition(".")[0] in modules
    }


def scaled(
    sources: Mapping[str, Source], modules: Sequence[str], factor: float
) -> dict[str, Source]:
    """Return the sources of the weights and biases of some modules, multiplied by a factor."""
    return {
        name: tuple(replace(piece, scale=piece.scale * factor) for piece in source)
        for name, source in sources.items()
        if name.rpartition(".")[0] in modules
    }
