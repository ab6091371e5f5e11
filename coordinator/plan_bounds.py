"""Lower bounds of all plans, by shortest walks.

A plan is a walk over (device, block) that enters each device at most once. Without that, and with
the quality budget priced instead of kept, a shortest walk is found by dynamic programming. Each
entry is charged a price per device; ``Pricer`` chooses these prices by averaged subgradient steps,
so that the shortest walk, less all prices once, is as long as can be: no plan is below it.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from coordinator.plan_tables import Floats, Tables


class Joint:
    """What a stage and the link that leaves it cost: [block, device, length - 1, next or sink]."""

    def __init__(self, costs: Floats) -> None:
        self.costs = costs

    def at(self, k: int) -> Floats:
        """Of all stages from block ``k`` on."""
        found: Floats = self.costs[k]
        return found

    def of(self, k: int, device: int) -> Floats:
        """Of one device."""
        found: Floats = self.costs[k, device]
        return found

    def to_go(self, fixed: Floats) -> Floats:
        """[device, block]: the least way from entering there to the end, the sink the last row."""
        blocks, devices, longest, _ = self.costs.shape
        found = np.full((devices + 1, blocks + 1 + longest), math.inf)
        found[devices, blocks] = 0.0
        for k in reversed(range(blocks)):
            ahead = found[:, k + 1 : k + 1 + longest].T
            found[:devices, k] = fixed + (self.costs[k] + ahead).min((1, 2))
        return found


class Separate:
    """The same where it is the sum of segments [device, block, length - 1] and ``links``.

    ``alone`` is what one stage of all blocks costs beside its segment, which has no link.
    """

    def __init__(self, segments: Floats, links: Floats, alone: Floats) -> None:
        self.segments = segments
        self.links = links
        _, blocks, longest = segments.shape
        self.whole = segments[:, 0, -1] + alone if longest == blocks else None

    def at(self, k: int) -> Floats:
        """Of all stages from block ``k`` on."""
        found = self.segments[:, k, :, None] + self.links[:, None, :]
        if self.whole is not None and k == 0:
            found[:, -1, -1] = self.whole
        return found

    def of(self, k: int, device: int) -> Floats:
        """Of one device."""
        found: Floats = self.segments[device, k, :, None] + self.links[device]
        if self.whole is not None and k == 0:
            found[-1, -1] = self.whole[device]
        return found

    def to_go(self, fixed: Floats) -> Floats:
        """[device, block]: the least way from entering there to the end, the sink the last row."""
        devices, blocks, longest = self.segments.shape
        found = np.full((devices + 1, blocks + 1 + longest), math.inf)
        found[devices, blocks] = 0.0
        beyond = np.full((devices, blocks + 1 + longest), math.inf)
        beyond[:, blocks] = self.links[:, devices]
        to_others = np.ascontiguousarray(self.links[:, :devices])
        for k in reversed(range(blocks)):
            ways = self.segments[:, k] + beyond[:, k + 1 : k + 1 + longest]
            if self.whole is not None and k == 0:
                ways[:, -1] = self.whole
            found[:devices, k] = fixed + ways.min(1)
            beyond[:, k] = (to_others + found[:devices, k]).min(1)
        return found


@dataclass(frozen=True, slots=True)
class Priced:
    """A relaxation: walks that may come back to a device, and pay ``fixed`` each time they enter.

    ``enter`` is what it costs to begin with a device, ``constant`` is taken off every walk.
    """

    arcs: Joint | Separate
    fixed: Floats
    enter: Floats
    constant: float
    to_go: Floats

    @property
    def bound(self) -> float:
        """What no walk is below, whether it comes back or not."""
        return float((self.enter + self.to_go[:-1, 0]).min()) - self.constant


def _uses(priced: Priced, blocks: int) -> npt.NDArray[np.int64]:
    """How often the shortest walk enters each device."""
    devices = len(priced.fixed)
    count = np.zeros(devices, dtype=np.int64)
    device, k = int((priced.enter + priced.to_go[:-1, 0]).argmin()), 0
    while device < devices:
        count[device] += 1
        arcs = priced.arcs.of(k, device)
        ways = arcs + priced.to_go[:, k + 1 : k + 1 + len(arcs)].T
        length, device = divmod(int(ways.argmin()), devices + 1)
        k += length + 1
    return count


class Pricer:
    """Finds the prices of devices for one setting of everything else, by subgradient steps."""

    def __init__(self, tables: Tables, deadline_s: float) -> None:
        self.tables = tables
        self.deadline_s = deadline_s

    def price(
        self,
        arcs: Joint | Separate,
        constant: float,
        lambdas: Floats,
        *,
        target: float,
        reach: float,
        rounds: int,
    ) -> tuple[Priced, Floats]:
        """The best relaxation in so many rounds, and its lambdas; early where above ``target``.

        ``reach`` is a guess of what the bound can be.
        """
        tables = self.tables
        _, blocks, _ = tables.shape

        def relaxation(lambdas: Floats) -> Priced:
            fixed = tables.entry + lambdas
            paid = constant + float(lambdas.sum())
            return Priced(arcs, fixed, tables.ahead, paid, arcs.to_go(fixed))

        priced = relaxation(lambdas)
        best = priced, lambdas
        share, stalled = 0.3, 0
        slope: Any = np.zeros(len(lambdas))
        for turn in range(rounds):
            bound = priced.bound
            stalled += 1
            if bound > best[0].bound:
                if bound > best[0].bound + 1e-4 * abs(reach - bound):
                    stalled = 0
                best = (priced, lambdas)
            if stalled == 8:
                share, stalled = 0.6 * share, 0
            if best[0].bound >= target or bound == math.inf or time.monotonic() > self.deadline_s:
                break
            uses = _uses(priced, blocks) - 1.0
            # Averaged over walks the slope nears that of a mixture that uses each device once.
            slope = uses if turn == 0 else 0.7 * slope + 0.3 * uses
            climb = np.where((lambdas <= 0) & (slope < 0), 0.0, slope)
            norm = float(climb @ climb)
            if norm < 1e-9:
                break
            step = share * max(reach - bound, 1e-3 * abs(reach)) / norm
            lambdas = np.maximum(0.0, lambdas + step * climb)
            priced = relaxation(lambdas)
        return best
