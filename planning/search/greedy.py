"""First plans, made by filling devices one after the other.

They are seldom the best. But they take milliseconds on hundreds of devices, and the search has a
plan to beat. Widths come from a balance of size and loss at several prices, and from one width
throughout. Devices come in several orders. Every combination is tried, because no single one finds
a plan for all problems.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from planning.search.tables import Floats, Integers, Span, Tables
from planning.time_limit import now_s

_PRICES = (0.0, *np.geomspace(1e-3, 1e3, 13).tolist(), math.inf)
"""Prices of the whole room of the budget, in shares of a device. 0: smallest; inf: least lossy."""


@dataclass(frozen=True, slots=True)
class Filled:
    """A walk with the option of each block and the format of each hop.

    ``value`` is its objective. ``within`` is True if it keeps the budget. It always keeps memory
    and storage.
    """

    value: float
    within: bool
    spans: tuple[Span, ...]
    chosen: Integers
    hops: Integers


def fill(tables: Tables, until_s: float = math.inf) -> list[Filled]:
    """Different walks that cover all blocks: walks within the budget first, then by value.

    After ``until_s`` it stops if a walk keeps the budget.
    """
    filler = _Filler(tables)
    best: dict[tuple[Span, ...], Filled] = {}
    tried: set[bytes] = set()
    for options in filler.choices():
        if now_s() > until_s and any(one.within for one in best.values()):
            break
        if options.tobytes() in tried:
            continue
        tried.add(options.tobytes())
        level = _Level(tables, options)
        for score in ("longest", "fastest", "largest", "given"):
            spans = level.walk(score)
            if spans is None:
                continue
            one = filler.filled(spans, options)
            old = best.get(one.spans)
            if old is None or (not one.within, one.value) < (not old.within, old.value):
                best[one.spans] = one
    return sorted(best.values(), key=lambda one: (not one.within, one.value))


class _Filler:
    """The tables that all fillings of one problem share."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self.usable = np.isfinite(tables.memory)
        shares = [
            sizes / np.maximum(limit, 1.0)[:, None, None] for sizes, limit in tables.resources
        ]
        self.shares = np.where(self.usable, np.maximum.reduce(shares), math.inf)

    def choices(self) -> Iterator[Integers]:
        """The option [device, block] at each price of the budget, then at each width."""
        tables = self.tables
        room = tables.spare.room
        losses = np.zeros_like(tables.loss)
        if 0 < room < math.inf:
            losses = (tables.loss - np.array(tables.spare.least)[None, :, None]) / room
        for price in _PRICES if losses.any() else (0.0,):
            sizes = self.shares if price < math.inf else np.where(self.usable, 0.0, math.inf)
            yield (sizes + (price if price < math.inf else 1.0) * losses).argmin(2)
        for width in sorted(set(tables.bits[self.usable].tolist())):
            # The width itself, else the next wider one, else the next narrower one.
            far = np.where(tables.bits >= width, tables.bits - width, 100 + width - tables.bits)
            yield np.where(self.usable, far, 1000).argmin(2)

    def filled(self, spans: list[Span], options: Integers) -> Filled:
        """A walk with its figures. Each hop has the format of least loss, then of least time."""
        tables = self.tables
        device = np.concatenate([np.full(end - first, i) for i, first, end in spans])
        blocks = np.arange(len(device))
        chosen = options[device, blocks]
        pairs = [(a[0], b[0]) for a, b in pairwise(spans)]
        hops = np.array([self._hop(i, j) for i, j in pairs], dtype=np.int64)
        loss = [*tables.loss[device, blocks, chosen].tolist(), *tables.hop_loss[hops].tolist()]
        within = tables.budget is None or math.fsum(loss) <= tables.budget
        value = walk_value(tables, spans, chosen, hops)
        return Filled(value, within, tuple(spans), chosen, hops)

    def _hop(self, i: int, j: int) -> int:
        tables = self.tables
        formats = range(len(tables.hop_loss))
        return min(formats, key=lambda f: (tables.hop_loss[f], tables.hop_s[f, i, j]))


def walk_value(tables: Tables, spans: Sequence[Span], chosen: Integers, hops: Integers) -> float:
    """The objective of a walk with the option of each block and the format of each hop."""
    pairs = [(a[0], b[0]) for a, b in pairwise(spans)]
    last, first = spans[-1][0], spans[0][0]
    alone = len(spans) == 1
    blocks = np.arange(len(chosen))
    figures = tables.decode if tables.throughput else tables.cost
    stages = [float(figures[i, blocks[a:b], chosen[a:b]].sum()) for i, a, b in spans]
    if not tables.throughput:
        ways = [float(tables.hop[f, i, j]) for f, (i, j) in zip(hops, pairs, strict=True)]
        ways.append(0.0 if alone else float(tables.back[last, first]))
        entries = [float(tables.entry[i]) for i, _, _ in spans]
        waited = tables.turns * slowest_turn_s(tables, spans, chosen, hops) if tables.turns else 0.0
        return math.fsum([*stages, *ways, *entries, waited])
    leaving = [float(tables.hop_s[f, i, j]) for f, (i, j) in zip(hops, pairs, strict=True)]
    leaving.append(0.0 if alone else float(tables.back_s[last, first]))
    calls = [float(tables.call_s[i]) for i, _, _ in spans]
    return max(map(sum, zip(calls, stages, leaving, strict=True)))


def slowest_turn_s(
    tables: Tables, spans: Sequence[Span], chosen: Integers, hops: Integers
) -> float:
    """Seconds of a chunk of a prompt in the slowest stage of a walk, or on its slowest link."""
    blocks = np.arange(len(chosen))
    busy = [
        float(tables.call_s[i] + tables.turn[i, blocks[a:b], chosen[a:b]].sum())
        for i, a, b in spans
    ]
    pairs = zip(hops, pairwise(spans), strict=True)
    return max(*busy, *(float(tables.hop_turn[f, a[0], b[0]]) for f, (a, b) in pairs), 0.0)


class _Level:
    """All devices with one option for each of their blocks."""

    def __init__(self, tables: Tables, options: Integers) -> None:
        self.tables = tables
        devices, blocks, _ = tables.shape
        self.count, self.blocks = devices, blocks
        where = np.arange(devices)[:, None], np.arange(blocks)[None, :], options
        memory = tables.memory[where]
        usable = np.isfinite(memory)
        seconds = (tables.decode if tables.throughput else tables.cost)[where]
        self.seconds = _sums(np.where(usable, seconds, 0.0))
        self.sizes = [
            (_sums(np.where(usable, sizes[where], 0.0)), limit) for sizes, limit in tables.resources
        ]
        # The next block that the device cannot run, from each block on.
        self.stop = np.full((devices, blocks + 1), blocks)
        for k in reversed(range(blocks)):
            self.stop[:, k] = np.where(usable[:, k], self.stop[:, k + 1], k)
        # Blocks that fit the device alone.
        self.takes = np.logical_and.reduce(
            [usable, *(sizes[where] <= limit[:, None] for sizes, limit in tables.resources)]
        )
        self.conflicts = tables.conflicts
        self.linked = np.isfinite(tables.hop_s).any(0)
        self.returns = np.isfinite(tables.back_s)
        self.pinned: dict[int, list[int]] = {}
        for block, device in tables.problem.pins.items():
            self.pinned.setdefault(device, []).append(block)

    def walk(self, score: str) -> list[Span] | None:
        """Spans that cover all blocks, each next device the best by ``score``; None if stuck."""
        free = np.ones(self.count, dtype=bool)
        spans: list[Span] = []
        k = 0
        while k < self.blocks:
            ends = self._ends(k)
            allowed = free & (ends > k) & ~self._needed(free, ends)
            if spans:
                allowed &= self.linked[spans[-1][0]]
                done = ends == self.blocks
                allowed &= ~done | self.returns[:, spans[0][0]]
            if not allowed.any():
                return None
            rank = np.where(allowed, self._rank(score, k, ends, spans), math.inf)
            i = int(rank.argmin())
            spans.append((i, k, int(ends[i])))
            free &= ~self.conflicts[i]
            k = int(ends[i])
        return spans

    def _needed(self, free: npt.NDArray[np.bool_], ends: Integers) -> npt.NDArray[np.bool_]:
        """Whether a device is the only free one for a block beyond the end of its run."""
        alone = self.takes & free[:, None] & (self.takes[free].sum(0) == 1)
        last = np.where(alone, np.arange(self.blocks), -1).max(1)
        return np.asarray(last >= ends)

    def _ends(self, k: int) -> Integers:
        """The end of the longest run from block ``k`` on, for each device."""
        ends: Integers = self.stop[:, k].copy()
        for sums, limit in self.sizes:
            fitting = sums[:, k:] <= (sums[:, k] + limit)[:, None]
            ends = np.minimum(ends, k + fitting.sum(1) - 1)
        if k == 0:
            # No team has the embedding alone.
            count = len(self.tables.problem.real)
            ends[count:] = np.where(ends[count:] == 1, 0, ends[count:])
        for device, blocks in self.pinned.items():
            # A run must have all blocks pinned to its device.
            if k > min(blocks) or ends[device] <= max(blocks):
                ends[device] = k
        return ends

    def _rank(self, score: str, k: int, ends: Integers, spans: list[Span]) -> Floats:
        tables = self.tables
        length = np.maximum(ends - k, 1)
        if score == "given":
            return np.arange(self.count, dtype=float)
        if score == "largest":
            return -np.array(tables.memory_limit, dtype=float)
        rows = np.arange(self.count)
        seconds = self.seconds[rows, ends] - self.seconds[rows, k] + tables.call_s
        if spans:
            seconds = seconds + tables.hop_s[:, spans[-1][0]].min(0)
        if score == "fastest":
            return np.asarray(seconds / length)
        # Of equally long runs the faster one comes first.
        return np.asarray(-length - 1.0 / (1.0 + seconds))


def _sums(figures: npt.NDArray[np.float64]) -> Floats:
    """[device, block]: the sum over all blocks before it."""
    return np.concatenate([np.zeros((len(figures), 1)), np.cumsum(figures, axis=1)], axis=1)
