"""Biases of attention's scores by the distance between two tokens, as MPNet and T5 learn them.

Each distance up to a quarter of the buckets has its own row in either direction. Longer distances
share rows, each for a range that grows with the distance.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

NEAR_DISTANCE = 128
"""From this distance on, all tokens share a row."""

Array = npt.NDArray[Any]


def buckets_of(longest: int, buckets: int) -> npt.NDArray[np.int64]:
    """Return the row of each pair of tokens: int64 [longest, longest], the query first."""
    at = np.arange(longest)
    distance = at[:, None] - at  # Positive for a token before the query.
    half, near = buckets // 2, buckets // 4
    far = np.maximum(np.abs(distance), near).astype(np.float32) / np.float32(near)
    # In single precision, as the published models compute it.
    steps = np.log(far) / np.float32(math.log(NEAR_DISTANCE / near)) * np.float32(half - near)
    rows = np.where(
        np.abs(distance) < near,
        np.abs(distance),
        np.minimum(near + steps.astype(np.int64), half - 1),
    )
    found: npt.NDArray[np.int64] = rows + half * (distance < 0)
    return found


def position_bias(table: Array, longest: int) -> Array:
    """Return what is added to scores [heads, longest, longest], of a table [buckets, heads]."""
    bias: Array = table[buckets_of(longest, len(table))].transpose(2, 0, 1)
    return bias
