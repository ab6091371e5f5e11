"""The search for objectives that are sums over blocks and hops.

If the budget has a price, a shortest walk bounds every plan. Several prices are used at once,
because each is best for other beginnings of walks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from planning.search.base import EXCHANGE_SHARE, FINISHED, WIDTHS, Found, Make, Search
from planning.search.beam import beam
from planning.search.bounds import Joint, Priced, Separate
from planning.search.orders import Orders
from planning.search.polish import Polish
from planning.search.tables import Floats, Integers, Mask, Span, Tables
from planning.time_limit import now_s

ALL_FINISHED = 2_000
"""Like FINISHED, for a beam that mixed no walks: there the bounds of their widths count."""

_NEAR = 5
"""Prices next to the best one whose bounds lead the first beam."""

_EXCHANGE_PRICES = (0.7, 1.5, 4.0, 15.0)
"""Multiples of the best price of the budget, for orders of devices."""


class Cheapest(Search):
    """The search for objectives that are sums over blocks and hops."""

    def __init__(
        self, tables: Tables, until_s: tuple[float, float], gap: float, make: Make
    ) -> None:
        super().__init__(tables, until_s, gap, make)
        self.arcs: dict[float, Separate] = {}
        """Price of the budget -> costs of stages and hops at this price."""
        self.found: dict[float, tuple[Priced, Floats]] = {}
        """Price of the budget -> the best relaxation, with its prices of devices."""
        self.at_hand = math.inf
        """Value of the first plan."""
        self.prices = self.pricer.nothing()
        """Prices of devices with which the search begins."""
        self.price = 0.0
        """Price of the budget near which widths are chosen."""
        self.wanted: Mask = tables.fits
        """The stages [device, first block, length - 1] that a better plan may have."""
        self.dropped = math.inf
        """No plan with another stage is below this."""
        self.beside: Floats = np.zeros(1)
        """Least cost of a plan beside its sums, by any of its stages."""

    def run(self) -> Found:
        tables = self.tables
        self.price = self._guess() if tables.budget is not None else 0.0
        self.at_hand = self._fill()
        self._climb()
        top = max(self.found, key=lambda mu: self.found[mu][0].bound)
        self.price = top
        mus = [top * factor for factor in (1.0, 0.7, 1.4, 2.5, 6.0, 15.0)] if top else [0.0]
        rounds, merge = 60, True
        self._price(top, rounds)
        if not self._done():
            # The first plan may be far off. A better one at hand leaves less to look at.
            near = sorted(self.found, key=lambda mu: abs(math.log(mu / top)) if top else 0.0)
            self._follow([self.found[mu][0] for mu in near[:_NEAR]], WIDTHS[0], merge)
        for width in WIDTHS:
            for mu in mus:
                if not self._done():
                    self._price(mu, rounds)
            rounds = 100
            if self._done():
                break
            full = self._follow([self.found[mu][0] for mu in mus], width, merge)
            if width == WIDTHS[0] and self.value >= self.at_hand and not self._done():
                self._try_other()
            if self._done() or not (full or merge):
                break
            # A wider beam helps only where this one was full, or mixed walks up.
            merge = full
            if full or width == WIDTHS[0]:
                self._exchange_devices()
        return Found(self.choice, self.bound)

    def _follow(self, relaxations: Sequence[Priced], width: int, merge: bool) -> bool:
        """Finish walks that a beam finds, and raise the bound. True if the beam was full."""
        cutoff = self.value * (1 - self.gap) if self.value < math.inf else math.inf
        finished, dropped = beam(
            self.tables,
            relaxations,
            width=width,
            cutoff=cutoff,
            deadline_s=self._until_s(),
            merge=merge,
        )
        bounds = [min(cutoff, dropped)]
        for count, walk in enumerate(finished):
            bound = walk.bound
            if count < (FINISHED if merge else ALL_FINISHED) and not self._late():
                refined = self._finish(walk.spans)
                # Without a budget there is one exact relaxation: merging loses nothing.
                bound = bound if walk.mixed and self.price else max(bound, refined)
            bounds.append(bound)
        self.bound = max(self.bound, min(min(bounds), self.value, self.dropped))
        return dropped < math.inf or cutoff == math.inf

    def _done(self) -> bool:
        return self._late() or self.bound >= (1 - self.gap) * self.value

    def _exchange_devices(self) -> None:
        """Look for better orders of devices. Several prices rule out orders that lose too much."""
        tables = self.tables
        until_s = now_s() + EXCHANGE_SHARE * max(0.0, self._until_s() - now_s())
        relaxations: list[tuple[Joint | Separate, float]] = []
        for mu in [self.price * factor for factor in _EXCHANGE_PRICES] if self.price else [0.0]:
            if self._late():
                return
            segments = tables.segments(tables.cost + mu * tables.loss, self.wanted)
            arcs = Separate(segments, tables.links(mu), tables.back)
            relaxations.append((arcs, mu * (tables.budget or 0.0)))
        orders = Orders(relaxations, tables.entry, until_s, self.random, tables.conflicts)
        while self.choice is not None and not self._done() and now_s() < until_s:
            before = self.value
            spans, _ = orders.improve([stage[0] for stage in self.choice.stages], -math.inf)
            if spans is not None:
                self._finish(spans)
            if self.value >= before:
                break

    def _price(self, mu: float, rounds: int) -> None:
        """Improve the bound with this price of the budget."""
        tables = self.tables
        if mu in self.found:
            arcs, prices = self.arcs[mu], self.found[mu][1]
        else:
            segments = tables.segments(tables.cost + mu * tables.loss, self.wanted)
            arcs = self.arcs[mu] = Separate(segments, tables.links(mu), tables.back)
            nearest = min(self.found, key=lambda at: abs(math.log(at / mu)), default=None)
            prices = self.prices if nearest is None else self.found[nearest][1]
        # The first plan is too far off as a guess of the largest bound.
        reach = self.value if self.value < self.at_hand else 1.1 * self._best()
        self.found[mu] = self.pricer.price(
            arcs,
            mu * (tables.budget or 0.0),
            prices,
            target=self.value * (1 - self.gap) if self.value < math.inf else math.inf,
            reach=reach,
            rounds=rounds,
        )
        bound = self.found[mu][0].bound
        self.bound = max(self.bound, min(bound, self.value, self.dropped))
        self._drop(mu)

    def _drop(self, mu: float) -> None:
        """Leave out the stages that no better plan has, by the relaxation at this price."""
        cutoff = self.value * (1 - self.gap)
        if cutoff < math.inf:
            self.wanted = self.wanted & (
                self.arcs[mu].through(self.found[mu][0]) + self.beside < cutoff
            )
            self.dropped = min(self.dropped, cutoff)

    def _best(self) -> float:
        return max((one.bound for one, _ in self.found.values()), default=1.0)

    def _climb(self, precision: float = 1.15) -> None:
        """Find the price of the budget with the largest bound, by hill climbing.

        ``precision`` is about the largest ratio of the price found and the best one.
        """
        tables = self.tables
        if tables.budget is None:
            self._price(0.0, 100)
            return
        mu, step = self._guess(), 4.0
        self._price(mu, 15)
        while step > precision and len(self.found) < 40:
            mu = max(self.found, key=lambda at: self.found[at][0].bound)
            for other in (mu * step, mu / step):
                if other not in self.found and now_s() <= self.deadline_s:
                    self._price(other, 15)
            if max(self.found, key=lambda at: self.found[at][0].bound) == mu:
                step = step**0.5

    def _guess(self) -> float:
        """A first price of the budget: the median of seconds saved per loss, over all blocks."""
        tables = self.tables
        finite = np.isfinite(tables.cost)
        saved = np.where(finite, tables.cost, -math.inf).max(2) - tables.cost.min(2)
        lost = tables.loss.max(2) - tables.loss.min(2)
        telling = finite.any(2) & (lost > 0) & (saved > 0)
        ratios = saved[telling] / lost[telling]
        return float(np.median(ratios)) if len(ratios) else 1.0

    def _widths(self, spans: Sequence[Span], charged: Tables | None = None) -> float:
        tables, mu = charged or self.tables, self.price
        budget = math.inf if tables.budget is None else tables.budget
        fixed = sum(tables.entry[i] for i, _, _ in spans)
        pairs = [(a[0], b[0]) for a, b in pairwise(spans)]
        ways = np.array([tables.hop[:, i, j] for i, j in pairs])
        ways = ways.reshape(len(pairs), len(tables.hop_bits))
        fixed += tables.back[spans[-1][0], spans[0][0]] if len(spans) > 1 else 0.0
        mus = np.array([0.0]) if not mu else mu * np.geomspace(0.05, 100.0, 15)
        bound = -math.inf
        best = hops = np.empty(0, dtype=np.int64)
        for _ in range(3 if mu else 1):
            chosen = np.empty((len(mus), tables.shape[1]), dtype=np.int64)
            total = np.full(len(mus), fixed) - (mus * budget if mu else 0.0)
            for i, first, end in spans:
                costs = tables.cost[i, first:end] + mus[:, None, None] * tables.loss[i, first:end]
                chosen[:, first:end], sums = tables.choices(i, first, costs)
                total += sums
            priced = ways + mus[:, None, None] * tables.hop_loss
            formats = priced.argmin(2) if pairs else np.empty((len(mus), 0), dtype=np.int64)
            total += priced.min(2, initial=math.inf).sum(1)
            bound = max(bound, float(total.max()))
            losses = self._sums(tables.loss, spans, chosen) + tables.hop_loss[formats].sum(1)
            within = np.flatnonzero(losses <= budget)
            if not len(within):
                return bound
            costs = self._sums(tables.cost, spans, chosen)
            costs += ways[np.arange(len(pairs)), formats].sum(1)
            at = int(within[costs[within].argmin()])
            best, hops = chosen[at], formats[at]
            low = mus[max(at - 1, 0)]
            mus = np.linspace(low, mus[at], 13) if mu else mus
        polished = Polish(tables, spans, best, hops).run()
        if polished is not None:
            self._keep(spans, *polished)
        return bound

    @staticmethod
    def _sums(figures: Floats, spans: Sequence[Span], chosen: Integers) -> Floats:
        """Sums of a figure over all blocks, one for each row of ``chosen``."""
        found = np.zeros(len(chosen))
        for i, first, end in spans:
            rows = np.arange(first, end)
            found += figures[i, rows, chosen[:, first:end]].sum(1)
        return found
