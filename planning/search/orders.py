"""Better orders of devices: takes some devices out of a walk, and puts in those that help most.

For a given order a dynamic program over blocks finds the best cuts between stages. It has the least
cost up to each block (from the front) and from each block on (from the back). With both tables one
more device is judged at every place at once. Each block without a device costs a large penalty, so
a walk may lack devices on the way to a better one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from planning.search.bounds import Joint, Separate
from planning.search.tables import Floats, Integers, Span
from planning.time_limit import now_s

_MOST_TAKEN_OUT = 3
_MOST_TRIED = 48
"""The most devices tried in all places. If there are more, they are drawn at random."""

_STALLED = 250
"""The search ends after so many changes in a row that did not help."""


class Orders:
    """Orders of devices within one relaxation of the budget or of the time."""

    def __init__(
        self,
        relaxations: Sequence[tuple[Joint | Separate, float]],
        entry: Floats,
        until_s: float,
        random: np.random.Generator,
        conflicts: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """``relaxations`` are pairs of arcs and a constant, which is taken off every walk.

        The largest cost over all relaxations counts. ``entry`` [device] is the cost of a stage
        without its blocks and hops. ``conflicts`` [device, device]: no plan has both. None: no two.
        """
        self.arcs = [arcs for arcs, _ in relaxations]
        self.constant = np.array([constant for _, constant in relaxations])
        self.entry, self.until_s, self.random = entry, until_s, random
        alone = np.eye(len(entry), dtype=bool)
        self.conflicts = alone if conflicts is None else conflicts
        self.devices, self.longest = self.arcs[0].ends.shape[:2]
        self.blocks = self.arcs[0].blocks
        # Above the cost of any stage, so that leaving a block out never pays.
        finite = max(arcs.finite() for arcs in self.arcs)
        self.penalty = 10.0 * max(finite + float(entry.max()), 1e-12)
        self.ramp = self.penalty * np.arange(self.blocks + 1)
        # [block, length - 1]: first block of a stage of that length that ends at the block.
        end, self.length = np.indices((self.blocks + 1, self.longest))
        begin = end - self.length - 1
        self.valid, self.source = begin >= 0, np.clip(begin, 0, self.blocks - 1)

    def improve(self, devices: Sequence[int], target: float) -> tuple[list[Span] | None, float]:
        """Spans of the best order found, and its cost; None if it does not cover all blocks.

        Ends at ``target``, at the deadline, or after _STALLED changes without success.
        """
        best = list(devices)
        least = self._cost(best)
        stalled = 0
        while least > target and stalled < _STALLED and now_s() < self.until_s:
            order, cost = self._refilled(best, least)
            stalled += 1
            if cost < least - 1e-9 * abs(least):
                best, least, stalled = order, cost, 0
        # A block that is left out may cost less than the penalty, by rounding or the constant.
        return (self._spans(best) if least < self.penalty else None), least

    def _refilled(self, order: Sequence[int], least: float) -> tuple[list[int], float]:
        """The order with up to three devices taken out, and others put in, the best first."""
        count = int(self.random.integers(0, min(_MOST_TAKEN_OUT, len(order) - 1) + 1))
        if self.random.random() < 0.5:
            at = int(self.random.integers(len(order)))
            out = {(at + more) % len(order) for more in range(count)}
        else:
            out = set(self.random.choice(len(order), count, replace=False).tolist())
        found = [device for at, device in enumerate(order) if at not in out]
        cost = self._cost(found)
        for _ in range(count + 2):
            unused = np.flatnonzero(~self.conflicts[found].any(0))
            if not len(unused):
                break
            if len(unused) > _MOST_TRIED:
                unused = self.random.choice(unused, _MOST_TRIED, replace=False)
            ways = self._with_one_more(found, unused)
            place, which = divmod(int(ways.argmin()), len(unused))
            if ways[place, which] >= cost:
                break
            cost = float(ways[place, which])
            found.insert(place, int(unused[which]))
        return found, cost

    def _cost(self, order: Sequence[int]) -> float:
        return float((self._to_go(order)[0][:, 0] - self.constant).max())

    def _with_one_more(self, order: Sequence[int], unused: Integers) -> Floats:
        """[place, device]: the cost of the order with the device put in at the place."""
        found = np.full((len(self.arcs), len(order) + 1, len(unused)), math.inf)
        now, ahead = self._so_far(order), self._to_go(order)
        sources, targets = np.array(order[:-1], dtype=np.int64), np.array(order[1:], dtype=np.int64)
        if len(sources):
            so_far, to_go = np.stack(now[:-1], 1), np.stack(ahead[1:], 1)
            before = self._step(so_far[:, :, None], self._ways(sources[:, None], unused))
            after = self._step_back(to_go[:, :, None], self._ways(unused, targets[:, None]))
            found[:, 1:-1] = (before + after).min(-1)
        before = self._step(now[-1][:, None], self._ways(np.array(order[-1]), unused))
        found[:, -1] = (before + self._last(unused, order[0])).min(-1)
        # A new first device changes the way back, so all stages are computed anew.
        behind = self._last(order[-1], unused)
        for i, j in reversed(list(pairwise(order))):
            behind = self._step_back(behind, self._ways(np.array(i), np.array(j))[:, None])
        found[:, 0] = self._step_back(behind, self._ways(unused, np.array(order[0])))[..., 0]
        return np.asarray((found - self.constant[:, None, None]).max(0))

    def _ways(self, sources: Integers, targets: Integers) -> Floats:
        """[relaxation, ..., block, length - 1]: the cost of a stage with the hop to the next."""
        ways = np.stack([arcs.between(sources, targets) for arcs in self.arcs])
        ways += self.entry[sources][..., None, None]
        return np.minimum(ways, 1e3 * self.penalty, out=ways)

    def _last(self, device: int | Integers, first: int | Integers) -> Floats:
        """[..., block]: the least cost from there to the end, all on the last device."""
        ends = np.stack([arcs.ends[device, :, first] for arcs in self.arcs])
        ends += self.entry[device][..., None]
        found = np.full((*ends.shape[:-1], self.blocks + 1), math.inf)
        found[..., self.blocks - self.longest : self.blocks] = ends[..., ::-1]
        return self._skipping_back(found)

    def _so_far(self, order: Sequence[int]) -> list[Floats]:
        """Per stage, [relaxation, block]: the least cost up to the block where it begins."""
        found: list[Floats] = [np.tile(self.ramp, (len(self.arcs), 1))]
        for i, j in pairwise(order):
            found.append(self._step(found[-1], self._ways(np.array(i), np.array(j))))
        return found

    def _to_go(self, order: Sequence[int]) -> list[Floats]:
        """Per stage, [relaxation, block]: the least cost to the end, the stage included."""
        found = [self._last(order[-1], order[0])]
        for i, j in reversed(list(pairwise(order))):
            found.append(self._step_back(found[-1], self._ways(np.array(i), np.array(j))))
        return found[::-1]

    def _step(self, before: Floats, ways: Floats) -> Floats:
        """[..., block]: the least cost up to there, with one more stage after ``before``."""
        came = before[..., self.source] + ways[..., self.source, self.length]
        least = np.where(self.valid, came, math.inf).min(-1)
        return np.asarray(np.minimum.accumulate(least - self.ramp, axis=-1) + self.ramp)

    def _step_back(self, behind: Floats, ways: Floats) -> Floats:
        """[..., block]: the least cost from there to the end, with one more stage in front."""
        beyond = np.full((*behind.shape[:-1], self.blocks + 1 + self.longest), math.inf)
        beyond[..., : self.blocks + 1] = behind
        windows = sliding_window_view(beyond, self.longest, axis=-1)[..., 1 : self.blocks + 1, :]
        least = (ways + windows).min(-1)
        found = np.full((*least.shape[:-1], self.blocks + 1), math.inf)
        found[..., : self.blocks] = least
        return self._skipping_back(found)

    def _skipping_back(self, found: Floats) -> Floats:
        """The costs if blocks before the stage may be left out, at a penalty each."""
        least = np.minimum.accumulate((found + self.ramp)[..., ::-1], axis=-1)[..., ::-1]
        return np.asarray(least - self.ramp)

    def _spans(self, order: Sequence[int]) -> list[Span] | None:
        """The best cuts of an order, by the relaxation of largest cost; None if a block is left."""
        ahead = self._to_go(order)
        counts = int((ahead[0][:, 0] - self.constant).argmax())
        arcs = self.arcs[counts]
        spans: list[Span] = []
        first = 0
        for at, (i, j) in enumerate(pairwise(order)):
            ways = self._ways(np.array(i), np.array(j))[counts, first]
            end = first + 1 + np.arange(self.longest)
            behind = ahead[at + 1][counts, np.minimum(end, self.blocks)]
            cost = np.where(end <= self.blocks, ways + behind, math.inf)
            size = int(cost.argmin())
            if not np.isfinite(arcs.between(np.array(i), np.array(j))[first, size]):
                return None
            spans.append((i, first, first + size + 1))
            first += size + 1
            if first == self.blocks:
                return None
        left = self.blocks - first
        if left > self.longest or not np.isfinite(arcs.ends[order[-1], left - 1, order[0]]):
            return None
        return [*spans, (order[-1], first, self.blocks)]
