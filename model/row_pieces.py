"""A matrix whose rows are read piece by piece, so that one piece of it is in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]


class RowPieces:
    """A float32 matrix [N, K] of pieces one below the other, of which the last one read is kept.

    A layer with experts has hundreds, which together are gigabytes.
    """

    ndim = 2

    def __init__(
        self, rows: Sequence[int], columns: int, read: Callable[[int], FloatArray]
    ) -> None:
        """``rows`` are those of each piece, and ``read`` returns a piece by its number."""
        self._ends = np.cumsum(rows)
        self._read = read
        self._kept: tuple[int, FloatArray] | None = None
        self.shape = (int(self._ends[-1]), columns)

    def __getitem__(self, rows: slice) -> FloatArray:
        """Return consecutive rows."""
        begin, end, step = rows.indices(self.shape[0])
        if step != 1:
            raise ValueError("only consecutive rows are read")
        parts = []
        first = int(np.searchsorted(self._ends, begin, "right"))
        last = int(np.searchsorted(self._ends, end, "left"))
        for piece in range(first, last + 1) if begin < end else ():
            values = self._piece(piece)
            before = int(self._ends[piece]) - len(values)
            parts.append(values[max(begin - before, 0) : end - before])
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty((0, self.shape[1]), np.float32)

    def __array__(
        self, dtype: npt.DTypeLike | None = None, copy: bool | None = None
    ) -> npt.NDArray[Any]:
        """Return the whole matrix."""
        values = np.empty(self.shape, dtype or np.float32)
        for piece, end in enumerate(self._ends):
            part = self._piece(piece)
            values[int(end) - len(part) : int(end)] = part
        return values

    def _piece(self, number: int) -> FloatArray:
        if self._kept is None or self._kept[0] != number:
            self._kept = None  # Two pieces are never in memory.
            self._kept = number, self._read(number)
        return self._kept[1]
