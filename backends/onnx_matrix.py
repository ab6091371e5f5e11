"""Stored matrices in the forms that ONNX Runtime's CPU kernels multiply.

Integer codes stay packed. MatMulNBits has kernels for 2, 4 and 8 bits, so 3 bits are kept as 4, and
5 and 6 as 8. Older runtimes lack the kernel for 2 bits, and the oldest also the kernel for 8. (6
bits as a plane of 4 and one of 2 would take 0.8 of the memory. But they decode no faster, and read
a prompt at half the speed.) There is no kernel for 16 bits on x86, so fp16 and bf16 are widened to
fp32.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from model.artifact import Tensor
from model.quantize import INTEGER_BITS, QuantizedMatrix

Array: TypeAlias = npt.NDArray[np.float32]
Bytes: TypeAlias = npt.NDArray[np.uint8]

KERNEL_BITS = (2, 4, 8)
"""The widths of codes that the newest MatMulNBits multiplies."""

EXACT_BITS: Mapping[int, int] = dict.fromkeys((*INTEGER_BITS, 16, 32), 32)
"""Stored to executed widths of products that do not round activations."""

INT8_ACTIVATIONS = 4
"""The accuracy_level of MatMulNBits that rounds activations to 8 bits.

Each block of a row is rounded on its own, and products are summed as integers.
"""

# With this many rows at once, the transposed copy writes whole cache lines.
_STRIP_ROWS = 64


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A matrix [rows, columns] as MatMulNBits takes it.

    codes: uint8 [rows, blocks, block_size * bits / 8], low bits first.
    scales: float32 [rows, blocks].
    zero_points: uint8 [rows, ceil(blocks * bits / 8)], packed like codes. None: all are 2^(bits -
        1).
    """

    columns: int
    bits: int
    block_size: int
    codes: Bytes
    scales: Array
    zero_points: Bytes | None


@dataclass(frozen=True, slots=True)
class ByteMatrix:
    """A matrix [rows, columns] of signed bytes as DynamicQuantizeMatMul takes it.

    codes: int8 [columns, rows], within +-127.
    scales: float32 [rows].
    """

    codes: npt.NDArray[np.int8]
    scales: Array


Matrix: TypeAlias = PackedMatrix | ByteMatrix | Array
"""A packed matrix, a matrix of bytes, or a dense one as float32 [rows, columns]."""


def containers(kernels: Collection[int]) -> dict[int, int]:
    """Map stored to executed widths, for a runtime whose MatMulNBits has ``kernels`` of these bits.

    Codes take the narrowest kernel that holds them, and run as fp32 if none does.
    """
    return dict(EXACT_BITS) | {
        bits: min((kernel for kernel in kernels if kernel >= bits), default=32)
        for bits in INTEGER_BITS
    }


def executable(stored: Tensor, containers: Mapping[int, int]) -> Matrix:
    """Return a stored matrix in its executed form, with the same values.

    ``containers`` maps its stored width to the executed one. 32 is fp32.
    """
    if not isinstance(stored, QuantizedMatrix):
        return stored
    bits = containers[stored.format.bits]
    if bits == 32:
        return stored.dequantize()
    codes, zeros = stored.in_container(bits)
    centred = stored.format.symmetric and stored.format.bits == bits
    return PackedMatrix(
        columns=stored.shape[1],
        bits=bits,
        block_size=stored.format.group_size,
        codes=codes,
        scales=stored.scales(),
        zero_points=None if centred else zeros,
    )


def bytes_of(stored: QuantizedMatrix) -> ByteMatrix:
    """Round a stored matrix to nearest at one scale per row, within max|row| / 254."""
    rows, columns = stored.shape
    codes = np.empty((columns, rows), np.int8)
    scales = np.empty(rows, np.float32)
    for first in range(0, rows, _STRIP_ROWS):
        part = slice(first, first + _STRIP_ROWS)
        values = stored.dequantize(part)
        scales[part] = np.maximum(np.abs(values).max(axis=1) / 127, np.finfo(np.float32).tiny)
        values /= scales[part, None]
        np.rint(values, out=values)
        codes[:, part] = values.astype(np.int8).T
    return ByteMatrix(codes, scales)


def stack_rows(matrices: Sequence[Matrix]) -> Matrix | None:
    """Stack the rows of all matrices in one, or return None if their layouts differ."""
    if len(matrices) == 1:
        return matrices[0]
    narrow = [matrix for matrix in matrices if isinstance(matrix, ByteMatrix)]
    if narrow:
        if len(narrow) < len(matrices):
            return None
        return ByteMatrix(
            np.concatenate([matrix.codes for matrix in narrow], axis=1),
            np.concatenate([matrix.scales for matrix in narrow]),
        )
    packed = [matrix for matrix in matrices if isinstance(matrix, PackedMatrix)]
    if not packed:
        return np.concatenate([np.asarray(matrix) for matrix in matrices])
    zeros = [matrix.zero_points for matrix in packed if matrix.zero_points is not None]
    layouts = {(matrix.columns, matrix.bits, matrix.block_size) for matrix in packed}
    if len(packed) < len(matrices) or len(layouts) > 1 or len(zeros) not in (0, len(packed)):
        return None
    return PackedMatrix(
        columns=packed[0].columns,
        bits=packed[0].bits,
        block_size=packed[0].block_size,
        codes=np.concatenate([matrix.codes for matrix in packed]),
        scales=np.concatenate([matrix.scales for matrix in packed]),
        zero_points=np.concatenate(zeros) if zeros else None,
    )
