"""A first plan for devices of which nearly all are needed, or a proof that nothing fits.

Filling one device after the other (``greedy.py``) decides too early if each holds only a few
blocks: it may leave the last blocks without a place. Here an integer program counts how many
devices of each kind take how many blocks. It leaves out links and where a run begins, so it is
small. If even this has no solution within the budget, there is no plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pulp

from planning.exact.solver import SolverError, run
from planning.search.greedy import Filled, walk_value
from planning.search.tables import Floats, Integers, Span, Tables
from planning.time_limit import now_s

_MOST_COUNTS = 4_000
"""With more counts than this the program is not written: filling finds plans of long runs."""

_GAP = 1e-3
_ROUNDING = 1e-6
"""Part of the budget by which the solver's bound must exceed it."""

_ROUNDS = 100
"""The most exchanges of two stages that make an order better."""

_MISSING = 1e6
"""Counts as much as a run that does not fit at its place, or a missing link."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A walk that covers all blocks, if one was found. ``impossible``: it is proved there is none.

    The walk's widths may break a limit by the rounding of the tables.
    """

    walk: Filled | None
    impossible: bool = False


@dataclass(frozen=True, slots=True)
class _Run:
    """So many blocks on a device of a kind, and the place of the run: 0 first, 1 between, 2 last.

    ``loss`` is the mean over all beginnings, ``least`` the least one.
    """

    kind: int
    length: int
    place: int
    loss: float
    least: float


def pack(tables: Tables, *, limit_s: float) -> Packed:
    """A walk of runs that all devices together can take, in at most ``limit_s`` for the solver."""
    if not np.isfinite(tables.hop_s).any():
        return Packed(None, impossible=tables.longest < tables.shape[1])
    until_s = now_s() + limit_s
    if tables.teams and (walk := _Packing(tables, alone=True).run(until_s).walk) is not None:
        return Packed(walk)
    found = _Packing(tables).run(until_s)
    if found.walk is None and not found.impossible and tables.teams:
        found = _Packing(tables, apart=True).run(until_s)
    return found


class _Packing:
    """The runs of one problem, and the program that counts them."""

    def __init__(self, tables: Tables, *, alone: bool = False, apart: bool = False) -> None:
        """``alone``: without teams. ``apart``: devices of a group are in just the same teams.

        Otherwise their teams are of the same kinds. Counts of these may have no teams at hand.
        """
        self.tables = tables
        count = tables.members.shape[1] if alone else tables.shape[0]
        limited = tables.budget is not None
        figures = tables.loss if limited else tables.cost
        self.figures = np.where(np.isfinite(tables.cost), figures, math.inf)
        self.segments = tables.segments(self.figures)
        whole = self.segments[:, 0, tables.shape[1] - 1 :]
        self.whole = float(whole.min(initial=math.inf))
        """The least loss of all blocks on one device or team."""
        self.hop_loss = float(tables.hop_loss.min()) if limited else 0.0
        members = tables.members[:count]
        several = members.sum(1) > 1
        rows = [row.tobytes() for row in self.segments[:count]]
        # Real devices of a group take the same blocks, alone and in teams of the same kinds.
        keys = [
            (
                rows[int(having.argmax())],
                frozenset((i if apart else rows[i]) for i in np.flatnonzero(having & several)),
                column in tables.needed,
            )
            for column, having in enumerate(members.T)
        ]
        names = list(dict.fromkeys(keys))
        self.groups = np.array([names.index(key) for key in keys])
        self.needed = [key[2] for key in names]
        # Devices and teams of a kind have such groups as members.
        self.used = np.array(
            [np.bincount(self.groups[row], minlength=len(names)) for row in members]
        )
        kinds: dict[tuple[bytes, bytes], list[int]] = {}
        for index, used in enumerate(self.used):
            kinds.setdefault((rows[index], used.tobytes()), []).append(index)
        self.kinds = list(kinds.values())
        self.runs = list(self._all_runs())

    def run(self, until_s: float) -> Packed:
        """The walk of the counts of least loss, or what they prove."""
        if len(self.runs) > _MOST_COUNTS:
            return Packed(None)
        budget = self.tables.budget
        for losses in ("loss", "least"):
            each = [getattr(run, losses) + self.hop_loss for run in self.runs]
            counts, bound = self._counts(each, max(0.0, until_s - now_s()))
            if counts is not None and (walk := self._walk(counts)) is not None:
                return Packed(walk)
        # One device alone is no sum of runs.
        bound = min(bound - self.hop_loss, self.whole)
        allowed = math.inf if budget is None else budget * (1 + _ROUNDING)
        return Packed(None, impossible=bound == math.inf or bound > allowed)

    def _all_runs(self) -> Iterator[_Run]:
        blocks = self.tables.shape[1]
        for kind, indices in enumerate(self.kinds):
            found = self.segments[indices[0]]
            for length in range(1, min(self.tables.longest, blocks - 1) + 1):
                own = found[: blocks - length + 1, length - 1]
                for place, some in enumerate((own[:1], own[1:-1], own[-1:])):
                    some = some[np.isfinite(some)]
                    if len(some):
                        yield _Run(kind, length, place, float(some.mean()), float(some.min()))

    def _counts(self, each: Sequence[float], limit_s: float) -> tuple[list[int] | None, float]:
        """How often each run is used at the least loss, and a bound of it; inf if none fits."""
        program = pulp.LpProblem("packing")
        unit = self.tables.budget or max(each, default=0.0) or 1.0
        most = [len(self.kinds[run.kind]) for run in self.runs]
        counts = [
            program.add_variable(f"n{at}", 0, 1 if run.place != 1 else most[at], pulp.LpInteger)
            for at, run in enumerate(self.runs)
        ]
        pairs = list(zip(self.runs, counts, strict=True))
        program.setObjective(
            pulp.lpSum(loss / unit * n for loss, n in zip(each, counts, strict=True))
        )
        rows = [(pulp.lpSum(run.length * n for run, n in pairs), True, self.tables.shape[1])]
        rows += [
            (pulp.lpSum(n for run, n in pairs if run.place == place), True, 1) for place in (0, 2)
        ]
        for group, needed in enumerate(self.needed):
            taken = [(int(self.used[self.kinds[run.kind][0]][group]), n) for run, n in pairs]
            row = pulp.lpSum(members * n for members, n in taken if members)
            rows.append((row, needed, int((self.groups == group).sum())))
        for row, exact, limit in rows:
            program.addConstraint(row == limit if exact else row <= limit)
        try:
            outcome = run(program, time_limit_s=limit_s, gap=_GAP)
        except SolverError:
            return None, 0.0
        if outcome.status == "infeasible":
            return None, math.inf
        bound = 0.0 if outcome.bound is None else outcome.bound * unit
        if not outcome.values:
            return None, bound
        return [round(outcome.values[f"n{at}"]) for at in range(len(self.runs))], bound

    def _walk(self, counts: Sequence[int]) -> Filled | None:
        """A walk of the counted runs; None if devices or links do not allow one."""
        wanted = [run for run, count in zip(self.runs, counts, strict=True) for _ in range(count)]
        given = self._given(wanted)
        stages = None if given is None else self._ordered(given)
        if stages is None:
            return None
        tables = self.tables
        ends = np.cumsum([length for _, length in stages]).tolist()
        spans: list[Span] = [
            (i, end - length, end) for (i, length), end in zip(stages, ends, strict=True)
        ]
        if not all(tables.fits[i, first, end - first - 1] for i, first, end in spans):
            return None
        chosen = np.concatenate(
            [tables.choices(i, a, self.figures[i, a:b][None])[0][0] for i, a, b in spans]
        )
        hops = np.array([self._hop(a[0], b[0]) for a, b in pairwise(spans)], dtype=np.int64)
        value = walk_value(tables, spans, chosen, hops)
        return Filled(value, True, tuple(spans), chosen, hops)

    def _hop(self, i: int, j: int) -> int:
        tables = self.tables
        formats = range(len(tables.hop_loss))
        return min(formats, key=lambda f: (tables.hop_loss[f], tables.hop_s[f, i, j]))

    def _given(self, wanted: Sequence[_Run]) -> list[tuple[int, int, int]] | None:
        """(device, length, place) of each run, with no real device in two; None if that fails.

        Large teams choose first, and each takes the first ones that are free.
        """
        members = self.tables.members
        free = np.ones(members.shape[1], dtype=bool)
        found = []
        sizes = [-int(members[self.kinds[run.kind][0]].sum()) for run in wanted]
        for at in np.argsort(sizes, kind="stable").tolist():
            run = wanted[at]
            fitting = (i for i in self.kinds[run.kind] if free[members[i]].all())
            if (device := next(fitting, None)) is None:
                return None
            free &= ~members[device]
            found.append((device, run.length, run.place))
        return found

    def _ordered(self, given: Sequence[tuple[int, int, int]]) -> list[tuple[int, int]] | None:
        """(device, length) in an order that has all links; None if none was found.

        Each stage goes where its hops are the quickest. Then pairs that lose less the other way
        round are exchanged.
        """
        quickest = self.tables.hop_s.min(0)
        order = [next(one for one in given if one[2] == place) for place in (0, 2)]
        # Devices with few links first: the others fit in anywhere.
        links = np.isfinite(quickest).sum(1)
        between = sorted((one for one in given if one[2] == 1), key=lambda one: links[one[0]])
        for one in between:
            into, out = (
                np.array([quickest[stage[0], one[0]] for stage in order[:-1]]),
                np.array([quickest[one[0], stage[0]] for stage in order[1:]]),
            )
            order.insert(1 + int((into + out).argmin()), one)
        stages = self._exchanged([(device, length) for device, length, _ in order])
        return stages if self._badness(np.array([stages]))[0] <= self._enough() else None

    def _enough(self) -> float:
        """The badness of an order that keeps the budget."""
        budget = self.tables.budget
        return _MISSING / 2 if budget is None else budget

    def _badness(self, orders: Integers) -> Floats:
        """[order]: its loss, and much more for each run or link that it lacks.

        ``orders`` [order, stage] are devices with lengths.
        """
        tables = self.tables
        devices, lengths = orders[..., 0], orders[..., 1]
        losses = self.segments[devices, np.cumsum(lengths, axis=1) - lengths, lengths - 1]
        hops = tables.hop_s.min(0)[devices[:, :-1], devices[:, 1:]]
        back = tables.back_s[devices[:, -1], devices[:, 0]]
        lacking = np.isinf(losses).sum(1) + np.isinf(hops).sum(1) + np.isinf(back)
        found = np.where(np.isfinite(losses), losses, 0.0).sum(1)
        return np.asarray(found + hops.shape[1] * self.hop_loss + _MISSING * lacking)

    def _exchanged(self, stages: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """The stages with pairs exchanged until they keep the budget, or none is better."""
        order = np.array(stages)
        a, b = np.triu_indices(len(order), 1)
        pairs = np.arange(len(a))
        for _ in range(_ROUNDS):
            if (now := self._badness(order[None])[0]) <= self._enough():
                break
            orders = np.repeat(order[None], len(a), axis=0)
            orders[pairs, a], orders[pairs, b] = order[b], order[a]
            after = self._badness(orders)
            if after.min() >= now:
                break
            order = orders[int(after.argmin())]
        return [(int(device), int(length)) for device, length in order]
