"""Weights on a torch device: packed codes, or plain numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from model.quantize import QuantizedMatrix

CONTAINERS = {2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 8: 8}
"""Width in memory of each integer format: those that fill a 32-bit word."""

STRIP_WEIGHTS = 1 << 20
"""Weights that torch unpacks at once: bounds what a product takes besides its operands."""

STRIP_WEIGHT_BYTES = 16
"""What it takes for each of them meanwhile: shifted, masked and offset codes, values."""


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A matrix [N, columns] of codes below 2^bits: value = (code - zero) * scale.

    words: int32 [N, W], 32 / bits codes each, low bits first; rows are padded to whole groups.
    scales: float16 or float32 [N, G]; zeros: uint8 [N, G]. Both may be views that repeat one value.
    """

    columns: int
    bits: int
    group_size: int
    words: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    @staticmethod
    def of(matrices: Sequence[QuantizedMatrix], device: torch.device) -> PackedWeight:
        """Matrices of one integer format and width, stacked by rows, without loss."""
        fmt, columns = matrices[0].format, matrices[0].shape[1]
        rows, groups = sum(matrix.shape[0] for matrix in matrices), fmt.groups(columns)
        bits = CONTAINERS[fmt.bits]
        words = [_words(matrix, bits).to(device) for matrix in matrices]
        if fmt.scheme == "truncate":
            # One scale for all of a matrix.
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
        """int32 [n, G * group_size]."""
        shifts = torch.arange(0, 32, self.bits, dtype=torch.int32, device=self.words.device)
        codes = (self.words[rows, :, None] >> shifts) & ((1 << self.bits) - 1)
        return codes.flatten(1)

    def dequantize(self, dtype: torch.dtype, rows: slice = slice(None)) -> torch.Tensor:
        """Values [n, columns]; computed in fp32, so that rounding to ``dtype`` is the only one."""
        zeros, scales = self.zeros[rows, :, None], self.scales[rows, :, None]
        steps = self.codes(rows).unflatten(1, (-1, self.group_size)) - zeros.to(torch.int32)
        values = steps.to(torch.float32) * scales
        return values.flatten(1)[:, : self.columns].to(dtype)

    def part(self, rows: slice) -> PackedWeight:
        """A view of some rows."""
        return PackedWeight(
            self.columns,
            self.bits,
            self.group_size,
            self.words[rows],
            self.scales[rows],
            self.zeros[rows],
        )

    def strips(self, weights: int = STRIP_WEIGHTS) -> Iterator[slice]:
        """Row ranges of about so many weights."""
        rows = self.words.shape[0]
        step = max(1, weights // self.columns)
        for first in range(0, rows, step):
            yield slice(first, min(first + step, rows))


def plain_weight(
    matrices: Sequence[QuantizedMatrix], device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Matrices of a float format stacked by rows, in ``dtype``.

    In fp32 where fp16 would overflow, which weights stored as bf16 may.
    """
    weight = torch.cat([_tensor(matrix.dequantize(), device) for matrix in matrices])
    narrow = weight.to(dtype)
    return narrow if bool(torch.isfinite(narrow).all()) else weight


def held_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the memory behind a tensor, which a repeating view does not add to."""
    return int(tensor.untyped_storage().nbytes())


def _words(matrix: QuantizedMatrix, bits: int) -> torch.Tensor:
    codes, _ = matrix.in_container(bits)
    # Low bits first in each byte, and bytes in order: a little-endian word is low bits first too.
    return torch.from_numpy(np.array(codes).reshape(len(codes), -1).view("<i4"))


def _stored_scales(matrix: QuantizedMatrix, device: torch.device) -> torch.Tensor:
    if matrix.scale_data is None:
        raise ValueError("an integer matrix has scales")
    return _tensor(matrix.scale_data, device)


def _cat_scales(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    wide = any(part.dtype == torch.float32 for part in parts)
    return torch.cat([part.float() if wide else part for part in parts])


def _tensor(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """A copy on the device: stored arrays are mapped files, which must not be written to."""
    return torch.from_numpy(np.array(array)).to(device)
