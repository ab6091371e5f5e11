"""A planning problem as arrays, and the segments of a plan as knapsacks.

A segment is a run of blocks on one device. Its least cost within a limit of memory or time is the
solution of a knapsack with one choice per block. Sizes are rounded down to units there, so costs
are never above the true ones. ``polish.py`` counts exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from planning.exact.program import Choice
from planning.problem import TOKEN_BYTES, PlanningProblem
from planning.teams import incidence
from planning.time_limit import now_s
from planning.usable import Usable

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Span = tuple[int, int, int]
"""(device, first block, end)"""

# Seconds or bytes. A room below this is rounding.
_LEAST_ROOM = 1e-12
_WHOLE = 1e-6
"""Part of a unit by which division may miss a whole number of units."""

_EQUAL_LOSS = 2e-3
"""Units are as good if rounding with them loses no more than this part of the sizes."""

_LEAST_UNITS, _MOST_UNITS = 320, 1_600
"""Steps of a limit. Rounding loses up to one step per block of a stage, so long stages need
more."""

_TABLE_CELLS = 20_000_000
"""The most cells of all devices' tables together, 8 bytes each. Above it there are fewer steps."""


class Knapsack:
    """The least cost within a limit, for all runs of up to ``longest`` blocks on one device.

    ``sizes`` [block, option] are inf where there is no such option. Sizes above each block's least
    are counted in whole units, rounded down, so costs are never above the true ones.
    """

    def __init__(self, sizes: Floats, limit: float, longest: int, units: int) -> None:
        """``units`` is the most steps for the room above the least sizes."""
        blocks, _ = sizes.shape
        self.longest = longest
        least = np.where(np.isfinite(sizes).any(1), sizes.min(1), 0.0)
        extra = sizes - least[:, None]
        sums = np.concatenate([[0.0], np.cumsum(least)])
        first, length = np.indices((blocks, longest))
        end = np.minimum(first + length + 1, blocks)
        self.least = sums[end] - sums[first]
        most = np.concatenate([[0.0], np.cumsum(np.where(np.isfinite(extra), extra, 0.0).max(1))])
        room = np.minimum(limit - self.least, most[end] - most[first])
        widest = float(room.max(initial=0.0))
        self.unit = _unit(extra[np.isfinite(extra) & (extra > 0)], widest, units)
        self.steps = int(widest / self.unit + _WHOLE) + 1
        self._runs: list[tuple[int, int, int, int]] = []
        finite = np.where(np.isfinite(extra), extra, math.inf)
        self._shifts = np.minimum(np.floor(finite / self.unit), self.steps).astype(np.int64)
        for option in range(sizes.shape[1]):
            cuts = [0, *(np.flatnonzero(np.diff(self._shifts[:, option])) + 1), blocks]
            for begin, until in pairwise(cuts):
                shift = int(self._shifts[begin, option])
                if shift < self.steps:
                    self._runs.append((option, int(begin), int(until), shift))

    def index(self, room: Any) -> Any:
        """The column of ``profiles`` for the ``room`` above the least sizes."""
        units = np.floor(room / self.unit + _WHOLE)
        return np.clip(units, 0, self.steps - 1).astype(np.int64)

    def profiles(self, cost: Floats) -> Floats:
        """The least costs [length - 1, first block, units of room]."""
        blocks = len(cost)
        found = np.full((self.longest, blocks, self.steps), math.inf)
        before = np.zeros((blocks, self.steps))
        room = self.steps
        for length in range(self.longest):
            now = found[length]
            for option, begin, end, shift in self._runs:
                low = max(begin - length, 0)
                if low < end - length:
                    part = now[low : end - length, shift:]
                    added = before[low : end - length, : room - shift]
                    more = added + cost[low + length : end, option, None]
                    np.minimum(part, more, out=part)
            before = now
        return found

    def choices(self, first: int, costs: Floats, columns: Integers) -> tuple[Integers, Floats]:
        """The best options [price, block] of the run from ``first``, and their costs [price].

        ``costs`` is [price, block, option]. ``columns`` [price] is the room at each price.
        """
        free = costs.argmin(2)
        shifts = self._shifts[first + np.arange(costs.shape[1]), free].sum(1)
        chosen, total = free, costs.min(2).sum(1)
        # Each block has its cheapest option wherever all of them fit together.
        tight = np.flatnonzero(shifts > columns)
        if len(tight):
            chosen[tight], total[tight] = self._rationed(first, costs[tight], columns[tight])
        return chosen, total

    def _rationed(self, first: int, costs: Floats, columns: Integers) -> tuple[Integers, Floats]:
        """``choices`` from a table of all rooms, for options that do not all fit together."""
        prices, length, options = costs.shape
        table = np.zeros((prices, self.steps))
        taken = np.empty((length, prices, self.steps), dtype=np.int64)
        for step in range(length):
            ways = np.full((options, prices, self.steps), math.inf)
            for option in range(options):
                shift = self._shifts[first + step, option]
                if shift < self.steps:
                    before = table[:, : self.steps - shift]
                    ways[option, :, shift:] = before + costs[:, step, option, None]
            taken[step] = ways.argmin(0)
            table = ways.min(0)
        every = np.arange(prices)
        total = table[every, columns]
        chosen = np.empty((prices, length), dtype=np.int64)
        for step in reversed(range(length)):
            chosen[:, step] = taken[step, every, columns]
            columns = np.maximum(columns - self._shifts[first + step, chosen[:, step]], 0)
        return chosen, total


class InMemory(Knapsack):
    """A knapsack whose limit is the memory of a device or of a member of a team.

    ``columns`` [first block, length - 1] are those of ``profiles`` at the limit.
    """

    def __init__(self, sizes: Floats, limit: float, longest: int) -> None:
        super().__init__(sizes, limit, longest, _LEAST_UNITS)
        self.columns: Integers = self.index(limit - self.least)
        self._hopeless = self.least > limit

    def least_costs(self, cost: Floats, wanted: Mask) -> Floats:
        """The least costs [first block, length - 1] at the limit.

        Any cost where nothing fits, or where the run is not ``wanted``.
        """
        blocks, options = cost.shape
        least, shifts = cost.min(1), self._shifts[np.arange(blocks), cost.argmin(1)]
        found = np.full((blocks, self.longest), math.inf)
        taken = np.zeros((blocks, self.longest), dtype=np.int64)
        sums, units = np.zeros(blocks), np.zeros(blocks, dtype=np.int64)
        for length in range(min(self.longest, blocks)):
            until = blocks - length
            sums, units = sums[:until] + least[length:], units[:until] + shifts[length:]
            found[:until, length], taken[:until, length] = sums, units
        tight = (taken > self.columns) & ~self._hopeless & np.isfinite(found) & wanted
        if not tight.any():
            return found
        if self.longest * len(self._runs) > blocks * options:
            self._ration(cost, found, tight)
            return found
        profile = self.profiles(cost)
        lengths, firsts = np.indices((self.longest, blocks))
        at_limit: Floats = profile[lengths, firsts, self.columns.T].T
        return at_limit

    def _ration(self, cost: Floats, found: Floats, tight: Mask) -> None:
        """Set ``found`` [first block, length - 1] where it is ``tight``: not all options fit there.

        All runs grow by one block at a time, each with a row of least costs by units of room.
        """
        blocks, longest = tight.shape
        lengths = np.arange(1, longest + 1)
        until = np.where(tight.any(1), np.arange(blocks) + (tight * lengths).max(1), 0)
        steps = int(self.columns[tight].max()) + 1
        table, grown = np.zeros((2, blocks, steps))
        begun = 0
        for k in range(int(until.max())):
            while until[begun] <= k and begun < k:
                begun += 1
            before, now = table[begun : k + 1], grown[begun : k + 1]
            now[:] = math.inf
            least = math.inf
            for option in np.argsort(self._shifts[k], kind="stable"):
                shift, price = int(self._shifts[k, option]), float(cost[k, option])
                # An option is of use only if no narrower one costs as little.
                if price < least and shift < steps:
                    least = price
                    part = now[:, shift:]
                    np.minimum(part, before[:, : steps - shift] + price, out=part)
            firsts = np.arange(max(begun, k + 1 - longest), k + 1)
            firsts = firsts[tight[firsts, k - firsts]]
            found[firsts, k - firsts] = grown[firsts, self.columns[firsts, k - firsts]]
            table, grown = grown, table


def _unit(sizes: Floats, room: float, steps: int) -> float:
    """The unit, at least room / steps, with which rounding sizes down loses the least."""
    if not len(sizes) or room < _LEAST_ROOM:
        return max(room, 1.0)
    sizes, counts = np.unique(sizes, return_counts=True)
    finest = max(room / steps, float(sizes[0]) / 40)
    units = np.geomspace(finest, max(finest, float(sizes[0])), 400)
    # A unit that divides the least size is lowered a little: no multiple is rounded below itself.
    units = np.concatenate([float(sizes[0]) / np.arange(1, 41) * (1 - 1e-6), units])
    units = units[units >= finest * (1 - 1e-6)]
    lost = 1 - np.floor(sizes / units[:, None]) * units[:, None] / sizes
    # A few blocks, such as the head, may lose more than all the layers.
    mean = lost @ counts / counts.sum()
    # The tables grow with the number of steps, so of equally good units the largest is best.
    return float(units[mean <= mean.min() + _EQUAL_LOSS].max())


class Tables:
    """The problem as arrays [device, block, option] and [hop format, device, next device]."""

    def __init__(self, problem: PlanningProblem, ties: Mask | None = None) -> None:
        began_s = now_s()
        self.problem = problem
        self.members = incidence(problem)
        """[device, real device]: which real devices a device is, or has as members."""
        self.teams = len(problem.real) < len(problem.devices)
        self.conflicts = self.members.astype(float) @ self.members.T.astype(float) > 0
        """[device, device]: whether both have a real device in common. No plan has both."""
        self.needed = self._needed()
        self.tied = ties
        self.ties = self._ties(ties)
        budget = problem.quality_budget
        self.budget = None if budget == math.inf else budget
        self.throughput = problem.objective.kind == "throughput"
        self.turns = problem.turns
        devices, blocks = range(len(problem.devices)), range(problem.spec.block_count)
        self.spare = usable = Usable(problem)
        mask = usable.usable
        self.shape = mask.shape
        self.cost, self.decode, self.turn, self.memory, self.storage = (
            np.where(mask, figures, math.inf)
            for figures in (
                usable.cost,
                usable.turn if self.throughput else usable.decode,
                usable.turn,
                usable.memory,
                usable.stored[None],
            )
        )
        self.loss = np.where(mask, usable.loss, 0.0)
        if self.budget is None:
            self.loss[:] = 0.0
        self.bits = np.broadcast_to(np.array(usable.widths, dtype=np.int64), self.shape)
        self.resources = [
            (np.where(mask, sizes, math.inf), limits) for sizes, limits in usable.resources
        ]
        self.fits = self._fits()
        lengths = np.flatnonzero(self.fits.any((0, 1)))
        self.longest = int(lengths[-1]) + 1 if len(lengths) else 0
        self.fits = self.fits[:, :, : self.longest]
        self.binding = [self._binding(i) for i in devices]
        """Per device, the indices of ``resources`` that are memory and may limit a stage."""
        self.memory_limit = [float(self.resources[r[0]][1][i]) for i, r in enumerate(self.binding)]
        self.reach = [self._reach(i) for i in devices]
        cells = max(1, sum(self.reach) * len(blocks))
        self.units = min(max(40 * self.longest, _LEAST_UNITS), _MOST_UNITS)
        self.units = max(min(self.units, _TABLE_CELLS // cells), _LEAST_UNITS)
        self.in_memory = [
            [
                InMemory(self.resources[at][0][i], self.resources[at][1][i], self.reach[i])
                for at in self.binding[i]
            ]
            for i in devices
        ]
        """Per device, a knapsack for its memory, or for each member of a team that may be short."""
        self.entry = np.array([problem.call_cost(i) for i in devices])
        self.call_s = np.array([problem.call_turn_s(i) for i in devices])
        self._measure_links()
        self.made_s = now_s() - began_s
        """Seconds that it took to make these tables."""

    def _measure_links(self) -> None:
        """Set hops [format, device, next device] and ways back, as ``PlanningProblem`` counts them.

        Large shoals have tens of thousands of links, so all are computed at once.
        """
        problem = self.problem
        forms = problem.permitted_hops
        self.hop_bits = [form.bits for form in forms]
        priced = self.budget is not None
        self.hop_loss = np.array([(priced and form.sensitivity) or 0.0 for form in forms])
        count = len(problem.devices)
        half_s, per_byte_s = np.full((2, count, count), math.inf)
        for (i, j), link in problem.links.items():
            half_s[i, j], per_byte_s[i, j] = link.transfer_s(0), 1 / link.bytes_per_s
        if self.teams:
            leads = [problem.lead(i) for i in range(count)]
            half_s, per_byte_s = half_s[np.ix_(leads, leads)], per_byte_s[np.ix_(leads, leads)]
            # Devices with a member in common are in no plan together.
            half_s[self.conflicts] = math.inf
        rows, output = problem.chunk_rows, problem.objective.tokens[1]
        square = np.full((len(self.hop_bits), count, count), math.inf)
        self.hop, self.hop_s, self.hop_turn = square, square.copy(), square.copy()
        linked = np.isfinite(half_s) & ~np.eye(count, dtype=bool)
        half_s, per_byte_s = half_s[linked], per_byte_s[linked]
        for f, bits in enumerate(self.hop_bits):
            sent_s = problem.hop_bytes(bits) * per_byte_s
            chunk_s = rows * sent_s
            self.hop_s[f, linked] = half_s + sent_s
            self.hop_turn[f, linked] = half_s + sent_s if self.throughput else chunk_s
            self.hop[f, linked] = output * (half_s + sent_s)
            if rows:
                self.hop[f, linked] += half_s + chunk_s
        self.back, self.back_s = np.full((2, count, count), math.inf)
        self.back_s[linked] = half_s + TOKEN_BYTES * per_byte_s
        self.back[linked] = output * self.back_s[linked]

    def least_turn_s(self, turn: Floats) -> float:
        """A lower bound of the slowest stage's seconds: no stage has less work than its share.

        ``turn`` [device, block, option]. A team counts as often as it has members.
        """
        fastest = turn.min((0, 2))
        work = (turn.min(2) * self.members.sum(1)[:, None]).min(0)
        stages = int(self.members.shape[1])
        return max(float(fastest.max()), float(work.sum()) / stages)

    def links(self, mu: float) -> Floats:
        """[device, next device]: the least cost of a hop, its loss priced at ``mu``."""
        found: Floats = (self.hop + mu * self.hop_loss[:, None, None]).min(0, initial=math.inf)
        return found

    def _fits(self) -> Mask:
        """[device, first block, length - 1]: whether such a stage fits at its least sizes."""
        devices, blocks, _ = self.shape
        usable = np.isfinite(self.memory).any(2)
        good = np.zeros((devices, blocks, blocks), dtype=bool)
        for at, (sizes, limit) in enumerate(self.resources):
            least = np.where(usable, sizes.min(2), math.inf)
            for first in range(blocks):
                inside = np.cumsum(least[:, first:], axis=1) <= limit[:, None]
                part = good[:, first, : blocks - first]
                part[:] = part & inside if at else inside
        # No team has the embedding alone.
        good[len(self.problem.real) :, 0, 0] = False
        return good

    def _needed(self) -> Integers:
        """The real devices, as columns of ``members``, that every plan must use in their teams."""
        named = [index for team in self.problem.teams for index in team]
        names = [self.problem.devices[index].name for index in named]
        columns = {self.problem.devices[i].name: i for i in self.problem.real}
        return np.array([columns[name] for name in names], dtype=np.int64)

    def _ties(self, ties: Mask | None) -> Floats:
        """[real device, device]: whether a walk must use the one before it enters the other."""
        if ties is None:
            return np.zeros(self.members.T.shape)
        if not self.teams:
            return ties.astype(float)
        before = ties.astype(float) @ self.members.T.astype(float) > 0
        return np.asarray(before & ~self.members.T, dtype=float)

    def _reach(self, device: int) -> int:
        lengths = np.flatnonzero(self.fits[device].any(0))
        return int(lengths[-1]) + 1 if len(lengths) else 0

    def segments(self, cost: Floats, wanted: Mask | None = None) -> Floats:
        """The least costs [device, first block, length - 1] within the memory; inf if none fits.

        Also inf where a stage is not ``wanted``, which has the same axes.
        """
        wanted = self.fits if wanted is None else self.fits & wanted
        devices, blocks, _ = self.shape
        found = np.full((devices, blocks, self.longest), math.inf)
        for i, knapsacks in enumerate(self.in_memory):
            own = wanted[i, :, : self.reach[i]]
            if not own.any():
                continue
            # Limits are taken one at a time, and the largest cost counts.
            least = [knapsack.least_costs(cost[i], own) for knapsack in knapsacks]
            found[i, :, : self.reach[i]] = np.maximum.reduce(least)
        return np.where(wanted, found, math.inf)

    def choices(self, device: int, first: int, costs: Floats) -> tuple[Integers, Floats]:
        """The best options [price, block] of a stage within its memory, and their costs [price].

        ``costs`` is [price, block, option]. Limits are taken one at a time, and the largest cost
        counts.
        """
        prices, length, _ = costs.shape
        best: tuple[Integers, Floats] | None = None
        for knapsack in self.in_memory[device]:
            column = np.full(prices, int(knapsack.columns[first, length - 1]))
            chosen, total = knapsack.choices(first, costs, column)
            if best is not None:
                more = total > best[1]
                chosen = np.where(more[:, None], chosen, best[0])
                total = np.maximum(total, best[1])
            best = chosen, total
        if best is None:
            raise ValueError("a device has memory")
        return best

    def _binding(self, device: int) -> list[int]:
        """The memories of a team that no other one limits more, the tightest one first."""
        rows = [2 * at for at in range(len(self.problem.devices[device].holders))]
        if len(rows) == 1:
            return rows
        parts = []
        for at in rows:
            sizes, limit = self.resources[at]
            usable = np.isfinite(sizes[device])
            parts.append(np.where(usable, sizes[device], 0.0) / max(float(limit[device]), 1.0))
        order = sorted(range(len(rows)), key=lambda m: -float(parts[m][1:].sum()))
        kept: list[int] = []
        for m in order:
            if not any((parts[m] <= parts[other]).all() for other in kept):
                kept.append(m)
        return [rows[m] for m in kept]

    def choice(self, spans: Sequence[Span], chosen: Integers, hops: Integers) -> Choice:
        """The choice of ``spans`` with the option of each block and the format of each hop."""
        stages = [
            (i, first, tuple(int(self.bits[i, k, chosen[k]]) for k in range(first, end)))
            for i, first, end in spans
        ]
        return Choice(stages, tuple(self.hop_bits[f] for f in hops))
