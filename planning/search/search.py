"""A search for a good plan and for a proof of how good it is, without an integer program.

Three things couple the stages of a plan: the quality budget, the devices in use, and the way back.
If each has a price, a shortest walk bounds every plan, and every completion of a beginning
(``bounds.py``). A beam of beginnings (``beam.py``) drops those that cannot be completed below the
best plan known. A beginning that is dropped for lack of space lowers the bound. Several prices of
the budget are used at once, because each is best for other beginnings.

There is one search for each form of the objective: sums over blocks and hops (``sums.py``), the
slowest stage (``slowest.py``), and a sum with the slowest stage of a prompt (``prompts.py``).
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from planning.problem import PlanningProblem
from planning.search.base import NOTHING, Found, Search
from planning.search.prompts import Prompted
from planning.search.slowest import Fastest
from planning.search.sums import Cheapest
from planning.search.tables import Tables

_LEAST_GAP = 1e-3


def search(
    problem: PlanningProblem,
    *,
    deadline_s: float,
    gap: float,
    ties: npt.NDArray[np.bool_] | None = None,
    last_resort_s: float | None = None,
    known: float = math.inf,
    before: Found = NOTHING,
) -> Found:
    """The best plan found until its gap is proved to be at most ``gap``, or the deadline.

    ``deadline_s`` is a point on the clock of ``now_s``. While there is no plan at all,
    ``last_resort_s`` (None: the same) takes its place.
    ``gap``: values below one in a thousand count as one in a thousand.
    ``ties`` [i, j] is True for i < j that are twins: exchanging them changes no figure of a plan.
    ``known`` is the objective of a known plan. Only better plans are looked for.
    ``before`` was found for another variant of the problem, whose best prices are much the same.

    A prompt runs in chunks of one size here: ``problem`` is one variant.
    """
    tables = Tables(problem, ties)
    if not np.isfinite(tables.cost).any((0, 2)).all() or not tables.longest:
        return Found(None, 0.0, impossible=True)
    # Slightly below the gap asked for, so that rounding does not miss it.
    until_s = deadline_s, deadline_s if last_resort_s is None else last_resort_s
    searching = _make(tables, until_s, max(gap, _LEAST_GAP) * (1 - 1e-6))
    searching.value = known
    searching.before = before
    # With teams first plans take long, and those of another variant fit here too.
    searching.filled = before.prices is not None and tables.teams and known < math.inf
    searching._fill()
    if searching.value == math.inf and searching._pack():
        return Found(None, 0.0, impossible=True)
    if searching.value == math.inf and searching._impossible():
        return Found(None, 0.0, impossible=True)
    found = searching.run()
    return replace(found, bound=float(found.bound))


def _make(tables: Tables, until_s: tuple[float, float], gap: float) -> Search:
    kind = Fastest if tables.throughput else Prompted if tables.turns else Cheapest
    return kind(tables, until_s, gap, _make)
