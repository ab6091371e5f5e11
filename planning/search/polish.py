"""The widths of a walk and of its hops, changed until every limit is kept exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from planning.search.tables import Floats, Integers, Span, Tables


class Polish:
    """Changes the widths of a walk until they keep every limit, then exchanges them for cheaper.

    With a limit of seconds per stage, loss takes the place of cost. It is lowered until the budget
    is kept.
    """

    def __init__(
        self,
        tables: Tables,
        spans: Sequence[Span],
        chosen: Integers,
        hops: Integers,
        *,
        seconds: Sequence[float] | None = None,
    ) -> None:
        """``chosen`` is the option of each block, ``hops`` the format of each hop.

        ``seconds`` limits the time of each stage's blocks. Formats then stay as they are.
        """
        self.blocks = len(chosen)
        self.timed = seconds is not None
        self.chosen: Integers = np.concatenate([chosen, hops])
        rows = np.arange(tables.shape[1])
        devices = [i for i, _, _ in spans]
        device = np.concatenate([np.full(end - first, i) for i, first, end in spans])
        self.stage = np.concatenate([np.full(e - f, n) for n, (_, f, e) in enumerate(spans)])
        sizes = [sizes for sizes, _ in tables.resources]
        sizes += [tables.decode] if self.timed else []
        cost = np.where(np.isfinite(tables.cost), tables.loss, math.inf)
        figures = [cost if self.timed else tables.cost, tables.loss, *sizes]
        self.figures = np.stack([figure[device, rows] for figure in figures])
        # A hop is one more row of size 0, with its formats as options.
        options = self.figures.shape[2]
        more = np.zeros((len(figures), len(hops), max(options, len(tables.hop_bits))))
        more[0] = math.inf
        for row, (i, j) in enumerate(pairwise(devices)):
            for f in [hops[row]] if self.timed else range(len(tables.hop_bits)):
                more[1, row, f] = tables.hop_loss[f]
                more[0, row, f] = more[1, row, f] if self.timed else tables.hop[f, i, j]
        wide = np.zeros((len(figures), self.blocks, more.shape[2]))
        wide[0] = math.inf
        wide[:, :, :options] = self.figures
        self.figures = np.concatenate([wide, more], axis=1)
        self.stage = np.concatenate([self.stage, np.zeros(len(hops), dtype=self.stage.dtype)])
        self.budget = math.inf if tables.budget is None else tables.budget
        limits = [limit[devices] for _, limit in tables.resources]
        self.limits = np.array([*limits, *([seconds] if seconds is not None else [])], dtype=float)

    def run(self) -> tuple[Integers, Integers] | None:
        """Options per block and formats per hop; None if no changes were found that fit."""
        if not self._repair():
            return None
        for _ in range(100):
            if (self.timed and self._now()[2] >= 0) or not self._exchange():
                break
        if self._now()[2] < 0:
            return None
        return self.chosen[: self.blocks], self.chosen[self.blocks :]

    def _now(self) -> tuple[Floats, Floats, float]:
        """Figures of each change [figure, block, option], the room left, and the budget left."""
        rows = np.arange(len(self.chosen))
        used = self.figures[:, rows, self.chosen]
        room = self.limits.copy()
        for resource in range(len(room)):
            np.subtract.at(room[resource], self.stage, used[2 + resource])
        return self.figures - used[:, :, None], room, self.budget - math.fsum(used[1])

    def _repair(self) -> bool:
        """Change widths until the limits are kept, then the budget too; False if that fails.

        With seconds it keeps the limits alone.
        """
        units = np.maximum(self.limits.max(1), 1e-12)[:, None]
        for _ in range(4 * len(self.chosen)):
            change, room, left = self._now()
            over = np.minimum(room, 0.0)
            if (over >= 0).all() and (left >= 0 or self.timed):
                return True
            cost, loss, sizes = change[0], change[1], change[2:]
            if (over < 0).any():
                short = ((over < 0) / units)[:, self.stage]
                saved = -(np.where(short[..., None] > 0, sizes, 0.0) * short[..., None]).sum(0)
                price = cost if self.timed else cost + loss * self._mean_price()
            else:
                fits = (sizes <= room[:, self.stage, None]).all(0)
                saved, price = np.where(fits, -loss, 0.0), cost
            with np.errstate(invalid="ignore", divide="ignore"):
                ratio = np.where(np.isfinite(cost) & (saved > 0), price / saved, math.inf)
            block, option = divmod(int(ratio.argmin()), ratio.shape[1])
            if ratio[block, option] == math.inf:
                return False
            self.chosen[block] = option
        return False

    def _mean_price(self) -> float:
        cost, loss = self.figures[0], self.figures[1]
        spread = float(loss.max(1).sum() - loss.min(1).sum())
        finite = np.where(np.isfinite(cost), cost, 0.0)
        return float(finite.max(1).sum()) / spread if spread > 0 else 0.0

    def _exchange(self) -> bool:
        """Make the best change of one block or of two; False if none is cheaper."""
        change, room, left = self._now()
        blocks, options = change.shape[1:]
        block, option = np.divmod(np.arange(blocks * options), options)
        flat = change.reshape(len(change), -1)
        real = np.isfinite(flat[0]) & (option != self.chosen[block])
        moves = np.flatnonzero(real)
        # The last move changes nothing, so that a pair may be one change.
        cost, loss, *resources = (np.append(figure[moves], 0.0) for figure in flat)
        block, option = np.append(block[moves], -1), np.append(option[moves], 0)
        stage = np.append(self.stage[block[:-1]], -1)
        gain = cost[:, None] + cost
        same = stage[:, None] == stage
        possible = (gain < -1e-12 * abs(float(cost.sum()))) & (block[:, None] != block)
        if not self.timed:
            possible &= loss[:, None] + loss <= left
        for sizes, rest in zip(resources, room, strict=True):
            own = np.append(rest, 0.0)[stage]
            both = sizes[:, None] + np.where(same, sizes, 0.0)
            possible &= both <= own[:, None]
            possible &= own >= both.T
        if not possible.any():
            return False
        first, second = divmod(int(np.where(possible, gain, math.inf).argmin()), len(cost))
        for one in (first, second):
            if block[one] >= 0:
                self.chosen[block[one]] = option[one]
        return True
