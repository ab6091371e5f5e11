"""Rank correlations with their intervals, and the random plans that they are taken over."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from evaluation.bootstrap import CONFIDENCE, DRAWS, Estimate

LEAST_PLANS = 3
"""Fewer values have no rank correlation that says anything."""

_ATTEMPTS = 1000
_COMPARED = 1 << 24
"""Pairs of values that are compared at once."""

Values = npt.NDArray[np.float64]


def correlation(
    predicted: Sequence[float], measured: Sequence[float], seed: int, draws: int = DRAWS
) -> Estimate:
    """Return Spearman's correlation with its 95 % interval, from plans drawn with replacement."""
    return _bootstrap([predicted], measured, seed, draws)


def difference(
    one: Sequence[float],
    other: Sequence[float],
    measured: Sequence[float],
    seed: int,
    draws: int = DRAWS,
) -> Estimate:
    """Return by how much ``one`` correlates better than ``other``, over the same drawn plans."""
    return _bootstrap([one, other], measured, seed, draws)


def ranks(values: Values) -> Values:
    """Return the rank of each value within its row of [n, count], from 1 up.

    Equal values share their mean rank.
    """
    below = (values[:, None, :] < values[:, :, None]).sum(axis=2)
    equal = (values[:, None, :] == values[:, :, None]).sum(axis=2)
    mean_ranks: Values = below + (equal + 1) / 2
    return mean_ranks


def random_plans(
    layers: int, widths: Sequence[int], count: int, seed: int
) -> list[tuple[int, ...]]:
    """Return different mixed plans, each a width per layer. Equal seeds draw equal plans.

    Each plan first draws its narrowest and its widest width, and a share for each width between
    them. So plans differ in their narrowest width, and in how many layers have it. More plans
    begin with the same ones. There are fewer if not so many different ones were found.
    """
    random = np.random.default_rng(seed)
    widths = sorted(set(widths))

    def draw() -> tuple[int, ...]:
        low = int(random.integers(0, len(widths) - 1))
        high = int(random.integers(low + 1, len(widths)))
        some = widths[low : high + 1]
        shares = random.dirichlet(np.ones(len(some)))
        return tuple(int(width) for width in random.choice(some, layers, p=shares))

    return _different(draw, count, lambda plan: len(set(plan)) > 1 or layers == 1)


def shuffled_plans(
    layers: int, widths: Sequence[int], count: int, seed: int
) -> list[tuple[int, ...]]:
    """Return different plans of equal bits: each width has as many layers in all of them.

    All else is as in ``random_plans``.
    """
    random = np.random.default_rng(seed)
    widths = sorted(set(widths))
    some = [widths[index % len(widths)] for index in range(layers)]

    def draw() -> tuple[int, ...]:
        return tuple(int(width) for width in random.permutation(some))

    return _different(draw, count, lambda plan: True)


def _different(
    draw: Callable[[], tuple[int, ...]], count: int, fits: Callable[[tuple[int, ...]], bool]
) -> list[tuple[int, ...]]:
    found: dict[tuple[int, ...], None] = {}
    for _ in range(_ATTEMPTS + 10 * count):
        if len(found) == count:
            break
        plan = draw()
        if fits(plan):
            found[plan] = None
    return list(found)


def _bootstrap(
    predictors: Sequence[Sequence[float]], measured: Sequence[float], seed: int, draws: int
) -> Estimate:
    """Return the correlation of the first predictor, less that of a second one."""
    count = len(measured)
    if count < LEAST_PLANS:
        raise ValueError(f"{count} plans are too few for a correlation")
    drawn = np.random.default_rng(seed).integers(0, count, (draws, count))
    places = np.concatenate([np.arange(count)[None], drawn])
    outcome = np.asarray(measured, float)

    def values(rows: npt.NDArray[np.int64]) -> Values:
        found = [_spearman(np.asarray(one, float)[rows], outcome[rows]) for one in predictors]
        total: Values = found[0] - sum(found[1:])
        return total

    some = max(1, _COMPARED // count**2)
    found = np.concatenate([values(places[at : at + some]) for at in range(0, len(places), some)])
    tail = (1.0 - CONFIDENCE) / 2
    low, high = np.quantile(found[1:], [tail, 1.0 - tail])
    return Estimate(float(found[0]), float(low), float(high), count)


def _spearman(first: Values, second: Values) -> Values:
    """Return Spearman's rank correlation of each pair of rows, from -1 to 1.

    It is 0 if all values of one are equal, because nothing can be told from them.
    """
    a, b = ranks(first), ranks(second)
    a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
    scale = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    result: Values = np.divide((a * b).sum(axis=1), scale, out=np.zeros(len(a)), where=scale > 0)
    return result
