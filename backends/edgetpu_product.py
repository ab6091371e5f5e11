"""A matrix product on int8 codes that equals the float product to about 1 %.

The chip has one fixed scale per input and per output channel. The host does the rest, row by row:

- A product without bias is homogeneous. So each row is divided by CLIP times its own root mean
  square before, and multiplied back after. One fixed input scale then suits every row.
- Values above 1 are outliers. The host multiplies them in float, a few values of a row. If the
  other values would vanish beside them, the row is divided by the scale of the others instead.
  (Source: Dettmers et al., "LLM.int8()", the outlier columns.)
- A row of independent values of unit variance gives an output channel the standard deviation
  ||w||_2. The channel's range is RANGE times that. It follows from the weights alone, without a
  calibration text. An output outside the range saturates, and the host computes it again.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np
import numpy.typing as npt

from backends.edgetpu_runtime import Codes, Engine
from backends.edgetpu_tflite import SCALE

Array = npt.NDArray[np.float32]

CLIP = 4.0
RANGE = 5.0
"""Chosen on the demo model. docs/edgetpu.md has the divergence at other values."""

DROWNED = 0.5
"""The outliers dominate a row if the others have less than this share of its root mean square."""

_TOP = 127
_EXACT_WEIGHTS = 1 << 20
"""The weights that are unpacked at once to compute saturated outputs again."""


@dataclass(frozen=True, slots=True, eq=False)
class Int8Weights:
    """A matrix as codes int8 [N, K] in [-127, 127] times ``steps`` float32 [N].

    ranges: float32 [N], the output of code 127 in units of a row's scale.
    """

    codes: Codes
    steps: Array
    ranges: Array

    @staticmethod
    def of(matrix: Array) -> Int8Weights:
        """Round to nearest, with one step per row. The bytes are the same on every machine."""
        largest = np.abs(matrix).max(axis=1)
        steps = (np.where(largest == 0, 1, largest) / np.float32(_TOP)).astype(np.float32)
        codes = np.empty(matrix.shape, np.int8)
        norms = np.empty(len(matrix), np.float64)
        for first in range(0, len(matrix), 256):
            part = slice(first, first + 256)
            codes[part] = np.rint(matrix[part] / steps[part, None])
            # Sums of integers do not depend on their order.
            norms[part] = np.sqrt(np.square(codes[part].astype(np.int64)).sum(axis=1))
        ranges = norms * steps * (RANGE / CLIP)
        ranges[ranges == 0] = 1
        return Int8Weights(codes, steps, ranges.astype(np.float32))

    @property
    def multipliers(self) -> Array:
        """The factors that turn sums of code products into output codes."""
        return (self.steps / self.ranges).astype(np.float32)


@dataclass(slots=True)
class Counts:
    """The host's share: ``outliers`` of ``inputs``, and ``saturated`` of ``outputs``."""

    inputs: int = 0
    outliers: int = 0
    outputs: int = 0
    saturated: int = 0


class Int8Product:
    """Computes x @ W.T of float rows through an Engine that holds W's codes.

    ``weights.codes`` may be a view of the engine's mapped file, because few of them are read.
    """

    def __init__(self, weights: Int8Weights, engine: Engine) -> None:
        self.counts = Counts()
        self._weights = weights
        self._engine = engine
        self._output_steps = weights.ranges * np.float32(SCALE)

    def __call__(self, rows: Array) -> Array:
        """Multiply float32 [n, K] to float32 [n, N]."""
        count, width = rows.shape
        units = _units(rows)
        units[units == 0] = 1
        scaled = rows / units
        wide = np.abs(scaled) > 1
        outliers = int(np.count_nonzero(wide))
        beside = None
        if outliers:
            # The rows were divided by their own scale, so this is a share.
            left = _units(np.where(wide, np.float32(0), scaled))
            drowned = (left > 0) & (left < DROWNED)
            if drowned.any():
                units = np.where(drowned, units * left, units)
                scaled = rows / units
                wide = np.abs(scaled) > 1
                outliers = int(np.count_nonzero(wide))
            columns = np.flatnonzero(wide.any(axis=0))
            kept = np.where(wide[:, columns], scaled[:, columns], np.float32(0))
            # np.take is twenty times as fast as indexing.
            beside = kept @ np.take(self._weights.codes, columns, axis=1).astype(np.float32).T
            beside *= self._weights.steps
            scaled[wide] = 0
        codes = self._engine.run(np.rint(scaled * np.float32(_TOP)).astype(np.int8))
        result: Array = codes * self._output_steps
        saturated = (codes == _TOP) | (codes <= -_TOP)
        exact = int(np.count_nonzero(saturated))
        if exact:
            self._compute_exactly(result, scaled, saturated)
        if beside is not None:
            result += beside
        result *= units
        counts = self.counts
        counts.inputs += count * width
        counts.outliers += outliers
        counts.outputs += codes.size
        counts.saturated += exact
        return result

    def _compute_exactly(self, result: Array, rows: Array, where: npt.NDArray[np.bool_]) -> None:
        at_rows, at_channels = np.nonzero(where)
        step = max(1, _EXACT_WEIGHTS // rows.shape[1])
        for first in range(0, len(at_rows), step):
            row, channel = at_rows[first : first + step], at_channels[first : first + step]
            weights = self._weights.codes[channel].astype(np.float32)
            sums = np.einsum("ij,ij->i", rows[row], weights)
            result[row, channel] = sums * self._weights.steps[channel]

    def close(self) -> None:
        """Free the engine. Idempotent."""
        self._engine.close()


def _units(rows: Array) -> Array:
    """Return CLIP root mean squares of each row, float32 [n, 1]."""
    squares = np.einsum("ij,ij->i", rows, rows)[:, None]
    units: Array = np.sqrt(squares) * np.float32(CLIP / sqrt(rows.shape[1]))
    return units
