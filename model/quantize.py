"""Storage formats of weight matrices: how numbers become b-bit codes and back.

Every integer format decodes as ``value = (code - zero) * scale``. Each group of consecutive inputs
of a row has one scale and one zero. Codes are packed low bits first. Each group takes whole bytes,
and rows are padded to whole groups. At 2, 4 and 8 bits this is the layout of ONNX Runtime's
MatMulNBits.

The schemes are:

    rtn        round to nearest, per group; asymmetric or symmetric (zero = 2^(bits-1))
    truncate   towards zero with one step R / 2^(bits-1), R = max|w| of the matrix
               (Source: DILEMMA, "Environment Setup": truncation as the quantization technique)
    float      16 bits: fp16, or bf16 where only that is lossless; 32 bits: fp32
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from model.errors import CheckpointError
from model.row_pieces import RowPieces
from model.safetensors import bfloat16_to_float32
from model.schemes import BITS as BITS
from model.schemes import DEFAULT_GROUP_SIZE as DEFAULT_GROUP_SIZE
from model.schemes import DEFAULT_SCHEME as DEFAULT_SCHEME
from model.schemes import GROUP_SIZES as GROUP_SIZES
from model.schemes import INTEGER_BITS as INTEGER_BITS
from model.schemes import PREPARED as PREPARED
from model.schemes import SCHEMES as SCHEMES
from model.schemes import Quantizer as Quantizer
from model.schemes import Scheme as Scheme

FloatArray = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

MIN_HALF_WEIGHT = 2.0**-16
"""A matrix whose largest weight is smaller is nearer in bf16, because fp16 has steps of 2^-24."""

# Rows are processed in pieces of about this many weights, which fit a core's cache.
_CHUNK_WEIGHTS = 1 << 18
# Products of codes and scales stay finite below this. No trained weight comes near.
_MAX_MAGNITUDE = 2.0**100
# From here on, rounding up makes an fp16 scale at most 1/16 too wide.
_MIN_HALF_SCALE = 2.0**-20
_MAX_HALF = 65504.0


@dataclass(frozen=True, slots=True)
class Format:
    """The storage of a block's matrices. ``Format.of`` fills in the fields that the bits determine.

    ``group_size`` is 0 for float. For truncate it only pads rows. Raises ValueError for a
    combination that does not exist.
    """

    bits: int
    scheme: Scheme = DEFAULT_SCHEME
    group_size: int = DEFAULT_GROUP_SIZE
    symmetric: bool = False

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in BITS:
            raise ValueError(f"bits must be one of {BITS}, not {self.bits!r}")
        if self.scheme not in get_args(Scheme):
            raise ValueError(f"scheme must be one of {get_args(Scheme)}, not {self.scheme!r}")
        if (self.scheme == "float") != (self.bits >= 16):
            raise ValueError("16 and 32 bits are scheme float, fewer bits are rtn or truncate")
        groups = (0,) if self.scheme == "float" else GROUP_SIZES
        if type(self.group_size) is not int or self.group_size not in groups:
            raise ValueError(f"group_size must be one of {groups}, not {self.group_size!r}")
        if type(self.symmetric) is not bool or (self.scheme != "rtn" and not self.symmetric):
            raise ValueError("symmetric must be a bool, and true for all schemes but rtn")

    @staticmethod
    def of(
        bits: int,
        scheme: Scheme | Quantizer = DEFAULT_SCHEME,
        group_size: int = DEFAULT_GROUP_SIZE,
        symmetric: bool = False,
    ) -> Format:
        """Return the format of a width: float for 16 and 32 bits, else the given scheme's.

        A quantizer has the format that it stores codes in.
        """
        if bits >= 16:
            return Format(bits, "float", 0, True)
        stored: Any = "rtn" if scheme in PREPARED else scheme
        return Format(bits, stored, group_size, symmetric or stored == "truncate")

    @property
    def key(self) -> str:
        """The format's name in files."""
        kind = "sym" if self.symmetric else "asym"
        return f"{self.bits}/{self.scheme}/{self.group_size}/{kind}"

    def groups(self, columns: int) -> int:
        """Return the groups in a row of ``columns`` weights (integer formats only)."""
        return -(-columns // self.group_size)


def own_format(native: Format | None, fmt: Format) -> Format:
    """Return the format of a block at the bits of ``fmt``: ``native`` if it has those bits.

    ``native`` is the format of the codes that the block's file already has, or None.
    """
    return native if native is not None and native.bits == fmt.bits else fmt


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedMatrix:
    """A matrix [N, K] in a format, with G groups of g inputs a row.

    data: for integer formats packed codes uint8 [N, G, g * bits / 8]. For float formats [N, K] of
        float16, uint16 (bf16 bit patterns) or float32.
    scale_data: float16 or float32 [N, G] (truncate: [1, 1]); None for float.
    zero_data: uint8 [N, ceil(G * bits / 8)], codes packed per row; None if symmetric.

    Raises ValueError if the arrays do not fit shape and format.
    """

    shape: tuple[int, int]
    format: Format
    data: npt.NDArray[Any]
    scale_data: npt.NDArray[Any] | None = None
    zero_data: Bytes | None = None

    def __post_init__(self) -> None:
        rows, columns = self.shape
        if self.format.scheme == "float":
            kinds = (np.float16, np.uint16) if self.format.bits == 16 else (np.float32,)
            _expect("data", self.data, self.shape, *kinds)
            if self.scale_data is not None or self.zero_data is not None:
                raise ValueError("float matrices have neither scales nor zeros")
            return
        groups = self.format.groups(columns)
        group_bytes = self.format.group_size * self.format.bits // 8
        _expect("data", self.data, (rows, groups, group_bytes), np.uint8)
        if self.format.scheme == "truncate":
            _expect("scales", self.scale_data, (1, 1), np.float32)
        else:
            _expect("scales", self.scale_data, (rows, groups), np.float16, np.float32)
        if self.format.symmetric:
            if self.zero_data is not None:
                raise ValueError("a symmetric matrix has no stored zeros")
        else:
            _expect("zeros", self.zero_data, (rows, -(-groups * self.format.bits // 8)), np.uint8)

    @property
    def stored_bytes(self) -> int:
        """The bytes of codes, scales and zeros."""
        parts = (self.data, self.scale_data, self.zero_data)
        return sum(part.nbytes for part in parts if part is not None)

    def dequantize(self, rows: slice | npt.NDArray[np.integer[Any]] | None = None) -> FloatArray:
        """Return values float32 [n, K] of all rows, or unpack only the selected ones."""
        data = self.data if rows is None else self.data[rows]
        if self.format.scheme == "float":
            if data.dtype == np.uint16:
                return bfloat16_to_float32(data)
            return np.array(data, np.float32)
        scales, zeros = self.scales(rows), self.zeros(rows)
        columns = self.shape[1]
        values = np.empty((len(data), columns), np.float32)
        for part in row_chunks(len(data), columns):
            codes = unpack(data[part], self.format.bits).astype(np.float32)  # [n, G, g]
            codes -= zeros[part, :, None]
            codes *= scales[part, :, None]
            values[part] = codes.reshape(len(codes), -1)[:, :columns]
        return values

    def codes(self) -> Bytes:
        """Return unpacked codes uint8 [N, K] (integer formats only)."""
        self._integer()
        rows, columns = self.shape
        return unpack(self.data, self.format.bits).reshape(rows, -1)[:, :columns]

    def zeros(self, rows: slice | npt.NDArray[np.integer[Any]] | None = None) -> Bytes:
        """Return zero codes uint8 [n, G] (integer formats only)."""
        self._integer()
        groups = self.format.groups(self.shape[1])
        if self.zero_data is None:
            count = len(self.data if rows is None else self.data[rows])
            return np.full((count, groups), 1 << (self.format.bits - 1), np.uint8)
        packed = self.zero_data if rows is None else self.zero_data[rows]
        return _unpack_rows(packed, self.format.bits, groups)

    def scales(self, rows: slice | npt.NDArray[np.integer[Any]] | None = None) -> FloatArray:
        """Return scales float32 [n, G] (integer formats only)."""
        self._integer()
        assert self.scale_data is not None  # noqa: S101 - checked at construction
        if self.format.scheme == "truncate":
            count = len(self.data if rows is None else self.data[rows])
            shape = (count, self.format.groups(self.shape[1]))
            return np.full(shape, self.scale_data[0, 0], np.float32)
        return np.array(self.scale_data if rows is None else self.scale_data[rows], np.float32)

    def take(self, rows: npt.NDArray[np.integer[Any]]) -> QuantizedMatrix:
        """Return the matrix of these rows, in this order, with the codes unchanged."""
        return QuantizedMatrix(
            (len(rows), self.shape[1]),
            self.format,
            self.data[rows],
            self.scale_data
            if self.scale_data is None or self.format.scheme == "truncate"
            else self.scale_data[rows],
            None if self.zero_data is None else self.zero_data[rows],
        )

    def rows(self, rows: slice) -> QuantizedMatrix:
        """Return the matrix of consecutive rows, as a view of the same codes."""
        scales = self.scale_data
        if scales is not None and self.format.scheme != "truncate":
            scales = scales[rows]
        zeros = None if self.zero_data is None else self.zero_data[rows]
        data = self.data[rows]
        return QuantizedMatrix((len(data), self.shape[1]), self.format, data, scales, zeros)

    def in_container(self, bits: int) -> tuple[Bytes, Bytes]:
        """Pack the same codes and zeros at a larger width, for kernels without the format's width.

        Returns data uint8 [N, G, g * bits / 8] and zeros uint8 [N, ceil(G * bits / 8)], as
        MatMulNBits takes them. Scales stay as they are. Integer formats and widths only.
        """
        self._integer()
        if bits not in INTEGER_BITS or bits < self.format.bits:
            raise ValueError(f"{self.format.bits}-bit codes do not fit a {bits}-bit container")
        zeros = pack_rows(self.zeros(), bits)
        if bits == self.format.bits:
            return self.data, zeros
        rows, groups, _ = self.data.shape
        data = np.empty((rows, groups, self.format.group_size * bits // 8), np.uint8)
        for part in row_chunks(rows, self.shape[1]):
            data[part] = pack(unpack(self.data[part], self.format.bits), bits)
        return data, zeros

    def _integer(self) -> None:
        if self.format.scheme == "float":
            raise ValueError("a float matrix has no codes, zeros or scales")


def stack(matrices: Sequence[QuantizedMatrix]) -> QuantizedMatrix:
    """Return matrices of one group-wise format and width one below the other, codes unchanged.

    Raises ValueError if formats or widths differ.
    """
    first = matrices[0]
    same = {(matrix.format, matrix.shape[1]) for matrix in matrices}
    if len(same) != 1 or first.format.scheme != "rtn":
        raise ValueError("only matrices of one group-wise format and width can be stacked")
    if len(matrices) == 1:
        return first
    zeros = [matrix.zero_data for matrix in matrices if matrix.zero_data is not None]
    return QuantizedMatrix(
        (sum(matrix.shape[0] for matrix in matrices), first.shape[1]),
        first.format,
        np.concatenate([matrix.data for matrix in matrices]),
        np.concatenate([matrix.scale_data for matrix in matrices if matrix.scale_data is not None]),
        np.concatenate(zeros) if zeros else None,
    )


def quantize(
    weights: npt.NDArray[Any] | RowPieces, fmt: Format, name: str = "weights"
) -> QuantizedMatrix:
    """Encode a float matrix [N, K]; no value moves further than half a step (truncate: one).

    Scales are fp16, rounded up before codes are chosen. They are fp32 if the largest leaves [2^-20,
    65504]. It takes the memory of the result plus a few rows. Raises CheckpointError that names
    ``name`` for NaN, infinities and magnitudes above 2^100.
    """
    if weights.ndim != 2:
        raise ValueError(f"{name}: only matrices are quantized, not shape {weights.shape}")
    rows, columns = weights.shape
    require_storable(weights, name)
    shape = (rows, columns)
    if fmt.scheme == "float":
        if fmt.bits == 32:
            return QuantizedMatrix(shape, fmt, np.asarray(weights, np.float32))
        return QuantizedMatrix(shape, fmt, _to_half(np.asarray(weights, np.float32)))
    if fmt.scheme == "truncate":
        return _truncate(weights, fmt)
    return _round_to_nearest(weights, fmt)


def require_storable(weights: npt.NDArray[Any] | RowPieces, name: str) -> None:
    """Raise CheckpointError that names ``name`` for weights [N, K] that no format holds."""
    for part in row_chunks(*weights.shape):
        # NaN fails this comparison, too.
        if not np.abs(weights[part]).max(initial=0.0) <= _MAX_MAGNITUDE:
            raise CheckpointError(
                f"{name} holds NaN, infinite or absurdly large values; the checkpoint is damaged"
            )


def random_matrix(
    shape: tuple[int, int], fmt: Format, random: np.random.Generator
) -> QuantizedMatrix:
    """Draw random codes for measurements of speed, in a tenth of the time of ``quantize``.

    Values are spread evenly within +-1 / sqrt(columns).
    """
    rows, columns = shape
    if fmt.scheme == "float":
        values = random.random(shape, np.float32)
        values -= 0.5
        values *= np.float32(2 / columns**0.5)
        return quantize(values, fmt)
    groups, middle = fmt.groups(columns), 1 << (fmt.bits - 1)
    data = random.integers(0, 256, (rows, groups, fmt.group_size * fmt.bits // 8), np.uint8)
    dtype, scales = (
        (np.float32, (1, 1)) if fmt.scheme == "truncate" else (np.float16, (rows, groups))
    )
    scale = np.full(scales, 1 / (middle * columns**0.5), dtype)
    if fmt.symmetric:
        return QuantizedMatrix(shape, fmt, data, scale)
    zeros = pack_rows(np.full((1, groups), middle, np.uint8), fmt.bits)
    return QuantizedMatrix(shape, fmt, data, scale, np.repeat(zeros, rows, axis=0))


def weight_error(
    weights: npt.NDArray[Any], fmt: Format, codes: Any = None, *, normalized: bool = False
) -> float:
    """Return the largest |w - w_b| over a matrix [N, K]; ``normalized`` divides it by 2^bits.

    codes: the QuantizedMatrix that stands for the weights. None: they are quantized here.
    Source: DILEMMA, the constraint on delta and "Environment Setup" (division by 2^b).
    """
    matrix = quantize(weights, fmt) if codes is None else codes
    worst = 0.0
    for part in row_chunks(*matrix.shape):
        error = np.abs(np.asarray(weights[part], np.float32) - matrix.dequantize(part))
        worst = max(worst, float(error.max(initial=0.0)))
    return worst / 2.0**fmt.bits if normalized else worst


def pack(codes: Bytes, bits: int) -> Bytes:
    """Pack codes [..., n] (n a multiple of 8) to bytes [..., n * bits / 8], low bits first."""
    eights = codes.reshape(*codes.shape[:-1], -1, 8)
    packed = np.zeros((*eights.shape[:-1], bits), np.uint8)
    for index, byte, shift, spill in _bit_positions(bits):
        packed[..., byte] |= eights[..., index] << np.uint8(shift)
        if spill:
            packed[..., byte + 1] |= eights[..., index] >> np.uint8(8 - shift)
    return packed.reshape(*codes.shape[:-1], -1)


def unpack(packed: Bytes, bits: int) -> Bytes:
    """Inverse of ``pack``: bytes [..., m] (m a multiple of bits) to codes [..., m * 8 / bits]."""
    if 8 % bits == 0:
        return _unpack_bytes(packed, bits)
    groups = packed.reshape(*packed.shape[:-1], -1, bits)
    codes = np.empty((*groups.shape[:-1], 8), np.uint8)
    mask = np.uint8((1 << bits) - 1)
    for index, byte, shift, spill in _bit_positions(bits):
        code = groups[..., byte] >> np.uint8(shift)
        if spill:
            code |= groups[..., byte + 1] << np.uint8(8 - shift)
        code &= mask
        codes[..., index] = code
    return codes.reshape(*packed.shape[:-1], -1)


def _unpack_bytes(packed: Bytes, bits: int) -> Bytes:
    """Unpack codes that do not continue in the next byte, with a few calls for a row of tokens."""
    codes = np.empty((*packed.shape, 8 // bits), np.uint8)
    for index in range(8 // bits):
        np.right_shift(packed, np.uint8(index * bits), out=codes[..., index])
    codes &= np.uint8((1 << bits) - 1)
    return codes.reshape(*packed.shape[:-1], -1)


def _bit_positions(bits: int) -> Iterator[tuple[int, int, int, bool]]:
    """Yield (code index, byte, shift, continues in the next byte) of eight codes.

    They fill ``bits`` bytes.
    """
    for index in range(8):
        byte, shift = divmod(index * bits, 8)
        yield index, byte, shift, shift + bits > 8


def pack_rows(codes: Bytes, bits: int) -> Bytes:
    """Pack codes [N, n] of any n to bytes [N, ceil(n * bits / 8)]."""
    count = codes.shape[1]
    padded = np.pad(codes, ((0, 0), (0, -count % 8)))
    return np.ascontiguousarray(pack(padded, bits)[:, : -(-count * bits // 8)])


def _unpack_rows(packed: Bytes, bits: int, count: int) -> Bytes:
    rows, columns = packed.shape
    if columns % bits:  # np.pad would take longer than the rest for one row.
        packed = np.concatenate([packed, np.zeros((rows, -columns % bits), np.uint8)], axis=1)
    return unpack(packed, bits)[:, :count]


def row_chunks(rows: int, columns: int) -> Iterator[slice]:
    """Yield slices of a matrix's rows that fit a core's cache."""
    step = max(1, _CHUNK_WEIGHTS // max(columns, 1))
    for begin in range(0, rows, step):
        yield slice(begin, min(begin + step, rows))


def grouped_rows(weights: npt.NDArray[Any], fmt: Format) -> FloatArray:
    """Return rows as float32 [n, G, g], padded with zeros."""
    chunk = np.asarray(weights, np.float32)
    padding = -chunk.shape[1] % fmt.group_size
    if padding:
        chunk = np.pad(chunk, ((0, 0), (0, padding)))
    return chunk.reshape(len(chunk), -1, fmt.group_size)


def _round_to_nearest(weights: npt.NDArray[Any] | RowPieces, fmt: Format) -> QuantizedMatrix:
    rows, columns = weights.shape
    groups, top, middle = fmt.groups(columns), (1 << fmt.bits) - 1, 1 << (fmt.bits - 1)
    low, high = np.empty((2, rows, groups), np.float64)
    for part in row_chunks(rows, columns):
        grouped = grouped_rows(weights[part], fmt)
        low[part], high[part] = grouped.min(axis=2), grouped.max(axis=2)
    np.minimum(low, 0.0, out=low)
    np.maximum(high, 0.0, out=high)
    if fmt.symmetric:
        scales = _stored_scales(np.maximum(high / (middle - 1), -low / middle))
        zeros = np.full((rows, groups), middle, np.uint8)
    else:
        scales = _stored_scales((high - low) / top)
        steps = np.where(scales == 0, 1.0, scales.astype(np.float64))
        zeros = np.clip(np.rint(-low / steps), 0, top).astype(np.uint8)
    data = np.empty((rows, groups, fmt.group_size * fmt.bits // 8), np.uint8)
    divisors = np.where(scales == 0, np.float32(1), scales.astype(np.float32))
    for part in row_chunks(rows, columns):
        codes = grouped_rows(weights[part], fmt) / divisors[part, :, None]
        np.rint(codes, out=codes)
        codes += zeros[part, :, None]
        np.clip(codes, 0, top, out=codes)
        data[part] = pack(codes.astype(np.uint8), fmt.bits)
    packed_zeros = None if fmt.symmetric else pack_rows(zeros, fmt.bits)
    return QuantizedMatrix((rows, columns), fmt, data, scales, packed_zeros)


def _truncate(weights: npt.NDArray[Any] | RowPieces, fmt: Format) -> QuantizedMatrix:
    rows, columns = weights.shape
    middle = 1 << (fmt.bits - 1)
    largest = max(
        (float(np.abs(weights[part]).max(initial=0.0)) for part in row_chunks(rows, columns)),
        default=0.0,
    )
    scale = round_scales_up(np.array([[largest / middle]]), np.dtype(np.float32))
    divisor = scale[0, 0] or np.float32(1)
    data = np.empty((rows, fmt.groups(columns), fmt.group_size * fmt.bits // 8), np.uint8)
    for part in row_chunks(rows, columns):
        codes = grouped_rows(weights[part], fmt) / divisor
        np.trunc(codes, out=codes)
        codes += middle
        np.clip(codes, 0, 2 * middle - 1, out=codes)
        data[part] = pack(codes.astype(np.uint8), fmt.bits)
    return QuantizedMatrix((rows, columns), fmt, data, scale)


def half_scales_suffice(largest: float) -> bool:
    """Whether fp16 holds the scales of a matrix whose largest scale this is."""
    return largest == 0.0 or _MIN_HALF_SCALE <= largest <= _MAX_HALF


def _stored_scales(exact: npt.NDArray[np.float64]) -> npt.NDArray[Any]:
    half = half_scales_suffice(float(exact.max(initial=0.0)))
    return round_scales_up(exact, np.dtype(np.float16 if half else np.float32))


def round_scales_up(exact: npt.NDArray[np.float64], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Narrow to ``dtype`` and never down, because a smaller step would clip a group's ends."""
    narrow = exact.astype(dtype)
    with np.errstate(over="ignore"):  # What follows the largest number is rarely needed.
        return np.where(narrow < exact, np.nextafter(narrow, dtype.type(np.inf)), narrow)


def _to_half(weights: FloatArray) -> npt.NDArray[Any]:
    """Convert to fp16 or bf16: the lossless one, else the one that fits their magnitude."""
    with np.errstate(over="ignore"):
        half = weights.astype(np.float16)
    if np.array_equal(half, weights):
        return half
    patterns = np.ascontiguousarray(weights).view(np.uint32)
    if not (patterns & 0xFFFF).any():
        return (patterns >> 16).astype(np.uint16)
    if np.isfinite(half).all() and np.abs(weights).max() >= MIN_HALF_WEIGHT:
        return half
    # Round to nearest, ties to even: add half of the dropped range, less one if the kept bit is 0.
    return ((patterns + 0x7FFF + ((patterns >> 16) & 1)) >> 16).astype(np.uint16)


def _expect(name: str, array: Any, shape: tuple[int, ...], *dtypes: type[Any]) -> None:
    if array is None or array.shape != shape or array.dtype not in dtypes:
        found = "nothing" if array is None else f"{array.dtype} {array.shape}"
        names = " or ".join(np.dtype(dtype).name for dtype in dtypes)
        raise ValueError(f"{name}: expected {names} {shape}, found {found}")
