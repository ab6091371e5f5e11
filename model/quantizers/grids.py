"""Scales and zeros of groups of weights: from the smallest to the largest weight, or clipped.

A clipped grid gives up the outermost weights of a group for smaller steps between the others. The
factor is searched for each group of each row, by the squared error that it leaves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from model.quantize import (
    Bytes,
    FloatArray,
    Format,
    QuantizedMatrix,
    grouped_rows,
    half_scales_suffice,
    pack,
    pack_rows,
    round_scales_up,
    row_chunks,
)

CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
"""The parts of a group's range that are tried, from all of it downwards."""

_GROWTH = 16.0


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """The steps of groups: fp16 or fp32 scales and uint8 zeros, both [..., 1].

    ``divisors`` are the scales as fp32, with 1 in place of 0.
    """

    scales: npt.NDArray[Any]
    zeros: Bytes
    divisors: FloatArray

    def codes(self, weights: FloatArray, top: int) -> FloatArray:
        """Return the nearest codes of weights [..., g], whole numbers in fp32 up to ``top``."""
        codes = weights / self.divisors
        np.rint(codes, out=codes)
        codes += self.zeros
        np.clip(codes, 0, top, out=codes)
        return codes

    def values(self, codes: FloatArray) -> FloatArray:
        """Return what codes decode to. ``codes`` is overwritten."""
        codes -= self.zeros
        codes *= self.scales.astype(np.float32)
        return codes


def scale_dtype(weights: npt.NDArray[Any], fmt: Format) -> np.dtype[Any]:
    """Return the type of a matrix's scales: fp16, or fp32 if fp16 cannot hold the largest."""
    largest = float(np.abs(weights).max(initial=0.0)) * 2 / ((1 << fmt.bits) - 1)
    # Weights that make up for others' errors may grow.
    half = half_scales_suffice(largest) and half_scales_suffice(largest * _GROWTH)
    return np.dtype(np.float16 if half else np.float32)


def whole_grid(weights: FloatArray, fmt: Format, dtype: np.dtype[Any], clip: float = 1.0) -> Grid:
    """Return the grid over ``clip`` of the range of each group [..., g]; zero is always in it."""
    top, middle = (1 << fmt.bits) - 1, 1 << (fmt.bits - 1)
    low = np.minimum(weights.min(axis=-1, keepdims=True), 0.0).astype(np.float64) * clip
    high = np.maximum(weights.max(axis=-1, keepdims=True), 0.0).astype(np.float64) * clip
    if fmt.symmetric:
        scales = round_scales_up(np.maximum(high / (middle - 1), -low / middle), dtype)
        zeros = np.full(scales.shape, middle, np.uint8)
    else:
        scales = round_scales_up((high - low) / top, dtype)
        steps = np.where(scales == 0, 1.0, scales.astype(np.float64))
        zeros = np.clip(np.rint(-low / steps), 0, top).astype(np.uint8)
    return Grid(scales, zeros, np.where(scales == 0, np.float32(1), scales.astype(np.float32)))


def clipped_grid(
    weights: FloatArray, fmt: Format, dtype: np.dtype[Any], importance: FloatArray | None = None
) -> Grid:
    """Return the grid of the ``CLIPS`` that leaves each group [..., g] the least squared error.

    importance: factors of the squared errors, broadcast to ``weights``.
    """
    top = (1 << fmt.bits) - 1
    best, least = whole_grid(weights, fmt, dtype), None
    for clip in CLIPS:
        grid = best if least is None else whole_grid(weights, fmt, dtype, clip)
        error = grid.values(grid.codes(weights, top))
        error -= weights
        np.square(error, out=error)
        if importance is not None:
            error *= importance
        total = error.sum(axis=-1, keepdims=True)
        if least is None:
            least = total
            continue
        better = total < least
        least = np.where(better, total, least)
        best = Grid(
            np.where(better, grid.scales, best.scales),
            np.where(better, grid.zeros, best.zeros),
            np.where(better, grid.divisors, best.divisors),
        )
    return best


def clipped(
    weights: npt.NDArray[Any], fmt: Format, importance: FloatArray | None = None
) -> QuantizedMatrix:
    """Round a matrix [N, K] to nearest on clipped grids.

    importance: factors of the squared errors of each column [K].
    """
    rows, columns = weights.shape
    groups, dtype = fmt.groups(columns), scale_dtype(weights, fmt)
    if importance is not None:
        importance = grouped_rows(importance[None], fmt)
    data = np.empty((rows, groups, fmt.group_size * fmt.bits // 8), np.uint8)
    scales, zeros = np.empty((rows, groups), dtype), np.empty((rows, groups), np.uint8)
    for part in row_chunks(rows, columns):
        own = grouped_rows(weights[part], fmt)
        grid = clipped_grid(own, fmt, dtype, importance)
        scales[part], zeros[part] = grid.scales[..., 0], grid.zeros[..., 0]
        data[part] = pack(grid.codes(own, (1 << fmt.bits) - 1).astype(np.uint8), fmt.bits)
    packed = None if fmt.symmetric else pack_rows(zeros, fmt.bits)
    return QuantizedMatrix((rows, columns), fmt, data, scales, packed)
