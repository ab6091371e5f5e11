"""How far a model's predictions are from another's: the divergence of rows of logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[Any]

_MAX_EXPONENT = 20.0
"""Up to this difference d of logits, e^d is computed in fp32."""


def divergences(expected: Rows, got: Rows) -> npt.NDArray[np.float64]:
    """Return KL(softmax(expected) || softmax(got)) of each row of logits fp32 [n, vocab], in nats.

    Small results are good to about 1e-3 of themselves in fp32. Let p be the expected distribution,
    d the difference of the logits and m the mean of d under p. The result is
    log(1 + sum p (e^(d-m) - 1)): its terms of first order cancel before they are rounded.
    """
    chances = expected - expected.max(axis=1, keepdims=True)
    np.exp(chances, out=chances)
    total = chances.sum(axis=1, dtype=np.float64)
    difference = got - expected
    difference -= (np.einsum("ij,ij->i", chances, difference) / total)[:, None]
    rest = np.einsum("ij,ij->i", chances, difference) / total  # The mean is not quite 0: rounding.
    curved = np.minimum(difference, _MAX_EXPONENT)
    np.expm1(curved, out=curved)
    curved -= difference
    result: npt.NDArray[np.float64] = np.einsum("ij,ij->i", chances, curved) / total
    result = np.log1p(result + rest) - rest
    for row in np.flatnonzero(difference.max(axis=1) > _MAX_EXPONENT):
        # These rows are far from each other: fp64 is needed, and exact enough.
        wide = difference[row].astype(np.float64)
        weighted = np.log(chances[row], where=chances[row] > 0, out=np.full(len(wide), -np.inf))
        result[row] = np.logaddexp.reduce(weighted + wide) - np.log(total[row]) - rest[row]
    # A negative value comes only from the last digit of a sum.
    return np.maximum(result, 0.0)
