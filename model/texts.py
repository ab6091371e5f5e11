"""Whole texts that share a pass through an encoder, one behind the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

PASS_ROWS = 512
"""The most tokens of a pass of several texts. One text alone may be as long as the context."""


def pass_rows(context_tokens: int) -> int:
    """Return the most rows of a pass."""
    return max(PASS_ROWS, context_tokens)


@dataclass(frozen=True, slots=True)
class Texts:
    """The bounds of texts in the rows of a pass.

    lengths: the tokens of each text.
    seconds: where the second part of each text begins, as in a pair of sentences: its length if it
        has no second part.
    """

    lengths: tuple[int, ...]
    seconds: tuple[int, ...]

    @staticmethod
    def plain(*lengths: int) -> Texts:
        """Return texts of one part each."""
        return Texts(lengths, lengths)

    @property
    def rows(self) -> int:
        return sum(self.lengths)

    @property
    def padded_rows(self) -> int:
        """The rows if each text were as long as the longest, as attention lays them."""
        return len(self.lengths) * max(self.lengths)

    @property
    def are_sound(self) -> bool:
        """Whether the numbers can be true, as a peer may send any."""
        return 0 < len(self.lengths) == len(self.seconds) and all(
            0 <= second <= length and length > 0
            for second, length in zip(self.seconds, self.lengths, strict=True)
        )

    def begins(self) -> npt.NDArray[np.int64]:
        """Return the row at which each text begins, and the number of all rows."""
        return np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)

    def positions(self) -> npt.NDArray[np.int64]:
        """Return the position of each row in its text, from 0."""
        return np.concatenate([np.arange(length, dtype=np.int64) for length in self.lengths])

    def types(self) -> npt.NDArray[np.int64]:
        """Return 0 for each row of a text's first part, and 1 for one of its second part."""
        parts = zip(self.lengths, self.seconds, strict=True)
        return np.concatenate(
            [(np.arange(length) >= second).astype(np.int64) for length, second in parts]
        )


def pooled(rows: npt.NDArray[np.float32], texts: Texts, pooling: str) -> npt.NDArray[np.float32]:
    """Return a row for each text [texts, hidden]: its first, its last, or one made of all.

    The mean may be over the root of the length, or weighted by positions from 1 on.
    """
    begins = texts.begins()
    lengths: npt.NDArray[Any] = np.asarray(texts.lengths, rows.dtype)[:, None]
    found: npt.NDArray[np.float32]
    match pooling:
        case "first":
            return rows[begins[:-1]]
        case "last":
            return rows[begins[1:] - 1]
        case "max":
            found = np.maximum.reduceat(rows, begins[:-1], axis=0)
            return found
        case "weighted_mean":
            places: npt.NDArray[Any] = np.asarray(1 + texts.positions(), rows.dtype)
            rows = rows * places[:, None]
            lengths = lengths * (lengths + 1) / 2
        case "mean_sqrt_len":
            lengths = np.sqrt(lengths)
    found = np.add.reduceat(rows, begins[:-1], axis=0) / lengths
    return found


def split(lengths: Sequence[int], most_rows: int) -> list[list[int]]:
    """Divide texts into passes of at most ``most_rows`` rows, and return their indices.

    Texts of similar length share a pass. A longer text has one of its own.
    """
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    passes: list[list[int]] = []
    rows = 0
    for index in order:
        if not passes or rows + lengths[index] > most_rows:
            passes.append([])
            rows = 0
        passes[-1].append(index)
        rows += lengths[index]
    return passes
