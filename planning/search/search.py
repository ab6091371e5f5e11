"""A search for a good plan and for a proof of how good it is, without an integer program.

Three things couple the stages of a plan: the quality budget, the devices in use, and the way back.
If each has a price, a shortest walk bounds every plan, and every completion of a beginning
(``bounds.py``). A beam of beginnings (``beam.py``) drops those that cannot be completed below the
best plan known. A beginning that is dropped for lack of space lowers the bound. Several prices of
the budget are used at once, because each is best for other beginnings.

For throughput the length of a walk is its loss, and each stage must keep a limit of time. Bisection
finds the least limit at which a walk keeps the budget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from planning.exact.program import Choice
from planning.problem import Objective, ObjectiveKind, PlanningProblem
from planning.search.beam import beam
from planning.search.bounds import Free, Joint, Priced, Pricer, Separate
from planning.search.greedy import fill, walk_value
from planning.search.orders import Orders
from planning.search.parts import part_of, renamed
from planning.search.polish import Polish
from planning.search.tables import Floats, Integers, Knapsack, Span, Tables
from planning.time_limit import now_s

_WIDTHS = (20, 100, 400, 1_500, 5_000, 20_000)
"""Walks kept per block, in one attempt after the other."""

_FINISHED = 60
"""Walks of one attempt whose widths are chosen."""

_ALL_FINISHED = 2_000
"""Like _FINISHED, for a beam that mixed no walks: there the bounds of their widths count."""

_GREEDY = 12
"""First plans (``greedy.py``) whose widths are improved."""

_BEYOND = (1.005, 1.02, 1.05, 1.1, 1.2, 1.4, 1.8, 2.5, 4.0, 8.0, 20.0, 100.0)
"""Limits of time, as multiples of the bound, under which walks for throughput are looked for."""

_EXCHANGE_SHARE = 0.25
"""Share of the time left for each search of better orders of devices."""

_FARTHEST, _NEAREST = 0.6, 0.1
"""Parts of the way from the best plan's time to its bound at which devices are exchanged."""

_EXCHANGE_PRICES = (0.7, 1.5, 4.0, 15.0)
"""Multiples of the best price of the budget, for orders of devices."""

_SLACKS = (1.0, 1.002, 1.006, 1.02, 1.05)
"""Factors on a walk's time, which rounding down may have made too small."""

_OTHER_SHARE = 0.25
"""Share of the time left for the search for the other kind of objective."""
_OTHER_GAP = 0.05

_MANY = 96
"""With more devices than this the bound for throughput lets hops lead anywhere."""

# Stages that take more than so many times the bound are not looked for.
_SLOWEST = 1e4
_LEAST_GAP = 1e-3


@dataclass(frozen=True, slots=True)
class Found:
    """The best choice found, if any, and a lower bound of the objective of all plans."""

    choice: Choice | None
    bound: float
    impossible: bool = False
    """It is proved that no plan fits."""


def search(
    problem: PlanningProblem,
    *,
    deadline_s: float,
    gap: float,
    ties: npt.NDArray[np.bool_] | None = None,
    last_resort_s: float | None = None,
    known: float = math.inf,
) -> Found:
    """The best plan found until its gap is proved to be at most ``gap``, or the deadline.

    ``deadline_s`` is a point on the clock of ``now_s``. While there is no plan at all,
    ``last_resort_s`` (None: the same) takes its place.
    ``gap``: values below one in a thousand count as one in a thousand.
    ``ties`` [i, j] is True for i < j that are twins: exchanging them changes no figure of a plan.
    ``known`` is the objective of a known plan. Only better plans are looked for.

    A prompt runs in chunks of one size here: ``problem`` is one variant.
    """
    tables = Tables(problem, ties)
    if not np.isfinite(tables.cost).any((0, 2)).all() or not tables.longest:
        return Found(None, 0.0, impossible=True)
    # Slightly below the gap asked for, so that rounding does not miss it.
    until_s = deadline_s, deadline_s if last_resort_s is None else last_resort_s
    searching = _kind(tables)(tables, until_s, max(gap, _LEAST_GAP) * (1 - 1e-6))
    searching.value = known
    searching._fill()
    if searching.value == math.inf and searching._impossible():
        return Found(None, 0.0, impossible=True)
    found = searching.run()
    return Found(found.choice, float(found.bound))


def _kind(tables: Tables) -> type[_Search]:
    from planning.search.prompts import Prompted  # That module imports this one.

    if tables.throughput:
        return _Fastest
    return Prompted if tables.turns else _Cheapest


class _Search:
    """The best plan so far, the proved bound, and the time limits."""

    def __init__(self, tables: Tables, until_s: tuple[float, float], gap: float) -> None:
        self.tables = tables
        self.deadline_s, self.last_resort_s = until_s
        self.gap = gap
        self.pricer = Pricer(tables.entry, self.deadline_s, tables.members, tables.needed)
        self.choice: Choice | None = None
        self.value = math.inf
        self.bound = 0.0
        self.seen: dict[tuple[Span, ...], float] = {}
        self.filled = False
        self.random = np.random.default_rng(0)
        self.other = False
        """This search only serves another one."""

    def run(self) -> Found:
        """Search until the gap is proved or the time is over."""
        raise NotImplementedError

    def _finish(self, spans: Sequence[Span]) -> float:
        """Choose the widths of a walk, and keep it if it is the best plan. Returns its bound."""
        key = tuple(spans)
        if key not in self.seen:
            self.seen[key] = self._widths(spans) if self._complete(spans) else math.inf
        return self.seen[key]

    def _complete(self, spans: Sequence[Span]) -> bool:
        """Whether the walk has all teams that the user asked for."""
        used = self.tables.members[np.array([i for i, _, _ in spans])]
        return bool(used[:, self.tables.needed].any(0).all())

    def _widths(self, spans: Sequence[Span]) -> float:
        raise NotImplementedError

    def _fill(self) -> float:
        """Keep the best first plan (``greedy.py``). Returns its value, inf if there is none."""
        if self.filled:
            return self.value
        self.filled = True
        for walk in fill(self.tables, self.deadline_s)[:_GREEDY]:
            if self.value < math.inf and now_s() > self.deadline_s:
                break
            if not self._complete(walk.spans):
                continue
            polish = Polish(self.tables, walk.spans, walk.chosen, walk.hops)
            if (polished := polish.run()) is None:
                continue
            self._keep(walk.spans, *polished)
        return self.value

    def _impossible(self) -> bool:
        """Whether prices of devices prove that no plan fits, wherever hops lead."""
        tables = self.tables
        loss = np.where(np.isfinite(tables.cost), tables.loss, math.inf)
        spare = tables.spare.room if tables.spare.room < math.inf else 1.0
        # A plan loses at most the budget. If the bound of all walks is more, there is no plan.
        budget = tables.budget or 0.0
        enough = budget + 1e-6 * (spare or 1.0)
        # The costs are losses, and entering a device loses nothing.
        nothing = np.zeros(tables.shape[0])
        pricer = Pricer(nothing, self._until_s(), tables.members, tables.needed)
        priced, _ = pricer.price(
            Free(tables.segments(loss)),
            0.0,
            pricer.nothing(),
            target=enough,
            reach=1.1 * budget + 0.1 * (spare or 1.0),
            rounds=100,
        )
        return priced.bound >= enough + 1e-9 * priced.constant

    def _keep(self, spans: Sequence[Span], chosen: Integers, hops: Integers) -> None:
        """Keep a plan that fits if it is the best so far."""
        value = walk_value(self.tables, spans, chosen, hops)
        if value < self.value:
            self.value, self.choice = value, self.tables.choice(spans, chosen, hops)

    def _try_other(self) -> None:
        """Finish the walks of the search for the other kind of objective. They fit here too."""
        left_s = self._until_s() - now_s()
        if self.other or left_s <= 0:
            return
        aim: ObjectiveKind = "latency" if self.tables.throughput else "throughput"
        problem = replace(self.tables.problem, objective=Objective(aim))
        tables = Tables(problem, self.tables.tied)
        until_s = now_s() + _OTHER_SHARE * left_s
        other = _kind(tables)(tables, (until_s, until_s), _OTHER_GAP)
        other.other = True
        other.run()
        for spans in sorted(other.seen, key=lambda spans: other.seen[spans])[:_FINISHED]:
            if self._late():
                break
            self._finish(list(spans))

    def _late(self) -> bool:
        return now_s() > self._until_s()

    def _until_s(self) -> float:
        """The end of the search. It is later while there is no plan at all."""
        return self.last_resort_s if self.value == math.inf else self.deadline_s


class _Cheapest(_Search):
    """The search for objectives that are sums over blocks and hops."""

    def __init__(self, tables: Tables, until_s: tuple[float, float], gap: float) -> None:
        super().__init__(tables, until_s, gap)
        self.found: dict[float, tuple[Priced, Floats]] = {}
        self.at_hand = math.inf
        """Value of the first plan."""
        self.price = 0.0
        """Price of the budget near which widths are chosen."""

    def run(self) -> Found:
        tables = self.tables
        self.price = self._guess() if tables.budget is not None else 0.0
        self.at_hand = self._fill()
        self._climb()
        top = max(self.found, key=lambda mu: self.found[mu][0].bound)
        self.price = top
        mus = [top * factor for factor in (1.0, 0.7, 1.4, 2.5, 6.0, 15.0)] if top else [0.0]
        rounds, merge = 60, True
        for width in _WIDTHS:
            for mu in mus:
                self._price(mu, rounds)
            rounds = 100
            if self._done():
                break
            full = self._follow([self.found[mu][0] for mu in mus], width, merge)
            if width == _WIDTHS[0] and self.value >= self.at_hand and not self._done():
                self._try_other()
            if self._done() or not (full or merge):
                break
            # A wider beam helps only where this one was full, or mixed walks up.
            merge = full
            if full or width == _WIDTHS[0]:
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
            if count < (_FINISHED if merge else _ALL_FINISHED) and not self._late():
                refined = self._finish(walk.spans)
                # Without a budget there is one exact relaxation: merging loses nothing.
                bound = bound if walk.mixed and self.price else max(bound, refined)
            bounds.append(bound)
        self.bound = max(self.bound, min(min(bounds), self.value))
        return dropped < math.inf or cutoff == math.inf

    def _done(self) -> bool:
        return self._late() or self.bound >= (1 - self.gap) * self.value

    def _exchange_devices(self) -> None:
        """Look for better orders of devices. Several prices rule out orders that lose too much."""
        tables = self.tables
        until_s = now_s() + _EXCHANGE_SHARE * max(0.0, self._until_s() - now_s())
        relaxations: list[tuple[Joint | Separate, float]] = []
        for mu in [self.price * factor for factor in _EXCHANGE_PRICES] if self.price else [0.0]:
            segments = tables.segments(tables.cost + mu * tables.loss)
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

    def _price(self, mu: float, rounds: int) -> float:
        """Improve the bound with this price of the budget. Returns it."""
        tables = self.tables
        arcs: Joint | Separate
        if mu in self.found:
            priced, prices = self.found[mu]
            arcs = priced.arcs
        else:
            segments = tables.segments(tables.cost + mu * tables.loss)
            arcs = Separate(segments, tables.links(mu), tables.back)
            nearest = min(self.found, key=lambda at: abs(math.log(at / mu)), default=None)
            prices = self.pricer.nothing() if nearest is None else self.found[nearest][1]
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
        self.bound = max(self.bound, min(bound, self.value))
        return bound

    def _best(self) -> float:
        return max((one.bound for one, _ in self.found.values()), default=1.0)

    def _climb(self) -> None:
        """Find the price of the budget with the largest bound, by hill climbing."""
        tables = self.tables
        if tables.budget is None:
            self._price(0.0, 100)
            return
        mu, step = self._guess(), 4.0
        self._price(mu, 15)
        while step > 1.15 and len(self.found) < 40:
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


class _Fastest(_Search):
    """The search for throughput: bisection over the time of the slowest stage.

    The bound leaves out loading (``Objective.migration_weight``). It stays valid.
    """

    def __init__(self, tables: Tables, until_s: tuple[float, float], gap: float) -> None:
        super().__init__(tables, until_s, gap)
        self.budget = tables.budget or 0.0
        self.prices = self.pricer.nothing()
        self.full = False
        cost = np.where(np.isfinite(tables.decode), tables.loss, math.inf)
        self.within_memory = tables.segments(cost)
        self.cost = cost

    def run(self) -> Found:
        self.bound = self.tables.least_turn_s(self.tables.decode)
        self.at_hand = self._fill()
        if self.tables.shape[0] > _MANY:
            return self._of_many()
        self._climb()
        self._look()
        if self.value >= self.at_hand:
            self._try_other()
        if self.choice is None:
            return Found(None, self.bound)
        self._measure(self.value)
        for width in _WIDTHS:
            self._exchange_devices()
            if width == _WIDTHS[0]:
                # More rounds of prices raise the bound here further than wider beams.
                self._press(self.value * (1 - self.gap), self.gap / 4, 500)
            self.full = False
            self._raise(width)
            self._lower(width)
            if not self.full or self._done():
                break
        return Found(self.choice, self.bound)

    def _of_many(self) -> Found:
        """A bound with hops that lead anywhere, and a plan of the most useful devices."""
        self._climb()
        chosen = self._most_useful()
        part, ties = part_of(self.tables.problem, chosen), self.tables.tied
        # A part may have teams without their twins.
        ties = None if ties is None or self.tables.teams else ties[np.ix_(chosen, chosen)]
        best = _Fastest(Tables(part, ties), (self.deadline_s, self.last_resort_s), self.gap)
        best.value, best.filled = self.value, True
        found = best.run()
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
        chosen = {i for *_, i in sorted(score)[:_MANY]}
        return sorted(chosen | {problem.lead(i) for i in chosen})

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
        limit = 1.4 * self.bound
        while limit < high and not self._late():
            if limit > self.top:
                self._measure(min(4 * limit, high))
            if self._prove(limit) is not None:
                high = limit
                break
            limit *= 1.4
        # While there is no plan, time is better spent on one than on the last percent.
        self._press(high, self.gap / 4 if self.value < math.inf else _OTHER_GAP, 100)

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
            self._try(limit, _WIDTHS[1])

    def _exchange_devices(self) -> None:
        """Look for better orders of devices, within less time than the best plan takes.

        With a lower limit fewer changes help, but each helps more.
        """
        until_s = now_s() + _EXCHANGE_SHARE * max(0.0, self._until_s() - now_s())
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
        many = self.tables.shape[0] > _MANY
        priced, self.prices = self.pricer.price(
            self._free(limit) if many else self._arcs(limit),
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
        least = [self._finish(walk.spans) for walk in finished[:_FINISHED]]
        if dropped >= enough and len(finished) <= _FINISHED and min(least, default=limit) >= limit:
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

    def __init__(self, search: _Fastest, spans: Sequence[Span]) -> None:
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
