"""Weights on a torch device: packed codes, or plain numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from model.quantize import MIN_HALF_WEIGHT, QuantizedMatrix

CONTAINERS = {2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 8: 8}
"""Maps each integer format to its width in memory, which divides a 32-bit word."""

STRIP_WEIGHTS = 1 << 20
"""The weights that torch unpacks at once. This bounds a product's memory besides its operands."""

STRIP_WEIGHT_BYTES = 16
"""The bytes that each of them takes meanwhile: shifted, masked and offset codes, and values."""


UNPACKED_WEIGHTS = 1 << 24
"""The weights that Triton unpacks at once: few enough to hold, many enough to multiply fast."""


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A matrix [N, columns] of codes below 2^bits: value = (code - zero) * scale.

    words: int32 [N, W] of 32 / bits codes each, low bits first. Rows are padded to whole groups.
    scales: float16 or float32 [N, G].
    zeros: uint8 [N, G]. Both may be views that repeat one value.
    """

    columns: int
    bits: int
    group_size: int
    words: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    @staticmethod
    def of(matrices: Sequence[QuantizedMatrix], device: torch.device) -> PackedWeight:
        """Stack matrices of one integer format and width by rows, without loss."""
        fmt, columns = matrices[0].format, matrices[0].shape[1]
        rows, groups = sum(matrix.shape[0] for matrix in matrices), fmt.groups(columns)
        bits = CONTAINERS[fmt.bits]
        words = [_words(matrix, bits).to(device) for matrix in matrices]
        if fmt.scheme == "truncate":
            # The whole matrix has one scale.
            scales = torch.cat([_tensor(matrix.scales()[:, :1], device) for matrix in matrices])
        else:
            scales = _cat_scales([_stored_scales(matrix, device) for matrix in matrices])
        if fmt.symmetric:
            zeros = torch.full((1, 1), 1 << (fmt.bits - 1), dtype=torch.uint8, device=device)
        else:
            zeros = torch.cat([_tensor(matrix.zeros(), device) for matrix in matrices])
        return PackedWeight(
            columns,
            bits,
            fmt.group_size,
            torch.cat(words),
            scales.expand(rows, groups),
            zeros.expand(rows, groups),
        )

    @property
    def shape(self) -> tuple[int, int]:
        return self.words.shape[0], self.columns

    @property
    def nbytes(self) -> int:
        return sum(held_bytes(part) for part in (self.words, self.scales, self.zeros))

    def codes(self, rows: slice = slice(None)) -> torch.Tensor:
        """Return the codes, int32 [n, G * group_size]."""
        shifts = torch.arange(0, 32, self.bits, dtype=torch.int32, device=self.words.device)
        codes = (self.words[rows, :, None] >> shifts) & ((1 << self.bits) - 1)
        return codes.flatten(1)

    def dequantize(self, dtype: torch.dtype, rows: slice = slice(None)) -> torch.Tensor:
        """Return values [n, columns], computed in fp32, so that ``dtype`` is the only rounding."""
        zeros, scales = self.zeros[rows, :, None], self.scales[rows, :, None]
        steps = self.codes(rows).unflatten(1, (-1, self.group_size)) - zeros.to(torch.int32)
        values = steps.to(torch.float32) * scales
        return values.flatten(1)[:, : self.columns].to(dtype)

    def part(self, rows: slice) -> PackedWeight:
        """Return a view of some rows."""
        return PackedWeight(
            self.columns,
            self.bits,
            self.group_size,
            self.words[rows],
            self.scales[rows],
            self.zeros[rows],
        )

    def strips(self, weights: int = STRIP_WEIGHTS) -> Iterator[slice]:
        """Yield row ranges of about this many weights."""
        rows = self.words.shape[0]
        step = max(1, weights // self.columns)
        for first in range(0, rows, step):
            yield slice(first, min(first + step, rows))


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """The operands of torch's 4-bit product: its own tiles, and [G, N, 2] of scales and offsets."""

    tiles: torch.Tensor
    scales_and_offsets: torch.Tensor
    group_size: int

    def strips(self, weights: int = UNPACKED_WEIGHTS) -> Iterator[Int4Weight]:
        """Yield views of about this many weights each."""
        groups, rows, _ = self.scales_and_offsets.shape
        tiles = max(1, weights // (groups * self.group_size) // 8)
        for first in range(0, rows // 8, tiles):
            end = min(first + tiles, rows // 8)
            scales = self.scales_and_offsets[:, 8 * first : 8 * end]
            yield Int4Weight(self.tiles[first:end], scales, self.group_size)


def plain_weight(
    matrices: Sequence[QuantizedMatrix], device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Stack matrices of a float format by rows, in ``dtype``.

    The result is fp32 if fp16 would overflow or lose digits, as weights stored as bf16 may.
    """
    weight = torch.cat([_tensor(matrix.dequantize(), device) for matrix in matrices])
    narrow = weight.to(dtype)
    if not bool(torch.isfinite(narrow).all()):
        return weight
    if dtype != torch.float16 or float(weight.abs().max()) >= MIN_HALF_WEIGHT:
        return narrow
    return narrow if torch.equal(narrow.float(), weight) else weight


def held_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of the memory behind a tensor. A repeating view adds none."""
    return int(tensor.untyped_storage().nbytes())


def _words(matrix: QuantizedMatrix, bits: int) -> torch.Tensor:
    codes, _ = matrix.in_container(bits)
    # Bytes have low bits first and are in order, so a little-endian word has low bits first too.
    return torch.from_numpy(np.array(codes).reshape(len(codes), -1).view("<i4"))


def _stored_scales(matrix: QuantizedMatrix, device: torch.device) -> torch.Tensor:
    if matrix.scale_data is None:
        raise ValueError("an integer matrix has scales")
    return _tensor(matrix.scale_data, device)


def _cat_scales(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    wide = any(part.dtype == torch.float32 for part in parts)
    return torch.cat([part.float() if wide else part for part in parts])


def _tensor(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """Copy an array to the device. Stored arrays are mapped files, which must not be written."""
    return torch.from_numpy(np.array(array)).to(device)
