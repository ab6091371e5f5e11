"""Guesses the next tokens of an answer, and decides how many of them one pass checks.

Text that repeats itself or its context can be guessed: what followed the last tokens before is
likely to follow them again. The first stage guesses, and the last one samples each row with the
seed and position that it has anyway. So the answer is that of single rows, whatever the guesses.

A wrong guess costs time. So the first stage measures its passes, counts which guesses were right,
and takes the number that promises most tokens per second. It may lose about a hundredth of the
time, and what right guesses have gained before.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import median

import numpy as np

from backends.base import Tokens

SHORTEST_MATCH = 2
"""The last tokens that must have occurred before, so that a guess is made."""

LONGEST_MATCH = 16
"""Longer matches count as equal. The newest one decides."""

SIZES = (1, 3, 7, 14)
"""The numbers of guesses whose passes are measured apart. Kernels take 2, 4, 8 and 16 rows best."""


class History:
    """The tokens of a sequence so far."""

    def __init__(self, prompt: Tokens, context_tokens: int) -> None:
        self._tokens = np.empty(context_tokens + 1, np.int64)
        self._tokens[: len(prompt)] = prompt
        self._count = len(prompt)

    def append(self, tokens: Sequence[int]) -> None:
        self._tokens[self._count : self._count + len(tokens)] = tokens
        self._count += len(tokens)

    def guess(self, most: int) -> tuple[tuple[int, ...], int]:
        """Return up to ``most`` tokens that may follow, and how many last tokens speak for them.

        They are what followed the longest match of the last tokens. If it ends before ``most``
        tokens, its end is taken to repeat.
        """
        count, tokens = self._count, self._tokens
        if count <= SHORTEST_MATCH or most < 1:
            return (), 0
        one, two = tokens[count - 2 : count]
        before = tokens[: count - 1]
        # The end of a match is the index of the token that followed it.
        ends = np.flatnonzero((before[1:] == two) & (before[:-1] == one)) + 2
        if not len(ends):
            return (), 0
        matched = SHORTEST_MATCH
        while matched < LONGEST_MATCH and matched < count:
            before_last = tokens[count - 1 - matched]
            longer = ends[(ends > matched) & (tokens[ends - 1 - matched] == before_last)]
            if not len(longer):
                break
            ends, matched = longer, matched + 1
        following: list[int] = tokens[ends[-1] : min(ends[-1] + most, count)].tolist()
        while len(following) < most:
            following += following[: most - len(following)]
        return tuple(following), matched


class Pacer:
    """Chooses how many guesses to check, from what passes of a lone sequence have taken so far."""

    FASTER = 1.05
    """A number of guesses must promise so many times the tokens per second of none."""

    LEAST_CREDIT, MOST_CREDIT = -0.5, 4.0
    START_CREDIT = 1.0
    EARNED = 0.01
    """Credit is counted in passes of one row. A pass without guesses earns a hundredth."""

    CHANCES = (0.3, 0.6, 0.9)
    """The chance of a guess after a short, a longer and a long match, before any was checked."""

    FEWEST = 3
    """So many passes of one row are measured before a guess is checked."""

    FORGET = 64
    """After so many passes without guesses, the oldest figure of each size is forgotten."""

    def __init__(self) -> None:
        self._ones_s: deque[float] = deque(maxlen=9)
        """The last passes of one row."""
        self._sizes_s: dict[int, deque[float]] = {size: deque(maxlen=5) for size in SIZES}
        """The last passes with guesses, by the entry of SIZES."""
        self._right = [[4.0 * chance, 4.0] for chance in self.CHANCES]
        """Right guesses and tried ones by the kind of match, the older ones counting less."""
        self._credit = self.START_CREDIT
        self._plain = 0
        """Passes without guesses."""

    def choose(self, most: int, matched: int) -> int:
        """Return how many of ``most`` guesses a pass checks."""
        if len(self._ones_s) < self.FEWEST or most < 1:
            return 0
        kind = _kind(matched)
        right, tried = self._right[kind]
        chance = min(right / tried, 0.99)
        one_s = median(self._ones_s)
        best, best_rate = 0, self.FASTER
        for guesses in {min(size, most) for size in SIZES}:
            cost = self._cost(guesses, one_s)
            rate = (1 - chance ** (guesses + 1)) / (1 - chance) / (1 + cost)
            if cost <= self._credit and rate > best_rate:
                best, best_rate = guesses, rate
        if not best:  # What was true of this kind of match may have changed.
            self._right[kind] = [
                0.99 * right + 0.04 * self.CHANCES[kind],
                0.99 * tried + 0.04,
            ]
        return best

    def note(self, seconds: float, drafted: int, accepted: int, matched: int) -> None:
        """Learn from a pass that checked ``drafted`` guesses, of which ``accepted`` were right."""
        if not drafted:
            self._ones_s.append(seconds)
            self._credit = min(self._credit + self.EARNED, self.MOST_CREDIT)
            self._plain += 1
            if self._plain % self.FORGET == 0:
                for passes_s in filter(None, self._sizes_s.values()):
                    passes_s.popleft()
            return
        self._sizes_s[_size(drafted)].append(seconds)
        right, tried = self._right[_kind(matched)]
        checked = accepted + (accepted < drafted)
        self._right[_kind(matched)] = [0.95 * right + accepted, 0.95 * tried + checked]
        gained = 1 + accepted - seconds / median(self._ones_s or [seconds])
        # A rare stall says little about guesses. So one pass costs no more than some credit.
        credit = max(self._credit + gained, self.LEAST_CREDIT)
        self._credit = min(credit, self.MOST_CREDIT)

    def _cost(self, guesses: int, one_s: float) -> float:
        """Return the time that guesses add to a pass, in passes of one row.

        A size that was not measured counts as the next smaller one in proportion, and is not taken
        before that was measured. One guess is taken to cost little at first.
        """
        size = _size(guesses)
        if self._sizes_s[size]:
            return max(median(self._sizes_s[size]) / one_s - 1, 0.0)
        at = SIZES.index(size)
        if not at:
            return 0.05
        smaller = SIZES[at - 1]
        if not self._sizes_s[smaller]:
            return math.inf
        return max(median(self._sizes_s[smaller]) / one_s - 1, 0.01 * smaller) * guesses / smaller


def _size(guesses: int) -> int:
    """Return the entry of SIZES that stands for so many guesses."""
    return next(size for size in SIZES if size >= guesses)


def _kind(matched: int) -> int:
    """Return 0 for a short match, 1 for a longer one, 2 for a long one."""
    return 0 if matched < 4 else 1 if matched < 8 else 2
