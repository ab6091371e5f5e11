"""Matrices of packed numbers that are no group-wise integer codes: fp8, MLX, MXFP4, nf4.

They are decoded on reading. MXFP4's codes are kept, because they are small integers times a power
of two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model.errors import CheckpointError
from model.packed_codes import narrow
from model.quantize import Format, QuantizedMatrix, pack, unpack
from model.weights import PlainTensor, Rows, StoredTensor

FloatArray = npt.NDArray[np.float32]

FLOAT8 = ("F8_E4M3", "F8_E5M2")

_CHUNK_WEIGHTS = 1 << 22
"""The weights that are decoded at once."""
_FLOAT4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_SIGNED4 = np.array([*_FLOAT4, *(-value for value in _FLOAT4)], np.float32)
"""The values of e2m1 (Source: OCP Microscaling Formats, 5.3.3)."""


@cache
def _float8_values(dtype: str) -> FloatArray:
    """Return the value of each byte (Source: Micikevicius et al., "FP8 Formats", Table 1)."""
    codes = np.arange(256, dtype=np.uint16)
    if dtype == "F8_E5M2":  # The upper half of a float16.
        return (codes << 8).view(np.float16).astype(np.float32)
    sign = np.where(codes & 0x80, -1.0, 1.0)
    exponent, fraction = (codes >> 3) & 15, (codes & 7) / 8
    normal = np.ldexp(1 + fraction, exponent.astype(np.int64) - 7)
    values = sign * np.where(exponent == 0, np.ldexp(fraction, -6), normal)
    values[codes & 0x7F == 0x7F] = np.nan
    return values.astype(np.float32)


@dataclass(frozen=True)
class _Decoded(StoredTensor):
    """A tensor that is decoded on reading. ``source``: the tensor to name in messages.

    Numbers of a damaged file may become NaN here. ``model.quantize`` refuses those.
    """

    source: PlainTensor
    label: str
    size: tuple[int, ...]

    @property
    def path(self) -> Path:
        return self.source.path

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size

    @property
    def dtype(self) -> str:
        return self.label

    @property
    def readable(self) -> bool:
        return True


@dataclass(frozen=True)
class Float8Matrix(_Decoded):
    """fp8 [N, K] times scales: of the whole matrix, of rows [N, 1], or of blocks of weights."""

    scales: PlainTensor
    block: tuple[int, int]

    @np.errstate(invalid="ignore", over="ignore")
    def float32(self, rows: Rows = slice(None)) -> FloatArray:
        values: FloatArray = _float8_values(self.source.dtype)[self.source.map()[rows]]
        bytes_only = self.scales.dtype == "F8_E8M0"
        scales = _exponents(self.scales) if bytes_only else self.scales.float32()
        if not np.isfinite(scales).all():
            raise CheckpointError(f"{self.path}: {self.scales.name!r} holds NaN or infinite values")
        if scales.size == 1:
            values *= scales.reshape(-1)[0]
            return values
        first, _, step = rows.indices(self.size[0])
        lines = (first + step * np.arange(len(values))) // self.block[0]
        across = np.arange(self.size[1]) // self.block[1]
        scales = scales.reshape(len(scales), -1)
        for begin in range(0, len(values), 1024):  # Not a second matrix of scales.
            part = slice(begin, begin + 1024)
            values[part] *= scales[lines[part]][:, across]
        return values


@dataclass(frozen=True)
class MlxMatrix(_Decoded):
    """MLX's affine codes: words [N, K * bits / 32], then code * scale + bias per group.

    The biases are rounded numbers, not whole multiples of the scales, so no codes are kept.
    """

    scales: PlainTensor
    biases: PlainTensor
    bits: int

    @np.errstate(invalid="ignore", over="ignore")
    def float32(self, rows: Rows = slice(None)) -> FloatArray:
        words = np.ascontiguousarray(self.source.map()[rows], np.dtype("<u4")).view(np.uint8)
        scales, biases = self.scales.float32(rows), self.biases.float32(rows)
        values = np.empty((len(words), self.size[1]), np.float32)
        step = max(1, _CHUNK_WEIGHTS // self.size[1])
        for begin in range(0, len(words), step):
            part = slice(begin, begin + step)
            codes = unpack(words[part], self.bits).astype(np.float32)
            codes = codes.reshape(*scales[part].shape, -1)
            codes *= scales[part][..., None]
            codes += biases[part][..., None]
            values[part] = codes.reshape(values[part].shape)
        return values


@dataclass(frozen=True)
class MxfpMatrix(_Decoded):
    """MXFP4 [..., N, K]: nibbles [..., N, K / 32, 16], one power of two for 32 columns.

    Twice an e2m1 number is an integer up to 12. So symmetric codes of 5 bits hold all of them.
    """

    scales: PlainTensor

    @np.errstate(invalid="ignore", over="ignore")
    def float32(self, rows: Rows = slice(None)) -> FloatArray:
        groups = self.size[-1] // 32
        nibbles = self.source.map()[rows].reshape(-1, groups, 16)
        scales = _exponents(self.scales)[rows].reshape(-1, groups, 1)
        values = np.empty((len(nibbles), groups, 32), np.float32)
        for part in self._parts(len(nibbles)):
            np.multiply(_SIGNED4[unpack(nibbles[part], 4)], scales[part], out=values[part])
        return values.reshape(-1, *self.size[1:-1], self.size[-1])

    @property
    def format(self) -> Format | None:
        return Format(5, "rtn", 32, symmetric=True)

    def codes(self) -> QuantizedMatrix | None:
        fmt = Format(5, "rtn", 32, symmetric=True)
        integers = (_SIGNED4 * 2 + 16).astype(np.uint8)
        groups = self.size[-1] // 32
        nibbles = self.source.map().reshape(-1, groups, 16)
        data = np.empty((len(nibbles), groups, 20), np.uint8)
        for part in self._parts(len(nibbles)):
            data[part] = pack(integers[unpack(nibbles[part], 4)], 5)
        scales = narrow(_exponents(self.scales).reshape(-1, groups) / 2)
        return QuantizedMatrix((len(nibbles), self.size[-1]), fmt, data, scales)

    def _parts(self, count: int) -> Iterator[slice]:
        step = max(1, _CHUNK_WEIGHTS // self.size[-1])
        for begin in range(0, count, step):
            yield slice(begin, begin + step)


@dataclass(frozen=True)
class Nf4Matrix(_Decoded):
    """bitsandbytes' 4 bits: nibbles, the first in the high half; a table; a scale per block.

    nested: if the scales are codes themselves: their table, their scales, their offset and block.
    """

    table: PlainTensor
    scales: PlainTensor
    block: int
    nested: tuple[PlainTensor, PlainTensor, float, int] | None

    @np.errstate(invalid="ignore", over="ignore")
    def float32(self, rows: Rows = slice(None)) -> FloatArray:
        packed = self.source.map().reshape(-1)
        codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)
        count = self.size[0] * self.size[1]
        values: FloatArray = self.table.float32().reshape(-1)[codes[:count]]
        scales = self._scales()
        for begin in range(0, count, self.block * 4096):
            part = values[begin : begin + self.block * 4096]
            first = begin // self.block
            part *= np.repeat(scales[first : first + 4096], self.block)[: len(part)]
        return values.reshape(self.size)[rows]

    def _scales(self) -> FloatArray:
        if self.nested is None:
            return self.scales.float32().reshape(-1)
        table, scales, offset, block = self.nested
        codes = self.scales.map().reshape(-1)
        values: FloatArray = table.float32().reshape(-1)[codes]
        values *= np.repeat(scales.float32().reshape(-1), block)[: len(values)]
        values += np.float32(offset)
        return values


def _exponents(stored: PlainTensor) -> FloatArray:
    """Return the powers of two that bytes e8m0 stand for. Raises CheckpointError for NaN."""
    codes: npt.NDArray[Any] = stored.map()
    if (codes == 255).any():
        raise CheckpointError(
            f"{stored.path}: {stored.name!r} holds NaN; the checkpoint is damaged"
        )
    return np.asarray(np.ldexp(np.float32(1), codes.astype(np.int32) - 127), np.float32)
