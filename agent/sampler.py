"""From logits to a token: greedy, or temperature with top-k, top-p and min-p.

agent.adjustments changes logits before, if the request asks for it.

Nothing is sorted. One uniform number is looked up in the cumulative distribution. Sums of groups of
weights find the group, and the weights of that group find the token.

Top-k needs only the k highest logits. At least k of all logits reach the k-th highest of the
groups' maxima, and few more do. The exact choice is made among these.

Top-p draws from the whole distribution, and adds up the probabilities of the token and of those
that rank behind it. If they are at most 1 - top_p, all these are dropped, and another token is
drawn from the others. Most sums are known to be more after a part of the vocabulary. Each draw is
proportional to the weights, so the result is, too. Tokens below min_p weigh nothing, but count in
the sum that top_p is a part of.
"""

from __future__ import annotations

import hashlib
import math
import struct
import threading
from collections.abc import Sequence
from itertools import count, pairwise
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from agent.adjustments import Adjustments, Logits, Matcher
from backends.base import ALL_LOGITS, BackendError
from wire.logprobs import encode_logprobs
from wire.messages import Sampling

Ids = npt.NDArray[np.int64]
Real = TypeVar("Real", np.float32, np.float64)

GROUPS = 1024
"""Token i is in group i % GROUPS. Groups are columns, which vector instructions sum and compare."""

EXACT_COUNT = 4096
"""At most this many logits are computed in float64 at once, which takes microseconds."""

DOUBT = 1e-5
"""The accuracy of float32 sums of probabilities. Anything closer to top_p is computed again.

The second computation uses float64.
"""

SMALLEST_TEMPERATURE = 1e-37
"""A normal float32, because the thread of a stage may read denormals as zero."""

NEAR = 20.0
"""Float32 holds the exponentials of logits up to this, and their sums, as well as smaller ones."""

SMALLEST_LOGPROB = -9999.0
"""Stands for impossible tokens, as in OpenAI's answers, because JSON has no infinity."""

NOT_FINITE = "the model's logits are not finite: load it at more bits"

ZEROS = np.zeros(GROUPS, np.float32)
"""Zeros to compare rows with. Comparing with one number takes NumPy four times as long."""


class _Memory(threading.local):
    """Float32 arrays that a thread reuses for each token.

    New arrays of this size would be mapped, zeroed and given back with each token.
    """

    def __init__(self) -> None:
        self._weights = self._lower = np.empty(0, np.float32)
        self._mask = np.empty(0, np.bool_)

    def weights(self, rows: int, groups: int) -> npt.NDArray[Any]:
        self._reserve(rows * groups)
        return self._weights[: rows * groups].reshape(rows, groups)

    def lower(self, rows: int, groups: int) -> npt.NDArray[Any]:
        self._reserve(rows * groups)
        return self._lower[: rows * groups].reshape(rows, groups)

    def mask(self, *shape: int) -> npt.NDArray[np.bool_]:
        self._reserve(math.prod(shape))
        return self._mask[: math.prod(shape)].reshape(shape)

    def _reserve(self, size: int) -> None:
        if len(self._weights) < size:
            self._weights, self._lower = np.empty(size, np.float32), np.empty(size, np.float32)
            self._mask = np.empty(size, np.bool_)


_memory = _Memory()


class Sampler:
    """Draws the tokens of one sequence. Equal settings, positions and logits give equal tokens.

    With penalties or a grammar, the tokens before must be equal, too.
    """

    def __init__(
        self, sampling: Sampling, matcher: Matcher | None = None, prompt: Sequence[int] = ()
    ) -> None:
        """``matcher`` knows the tokens that may follow, if the request has a grammar.

        prompt: its tokens, if their log-probabilities are wanted.
        """
        self._sampling = sampling
        self._told = prompt if sampling.prompt_logprobs else ()
        self._adjustments = Adjustments.of(sampling, matcher)
        self.tells_logprobs = sampling.top_logprobs >= 0
        """Whether ``logprobs`` is wanted for each token."""

    @property
    def candidates(self) -> int:
        """How many of the highest logits ``sample`` needs, or ALL_LOGITS."""
        if self._adjustments is not None or self.tells_logprobs or self._sampling.prompt_logprobs:
            return ALL_LOGITS
        if not self._sampling.temperature > 0 or self._sampling.top_k == 1:
            return 1
        return self._sampling.top_k if self._sampling.top_k > 0 else ALL_LOGITS

    @property
    def waits(self) -> bool:
        """Whether ``sample`` would wait for the process that follows the grammar."""
        return self._adjustments is not None and self._adjustments.waits

    def sample(self, logits: Logits, position: int) -> int:
        """Return the token at ``position`` by ``logits`` [vocab].

        Temperature 0 takes the highest logit. Of equal logits the lowest id ranks first, for
        greedy, top_k and top_p. The draw does not depend on earlier ones, so another device that
        knows the earlier tokens can continue. Raises BackendError if the highest logit is not
        finite, or the grammar fails.
        """
        if self._adjustments is None:
            return self._choose(logits, position)
        token = self._choose(self._adjustments.apply(logits), position)
        self._adjustments.note(token)
        return token

    def told(self, position: int) -> int | None:
        """Return the prompt's token at ``position``, if its log-probability is wanted."""
        return self._told[position] if position < len(self._told) else None

    def logprobs(self, logits: Logits, token: int) -> bytes:
        """Return the log-probabilities of ``token`` and of the likeliest ones, as on the wire.

        They are the model's own: temperature, penalties and grammars do not change them.
        """
        return encode_logprobs(*token_logprobs(logits, token, max(self._sampling.top_logprobs, 0)))

    def _choose(self, logits: Logits, position: int) -> int:
        """Return the token by logits that are penalized already."""
        sampling = self._sampling
        best = int(logits.argmax())  # The first NaN, if there is one.
        if not math.isfinite(logits[best]):
            raise BackendError(NOT_FINITE)
        if not sampling.temperature > 0 or sampling.top_k == 1:
            return best
        if 0 < sampling.top_k < len(logits):
            chosen = highest(logits, sampling.top_k)
            best = int(chosen.searchsorted(best))
            return int(chosen[self._draw(logits[chosen], best, position)])
        return self._draw(logits, best, position)

    def _draw(self, logits: Logits, best: int, position: int) -> int:
        """Draw an index of ``logits``, whose highest is at ``best``."""
        if len(logits) > EXACT_COUNT:
            try:
                return draw(logits, best, self._sampling, position)
            except _InDoubt:
                pass
        return draw(logits.astype(np.float64), best, self._sampling, position)


class _InDoubt(Exception):
    """Float32 cannot tell whether a token is among those that top_p keeps."""


def highest(logits: Logits, count: int) -> Ids:
    """Return the ids of the ``count`` highest logits, 0 < count < vocab, by rising id."""
    rows = len(logits) // GROUPS
    if count <= GROUPS and rows > 1:
        maxima = np.maximum.reduce(logits[: rows * GROUPS].reshape(rows, GROUPS))
        floor = np.partition(maxima, -count)[-count]
        mask = _memory.mask(len(logits))
        np.greater_equal(logits, floor, out=mask)
        (found,) = mask.nonzero()
    else:
        found = np.arange(len(logits))
    values = logits[found]
    if len(found) > count:
        floor = np.partition(values, -count)[-count]
        kept = values > floor
        equal = np.flatnonzero(values == floor)
        kept[equal[: count - np.count_nonzero(kept)]] = True
        found = found[kept]
    return found


def token_logprobs(logits: Logits, token: int, top: int) -> tuple[Ids, Logits]:
    """Return ids [1 + top] and their log-probabilities: ``token``, then the likeliest ones.

    There are fewer if the vocabulary is smaller. Of equal ones the lowest id comes first.
    """
    best = float(logits.max())
    if not math.isfinite(best):
        raise BackendError(NOT_FINITE)
    with np.errstate(
        over="ignore"
    ):  # The smallest logits may be further away than float32 reaches.
        total = float(np.exp(logits - np.float32(best)).sum(dtype=np.float64))
    ids = np.array([token], np.int64)
    if top > 0:
        likeliest = highest(logits, min(top, len(logits)))
        ids = np.append(ids, likeliest[np.argsort(-logits[likeliest], kind="stable")])
    values = logits[ids].astype(np.float64) - best - math.log(total)
    return ids, np.maximum(values, SMALLEST_LOGPROB).astype(np.float32)


def draw(logits: npt.NDArray[Real], best: int, sampling: Sampling, position: int) -> int:
    """Draw an index of ``logits`` [n] by temperature, top_p and min_p, in the type of the logits.

    The highest logit is at ``best``, and finite. Raises _InDoubt if float32 is too coarse.
    """
    weights = _weights(logits, logits[best], sampling.temperature)
    flat = weights.reshape(-1)
    highest_weight = float(flat[best])
    limit, doubt = 0.0, 0.0
    cumulative = _cumulative(weights)
    total = cumulative[-1]
    if sampling.min_p > 0:
        np.multiply(weights, weights >= sampling.min_p * highest_weight, out=weights)
        cumulative = _cumulative(weights)
    for attempt in count():
        if attempt:
            cumulative = _cumulative(weights)
        target = _uniform(sampling.seed, position, attempt) * cumulative[-1]
        group = _invert(cumulative, target)
        within = np.add.accumulate(weights[:, group].astype(np.float64))
        row = _invert(within, target - (cumulative[group - 1] if group else 0.0))
        index = row * len(cumulative) + group
        if sampling.top_p >= 1:
            break
        if attempt == 0:
            limit = sampling.top_p * total
            doubt = DOUBT * total if logits.dtype == np.float32 else 0.0
            if limit <= highest_weight - doubt:  # It suffices alone.
                return best
        if index == best:
            break
        enough = cumulative[-1] - limit  # Then the tokens before it are less than top_p.
        behind = _weight_behind(weights, index, enough + doubt)
        if behind > enough + doubt:
            break
        if behind > enough - doubt and doubt:
            raise _InDoubt
        # Assigning through a mask would cost more than everything else in this function.
        np.multiply(weights, weights >= flat[index], out=weights)
        rest = flat[index:]
        rest[rest == rest[0]] = 0
    return index


def _weights(logits: npt.NDArray[Real], best: Real, temperature: float) -> npt.NDArray[Real]:
    """Return numbers in proportion to the probabilities, [rows, groups], padded with 0.

    The largest is 1, unless the highest logit, ``best``, is near 0. Then its exponential is.
    """
    groups = min(GROUPS, len(logits))
    shape = -(-len(logits) // groups), groups
    if logits.dtype == np.float32:
        weights = _memory.weights(*shape)
    else:
        weights = np.empty(shape, logits.dtype)
    flat = weights.reshape(-1)
    flat[len(logits) :] = 0
    own = flat[: len(logits)]
    if temperature == 1 and abs(best) <= NEAR:
        np.exp(logits, out=own)
        return weights
    temperature = max(temperature, SMALLEST_TEMPERATURE)
    with np.errstate(over="ignore"):  # A tiny temperature leaves only the likeliest token.
        if abs(best) > NEAR * temperature:
            logits = np.subtract(logits, best, out=own)
        if temperature != 1:
            logits = np.divide(logits, logits.dtype.type(temperature), out=own)
    np.exp(logits, out=own)
    return weights


def _cumulative(weights: npt.NDArray[Real]) -> npt.NDArray[np.float64]:
    """Return the cumulative sums of the groups.

    Methods and mixed types make NumPy call more code. Behind a pass, code is out of the caches.
    """
    return np.add.accumulate(np.add.reduce(weights).astype(np.float64))


def _weight_behind(weights: npt.NDArray[Real], index: int, enough: float) -> float:
    """Add up the weight at ``index`` and those that rank behind it, until they are ``enough``."""
    flat = weights.reshape(-1)
    weight, (rows, groups) = flat[index], weights.shape
    if weights.dtype == np.float32:
        lower = _memory.lower(*weights.shape)
        mask = _memory.mask(flat.size)
    else:
        lower, mask = np.empty_like(weights), np.empty(flat.size, np.bool_)
    found = 0.0
    for first, end in pairwise(sorted({0, rows // 4, rows // 2, rows})):
        # With one number, np.minimum takes almost three times as long.
        sums = np.add.reduce(np.clip(weights[first:end], 0, weight, out=lower[first:end]))
        begin, end = first * groups, end * groups
        if begin < index:  # Equal ones before it rank before it.
            here = min(index, end)
            np.greater_equal(flat[begin:here], weight, out=mask[begin:here])
        if index < end:
            here = max(index, begin)
            np.greater(flat[here:end], weight, out=mask[here:end])
        ranked = int(np.count_nonzero(mask[begin:end]))
        found += float(np.add.reduce(sums.astype(np.float64))) - ranked * float(weight)
        if found > enough:
            break
    return found


def _invert(cumulative: npt.NDArray[np.float64], target: float) -> int:
    """Return the first index whose cumulative sum is above ``target``, never one of weight 0."""
    if target >= cumulative[-1]:  # Sums in another order differ in their last bits.
        return int(cumulative.searchsorted(cumulative[-1]))
    return int(cumulative.searchsorted(target, side="right"))


def _uniform(seed: int, position: int, attempt: int) -> float:
    """Return a number in [0, 1) of 53 bits that depends only on the arguments."""
    digest = hashlib.blake2b(struct.pack("<qqq", seed, position, attempt), digest_size=8).digest()
    (number,) = struct.unpack("<Q", digest)
    return float(number >> 11) * 2.0**-53
