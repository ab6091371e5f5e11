"""The parts of all searches: the best plan so far, the proved bound, and the time limits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from planning.exact.program import Choice
from planning.problem import Objective, ObjectiveKind
from planning.search.bounds import Free, Pricer
from planning.search.greedy import fill, walk_value
from planning.search.packing import pack
from planning.search.polish import Polish
from planning.search.tables import Floats, Integers, Span, Tables
from planning.time_limit import now_s

WIDTHS = (20, 100, 400, 1_500, 5_000, 20_000)
"""Walks kept per block, in one attempt after the other."""

FINISHED = 60
"""Walks of one attempt whose widths are chosen."""

_GREEDY = 12
"""First plans (``greedy.py``) whose widths are improved."""

EXCHANGE_SHARE = 0.25
"""Share of the time left for each search of better orders of devices."""

PACK_S = 1.0
"""The most seconds of a solver that counts runs."""

_OTHER_SHARE = 0.25
"""Share of the time left for the search for the other kind of objective."""
OTHER_GAP = 0.05
_OTHER_TABLES = 15
"""That search begins in about so many times the time of its tables. It reads no clock meanwhile."""


@dataclass(frozen=True, slots=True)
class Found:
    """The best choice found, if any, and a lower bound of the objective of all plans."""

    choice: Choice | None
    bound: float
    impossible: bool = False
    """It is proved that no plan fits."""
    price: float = 0.0
    """The price of the quality budget that bounds plans best; 0 if it has none."""
    prices: Floats | None = None
    """The prices of devices that bound plans best; None if nobody looked for them."""


NOTHING = Found(None, 0.0)
"""The result where nothing was looked for."""

Make: TypeAlias = Callable[[Tables, tuple[float, float], float], "Search"]
"""Makes the search that suits the objective of some tables, within time limits and a gap."""


class Search:
    """The best plan so far, the proved bound, and the time limits."""

    def __init__(
        self, tables: Tables, until_s: tuple[float, float], gap: float, make: Make
    ) -> None:
        """``make`` makes the search for the other kind of objective."""
        self.tables = tables
        self.deadline_s, self.last_resort_s = until_s
        self.gap = gap
        self.make = make
        self.pricer = Pricer(tables.entry, self.deadline_s, tables.members, tables.needed)
        self.choice: Choice | None = None
        self.value = math.inf
        self.bound = 0.0
        self.seen: dict[tuple[Span, ...], float] = {}
        self.filled = False
        self.before = NOTHING
        """The result for another variant, whose best prices are much the same."""
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
        if self.value < math.inf and now_s() > self.deadline_s:
            return self.value
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

    def _pack(self) -> bool:
        """Keep a plan by counts (``packing.py``). True if it is proved that no plan fits."""
        packed = pack(self.tables, limit_s=PACK_S)
        walk = packed.walk
        if walk is not None and self._complete(walk.spans):
            polished = Polish(self.tables, walk.spans, walk.chosen, walk.hops).run()
            if polished is not None:
                self._keep(walk.spans, *polished)
        return packed.impossible

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
        if self.other or left_s <= _OTHER_TABLES * self.tables.made_s:
            return
        aim: ObjectiveKind = "latency" if self.tables.throughput else "throughput"
        problem = replace(self.tables.problem, objective=Objective(aim))
        tables = Tables(problem, self.tables.tied)
        until_s = now_s() + _OTHER_SHARE * left_s
        other = self.make(tables, (until_s, until_s), OTHER_GAP)
        other.other = True
        other.run()
        for spans in sorted(other.seen, key=lambda spans: other.seen[spans])[:FINISHED]:
            if self._late():
                break
            self._finish(list(spans))

    def _late(self) -> bool:
        return now_s() > self._until_s()

    def _until_s(self) -> float:
        """The end of the search. It is later while there is no plan at all."""
        return self.last_resort_s if self.value == math.inf else self.deadline_s
