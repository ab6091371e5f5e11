"""The types of tensors in GGUF files: numbers in blocks, and how they become float32.

A block is some bytes that hold consecutive values of a tensor's row. ``decode`` takes uint8 [n,
size_bytes] and returns float32 [n, values], equal to the bit to the gguf package's ``gguf.quants``.
Quantized types are d * q or d * q + m with fp16 d and m. The K types have blocks of 256, whose
groups have scales of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from model.quantize import Format, QuantizedMatrix, pack
from model.safetensors import bfloat16_to_float32

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

_GROUP = 32
_SUPER = 256
_CHUNK_VALUES = 1 << 17
"""Values that are decoded at once, which fit a core's cache."""

_NON_LINEAR = np.array(
    (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113), np.float32
)
"""The values of the codes of IQ4_NL and IQ4_XS."""
_E2M1 = np.array((0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12), np.float32)
"""Twice the values of the codes of MXFP4."""
_E2M1_CODES = (_E2M1 + 16).astype(np.uint8)


@dataclass(frozen=True, slots=True)
class BlockType:
    """A type: its name, the values of a block, their bytes, and how they are decoded.

    decode: None for types that are not read.
    """

    name: str
    values: int
    size_bytes: int
    decode: Callable[[Bytes], Floats] | None = None


def dequantize(kind: BlockType, rows: Bytes, columns: int) -> Floats:
    """Return the values float32 [n, columns] of rows of blocks, uint8 [n, bytes of a row].

    A damaged file may hold infinite scales: its values are then NaN, which ``quantize`` refuses.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        return _dequantized(kind, rows, columns)


def _dequantized(kind: BlockType, rows: Bytes, columns: int) -> Floats:
    assert kind.decode is not None  # noqa: S101 - callers ask whether a type is readable
    if kind.values == 1:
        return kind.decode(rows).reshape(len(rows), columns)
    values = np.empty((len(rows), columns), np.float32)
    step = max(1, _CHUNK_VALUES // max(columns, 1))
    for first in range(0, len(rows), step):
        blocks = rows[first : first + step].reshape(-1, kind.size_bytes)
        values[first : first + step] = kind.decode(blocks).reshape(-1, columns)
    return values


# ---- decoders ----------------------------------------------------------------------------------


def _half(blocks: Bytes, begin: int) -> Floats:
    """Return the fp16 numbers at a byte of each block, float32 [n, 1]."""
    return np.ascontiguousarray(blocks[:, begin : begin + 2]).view("<f2").astype(np.float32)


def _nibbles(data: Bytes) -> Bytes:
    """Return codes uint8 [..., 2, m] of bytes [..., m]: all low halves, then all high ones."""
    return np.stack((data & 15, data >> 4), axis=-2)


def _fifth_bits(data: Bytes) -> Bytes:
    """Return the bits of 4 bytes [n, 4] as 0 or 16, uint8 [n, 32]."""
    bits: Bytes = np.unpackbits(data, axis=1, bitorder="little") << np.uint8(4)
    return bits


def _codes4(blocks: Bytes, begin: int) -> Bytes:
    return _nibbles(blocks[:, begin:]).reshape(len(blocks), _GROUP)


def _codes5(blocks: Bytes, begin: int) -> Bytes:
    return _codes4(blocks, begin + 4) | _fifth_bits(blocks[:, begin : begin + 4])


def _centred(codes: npt.NDArray[Any], middle: int) -> Floats:
    values: Floats = codes.astype(np.float32)
    values -= np.float32(middle)
    return values


def _q4_0(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * _centred(_codes4(blocks, 2), 8)


def _q4_1(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * _codes4(blocks, 4).astype(np.float32) + _half(blocks, 2)


def _q5_0(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * _centred(_codes5(blocks, 2), 16)


def _q5_1(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * _codes5(blocks, 4).astype(np.float32) + _half(blocks, 2)


def _q8_0(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _bits_of_two(data: Bytes, width: int) -> Bytes:
    """Return 2-bit codes uint8 [n, m / width, 4, width], the lowest bits of a run first."""
    runs = data.reshape(len(data), -1, 1, width)
    codes: Bytes = runs >> np.array((0, 2, 4, 6), np.uint8).reshape(4, 1)
    codes &= np.uint8(3)
    return codes


def _q2_k(blocks: Bytes) -> Floats:
    """16 groups of 16: 4-bit scale and minimum of each, 2-bit codes, fp16 factors of both."""
    scales = blocks[:, :16]
    codes = _bits_of_two(blocks[:, 16:80], 32).reshape(-1, 16, 16).astype(np.float32)
    steps = _half(blocks, 80) * (scales & 15).astype(np.float32)
    lows = _half(blocks, 82) * (scales >> 4).astype(np.float32)
    codes *= steps[:, :, None]
    codes -= lows[:, :, None]
    return codes


def _q3_k(blocks: Bytes) -> Floats:
    """16 groups of 16: a mask of high bits, 2-bit codes, 6-bit scales, an fp16 factor."""
    high = np.unpackbits(blocks[:, :32, None], axis=2, bitorder="little").swapaxes(1, 2)
    low = _bits_of_two(blocks[:, 32:96], 32).reshape(-1, 8, 32)
    packed = blocks[:, 96:108]
    upper = _bits_of_two(packed[:, 8:], 4).reshape(-1, 16)
    scales = _nibbles(packed[:, :8]).reshape(-1, 16) | upper << 4
    steps = _half(blocks, 108) * _centred(scales, 32)
    codes = _centred(low | high << 2, 4).reshape(-1, 16, 16)
    codes *= steps[:, :, None]
    return codes


def _scales_of_k(packed: Bytes) -> tuple[Floats, Floats]:
    """Return 8 scales and 8 minima of 6 bits, float32 [n, 8] each, from 12 bytes."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate((first & 63, third & 15 | first >> 2 & 48), axis=1)
    lows = np.concatenate((second & 63, third >> 4 | second >> 2 & 48), axis=1)
    return scales.astype(np.float32), lows.astype(np.float32)


def _with_scales_of_k(blocks: Bytes, codes: Floats) -> Floats:
    """Scale codes [n, 8, 32] by the fp16 factors and 6-bit scales at the start of each block."""
    scales, lows = _scales_of_k(blocks[:, 4:16])
    codes *= (_half(blocks, 0) * scales)[:, :, None]
    codes -= (_half(blocks, 2) * lows)[:, :, None]
    return codes


def _q4_k(blocks: Bytes) -> Floats:
    codes = _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return _with_scales_of_k(blocks, codes.astype(np.float32))


def _q5_k(blocks: Bytes) -> Floats:
    high = np.unpackbits(blocks[:, 16:48, None], axis=2, bitorder="little").swapaxes(1, 2)
    low = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return _with_scales_of_k(blocks, (low | high << 4).astype(np.float32))


def _q6_k(blocks: Bytes) -> Floats:
    """16 groups of 16: 4 low bits, 2 high bits, signed 8-bit scales, an fp16 factor."""
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    codes = _centred(low | _bits_of_two(blocks[:, 128:192], 32) << 4, 32).reshape(-1, 16, 16)
    steps = _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    codes *= steps[:, :, None]
    return codes


def _iq4_nl(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * _NON_LINEAR[_codes4(blocks, 2)]


def _iq4_xs(blocks: Bytes) -> Floats:
    """8 groups of 32: non-linear codes, 6-bit scales, an fp16 factor."""
    upper = _bits_of_two(blocks[:, 2:4], 1).reshape(-1, 8)
    lower = blocks[:, 4:8, None] >> np.array((0, 4), np.uint8) & np.uint8(15)
    steps = _half(blocks, 0) * _centred(lower.reshape(-1, 8) | upper << 4, 32)
    codes = _NON_LINEAR[_nibbles(blocks[:, 8:].reshape(-1, 8, 16)).reshape(-1, 8, 32)]
    codes *= steps[:, :, None]
    return codes


def _half_of_power(blocks: Bytes) -> Floats:
    """Return 2^(e - 128) of each block's exponent, float32 [n, 1]. It may be subnormal."""
    exponents = blocks[:, :1].astype(np.uint32)
    patterns = np.where(exponents < 2, 0x00200000 << exponents, exponents - 1 << 23)
    return patterns.astype(np.uint32).view(np.float32)


def _mxfp4(blocks: Bytes) -> Floats:
    return _half_of_power(blocks) * _E2M1[_codes4(blocks, 1)]


def _f32(rows: Bytes) -> Floats:
    return rows.view("<f4")


def _f16(rows: Bytes) -> Floats:
    return rows.view("<f2").astype(np.float32)


def _bf16(rows: Bytes) -> Floats:
    return bfloat16_to_float32(rows.view("<u2"))


TYPES: Mapping[int, BlockType] = {
    0: BlockType("F32", 1, 4, _f32),
    1: BlockType("F16", 1, 2, _f16),
    2: BlockType("Q4_0", _GROUP, 18, _q4_0),
    3: BlockType("Q4_1", _GROUP, 20, _q4_1),
    6: BlockType("Q5_0", _GROUP, 22, _q5_0),
    7: BlockType("Q5_1", _GROUP, 24, _q5_1),
    8: BlockType("Q8_0", _GROUP, 34, _q8_0),
    9: BlockType("Q8_1", _GROUP, 40),
    10: BlockType("Q2_K", _SUPER, 84, _q2_k),
    11: BlockType("Q3_K", _SUPER, 110, _q3_k),
    12: BlockType("Q4_K", _SUPER, 144, _q4_k),
    13: BlockType("Q5_K", _SUPER, 176, _q5_k),
    14: BlockType("Q6_K", _SUPER, 210, _q6_k),
    15: BlockType("Q8_K", _SUPER, 292),
    16: BlockType("IQ2_XXS", _SUPER, 66),
    17: BlockType("IQ2_XS", _SUPER, 74),
    18: BlockType("IQ3_XXS", _SUPER, 98),
    19: BlockType("IQ1_S", _SUPER, 50),
    20: BlockType("IQ4_NL", _GROUP, 18, _iq4_nl),
    21: BlockType("IQ3_S", _SUPER, 110),
    22: BlockType("IQ2_S", _SUPER, 82),
    23: BlockType("IQ4_XS", _SUPER, 136, _iq4_xs),
    24: BlockType("I8", 1, 1),
    25: BlockType("I16", 1, 2),
    26: BlockType("I32", 1, 4),
    27: BlockType("I64", 1, 8),
    28: BlockType("F64", 1, 8),
    29: BlockType("IQ1_M", _SUPER, 56),
    30: BlockType("BF16", 1, 2, _bf16),
    34: BlockType("TQ1_0", _SUPER, 54),
    35: BlockType("TQ2_0", _SUPER, 66),
    39: BlockType("MXFP4", _GROUP, 17, _mxfp4),
}
"""The types by their number in a file."""

READ_TYPES = tuple(kind.name for kind in TYPES.values() if kind.decode is not None)


# ---- codes that are kept -----------------------------------------------------------------------

_KEPT_BITS: Mapping[str, int] = {"Q4_0": 4, "Q5_0": 5, "Q8_0": 8, "MXFP4": 5}
"""The types whose codes one of our formats holds exactly, and its bits.

Twice a value of MXFP4 is a whole number of at most 12. Q4_1 and Q5_1 have minima that are no whole
number of steps, K types have scales of two levels.
"""


def kept_format(kind: BlockType) -> Format | None:
    """Return the format of ``kept_codes``, or None if none of ours holds a type's codes."""
    bits = _KEPT_BITS.get(kind.name)
    return None if bits is None else Format(bits, "rtn", _GROUP, symmetric=True)


def kept_codes(kind: BlockType, rows: Bytes, columns: int) -> QuantizedMatrix:
    """Return the codes of rows of blocks in ``kept_format``, which is not None.

    Blocks are d * (q - middle), and d may be negative.
    """
    fmt = kept_format(kind)
    assert fmt is not None  # noqa: S101 - callers ask first
    groups = columns // _GROUP
    data = np.empty((len(rows), groups, _GROUP * fmt.bits // 8), np.uint8)
    scales = np.empty((len(rows), groups), np.float32 if kind.name == "MXFP4" else np.float16)
    step = max(1, _CHUNK_VALUES // columns)
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        blocks = rows[part].reshape(-1, kind.size_bytes)
        codes, steps = _SPLITS[kind.name](blocks)
        data[part] = pack(codes, fmt.bits).reshape(-1, *data.shape[1:])
        scales[part] = steps.reshape(-1, groups)
    return QuantizedMatrix((len(rows), columns), fmt, data, scales)


_SPLITS: Mapping[str, Callable[[Bytes], tuple[Bytes, Floats]]] = {
    "Q4_0": lambda blocks: (_codes4(blocks, 2), _half(blocks, 0)),
    "Q5_0": lambda blocks: (_codes5(blocks, 2), _half(blocks, 0)),
    "Q8_0": lambda blocks: (blocks[:, 2:] ^ np.uint8(128), _half(blocks, 0)),
    "MXFP4": lambda blocks: (_E2M1_CODES[_codes4(blocks, 1)], _half_of_power(blocks)),
}
"""How blocks become codes uint8 [n, 32] and steps float32 [n, 1]."""
