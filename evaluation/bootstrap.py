"""Confidence intervals by the bootstrap: items are drawn again, with replacement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Sums = npt.NDArray[np.float64]
Statistic = Callable[[Sums], float]
"""A figure from the sums of each column over the items, such as a loss from nats and tokens."""

DRAWS = 1000
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with the bounds of its interval, from so many items."""

    value: float
    low: float
    high: float
    items: int


def estimate(rows: Sums, statistic: Statistic, seed: int, draws: int = DRAWS) -> Estimate:
    """Return a statistic of rows [items, columns] with its 95 % percentile interval.

    Equal seeds and counts of items draw the same items. So runs over the same items compare.
    At least one item is needed.
    """
    count = len(rows)
    generator = np.random.default_rng(seed)
    share = np.full(count, 1.0 / count)
    drawn = [statistic(generator.multinomial(count, share) @ rows) for _ in range(draws)]
    tail = (1.0 - CONFIDENCE) / 2
    low, high = np.quantile(drawn, [tail, 1.0 - tail])
    return Estimate(statistic(rows.sum(axis=0)), float(low), float(high), count)


def mean(sums: Sums) -> float:
    """Return the mean of the first column. The second one has a 1 for each item, or its tokens."""
    return float(sums[0] / sums[1])
