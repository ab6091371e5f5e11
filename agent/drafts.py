"""Guesses the next tokens of an answer, and decides how many of them one pass checks.

Text that repeats itself or its context can be guessed: what followed the last tokens before is
likely to follow them again. The first stage guesses, and the last one samples each row with the
seed and position that it has anyway. So the answer is that of single rows, whatever the guesses.

A small model may guess too, where one is loaded beside the first stage (agent.drafter).

A wrong guess costs time. So the first stage measures its passes and those of the small model. It
counts which guesses were right, and takes the source and the number that promise most tokens per
second. It may lose about a hundredth of the time, and what right guesses have gained before.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

import numpy as np

from backends.base import Tokens

SHORTEST_MATCH = 2
"""The last tokens that must have occurred before, so that a guess is made."""

LONGEST_MATCH = 16
"""Longer matches count as equal. The newest one decides."""

SIZES = (1, 3, 7, 14)
"""The numbers of guesses whose passes are measured apart. Kernels take 2, 4, 8 and 16 rows best."""


BY_MODEL = 3
"""The kind of guesses that the draft model makes. The others are kinds of matches."""


class Plan(NamedTuple):
    """How many tokens the next pass guesses, and whether the draft model guesses them."""

    guesses: int
    by_model: bool = False


class History:
    """The tokens of a sequence so far."""

    def __init__(self, prompt: Tokens, context_tokens: int) -> None:
        self._tokens = np.empty(context_tokens + 1, np.int64)
        self._tokens[: len(prompt)] = prompt
        self._count = len(prompt)

    @property
    def tokens(self) -> Tokens:
        """All tokens. Later ones do not change the array."""
        return self._tokens[: self._count]

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

    CHANCES = (0.3, 0.6, 0.9, 0.7)
    """The chance of a guess after a short, a longer and a long match, and of one by the draft
    model, before any was checked."""

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
        """Return how many of ``most`` guesses from the text a pass checks."""
        return self.plan(most, matched, 0, _no_time).guesses

    def plan(
        self, most: int, matched: int, most_by_model: int, draft_s: Callable[[int], float]
    ) -> Plan:
        """Choose among guesses from the text, guesses by the draft model, and none.

        most, matched: the guesses from the text, and the tokens that speak for them.
        draft_s: gives the seconds in which the draft model makes so many guesses.
        """
        if len(self._ones_s) < self.FEWEST:
            return Plan(0)
        by_text, text_rate = self._best(most, _kind(matched), _no_time)
        by_model, model_rate = self._best(most_by_model, BY_MODEL, draft_s)
        for guesses, limit, kind in (
            (by_text, most, _kind(matched)),
            (by_model, most_by_model, BY_MODEL),
        ):
            if limit > 0 and not guesses:  # What was true of this kind may have changed.
                right, tried = self._right[kind]
                self._right[kind] = [
                    0.99 * right + 0.04 * self.CHANCES[kind],
                    0.99 * tried + 0.04,
                ]
        if model_rate > text_rate:
            return Plan(by_model, by_model=True)
        return Plan(by_text)

    def trusts_model(self, draft_s: Callable[[int], float]) -> bool:
        """Whether guesses by the draft model would pay, once it has been fed all tokens."""
        if len(self._ones_s) < self.FEWEST:
            return True
        return self._credit > 0 and self._best(SIZES[-1], BY_MODEL, draft_s)[0] > 0

    def charge(self, seconds: float) -> None:
        """Count time for which a token had to wait."""
        lost = seconds / median(self._ones_s) if self._ones_s else 0.0
        self._credit = max(self._credit - lost, min(self._credit, self.LEAST_CREDIT))

    def _best(self, most: int, kind: int, draft_s: Callable[[int], float]) -> tuple[int, float]:
        """Return the best number of guesses of a kind and its tokens per pass of one row.

        That is 0 guesses if none would be faster.
        """
        best, best_rate = 0, self.FASTER
        right, tried = self._right[kind]
        chance = min(right / tried, 0.99)
        one_s = median(self._ones_s)
        for guesses in {min(size, most) for size in SIZES} if most > 0 else ():
            cost = self._cost(guesses, one_s) + draft_s(guesses) / one_s
            rate = (1 - chance ** (guesses + 1)) / (1 - chance) / (1 + cost)
            if cost <= self._credit and rate > best_rate:
                best, best_rate = guesses, rate
        return best, best_rate

    def note(
        self,
        seconds: float,
        drafted: int,
        accepted: int,
        matched: int,
        *,
        draft_s: float = 0.0,
        by_model: bool = False,
    ) -> None:
        """Learn from a pass that checked ``drafted`` guesses, of which ``accepted`` were right.

        draft_s: the part of ``seconds`` in which the draft model worked.
        """
        check_s = max(seconds - draft_s, 0.0)
        if not drafted:
            self._ones_s.append(check_s)
            self._credit = min(self._credit + self.EARNED, self.MOST_CREDIT)
            self.charge(draft_s)
            self._plain += 1
            if self._plain % self.FORGET == 0:
                for passes_s in filter(None, self._sizes_s.values()):
                    passes_s.popleft()
            return
        self._sizes_s[_size(drafted)].append(check_s)
        kind = BY_MODEL if by_model else _kind(matched)
        right, tried = self._right[kind]
        checked = accepted + (accepted < drafted)
        self._right[kind] = [0.95 * right + accepted, 0.95 * tried + checked]
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


def _no_time(guesses: int) -> float:
    """Guesses from the text take no time."""
    return 0.0


def _size(guesses: int) -> int:
    """Return the entry of SIZES that stands for so many guesses."""
    return next(size for size in SIZES if size >= guesses)


def _kind(matched: int) -> int:
    """Return 0 for a short match, 1 for a longer one, 2 for a long one."""
    return 0 if matched < 4 else 1 if matched < 8 else 2
