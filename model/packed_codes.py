"""Matrices of integer codes in groups: GPTQ, AWQ, compressed-tensors, bitsandbytes.

All decode as ``(code - zero) * scale``, as this project's own formats do. So their codes are kept
where the groups fit. Their kernels compute the product in half precision. Here it is exact.
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model.errors import CheckpointError
from model.quantize import GROUP_SIZES, Format, QuantizedMatrix, pack_rows, unpack
from model.weights import PlainTensor, Rows, StoredTensor

Bytes = npt.NDArray[np.uint8]

_CHUNK_WEIGHTS = 1 << 22
"""The weights that are decoded at once."""
_MAX_SCALE = 2.0**90
"""Values stay below the limit of ``model.quantize``."""
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""The nibble of a word of AWQ that holds the word's first, second, ... column."""


@dataclass(frozen=True)
class CodedMatrix(StoredTensor):
    """A matrix [N, K] of b-bit codes. Each group of ``group`` columns of a row has one scale.

    source: the tensor to name in messages.
    group: may be wider than a row, as ``whole_group`` is.
    """

    source: PlainTensor
    label: str
    rows: int
    columns: int
    bits: int
    group: int

    @abstractmethod
    def packed(self) -> Bytes:
        """Return the codes uint8 [N, ceil(K * bits / 8)], packed low bits first."""

    @abstractmethod
    def zeros(self) -> Bytes | None:
        """Return the zero codes [N, G], or None if all are the middle code."""

    @abstractmethod
    def raw_scales(self) -> npt.NDArray[Any]:
        """Return the scales float16 or float32 [N, G]."""

    def order(self) -> npt.NDArray[np.int32] | None:
        """Return the group of each column, or None if groups are consecutive columns."""
        return None

    def symmetric(self) -> bool:
        """Whether all zeros are the middle code, which then need not be stored."""
        return self.zeros() is None

    @property
    def path(self) -> Path:
        return self.source.path

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rows, self.columns

    @property
    def dtype(self) -> str:
        return self.label

    @property
    def readable(self) -> bool:
        return True

    @cached_property
    def format(self) -> Format | None:
        sizes = [size for size in GROUP_SIZES if self.group % size == 0]
        if not sizes or self.order() is not None:
            return None
        return Format(self.bits, "rtn", max(sizes), self.symmetric())

    def codes(self) -> QuantizedMatrix | None:
        fmt = self.format
        if fmt is None:
            return None
        groups, group_bytes = fmt.groups(self.columns), fmt.group_size * fmt.bits // 8
        packed = self.packed()
        missing = groups * group_bytes - packed.shape[1]
        if missing:
            packed = np.pad(packed, ((0, 0), (0, missing)))
        zeros = None if fmt.symmetric else self.zeros()
        return QuantizedMatrix(
            (self.rows, self.columns),
            fmt,
            np.ascontiguousarray(packed).reshape(self.rows, groups, group_bytes),
            self._repeated(narrow(self.scales()), groups),
            None if zeros is None else pack_rows(self._repeated(zeros, groups), fmt.bits),
        )

    def float32(self, rows: Rows = slice(None)) -> npt.NDArray[np.float32]:
        packed, scales, zeros = self.packed()[rows], self.scales()[rows], self.zeros()
        middle = np.full((1, 1), 1 << (self.bits - 1), np.uint8)
        zeros = middle if zeros is None else zeros[rows]
        order, groups = self.order(), scales.shape[1]
        if order is None and groups > 1 and groups * self.group != self.columns:
            order = np.arange(self.columns, dtype=np.int32) // self.group
        if order is not None:  # As if each column were a group.
            scales, groups = scales[:, order], self.columns
            zeros = zeros if zeros.size == 1 else zeros[:, order]
        values = np.empty((len(packed), groups, self.columns // groups), np.float32)
        step = max(1, _CHUNK_WEIGHTS // self.columns)
        for begin in range(0, len(packed), step):
            part = slice(begin, begin + step)
            codes = _unpacked(packed[part], self.bits, self.columns)
            own = zeros if zeros.size == 1 else zeros[part]
            np.subtract(
                codes.reshape(values[part].shape),
                own[..., None],
                out=values[part],
                dtype=np.float32,
            )
            values[part] *= scales[part, :, None].astype(np.float32)
        return values.reshape(len(packed), self.columns)

    def scales(self) -> npt.NDArray[Any]:
        """Return the scales [N, G]. Raises CheckpointError if one is no sane number."""
        scales = self.raw_scales()
        if not float(np.abs(scales).max(initial=0)) <= _MAX_SCALE:  # NaN fails this, too.
            raise CheckpointError(
                f"{self.path}: the scales of {self.source.name!r} hold NaN, infinite or absurdly "
                "large values; the checkpoint is damaged"
            )
        return scales

    def _repeated(self, values: npt.NDArray[Any], groups: int) -> npt.NDArray[Any]:
        """Return values [N, G] of the file's groups for each of our smaller groups."""
        times = -(-groups // values.shape[1])
        return values if times == 1 else np.repeat(values, times, axis=1)[:, :groups]


@dataclass(frozen=True)
class GptqMatrix(CodedMatrix):
    """GPTQ: words of ``source`` [K * bits / 32, N], zeros [G, N * bits / 32], scales [G, N].

    Zeros are stored less ``offset``: 1 in the first version of the format, 0 in the second.
    declared_symmetric: the settings say that all zeros are the middle code, which is checked.
    """

    stored_zeros: PlainTensor
    stored_scales: PlainTensor
    groups: PlainTensor | None
    offset: int
    declared_symmetric: bool

    def symmetric(self) -> bool:
        middle = 1 << (self.bits - 1)
        return self.declared_symmetric and bool((self.zeros() == middle).all())

    def packed(self) -> Bytes:
        return _bytes(np.ascontiguousarray(self.source.map().T))

    def zeros(self) -> Bytes:
        codes = _unpacked(_bytes(self.stored_zeros.map()), self.bits, self.rows)
        codes += np.uint8(self.offset)
        codes &= np.uint8((1 << self.bits) - 1)
        return np.ascontiguousarray(codes.T)

    def raw_scales(self) -> npt.NDArray[Any]:
        return np.ascontiguousarray(_numbers(self.stored_scales).T)

    def order(self) -> npt.NDArray[np.int32] | None:
        return None if self.groups is None else _order(self.groups, self)


@dataclass(frozen=True)
class AwqMatrix(CodedMatrix):
    """AWQ, gemm version: words of ``source`` [K, N / 8], zeros [G, N / 8], scales [G, N]."""

    stored_zeros: PlainTensor
    stored_scales: PlainTensor

    def packed(self) -> Bytes:
        return pack_rows(_nibbles(self.source.map()).T, self.bits)

    def zeros(self) -> Bytes:
        return np.ascontiguousarray(_nibbles(self.stored_zeros.map()).T)

    def raw_scales(self) -> npt.NDArray[Any]:
        return np.ascontiguousarray(_numbers(self.stored_scales).T)


@dataclass(frozen=True)
class PackedMatrix(CodedMatrix):
    """compressed-tensors: words of ``source`` [N, K * bits / 32], scales [N, G].

    zeros: words [N * bits / 32, G], or None.
    """

    stored_scales: PlainTensor
    stored_zeros: PlainTensor | None
    groups: PlainTensor | None

    def packed(self) -> Bytes:
        return _bytes(self.source.map())

    def zeros(self) -> Bytes | None:
        if self.stored_zeros is None:
            return None
        words = np.ascontiguousarray(self.stored_zeros.map().T)
        return np.ascontiguousarray(_unpacked(_bytes(words), self.bits, self.rows).T)

    def raw_scales(self) -> npt.NDArray[Any]:
        return _per_row(_numbers(self.stored_scales), self.rows)

    def order(self) -> npt.NDArray[np.int32] | None:
        return None if self.groups is None else _order(self.groups, self)


@dataclass(frozen=True)
class ByteMatrix(CodedMatrix):
    """Signed codes int8 [N, K], scales [N, G] times ``factor``, zeros int8 [N, G] or None."""

    stored_scales: PlainTensor
    stored_zeros: PlainTensor | None = None
    factor: float = 1.0

    def packed(self) -> Bytes:
        codes = self._unsigned(self.source.map())
        return codes if self.bits == 8 else pack_rows(codes, self.bits)

    def zeros(self) -> Bytes | None:
        if self.stored_zeros is None:
            return None
        return self._unsigned(_per_row(self.stored_zeros.map(), self.rows))

    def raw_scales(self) -> npt.NDArray[Any]:
        scales = _per_row(_numbers(self.stored_scales), self.rows)
        return scales if self.factor == 1 else scales * np.float32(self.factor)

    def _unsigned(self, codes: npt.NDArray[Any]) -> Bytes:
        middle = 1 << (self.bits - 1)
        if self.bits < 8 and not (-middle <= codes.min() and codes.max() < middle):
            raise CheckpointError(
                f"{self.path}: {self.source.name!r} has codes beyond {self.bits} bits; the "
                "checkpoint is damaged"
            )
        unsigned: Bytes = codes.view(np.uint8) + np.uint8(middle)
        return unsigned


def whole_group(columns: int) -> int:
    """Return the group of matrices with one scale per row, which our largest group divides."""
    return -(-columns // max(GROUP_SIZES)) * max(GROUP_SIZES)


def _bytes(words: npt.NDArray[Any]) -> Bytes:
    """Return the bytes [N, 4 n] of words [N, n], the low ones first."""
    words = np.ascontiguousarray(words)
    if sys.byteorder == "big":
        words = words.byteswap()
    return words.view(np.uint8)


def _unpacked(packed: Bytes, bits: int, count: int) -> Bytes:
    """Return ``count`` codes of each row."""
    missing = -packed.shape[1] % bits
    if missing:
        packed = np.pad(packed, ((0, 0), (0, missing)))
    return unpack(packed, bits)[:, :count]


def _nibbles(words: npt.NDArray[Any]) -> Bytes:
    """Return the codes of AWQ's words [n, m] as [n, 8 m], in the order of columns."""
    codes = unpack(_bytes(words), 4).reshape(*words.shape, 8)
    ordered: Bytes = np.ascontiguousarray(codes[..., _AWQ_ORDER])
    return ordered.reshape(len(words), -1)


def _numbers(stored: PlainTensor) -> npt.NDArray[Any]:
    """Return stored numbers as float16 or float32."""
    return stored.map() if stored.dtype == "F16" else stored.float32()


def narrow(scales: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return scales as float16 if that changes none, because all kernels are faster with it."""
    with np.errstate(over="ignore"):
        half = scales.astype(np.float16)
    return half if np.array_equal(half, scales) else scales.astype(np.float32)


def _per_row(values: npt.NDArray[Any], rows: int) -> npt.NDArray[Any]:
    """Return values of a whole matrix, of rows or of groups as [N, G]."""
    values = values.reshape(-1, 1) if values.ndim < 2 else values
    return np.broadcast_to(values, (rows, values.shape[1])) if len(values) == 1 else values


def _order(groups: PlainTensor, matrix: CodedMatrix) -> npt.NDArray[np.int32] | None:
    """Return the group of each column, or None if they are the usual ones."""
    order = groups.map().astype(np.int32)
    count = -(-matrix.columns // matrix.group)
    if order.size and not (order.min() >= 0 and order.max() < count):
        raise CheckpointError(
            f"{groups.path}: {groups.name!r} names groups beyond {count}; the checkpoint is damaged"
        )
    usual = np.arange(matrix.columns, dtype=np.int32) // matrix.group
    return None if np.array_equal(order, usual) else order
