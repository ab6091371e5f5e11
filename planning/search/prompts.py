"""The search for a request: the objective is a sum over blocks and hops, plus the slowest stage.

The time of the slowest stage or link with a chunk is cut into intervals. In an interval no stage
may take longer than its end, and the slowest one counts as its beginning. The rest of the objective
is a sum, which shortest walks bound. The interval of the least bound is halved until it is narrow.
Then a beam finishes it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from planning.search.base import FINISHED, WIDTHS, Found, Make
from planning.search.beam import beam
from planning.search.bounds import Priced, Separate
from planning.search.sums import ALL_FINISHED, Cheapest
from planning.search.tables import Floats, Span, Tables

_NARROW = 0.4
"""Largest width of an interval for a beam, as a share of the gap times the objective."""
_FACTORS = (1.0, 0.6, 1.7)
"""Multiples of the best price of the budget, for the bounds of a beam."""
_ROUNDS = 25
_LOOKS = 5
"""Number of limits between which plans are looked for first."""
_COARSE = 1.3
"""About the largest ratio of the price of the budget and the best one, before limits are tried."""
_FAR = 1.1
"""Limits of a smaller ratio have the same price of the budget."""


@dataclass(frozen=True, slots=True, order=True)
class _Interval:
    """Plans whose slowest stage takes ``low_s`` to ``high_s``, and a bound of all of them."""

    bound: float
    low_s: float
    high_s: float
    rest: float
    """Lower bound of the objective without the slowest stage."""
    level: int = 0
    """Index in WIDTHS of the next beam."""
    merge: bool = True
    """Whether the next beam may keep one of several like walks. Then their bounds stay lower."""


class Prompted(Cheapest):
    """The search for a request. Its bounds take the fastest width for the slowest stage."""

    def __init__(
        self, tables: Tables, until_s: tuple[float, float], gap: float, make: Make
    ) -> None:
        super().__init__(tables, until_s, gap, make)
        self.least_s = self._least_turns()
        usable = np.isfinite(tables.turn)
        self.varied = bool((np.where(usable, tables.turn, 0.0).max(2) > tables.turn.min(2)).any())
        """Whether widths make a difference to the slowest stage."""
        least_s = tables.least_turn_s(tables.turn)
        self.beside = tables.turns * np.maximum(self.least_s, least_s)
        self.top = 0.0
        """The price of the budget with the best bound of all plans."""
        self.segments: dict[float, Floats] = {}
        """Price of the budget -> least costs of all stages."""
        self.price_at: dict[int, float] = {}
        """Logarithm of a limit to the base _FAR, rounded -> best price of the budget."""

    def run(self) -> Found:
        """Search until the gap is proved or the time is over."""
        tables = self.tables
        self.price = self._guess() if tables.budget is not None else 0.0
        self.at_hand = self._fill()
        if self.before.prices is None:
            self._climb(_COARSE)
        else:
            self.prices = self.before.prices
            for factor in (1.0, 2.0**0.5, 0.5**0.5):
                if not self.found or not self._late():
                    self._price(factor * self.before.price, _ROUNDS)
        self.price = self.top = max(self.found, key=lambda mu: self.found[mu][0].bound)
        self.prices = self.found[self.top][1]
        rest = self._best()
        low_s, high_s = self._reach_s(rest)
        waiting = self._look_around(rest, low_s, high_s)
        heapq.heapify(waiting)
        closed = math.inf
        """Least bound of the intervals that no wider beam can improve."""
        while waiting and waiting[0].bound < self._target() and not self._late():
            least = heapq.heappop(waiting)
            if least.level == len(WIDTHS):
                closed = min(closed, least.bound)
                continue
            for one in self._narrower(least):
                heapq.heappush(waiting, one)
        # All other intervals were dropped at or above the target, which never rises.
        left = [closed, self._target(), *(one.bound for one in waiting[:1])]
        self.bound = max(self.bound, min(*left, self.value))
        return Found(self.choice, self.bound, price=self.top, prices=self.found[self.top][1])

    def _look_around(self, rest: float, low_s: float, high_s: float) -> list[_Interval]:
        """Look for plans under some limits, the widest first.

        Returns the intervals between the limits that may have a better plan.
        """
        found = []
        limits = np.geomspace(high_s, low_s, _LOOKS).tolist()
        for limit_s, next_s in pairwise(limits):
            target = self._target() - self.tables.turns * low_s
            if self._late():
                found.append(self._interval(rest, low_s, limit_s))
                break
            priced = self._limited(limit_s, target)
            rest = max(rest, priced.bound)
            if rest >= target:
                break
            self._walk([priced], target, WIDTHS[0], most=20)
            found.append(self._interval(rest, next_s, limit_s))
        if self.value >= self.at_hand and not self._done():
            self._try_other()
        return found

    def _target(self) -> float:
        return self.value * (1 - self.gap) if self.value < math.inf else math.inf

    def _mus(self) -> list[float]:
        return [self.price * factor for factor in _FACTORS] if self.price else [0.0]

    def _interval(
        self, rest: float, low_s: float, high_s: float, level: int = 0, *, merge: bool = True
    ) -> _Interval:
        bound = rest + self.tables.turns * low_s
        return _Interval(bound, low_s, high_s, rest, level, merge)

    def _least_turns(self) -> Floats:
        """[device, first block, length - 1]: least seconds of a chunk in such a stage."""
        tables = self.tables
        _, blocks, _ = tables.shape
        usable = np.isfinite(tables.turn).any(2)
        least = np.where(usable, tables.turn.min(2), 0.0)
        sums = np.concatenate([np.zeros((len(least), 1)), np.cumsum(least, axis=1)], axis=1)
        first, length = np.indices((blocks, tables.longest))
        end = np.minimum(first + length + 1, blocks)
        found: Floats = sums[:, end] - sums[:, first] + tables.call_s[:, None, None]
        return found

    def _reach_s(self, rest: float) -> tuple[float, float]:
        """The least and the largest time of the slowest stage in a better plan."""
        tables = self.tables
        low_s = tables.least_turn_s(tables.turn)
        links_s = np.where(np.isfinite(tables.hop_turn), tables.hop_turn, 0.0)
        high_s = float(self.least_s[tables.fits].max())
        high_s = max(high_s, float(links_s.max(initial=0.0)))
        widest = np.where(np.isfinite(tables.turn), tables.turn, 0.0).max(2).sum(1).max()
        high_s = max(high_s, float(widest + tables.call_s.max()))
        if self.value < math.inf:
            high_s = min(high_s, max(low_s, (self.value - rest) / tables.turns))
        return low_s, high_s

    def _narrower(self, whole: _Interval) -> list[_Interval]:
        """The two halves of a wide interval, or a narrow one with the bound of a beam."""
        turns = self.tables.turns
        wide = turns * (whole.high_s - whole.low_s)
        if wide > _NARROW * self.gap * min(self.value, 2 * whole.bound):
            middle_s = (whole.low_s + whole.high_s) / 2
            if self.value == math.inf:
                middle_s = (whole.low_s * whole.high_s) ** 0.5 or middle_s
            lower = self._bounded(whole, whole.low_s, middle_s)
            return [lower, self._interval(whole.rest, middle_s, whole.high_s, whole.level)]
        return self._beamed(whole)

    def _bounded(self, whole: _Interval, low_s: float, high_s: float) -> _Interval:
        """Part of an interval with a bound of its own. A small beam looks for plans there."""
        target = self._target() - self.tables.turns * low_s
        priced = self._limited(high_s, target)
        rest = max(whole.rest, priced.bound)
        found = self._interval(rest, low_s, high_s)
        if rest < target:
            self._walk([priced], target, WIDTHS[0], most=8)
        return found

    def _limited(self, high_s: float, target: float) -> Priced:
        """The best relaxation without stages and links that take a chunk longer than ``high_s``."""
        if self.price:
            near = round(math.log(high_s, _FAR))
            if near not in self.price_at:
                self.price_at[near] = self._price_within(high_s, target)
            self.price = self.price_at[near]
        priced, self.prices = self._at_price(self.price, high_s, target, _ROUNDS)
        return priced

    def _at_price(
        self, mu: float, high_s: float, target: float, rounds: int
    ) -> tuple[Priced, Floats]:
        return self.pricer.price(
            self._arcs(mu, high_s),
            mu * (self.tables.budget or 0.0),
            self.prices,
            target=target,
            reach=min(target, 1.1 * self._best()),
            rounds=rounds,
        )

    def _price_within(self, high_s: float, target: float) -> float:
        """The best price of the budget under this limit, by hill climbing."""
        bounds: dict[float, float] = {}

        def bound(mu: float) -> float:
            if mu not in bounds:
                bounds[mu] = self._at_price(mu, high_s, target, _ROUNDS // 3)[0].bound
            return bounds[mu]

        best = max((self.price, self._guess()), key=bound)
        step = 2.0 if self.price_at else 4.0
        # If no walk keeps the budget, the bound grows with the price for ever.
        while step > 1.3 and bound(best) < target and len(bounds) < 25 and not self._late():
            nearby = max((best, best * step, best / step), key=bound)
            step = step if nearby != best else step**0.5
            best = nearby
        return best

    def _arcs(self, mu: float, high_s: float) -> Separate:
        tables = self.tables
        if mu not in self.segments:
            self.segments[mu] = tables.segments(tables.cost + mu * tables.loss, self.wanted)
        limit_s = high_s * (1 + 1e-9)
        open_ = self.wanted & (self.least_s <= limit_s)
        segments = np.where(open_, self.segments[mu], np.inf)
        hops = np.where(tables.hop_turn <= limit_s, tables.hop, np.inf)
        priced = hops + mu * tables.hop_loss[:, None, None]
        return Separate(segments, priced.min(0, initial=math.inf), tables.back)

    def _walk(
        self,
        relaxations: Sequence[Priced],
        target: float,
        width: int,
        most: int = FINISHED,
        *,
        merge: bool = True,
    ) -> tuple[float, bool]:
        """Finish the walks that a beam finds below ``target``.

        Returns a bound of all walks without the slowest stage, and whether a wider beam may raise
        it.
        """
        finished, dropped = beam(
            self.tables,
            relaxations,
            width=width,
            cutoff=target,
            deadline_s=self._until_s(),
            merge=merge,
        )
        bounds, before = [target, dropped], self.value
        for count, walk in enumerate(finished):
            bound = walk.bound
            if count < most and not self._late():
                refined = self._finish(walk.spans)
                # Without a budget there is one exact relaxation: merging loses nothing.
                bound = bound if walk.mixed and self.price else max(bound, refined)
            bounds.append(bound)
        if self.value < before:
            self._drop(self.top)
        return min(bounds), dropped < math.inf or len(finished) > most

    def _beamed(self, whole: _Interval) -> list[_Interval]:
        """The interval with the bound of the next wider beam."""
        target = self._target() - self.tables.turns * whole.low_s
        chosen = [self._limited(whole.high_s, target)]
        for mu in self._mus()[1:]:
            arcs = self._arcs(mu, whole.high_s)
            paid = mu * (self.tables.budget or 0.0)
            chosen.append(self.pricer.relaxation(arcs, paid, self.prices))
        most = FINISHED if whole.merge else ALL_FINISHED
        rest, full = self._walk(chosen, target, WIDTHS[whole.level], most, merge=whole.merge)
        level = whole.level
        if full:
            level += 1
        elif not (whole.merge and self.price):
            # A wider beam would find the same walks, and one without merging no other bounds.
            level = len(WIDTHS)
        rest = max(whole.rest, rest)
        return [self._interval(rest, whole.low_s, whole.high_s, level, merge=full)]

    def _widths(self, spans: Sequence[Span], charged: Tables | None = None) -> float:
        """Choose widths by costs, then also with the slowest stage's time if widths change it.

        This time counts once as an equal share in each stage, and once whole. Returns the bound by
        costs alone.
        """
        bound = super()._widths(spans)
        turn = np.where(np.isfinite(self.tables.turn), self.tables.turn, 0.0)
        for share in (1 / len(spans), 1.0) if self.varied else ():
            charged = copy(self.tables)
            charged.cost = charged.cost + share * charged.turns * turn
            super()._widths(spans, charged)
        return bound
