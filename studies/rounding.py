"""Models whose layers are rounded to any width, also to widths that are no storage format.

The DILEMMA paper has layers of 4, 6, 8, 10, 12, ... bits. Shoal stores neither 10 nor 12. Here the
rounded weights are kept as fp32, so they take the memory of fp32, and compute as it does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model.artifact import Tensor
from model.checkpoint import Checkpoint
from model.quantize import BITS, Format, Scheme, quantize, require_storable
from model.row_pieces import RowPieces
from model.spec import QUANTIZED_TENSORS, ModelSpec

Tensors = Mapping[str, npt.NDArray[np.float32]]

ORIGINAL = 32
"""The width of a layer that stays as it is. The paper counts original weights as 32 bits."""

_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Rounding:
    """How weights are rounded: a storage scheme, or ``truncate`` to any width."""

    scheme: Scheme
    group_size: int

    def __str__(self) -> str:
        """The rounding's name, as the names of results have it."""
        return self.scheme if self.scheme == "truncate" else f"{self.scheme} {self.group_size}"

    def matrix(self, weights: npt.NDArray[np.float32], bits: int) -> npt.NDArray[np.float32]:
        """Return a matrix [N, K] rounded to ``bits``.

        Raises ValueError for a width that the scheme does not store, and CheckpointError for
        weights that are no finite numbers.
        """
        if bits >= ORIGINAL:
            return weights
        if self.scheme == "truncate" and (bits not in BITS or bits >= 16):
            return truncated(weights, bits)
        return quantize(weights, Format.of(bits, self.scheme, self.group_size)).dequantize()

    def tensors(self, tensors: Tensors, bits: int) -> dict[str, npt.NDArray[np.float32]]:
        """Return a block's tensors with each of its matrices rounded."""
        return {
            name: self.matrix(tensor, bits) if name in QUANTIZED_TENSORS else tensor
            for name, tensor in tensors.items()
        }


def truncated(weights: npt.NDArray[np.float32], bits: int) -> npt.NDArray[np.float32]:
    """Return weights truncated towards zero with the step max|w| / 2^(bits - 1).

    Source: DILEMMA, "Environment Setup". It is the scheme ``truncate`` of model.quantize. Raises
    CheckpointError as that does.
    """
    require_storable(weights, "a matrix")
    middle = 2.0 ** (bits - 1)
    step = float(np.abs(weights).max(initial=0.0)) / middle or 1.0
    result = np.empty(weights.shape, np.float32)
    for begin in range(0, len(weights), _rows(weights)):
        part = slice(begin, begin + _rows(weights))
        codes = np.clip(np.trunc(weights[part] / step, dtype=np.float64), -middle, middle - 1)
        result[part] = codes * step
    return result


class RoundedModel:
    """A checkpoint with each of its blocks rounded to a width, or as it is.

    It is a ``BlockSource`` of the rounded weights. Rounded blocks are fp32.
    """

    def __init__(self, checkpoint: Checkpoint, bits: Sequence[int], rounding: Rounding) -> None:
        """Make the model. ``bits`` has one width for each block, ORIGINAL for none."""
        if len(bits) != checkpoint.spec.block_count:
            raise ValueError(f"{len(bits)} widths for {checkpoint.spec.block_count} blocks")
        self._checkpoint = checkpoint
        self._bits = tuple(bits)
        self._rounding = rounding

    @property
    def spec(self) -> ModelSpec:
        return self._checkpoint.spec

    def block(self, block: int) -> dict[str, npt.NDArray[np.float32]]:
        """Return the tensors of one block, rounded."""
        tensors = self._checkpoint.block(block)
        return self._rounding.tensors(tensors, self._bits[block])

    def block_in(self, block: int, fmt: Format) -> Mapping[str, Tensor | RowPieces]:
        """Return the tensors of one block to store in ``fmt``."""
        if self._is_rounded(block):
            return self.block(block)
        return self._checkpoint.block_in(block, fmt)

    def kept(self, block: int, fmt: Format) -> Mapping[str, Tensor]:
        """Return the matrices that are stored in ``fmt`` already. A rounded block has none."""
        return {} if self._is_rounded(block) else self._checkpoint.kept(block, fmt)

    def format_of(self, block: int, fmt: Format) -> Format:
        """Return the format of a block at the bits of ``fmt``."""
        return fmt if self._is_rounded(block) else self._checkpoint.format_of(block, fmt)

    def lossless_format(self, block: int) -> Format:
        """Return fp32 for a rounded block, else the format that keeps the checkpoint's."""
        if self._is_rounded(block):
            return Format.of(ORIGINAL)
        return self._checkpoint.lossless_format(block)

    def _is_rounded(self, block: int) -> bool:
        return self._bits[block] < ORIGINAL


def weight_errors(
    checkpoint: Checkpoint, block: int, bits: Sequence[int], rounding: Rounding
) -> dict[int, float]:
    """Return by width the largest |w - w_b| / 2^b over a block's matrices.

    Source: DILEMMA, (5) to (7) and "Environment Setup". Raises CheckpointError.
    """
    matrices = _matrices(checkpoint, block)
    return {
        width: max(
            (float(np.abs(w - rounding.matrix(w, width)).max(initial=0.0)) for w in matrices),
            default=0.0,
        )
        / 2.0**width
        for width in bits
    }


def histogram(
    checkpoint: Checkpoint, blocks: Sequence[int], edges: npt.NDArray[np.float64], on_step: OnStep
) -> tuple[npt.NDArray[np.int64], float]:
    """Count the weights of matrices between the edges, and return the largest magnitude too.

    Weights beyond the edges count in the outermost bins. Raises CheckpointError.
    """
    counts = np.zeros(len(edges) - 1, np.int64)
    largest = 0.0
    for done, block in enumerate(blocks):
        on_step(done, len(blocks))
        for matrix in _matrices(checkpoint, block):
            inside = np.clip(matrix, edges[0], edges[-1])
            counts += np.histogram(inside, edges)[0]
            largest = max(largest, float(np.abs(matrix).max(initial=0.0)))
    on_step(len(blocks), len(blocks))
    return counts, largest


OnStep = Callable[[int, int], None]


def _matrices(checkpoint: Checkpoint, block: int) -> list[npt.NDArray[np.float32]]:
    tensors = checkpoint.block(block).items()
    return [tensor for name, tensor in tensors if name in QUANTIZED_TENSORS]


def _rows(weights: npt.NDArray[np.float32]) -> int:
    """The rows that are truncated at once."""
    columns = int(weights.shape[1])
    return max(1, _PIECE // max(1, columns))
