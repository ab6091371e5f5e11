"""Lower bounds of all plans, by shortest walks.

A plan is a walk over (device, block) that enters each device at most once. A relaxation lets a walk
enter devices again, and prices the quality budget instead of keeping it. A dynamic program finds
its shortest walk.

Each entry costs a price per device. Beginning with a device costs a price too, and the way back to
it is refunded this price. So a walk may return elsewhere than it began, but gains little from it.
The length of the shortest walk, less the price of each device once, is a lower bound of all plans.
``Pricer`` chooses the prices by averaged subgradient steps, to make the bound as large as it can.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from planning.search.tables import Floats, Mask
from planning.time_limit import now_s

_WORTHS = 60
"""The worths of a block that are tried for first prices."""


class Joint:
    """Costs of a stage with the hop that leaves it: [block, device, length - 1, next device].

    ``ends`` [device, length - 1, first device] are the costs of the last stage with the way back.
    """

    def __init__(self, costs: Floats, ends: Floats) -> None:
        self.costs = costs
        self.ends = ends
        self._pairs: Floats | None = None

    @property
    def blocks(self) -> int:
        """The number of blocks to place."""
        return len(self.costs)

    def finite(self) -> float:
        """An upper bound of the finite costs of one stage with its hop."""
        return float(np.abs(self.costs[np.isfinite(self.costs)]).max(initial=0.0))

    def between(self, sources: Any, targets: Any) -> Floats:
        """[..., block, length - 1]: stages on the sources, with hops to the targets."""
        if self._pairs is None:
            self._pairs = np.ascontiguousarray(self.costs.transpose(1, 3, 0, 2))
        found: Floats = self._pairs[sources, targets]
        return found

    def anywhere(self) -> Floats:
        """[device, length - 1]: the least cost of so many blocks, wherever they and the hop are."""
        found: Floats = np.minimum(self.costs.min((0, 3)), self.ends.min(2))
        return found

    def at(self, k: int) -> Floats:
        """[device, length - 1, next device]: stages from block ``k`` on, but not the last one."""
        found: Floats = self.costs[k]
        return found

    def of(self, k: int, device: int) -> Floats:
        """[length - 1, next device]: the rows of ``at`` for one device."""
        found: Floats = self.costs[k, device]
        return found

    def to_go(self, fixed: Floats, sink: Floats) -> Floats:
        """[device, block]: the least cost from entering there to the end.

        ``sink`` [device, length - 1] is the cost of last stages, ``fixed`` [device] of each entry.
        """
        blocks, devices, longest, _ = self.costs.shape
        found = np.full((devices, blocks + 1 + longest), np.inf)
        for k in reversed(range(blocks)):
            ahead = found[:, k + 1 : k + 1 + longest].T
            found[:, k] = (self.costs[k] + ahead).min((1, 2))
            if blocks - k <= longest:
                found[:, k] = np.minimum(found[:, k], sink[:, blocks - k - 1])
            found[:, k] += fixed
        return found


class Separate:
    """Costs like ``Joint``, as sums of ``segments`` [device, block, length - 1] and ``links``."""

    def __init__(self, segments: Floats, links: Floats, back: Floats) -> None:
        self.segments = segments
        self.links = links
        _, blocks, longest = segments.shape
        lengths = np.arange(longest)
        last = segments[:, blocks - 1 - lengths, lengths]
        self.ends = last[:, :, None] + back[:, None, :]
        if longest == blocks:
            # A plan of one stage has no way back.
            self.ends[:, -1] = np.inf
            np.fill_diagonal(self.ends[:, -1], last[:, -1])

    @property
    def blocks(self) -> int:
        """The number of blocks to place."""
        return int(self.segments.shape[1])

    def finite(self) -> float:
        """An upper bound of the finite costs of one stage with its hop."""
        return sum(
            float(np.abs(part[np.isfinite(part)]).max(initial=0.0))
            for part in (self.segments, self.links)
        )

    def between(self, sources: Any, targets: Any) -> Floats:
        """[..., block, length - 1]: stages on the sources, with hops to the targets."""
        sources, targets = np.broadcast_arrays(sources, targets)
        found: Floats = self.segments[sources] + self.links[sources, targets][..., None, None]
        return found

    def anywhere(self) -> Floats:
        """[device, length - 1]: the least cost of so many blocks, wherever they and the hop are."""
        found = self.segments.min(1) + self.links.min(1)[:, None]
        least: Floats = np.minimum(found, self.ends.min(2))
        return least

    def at(self, k: int) -> Floats:
        """[device, length - 1, next device]: stages from block ``k`` on, but not the last one."""
        found: Floats = self.segments[:, k, :, None] + self.links[:, None, :]
        return found

    def of(self, k: int, device: int) -> Floats:
        """[length - 1, next device]: the rows of ``at`` for one device."""
        found: Floats = self.segments[device, k, :, None] + self.links[device]
        return found

    def to_go(self, fixed: Floats, sink: Floats) -> Floats:
        """[device, block]: the least cost from entering there to the end.

        ``sink`` [device, length - 1] is the cost of last stages, ``fixed`` [device] of each entry.
        """
        devices, blocks, longest = self.segments.shape
        found = np.full((devices, blocks + 1 + longest), np.inf)
        beyond = np.full((devices, blocks + 1 + longest), np.inf)
        for k in reversed(range(blocks)):
            ways = self.segments[:, k] + beyond[:, k + 1 : k + 1 + longest]
            found[:, k] = ways.min(1)
            if blocks - k <= longest:
                found[:, k] = np.minimum(found[:, k], sink[:, blocks - k - 1])
            found[:, k] += fixed
            beyond[:, k] = (self.links + found[:, k]).min(1)
        return found

    def through(self, priced: Priced) -> Floats:
        """[device, block, length - 1]: the least cost of a walk with that stage, less the constant.

        No plan with the stage is better. ``priced`` is a relaxation with these costs.
        """
        devices, blocks, longest = self.segments.shape
        found = np.full(self.segments.shape, np.inf)
        behind = np.full((devices, blocks + longest), np.inf)
        entered = priced.enter
        for k in range(blocks):
            if k:
                entered = (behind[:, k, None] + self.links).min(0)
            until = (entered + priced.fixed)[:, None] + self.segments[:, k]
            reached = behind[:, k + 1 : k + 1 + longest]
            np.minimum(reached, until, out=reached)
            found[:, k] = until
            if (left := blocks - k) <= longest:
                found[:, k, left - 1] = entered + priced.fixed + priced.sink[:, left - 1]
        ahead = np.full((devices, blocks + longest), np.inf)
        for k in range(1, blocks):
            ahead[:, k] = (self.links + priced.to_go[:, k]).min(1)
        ahead[:, blocks] = 0.0
        firsts, lengths = np.indices((blocks, longest))
        found += ahead[:, firsts + lengths + 1]
        found -= priced.constant
        return found


class Free(Separate):
    """Costs without hops, which lead anywhere: quick to price on hundreds of devices."""

    def __init__(self, segments: Floats) -> None:
        nothing = np.zeros((len(segments), len(segments)))
        super().__init__(segments, nothing, nothing)

    def to_go(self, fixed: Floats, sink: Floats) -> Floats:
        """[device, block]: the least cost from entering there to the end, like ``Separate``."""
        devices, blocks, longest = self.segments.shape
        found = np.full((devices, blocks + 1 + longest), np.inf)
        beyond = np.full(blocks + 1 + longest, np.inf)
        for k in reversed(range(blocks)):
            found[:, k] = (self.segments[:, k] + beyond[k + 1 : k + 1 + longest]).min(1)
            if blocks - k <= longest:
                found[:, k] = np.minimum(found[:, k], sink[:, blocks - k - 1])
            found[:, k] += fixed
            beyond[k] = found[:, k].min()
        return found


@dataclass(frozen=True, slots=True)
class Priced:
    """A relaxation: walks may come back to a device, and pay ``fixed`` each time they enter it.

    ``enter`` [device]: price of beginning with it.
    ``sink`` [device, length - 1]: the last stage with the way back and its refund.
    ``constant``: taken off every walk.
    ``to_go`` [device, block]: the least cost from entering there to the end.
    """

    arcs: Joint | Separate
    fixed: Floats
    enter: Floats
    sink: Floats
    constant: float
    to_go: Floats

    @property
    def bound(self) -> float:
        """The length of the shortest walk, less the constant: a lower bound of all walks."""
        return float((self.enter + self.to_go[:, 0]).min()) - self.constant

    def uses(self, members: Mask) -> Floats:
        """The subgradient of the bound by the prices, from the shortest walk.

        First how often the walk uses each real device, less one. ``members`` says which real
        devices each device is. Then for each device 1 if the walk begins there, less 1 if it
        returns there.
        """
        devices, longest = self.sink.shape
        blocks = self.to_go.shape[1] - 1 - longest
        rows = members.shape[1]
        found = np.concatenate([np.full(rows, -1.0), np.zeros(devices)])
        device, k = int((self.enter + self.to_go[:, 0]).argmin()), 0
        found[rows + device] += 1
        while True:
            found[:rows] += members[device]
            ways = self.arcs.of(k, device) + self.to_go[:, k + 1 : k + 1 + longest].T
            least = int(ways.argmin())
            length = blocks - k
            if length <= longest and self.sink[device, length - 1] <= ways.flat[least]:
                back = self.arcs.ends[device, length - 1] - self.enter
                found[rows + int(back.argmin())] -= 1
                return found
            more, device = divmod(least, devices)
            k += more + 1


class Pricer:
    """Finds the prices of devices for given costs, by subgradient steps.

    Prices are one vector: first of using each real device (>= 0), then of beginning with each
    device. Entering a team costs the prices of all its members. The price of a real device that
    every plan uses may be below 0.
    """

    def __init__(self, entry: Floats, deadline_s: float, members: Mask, needed: Any = ()) -> None:
        """``entry`` [device] is the cost of each entry without its price.

        ``members`` [device, real device] says which real devices each device is. ``needed`` are
        those that every plan uses.
        """
        self.entry = entry
        self.deadline_s = deadline_s
        self.members = members
        self.rows = members.shape[1]
        self.needed = needed
        self._weights = None if self._single() else members.astype(float)

    def _single(self) -> bool:
        """Whether each device is one real device, and they are in the same order."""
        devices = len(self.members)
        return self.rows == devices and bool((self.members == np.eye(devices, dtype=bool)).all())

    def nothing(self) -> Floats:
        """Prices of 0."""
        return np.zeros(self.rows + len(self.entry))

    def relaxation(self, arcs: Joint | Separate, constant: float, prices: Floats) -> Priced:
        """The relaxation at given prices."""
        using, beginning = prices[: self.rows], prices[self.rows :]
        fixed = self.entry + (using if self._weights is None else self._weights @ using)
        sink = (arcs.ends - beginning).min(2)
        paid = constant + float(using.sum())
        return Priced(arcs, fixed, beginning, sink, paid, arcs.to_go(fixed, sink))

    def counted(self, arcs: Joint | Separate) -> Floats:
        """Prices of using each real device, by how many blocks it can take at which cost.

        All devices together must take all blocks. If each block is worth w, a device is worth at
        most what its blocks are worth beyond their cost. That is its price. The w is taken whose
        prices bound plans best if it does not matter which blocks a device takes.
        """
        least = arcs.anywhere() + self.entry[:, None]
        lengths = np.arange(1, least.shape[1] + 1)
        alone = self.members.sum(1) == 1
        each = (least / lengths)[alone]
        each = each[np.isfinite(each) & (each > 0)]
        worths = np.geomspace(each.min(), 4 * each.max(), _WORTHS) if len(each) else np.ones(1)
        # [worth, device]
        gains = (worths[:, None, None] * lengths - least).max(2).clip(0.0)
        bounds = worths * arcs.blocks - gains[:, alone].sum(1)
        gain = gains[int(bounds.argmax())]
        prices: Floats = np.zeros(self.rows)
        np.maximum.at(prices, self.members[alone].argmax(1), gain[alone])
        for team in np.flatnonzero(~alone):
            members = self.members[team]
            missing = gain[team] - float(prices[members].sum())
            if missing > 0:
                prices[members] += missing / int(members.sum())
        return prices

    def price(
        self,
        arcs: Joint | Separate,
        constant: float,
        prices: Floats,
        *,
        target: float,
        reach: float,
        rounds: int,
    ) -> tuple[Priced, Floats]:
        """The best relaxation in so many ``rounds``, and its prices.

        It ends early if the bound reaches ``target``. ``reach`` is a guess of the largest bound.
        """
        counted = np.concatenate([self.counted(arcs), prices[self.rows :]])
        by_count = self.relaxation(arcs, constant, counted), counted
        best = self.relaxation(arcs, constant, prices), prices
        for start in (best, by_count) if prices.any() else (by_count, best):
            # A start that is worse than the steps before it leads to nothing better.
            if best[0].bound < target and start[0].bound >= best[0].bound:
                best = self._steps(start, constant, target=target, reach=reach, rounds=rounds)
        return best

    def _steps(
        self,
        start: tuple[Priced, Floats],
        constant: float,
        *,
        target: float,
        reach: float,
        rounds: int,
    ) -> tuple[Priced, Floats]:
        """The best relaxation of the steps from ``start`` on, as ``price`` describes them."""
        priced, prices = best = start
        arcs = priced.arcs
        share, stalled = 0.3, 0
        slope: Any = np.zeros(len(prices))
        bounded: Mask = np.arange(len(prices)) < self.rows
        bounded[np.asarray(self.needed, dtype=np.int64)] = False
        for turn in range(rounds):
            bound = priced.bound
            stalled += 1
            if bound > best[0].bound:
                if bound > best[0].bound + 1e-4 * abs(reach - bound):
                    stalled = 0
                best = (priced, prices)
            if stalled == 8:
                share, stalled = 0.6 * share, 0
            if best[0].bound >= target or bound == np.inf or now_s() > self.deadline_s:
                break
            uses = priced.uses(self.members)
            # An average over walks comes near the slope of a mixture that uses each device once.
            slope = uses if turn == 0 else 0.7 * slope + 0.3 * uses
            climb = np.where(bounded & (prices <= 0) & (slope < 0), 0.0, slope)
            norm = float(climb @ climb)
            if norm < 1e-9:
                break
            step = share * max(reach - bound, 1e-3 * abs(reach)) / norm
            moved = prices + step * climb
            prices = np.where(bounded, np.maximum(0.0, moved), moved)
            priced = self.relaxation(arcs, constant, prices)
        return best
