"""GPTQ: rounds one column of a matrix after the other, and lets later columns make up for it.

The error of a matrix on inputs X is ||W X - Q X||^2. It depends on X by H = X X^T alone. With U the
upper triangle of the inverse of H (U^T U = H^-1), rounding column j by an error e costs
(e / U[j, j])^2, if the columns behind j move by -e U[j, k] / U[j, j].

Columns are taken in the order of the groups that share a scale, so that a group's scale is chosen
when all earlier columns have moved its weights. Groups and the columns inside them start with the
largest inputs.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers". The order of groups is that of "group-aware reordering" in Chee et al. and vLLM's
llm-compressor.
"""

from __future__ import annotations

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

_TRIANGLE = 64
"""Triangles of this size are inverted as they are, larger ones by halves."""


def input_moments(rows: FloatArray) -> FloatArray:
    """Return X X^T / n fp32 [K, K] of input rows [n, K]; zeros for no rows."""
    moments: FloatArray = rows.T @ rows
    moments /= max(1, len(rows))
    return moments


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


def gptq(
    weights: FloatArray, moments: FloatArray, fmt: Format, *, damping: float = DAMPING, clip: bool = True
) -> QuantizedMatrix:
    """Return a matrix [N, K] in a group-wise format, rounded for inputs with these moments [K, K].

    clip: search each group's range, else take all of it. ``moments`` stays as it is. It takes twice
    the memory of ``moments`` and a few times that of the result's codes.
    """
    rows, columns = weights.shape
    diagonal = moments.diagonal()
    order = column_order(diagonal, fmt.group_size)
    upper = inverse_triangle(moments[np.ix_(order, order)], damping)
    groups = fmt.groups(columns)
    dtype = scale_dtype(weights, fmt)
    codes = np.zeros((rows, groups * fmt.group_size), np.uint8)
    scales, zeros = np.empty((rows, groups), dtype), np.empty((rows, groups), np.uint8)
    for begin in range(0, rows, _CHUNK_ROWS):
        part = slice(begin, begin + _CHUNK_ROWS)
        found = _round_columns(weights[part].T[order], upper, order, fmt, dtype, clip)
        codes[part, order], scales[part], zeros[part] = (one.T for one in found)
    packed = None if fmt.symmetric else pack_rows(zeros, fmt.bits)
    data = pack(codes.reshape(rows, groups, fmt.group_size), fmt.bits)
    return QuantizedMatrix((rows, columns), fmt, data, scales, packed)


def _round_columns(
    left: FloatArray,
    upper: FloatArray,
    order: npt.NDArray[np.intp],
    fmt: Format,
    dtype: np.dtype[Any],
    clip: bool,
) -> tuple[Bytes, npt.NDArray[Any], Bytes]:
    """Return codes [K, n], scales [G, n] and zeros [G, n] of n rows; scales in the stored order.

    left: the weights [K, n] in the order of rounding, which are overwritten.
    """
    columns, count = left.shape
    top = (1 << fmt.bits) - 1
    groups = fmt.groups(columns)
    codes = np.empty((columns, count), np.uint8)
    scales, zeros = np.empty((groups, count), dtype), np.empty((groups, count), np.uint8)
    begin = 0
    while begin < columns:
        group = int(order[begin]) // fmt.group_size
        end = begin + min(fmt.group_size, columns - group * fmt.group_size)
        costs = 1 / np.square(upper.diagonal()[begin:end])
        own = np.ascontiguousarray(left[begin:end].T)
        grid = clipped_grid(own, fmt, dtype, costs) if clip else whole_grid(own, fmt, dtype)
        scales[group], zeros[group] = grid.scales[:, 0], grid.zeros[:, 0]
        step, divisor = grid.scales[:, 0].astype(np.float32), grid.divisors[:, 0]
        zero = grid.zeros[:, 0].astype(np.float32)
        errors = np.empty((end - begin, count), np.float32)
        for place in range(begin, end):
            code = np.rint(left[place] / divisor)
            code += zero
            np.clip(code, 0, top, out=code)
            codes[place] = code
            error = errors[place - begin]
            np.subtract(left[place], (code - zero) * step, out=error)
            error /= upper[place, place]
            left[place + 1 : end] -= upper[place, place + 1 : end, None] * error
        left[end:] -= upper[begin:end, end:].T @ errors
        begin = end
    return codes, scales, zeros
