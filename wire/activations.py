"""Hidden rows on the wire: float32 on the device, and 32, 16 or 8 bits a value on the link.

A payload is the values [rows, hidden], row by row. Below 32 bits, one float32 scale per row
follows. All numbers are little-endian. A value decodes as value * scale:

    bits  value    scale of a row                                        error at most
    32    float32  none                                                  0
    16    float16  1, or a power of two where float16 would overflow     |x| / 2^11 + scale / 2^25
    8     int8     largest magnitude / 127                               scale / 2

Infinities and NaN stay what they are at 16 bits. At 8 bits both have the code -128, which decodes
to NaN. A scale comes from the finite values of its row. At 16 bits a value above 3.4e38 becomes
infinite.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from wire.errors import ProtocolError

Rows = npt.NDArray[np.float32]
HopBits = Literal[32, 16, 8]

HOP_BITS: tuple[HopBits, ...] = (32, 16, 8)
DEFAULT_HOP_BITS: HopBits = 16

_VALUE: dict[HopBits, np.dtype[np.generic]] = {
    32: np.dtype("<f4"),
    16: np.dtype("<f2"),
    8: np.dtype("i1"),
}
_SCALE = np.dtype("<f4")

BLOCK_VALUES = 1 << 15
"""The values that are encoded at once. What is between them and the payload stays in the caches.

Larger pieces of memory would be mapped, zeroed and given back at each chunk of a prompt.
"""

_HALF_MAX = np.float32(65504)
"""The largest finite float16."""

_BYTE_MAX = np.float32(127)
_NOT_FINITE = -128

_LEAST_SCALE = np.finfo(np.float32).tiny
_SMALLEST_SCALE: dict[HopBits, np.float32] = {16: np.float32(1), 8: _LEAST_SCALE}
_LARGEST_SCALE: dict[HopBits, np.float32] = {
    16: np.float32(2.0**113),
    8: np.nextafter(np.finfo(np.float32).max / _BYTE_MAX, np.float32(0)),
}
"""The largest scale that an encoder needs. At 8 bits its largest value is a finite float32."""


def payload_bytes(rows: int, hidden: int, bits: HopBits) -> int:
    """Return the size of a payload of ``rows`` hidden rows."""
    return rows * (hidden * bits // 8 + (0 if bits == 32 else _SCALE.itemsize))


def encode_rows(rows: Rows, bits: HopBits, memory: memoryview | None = None) -> memoryview:
    """Encode hidden rows float32 [n, hidden]. The payload is a view of them if nothing changes.

    memory: bytes for the payload, at least as many. By default it has memory of its own.
    """
    if bits == 32:
        return np.ascontiguousarray(rows, _VALUE[32]).data.cast("B")
    count, hidden = rows.shape
    size = payload_bytes(count, hidden, bits)
    payload = np.empty(size, np.uint8).data if memory is None else memory[:size]
    values, scales = _parts(payload, count, hidden, bits)
    step = max(BLOCK_VALUES // hidden, 1)
    if count <= step:
        _encode(rows, values, scales, bits)
        return payload
    for begin in range(0, count, step):
        part = slice(begin, begin + step)
        _encode(rows[part], values[part], scales[part], bits)
    return payload


def _encode(rows: Rows, values: npt.NDArray[np.generic], scales: Rows, bits: HopBits) -> None:
    """Write the values and scales of some rows."""
    magnitudes = np.abs(rows)
    # A NaN makes this comparison false.
    if bits == 16 and magnitudes.max() <= _HALF_MAX:
        values[:] = rows
        scales[:] = 1
        return
    with np.errstate(all="ignore"):  # A signalling NaN would warn.
        largest = magnitudes.max(axis=1)
        finite = None if np.isfinite(largest).all() else np.isfinite(rows)
        if finite is not None:
            largest = magnitudes.max(axis=1, where=finite, initial=0)
        if bits == 16:
            scales[:] = 1
            wide = largest > _HALF_MAX
            scales[wide] = np.ldexp(np.float32(1), np.frexp(largest[wide])[1] - 15)
            values[:] = rows / scales[:, None]
            return
        np.clip(largest / _BYTE_MAX, _LEAST_SCALE, _LARGEST_SCALE[8], out=scales)
        codes = np.divide(rows, scales[:, None], out=magnitudes)
        np.rint(codes, out=codes)
        if finite is not None:
            codes[~finite] = _NOT_FINITE
        np.copyto(values, codes, casting="unsafe")


def decode_rows(
    payload: memoryview, count: int, hidden: int, bits: HopBits, out: Rows | None = None
) -> Rows:
    """Decode a payload into hidden rows float32 [count, hidden]. At 32 bits they are a view of it.

    out: memory for the rows, which are then written there at all widths. Raises ProtocolError if
    the length is wrong, or if no encoder makes such scales.
    """
    if count < 1 or len(payload) != payload_bytes(count, hidden, bits):
        raise ProtocolError(f"{count} hidden rows at {bits} bits do not have {len(payload)} bytes")
    values, scales = _parts(payload, count, hidden, bits)
    if out is None:
        rows: Rows = values.astype(np.float32, copy=False)
    else:
        np.copyto(out, values)
        rows = out
    if bits == 32:
        return rows
    least = largest = scales[0]
    if count > 1:  # A token has one row, and these two calls take a third of its time.
        least, largest = scales.min(), scales.max()
    # If a scale is NaN, so are both, and a NaN fails both comparisons.
    if not (least >= _SMALLEST_SCALE[bits] and largest <= _LARGEST_SCALE[bits]):
        raise ProtocolError("an activation's scales are out of range")
    if bits == 16 and largest == 1:
        return rows
    with np.errstate(all="ignore"):
        rows *= scales[:, None]
    if bits == 8 and values.min() == _NOT_FINITE:
        rows[values == _NOT_FINITE] = np.nan
    return rows


def _parts(
    payload: memoryview, count: int, hidden: int, bits: HopBits
) -> tuple[npt.NDArray[np.generic], Rows]:
    """Return the values [count, hidden] and scales [count] of a payload as views."""
    kind = _VALUE[bits]
    values = np.frombuffer(payload, kind, count * hidden).reshape(count, hidden)
    if bits == 32:
        return values, np.empty(0, _SCALE)
    return values, np.frombuffer(payload, _SCALE, count, count * hidden * kind.itemsize)
