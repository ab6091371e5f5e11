"""GPTQ: rounds one column of a matrix after the other, and lets later columns make up for it.

The error of a matrix on inputs X is ||W X - Q X||^2. It depends on X by H = X X^T alone. U is the
upper triangle of H's inverse: U^T U = H^-1. Column j is rounded by an error e. Each column k behind
it then moves by -e U[j, k] / U[j, j], and the error of the outputs grows by (e / U[j, j])^2.

Columns are taken in the order of the groups that share a scale, so that a group's scale is chosen
when all earlier columns have moved its weights. Groups and the columns inside them start with the
largest inputs.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers". The order of groups is that of "group-aware reordering" in Chee et al. and vLLM's
llm-compressor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from model.quantize import Bytes, FloatArray, Format, QuantizedMatrix, pack, pack_rows
from model.quantizers.grids import clipped_grid, scale_dtype, whole_grid

DAMPING = 0.01
"""This part of the mean of H's diagonal is added to it. Inputs that the text lacks keep a cost."""

_MOST_DAMPING = 1e6
_CHUNK_ROWS = 1024
"""The rows of a matrix that move together. They do not depend on each other."""

_STRIP = 16
"""Columns that move one by one. Products of matrices, which are faster, move those behind."""

_TRIANGLE = 64
"""Triangles of this size are inverted as they are, larger ones by halves."""


def column_order(diagonal: FloatArray, group_size: int) -> npt.NDArray[np.intp]:
    """Return the order in which columns are rounded: whole groups, with large inputs first."""
    columns = len(diagonal)
    starts = np.arange(0, columns, group_size)
    groups = [np.arange(start, min(start + group_size, columns)) for start in starts]
    # The last group may be shorter: its mean decides, not its sum.
    largest = [-float(diagonal[group].mean()) for group in groups]
    inside = [group[np.argsort(-diagonal[group], kind="stable")] for group in groups]
    return np.concatenate([inside[index] for index in np.argsort(largest, kind="stable")])


def inverse_triangle(moments: FloatArray, damping: float = DAMPING) -> FloatArray:
    """Return U fp32 [K, K], upper, with U^T U = (moments + damping * mean of diagonal)^-1.

    The damping grows tenfold as long as the sum is not positive definite in fp32.
    """
    size, mean = len(moments), float(moments.diagonal().mean(dtype=np.float64)) or 1.0
    while True:
        # With the order of rows and columns reversed, the factor of H becomes an upper one.
        damped = np.array(moments[::-1, ::-1])
        damped.flat[:: size + 1] += np.float32(damping * mean)
        try:
            factor = np.linalg.cholesky(damped)
        except np.linalg.LinAlgError:
            if damping > _MOST_DAMPING:
                raise
            damping *= 10
            continue
        del damped
        invert_lower(factor)
        return np.ascontiguousarray(factor[::-1, ::-1])


def invert_lower(triangle: FloatArray) -> None:
    """Invert a lower triangle [K, K] in place, by halves: almost all of it is matrix products."""
    size = len(triangle)
    if size <= _TRIANGLE:
        triangle[...] = np.tril(np.linalg.inv(triangle.astype(np.float64)))
        return
    half = size // 2
    first, last, corner = triangle[:half, :half], triangle[half:, half:], triangle[half:, :half]
    invert_lower(first)
    invert_lower(last)
    corner[...] = -(last @ (corner @ first))


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """Facts about the rows that a matrix takes. Matrices with equal inputs share them.

    order: the order of the columns. upper: ``inverse_triangle`` in this order.
    rows: the rows [n, K] themselves. expected: the rows that the original model has there, or None
        if they are the same. A matrix then aims at what it made of these.
    """

    order: npt.NDArray[np.intp]
    upper: FloatArray
    rows: FloatArray
    expected: FloatArray | None = None

    @staticmethod
    def of(
        rows: FloatArray,
        group_size: int,
        expected: FloatArray | None = None,
        damping: float = DAMPING,
    ) -> Inputs:
        """Prepare rows [n, K]. It takes a few times the memory of [K, K]."""
        order = column_order(np.square(rows).mean(axis=0), group_size)
        ordered = rows[:, order]
        moments: FloatArray = ordered.T @ ordered
        del ordered
        moments /= np.float32(len(rows))
        return Inputs(order, inverse_triangle(moments, damping), rows, expected)

    def aimed(self, weights: FloatArray) -> FloatArray:
        """Return the weights [K, n] in the order of columns, for outputs as the original's.

        That is W + W (E - X) X^T (X X^T)^-1, with the damped inverse.
        """
        turned: FloatArray = weights.T[self.order]
        if self.expected is not None:
            drift = weights @ (self.expected - self.rows).T  # [N, n]
            pull = (drift @ self.rows[:, self.order]).T / np.float32(len(self.rows))
            turned += self.upper.T @ (self.upper @ pull)
        return turned


def gptq(weights: FloatArray, inputs: Inputs, fmt: Format, *, clip: bool = True) -> QuantizedMatrix:
    """Return a matrix [N, K] in a group-wise format, rounded for these inputs.

    clip: search each group's range, else take all of it.
    """
    rows, columns = weights.shape
    groups = fmt.groups(columns)
    dtype = scale_dtype(weights, fmt)
    codes = np.zeros((rows, groups * fmt.group_size), np.uint8)
    scales, zeros = np.empty((rows, groups), dtype), np.empty((rows, groups), np.uint8)
    for begin in range(0, rows, _CHUNK_ROWS):
        part = slice(begin, begin + _CHUNK_ROWS)
        left = inputs.aimed(np.asarray(weights[part], np.float32))
        found = _round_columns(left, inputs, fmt, dtype, clip)
        codes[part, inputs.order], scales[part], zeros[part] = (one.T for one in found)
    packed = None if fmt.symmetric else pack_rows(zeros, fmt.bits)
    data = pack(codes.reshape(rows, groups, fmt.group_size), fmt.bits)
    return QuantizedMatrix((rows, columns), fmt, data, scales, packed)


def _round_columns(
    left: FloatArray, inputs: Inputs, fmt: Format, dtype: np.dtype[Any], clip: bool
) -> tuple[Bytes, npt.NDArray[Any], Bytes]:
    """Return codes [K, n], scales [G, n] and zeros [G, n] of n rows; scales in the stored order.

    left: the weights [K, n] in the order of rounding, which are overwritten.
    """
    order, upper = inputs.order, inputs.upper
    columns, count = left.shape
    top = (1 << fmt.bits) - 1
    groups = fmt.groups(columns)
    codes = np.empty((columns, count), np.uint8)
    scales, zeros = np.empty((groups, count), dtype), np.empty((groups, count), np.uint8)
    begin = 0
    while begin < columns:
        group = int(order[begin]) // fmt.group_size
        end = begin + min(fmt.group_size, columns - group * fmt.group_size)
        costs = np.float32(1) / np.square(upper.diagonal()[begin:end])
        own = np.ascontiguousarray(left[begin:end].T)
        grid = clipped_grid(own, fmt, dtype, costs) if clip else whole_grid(own, fmt, dtype)
        scales[group], zeros[group] = grid.scales[:, 0], grid.zeros[:, 0]
        step, divisor = grid.scales[:, 0].astype(np.float32), grid.divisors[:, 0]
        zero = grid.zeros[:, 0].astype(np.float32)
        errors = np.empty((end - begin, count), np.float32)
        for first in range(begin, end, _STRIP):
            last = min(first + _STRIP, end)
            for place in range(first, last):
                code = np.rint(left[place] / divisor)
                code += zero
                np.clip(code, 0, top, out=code)
                codes[place] = code
                error = errors[place - begin]
                np.subtract(left[place], (code - zero) * step, out=error)
                error /= upper[place, place]
                left[place + 1 : last] -= upper[place, place + 1 : last, None] * error
            strip = errors[first - begin : last - begin]
            left[last:end] -= upper[first:last, last:end].T @ strip
        left[end:] -= upper[begin:end, end:].T @ errors
        begin = end
    return codes, scales, zeros
