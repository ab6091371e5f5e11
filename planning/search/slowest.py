"""The search for throughput, where the slowest stage counts.

The length of a walk is its loss, and each stage must keep a limit of time. Bisection finds the
least limit at which a walk keeps the budget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from planning.search.base import EXCHANGE_SHARE, FINISHED, OTHER_GAP, WIDTHS, Found, Make, Search
from planning.search.beam import beam
from planning.search.bounds import Free, Joint, Priced
from planning.search.greedy import walk_value
from planning.search.orders import Orders
from planning.search.parts import part_of, renamed
from planning.search.polish import Polish
from planning.search.tables import Floats, Integers, Knapsack, Span, Tables
from planning.time_limit import now_s

_BEYOND = (1.005, 1.02, 1.05, 1.1, 1.2, 1.4, 1.8, 2.5, 4.0, 8.0, 20.0, 100.0)
"""Limits of time, as multiples of the bound, under which walks for throughput are looked for."""

_FARTHEST, _NEAREST = 0.6, 0.1
"""Parts of the way from the best plan's time to its bound at which devices are exchanged."""

_SLACKS = (1.0, 1.002, 1.006, 1.02, 1.05)
"""Factors on a walk's time, which rounding down may have made too small."""

_MANY = 96
"""With more devices than this the bound for throughput lets hops lead anywhere."""

_SOME = 48
"""With teams, and more of all than this, such a bound comes first: it takes far less time."""

# Stages that take more than so many times the bound are not looked for.
_SLOWEST = 1e4


class Fastest(Search):
    """The search for throughput: bisection over the time of the slowest stage.

    The bound leaves out loading (``Objective.migration_weight``). It stays valid.
    """

    def __init__(
        self,
        tables: Tables,
        until_s: tuple[float, float],
        gap: float,
        make: Make,
        within: Floats | None = None,
    ) -> None:
        """``within``: the least losses of all stages within the memory, where they are known."""
        super().__init__(tables, until_s, gap, make)
        self.budget = tables.budget or 0.0
        self.prices = self.pricer.nothing()
        self.full = False
        self.part = False
        """This search is of some of the devices of another one."""
        self.anywhere = False
        """Whether bounds let hops lead anywhere."""
        self.cost = np.where(np.isfinite(tables.decode), tables.loss, math.inf)
        self.within_memory = tables.segments(self.cost) if within is None else within

    def run(self) -> Found:
        self.bound = self.tables.least_turn_s(self.tables.decode)
        self.at_hand = self._fill()
        if self._is_many():
            return self._of_many()
        self._climb()
        self._look()
        if self.value >= self.at_hand:
            self._try_other()
        if self.choice is None or self._done():
            return Found(self.choice, self.bound)
        self._measure(self.value)
        for width in WIDTHS:
            self._exchange_devices()
            if width == WIDTHS[0]:
                # More rounds of prices raise the bound here further than wider beams.
                self._press(self.value * (1 - self.gap), self.gap / 4, 500)
            self.full = False
            self._raise(width)
            self._lower(width)
            if not self.full or self._done():
                break
        return Found(self.choice, self.bound)

    def _is_many(self) -> bool:
        return self.tables.shape[0] > _MANY and not self.part

    def _of_many(self) -> Found:
        """A bound with hops that lead anywhere, and a plan of the most useful devices."""
        self._climb()
        if self._late():
            return Found(self.choice, min(self.bound, self.value))
        chosen = self._most_useful()
        part, ties = part_of(self.tables.problem, chosen), self.tables.tied
        # A part may have teams without their twins.
        ties = None if ties is None or self.tables.teams else ties[np.ix_(chosen, chosen)]
        until_s = self.deadline_s, self.last_resort_s
        tables = Tables(part, ties)
        within = self.within_memory[chosen, :, : tables.longest]
        best = Fastest(tables, until_s, self.gap, self.make, within)
        best.value, best.filled, best.other = self.value, True, self.other
        best.part = True
        found = best.run()
        for spans, least in best.seen.items():
            self.seen[tuple((chosen[i], first, end) for i, first, end in spans)] = least
        if found.choice is not None:
            self.value, self.choice = best.value, renamed(found.choice, chosen)
        while not self._done() and self.bound * (1 + self.gap / 4) < self.value:
            if self._prove(min((self.bound * self.value) ** 0.5, 1.1 * self.bound)) is not None:
                break
        return Found(self.choice, min(self.bound, self.value))

    def _most_useful(self) -> list[int]:
        """Devices that take the most blocks near the bound's time, at their share of the budget."""
        tables = self.tables
        segments = self._free(1.2 * self.bound).segments
        fair = self.budget * (1 + np.arange(tables.longest)) / tables.shape[1]
        most = np.where(segments <= np.maximum(fair, 0.0), 1 + np.arange(tables.longest), 0).max(2)
        problem = tables.problem
        needed = {*problem.pins.values(), *(index for team in problem.teams for index in team)}
        if self.choice is not None:
            needed |= {device for device, *_ in self.choice.stages}
        score = [(i not in needed, -float(most[i].mean()), i) for i in range(len(most))]
        chosen: set[int] = set()
        for spare, _, i in sorted(score):
            more = chosen | {i, problem.lead(i)}
            if len(more) <= _MANY or not spare:
                chosen = more
        return sorted(chosen)

    def _free(self, limit: float) -> Free:
        """The least losses within a limit of time, each stage with the device's fastest hop."""
        tables = self.tables
        devices, blocks, longest = self.within_memory.shape
        limit *= 1 + 1e-9
        found = np.full((devices, blocks, longest), math.inf)
        firsts, lengths = np.indices((blocks, longest))
        out_s = tables.hop_s.min((0, 2), initial=math.inf)
        back_s = np.minimum(out_s, tables.back_s.min(1))
        for i, (knapsack, profile) in enumerate(zip(self.in_time, self.profiles, strict=True)):
            if not (reach := knapsack.longest):
                continue
            leaving_s = np.full((blocks, reach), out_s[i])
            size = np.arange(reach)
            leaving_s[blocks - 1 - size, size] = back_s[i]
            if reach == blocks:
                leaving_s[0, -1] = 0.0
            room = limit - tables.call_s[i] - leaving_s - knapsack.least
            # A room of -inf, where there is no link, has no index.
            index = knapsack.index(np.maximum(room, 0.0))
            part = profile[lengths[:, :reach], firsts[:, :reach], index]
            found[i, :, :reach] = np.where(
                room < 0, math.inf, np.maximum(part, self.within_memory[i, :, :reach])
            )
        return Free(found)

    def _done(self) -> bool:
        return self._late() or self.bound >= self.value * (1 - self.gap)

    def _climb(self) -> None:
        """Raise the bound by prices alone, until they prove no more."""
        high = min(self.at_hand, _SLOWEST * self.bound)
        self._measure(min(4 * self.bound, high))
        many = self._is_many()
        self.anywhere = many or (self.tables.teams and self.tables.shape[0] > _SOME)
        limit = 1.4 * self.bound
        while limit < high and not self._late():
            if limit > self.top:
                self._measure(min(4 * limit, high))
            if self._prove(limit) is not None:
                high = limit
                break
            limit *= 1.4
        # While there is no plan, time is better spent on one than on the last percent.
        self._press(high, self.gap / 4 if self.value < math.inf else OTHER_GAP, 100)
        self.anywhere = many

    def _press(self, high: float, close: float, rounds: int) -> None:
        """Raise the bound by prices alone, by bisection below ``high``."""
        while high > self.bound * (1 + close) and not self._late():
            limit = (high * self.bound) ** 0.5
            if self._prove(limit, rounds) is not None:
                high = limit

    def _look(self) -> None:
        """Finish walks within more and more time, from the bound upwards.

        Near the bound prices tell good walks from bad ones best.
        """
        floor = self.bound
        for factor in _BEYOND:
            limit = factor * floor
            if limit >= self.value * (1 - self.gap) or self._late():
                break
            if limit > self.top:
                self._measure(4 * limit)
            self._try(limit, WIDTHS[1])

    def _exchange_devices(self) -> None:
        """Look for better orders of devices, within less time than the best plan takes.

        With a lower limit fewer changes help, but each helps more.
        """
        until_s = now_s() + EXCHANGE_SHARE * max(0.0, self._until_s() - now_s())
        part = _FARTHEST
        while part > _NEAREST and not self._done() and now_s() < until_s:
            if self.choice is None:
                return
            value = self.value
            limit = value * (self.bound / value) ** part
            orders = Orders(
                [(self._arcs(limit), 0.0)],
                self.tables.entry,
                until_s,
                self.random,
                self.tables.conflicts,
            )
            spans, _ = orders.improve([stage[0] for stage in self.choice.stages], -math.inf)
            if spans is not None:
                self.seen.pop(tuple(spans), None)
                self._finish(spans)
            if self.value >= value:
                part /= 2

    def _raise(self, width: int) -> None:
        """Bisect for a higher bound, from the present one upwards."""
        ceiling = self.value * (1 - self.gap)
        while ceiling > self.bound * (1 + self.gap / 4 + 1e-6) and not self._late():
            limit = (ceiling * self.bound) ** 0.5
            before = self.value
            self._try(limit, width)
            if self.bound < limit:
                ceiling = limit
            if self.value < before:
                ceiling = min(ceiling, self.value * (1 - self.gap))

    def _lower(self, width: int) -> None:
        """Bisect for better plans, between the bound and the best plan."""
        floor = self.bound
        while self.value * (1 - self.gap) > floor * (1 + 1e-9) and not self._late():
            limit = (floor * self.value * (1 - self.gap)) ** 0.5
            if limit < floor * (1 + self.gap / 4):
                limit = self.value * (1 - self.gap)
            before = self.value
            self._try(limit, width)
            floor = max(floor if self.value < before else limit, self.bound)

    def _measure(self, top: float) -> None:
        """Make the tables of least loss by time, up to ``top`` seconds per stage."""
        tables = self.tables
        self.top = top
        self.in_time = []
        self.profiles = []
        for i, reach in enumerate(tables.reach):
            limit = top - tables.call_s[i]
            self.in_time.append(Knapsack(tables.decode[i], limit, reach, tables.units))
            self.profiles.append(self.in_time[-1].profiles(self.cost[i]))

    def _arcs(self, limit: float) -> Joint:
        """The least losses within a limit of time."""
        tables = self.tables
        devices, blocks, _ = tables.shape
        limit *= 1 + 1e-9
        found = np.full((blocks, devices, tables.longest, devices), math.inf)
        ends = np.full((devices, tables.longest, devices), math.inf)
        firsts, lengths = np.indices((blocks, tables.longest))
        for i, (knapsack, profile) in enumerate(zip(self.in_time, self.profiles, strict=True)):
            reach = knapsack.longest
            if not reach:
                continue
            within = self.within_memory[i, :, :reach, None]
            here = found[:, i, :reach]
            for hop_s, loss in zip(tables.hop_s[:, i], tables.hop_loss, strict=True):
                room = limit - tables.call_s[i] - hop_s - knapsack.least[..., None]
                # A room of -inf, where there is no link, has no index.
                index = knapsack.index(np.maximum(room, 0.0))
                part = profile[lengths[:, :reach, None], firsts[:, :reach, None], index]
                part[room < 0] = math.inf
                np.minimum(here, np.maximum(part, within) + loss, out=here)
            size = np.arange(reach)
            first = blocks - 1 - size
            room = limit - tables.call_s[i] - tables.back_s[i] - knapsack.least[first, size, None]
            if reach == blocks:
                # A plan of one stage has no way back.
                room[-1] = -math.inf
                room[-1, i] = limit - tables.call_s[i] - knapsack.least[0, -1]
            part = profile[size[:, None], first[:, None], knapsack.index(np.maximum(room, 0.0))]
            part[room < 0] = math.inf
            ends[i, :reach] = np.maximum(part, within[first, size])
        return Joint(found, ends)

    def _enough(self) -> float:
        """A loss above that of every plan within the budget, whatever the rounding of tables."""
        spare = self.tables.spare.room if self.tables.spare.room < math.inf else 1.0
        # The second term is a share of the room that placements compete for.
        return self.budget * (1 + 1e-12) + 1e-9 * (spare or 1.0)

    def _prove(self, limit: float, rounds: int = 100) -> Priced | None:
        """Raise the bound to ``limit`` and return None; or return the relaxation there."""
        enough = self._enough()
        self.pricer.deadline_s = self._until_s()  # Prices are needed even for a first plan.
        priced, self.prices = self.pricer.price(
            self._free(limit) if self.anywhere else self._arcs(limit),
            0.0,
            self.prices,
            target=enough,
            reach=1.1 * self.budget or 1.0,
            rounds=rounds,
        )
        # The rounding of bounds is far below the margin in ``enough``.
        if priced.bound < enough:
            return priced
        self.bound = max(self.bound, limit)
        return None

    def _try(self, limit: float, width: int) -> None:
        """Look for a plan within a limit of time per stage, or prove that there is none."""
        tables, enough = self.tables, self._enough()
        if (priced := self._prove(limit)) is None:
            return
        finished, dropped = beam(
            tables, [priced], width=width, cutoff=enough, deadline_s=self._until_s()
        )
        self.full = self.full or dropped < math.inf
        least = [self._finish(walk.spans) for walk in finished[:FINISHED]]
        if dropped >= enough and len(finished) <= FINISHED and min(least, default=limit) >= limit:
            self.bound = max(self.bound, limit)

    def _widths(self, spans: Sequence[Span]) -> float:
        walk = _Timed(self, spans)
        if walk.low > self.top:
            return walk.low
        # Most walks are not better than the best plan, which one test shows.
        barely = min(self.top, self.value * (1 - 1e-4))
        if barely < walk.low or walk.loss(barely) > self.budget:
            return max(walk.low, barely)
        low, high = walk.low, barely
        for _ in range(20):
            limit = (low + high) / 2
            low, high = (low, limit) if walk.loss(limit) <= self.budget else (limit, high)
        for slack in _SLACKS:
            if high * slack >= self.value:
                break
            if (found := walk.plan(high * slack)) is not None:
                value = walk_value(self.tables, spans, *found)
                if value < self.value:
                    self.value, self.choice = value, self.tables.choice(spans, *found)
                break
        return low


class _Timed:
    """A walk whose stages must keep a limit of time, by the tables of a search."""

    def __init__(self, search: Fastest, spans: Sequence[Span]) -> None:
        tables = search.tables
        self.search, self.spans = search, spans
        # Per stage and format of the hop that leaves it: (seconds without its blocks, loss).
        self.ways = [
            list(
                zip(tables.call_s[a[0]] + tables.hop_s[:, a[0], b[0]], tables.hop_loss, strict=True)
            )
            for a, b in pairwise(spans)
        ]
        last, first_device = spans[-1][0], spans[0][0]
        back_s = tables.back_s[last, first_device] if len(spans) > 1 else 0.0
        self.ways.append([(tables.call_s[last] + back_s, 0.0)])
        self.least = [float(search.in_time[i].least[f, end - f - 1]) for i, f, end in spans]
        self.within = [float(search.within_memory[i, f, end - f - 1]) for i, f, end in spans]
        self.low = max(
            float(min(ways)[0]) + least for ways, least in zip(self.ways, self.least, strict=True)
        )

    def loss(self, limit: float) -> float:
        """The least loss within ``limit`` seconds per stage."""
        return sum(lost for lost, _, _ in self._best(limit))

    def _best(self, limit: float) -> list[tuple[float, int, float]]:
        """Per stage: the least loss, the format of its hop, and the seconds for its blocks."""
        found = []
        rows = zip(self.spans, self.least, self.within, self.ways, strict=True)
        for (i, first, end), least, within, ways in rows:
            knapsack, profile = self.search.in_time[i], self.search.profiles[i]
            options = [(math.inf, 0, 0.0)]
            for f, (taken_s, loss) in enumerate(ways):
                room = limit - taken_s - least
                if room >= 0:
                    column = int(knapsack.index(room))
                    lost = float(profile[end - first - 1, first, column])
                    options.append((max(lost, within) + loss, f, limit - taken_s))
            found.append(min(options))
        return found

    def plan(self, limit: float) -> tuple[Integers, Integers] | None:
        """Options and formats that keep every limit; None if none were found."""
        search, tables = self.search, self.search.tables
        best = self._best(limit)
        if not math.isfinite(sum(lost for lost, _, _ in best)):
            return None
        chosen = np.empty(tables.shape[1], dtype=np.int64)
        rows = zip(self.spans, self.least, self.within, best, strict=True)
        for (i, first, end), least, within, (_, _, seconds) in rows:
            knapsack = search.in_time[i]
            column = int(knapsack.index(seconds - least))
            costs = search.cost[i, None, first:end]
            if search.profiles[i][end - first - 1, first, column] < within:
                # Memory limits this stage, not time.
                chosen[first:end] = tables.choices(i, first, costs)[0][0]
                continue
            chosen[first:end] = knapsack.choices(first, costs, np.array([column]))[0][0]
        hops = np.array([f for _, f, _ in best[:-1]], dtype=np.int64)
        seconds_of = [seconds * (1 + 1e-12) for *_, seconds in best]
        return Polish(tables, self.spans, chosen, hops, seconds=seconds_of).run()
