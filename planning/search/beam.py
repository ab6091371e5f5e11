"""Walks that enter each device at most once, grown block by block."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planning.search.bounds import Priced
from planning.search.tables import Floats, Integers, Mask, Span, Tables
from planning.time_limit import now_s


@dataclass(frozen=True, slots=True)
class Walk:
    """A walk that enters no device twice.

    ``mixed``: similar walks were dropped for it. By the relaxations at hand they are not shorter,
    and ``bound`` holds for them too.
    """

    bound: float
    spans: list[Span]
    mixed: bool


@dataclass(slots=True)
class _Labels:
    """Beginnings of walks, one a row. Each ends where its next stage begins.

    ``device``: device of the next stage.
    ``parent``: number of the label that was extended; -1 for none.
    ``used`` [row, real device]: whether a stage before it is on the real device.
    ``first``: device of the first stage.
    ``mixed``: whether labels were merged into this one.
    ``length`` [row, relaxation]: cost of the beginning.
    ``bound``: lower bound of all completions.
    """

    device: Integers
    parent: Integers
    used: Mask
    first: Integers
    mixed: Mask
    length: Floats
    bound: Floats

    @staticmethod
    def joined(parts: Sequence[_Labels]) -> _Labels:
        """All rows of several ``parts``."""
        columns = [[getattr(part, name) for part in parts] for name in _Labels.__slots__]
        return _Labels(*(np.concatenate(column) for column in columns))

    def rows(self, at: Integers) -> _Labels:
        """The rows with the numbers ``at``."""
        return _Labels(*(getattr(self, name)[at] for name in _Labels.__slots__))


def beam(
    tables: Tables,
    relaxations: Sequence[Priced],
    *,
    width: int,
    cutoff: float,
    deadline_s: float,
    merge: bool = True,
) -> tuple[list[Walk], float]:
    """Walks that enter no device twice, the least bound first, and a bound of the dropped walks.

    This is the least bound of all walks that were dropped for lack of space or time. Walks that are
    not below ``cutoff`` are left out, and walks that enter a device before its twin of a lower
    index. Without ``merge`` no walk is mixed.
    """
    return _Beam(tables, relaxations, width, cutoff, merge).run(deadline_s)


class _Beam:
    """The labels of one beam, block by block."""

    def __init__(
        self,
        tables: Tables,
        relaxations: Sequence[Priced],
        width: int,
        cutoff: float,
        merge: bool,
    ) -> None:
        self.tables, self.relaxations = tables, relaxations
        self.width, self.cutoff, self.merge = width, cutoff, merge
        self.fixed = np.array([r.fixed for r in relaxations])
        self.constant = np.array([r.constant for r in relaxations])
        self.enter = np.array([r.enter for r in relaxations])
        self.dropped = math.inf
        self.finished: list[Walk] = []
        # Devices and parents of the labels kept at each block. ``base`` numbers the first of them.
        self.own: list[Integers] = []
        self.parents: list[Integers] = []
        self.base = [0]
        self.waiting: list[list[_Labels]] = [[] for _ in range(tables.shape[1] + 1)]

    def run(self, deadline_s: float) -> tuple[list[Walk], float]:
        """Extend all labels until all blocks are placed."""
        self._begin()
        for k in range(self.tables.shape[1]):
            parts, self.waiting[k] = self.waiting[k], []
            if now_s() > deadline_s:
                self.width = 1
            if not parts:
                self._number(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))
                continue
            labels = self._shortlist(_Labels.joined(parts))
            labels = self._unlike(labels) if self.merge else labels
            self._number(labels.device, labels.parent)
            self._end(k, labels)
            self._extend(k, labels)
        self.finished.sort(key=lambda walk: walk.bound)
        return self.finished, self.dropped

    def _begin(self) -> None:
        """Add a label for each device that may be the first."""
        devices = self.tables.members.shape[1]
        start = np.flatnonzero(~(self.tables.ties > 0).any(0))
        ahead = np.array([r.to_go[:, 0] for r in self.relaxations])
        labels = _Labels(
            start,
            np.full(len(start), -1),
            np.zeros((len(start), devices), dtype=bool),
            start,
            np.zeros(len(start), dtype=bool),
            (self.enter + self.fixed).T[start],
            ((self.enter + ahead).T - self.constant).max(1)[start],
        )
        self.waiting[0].append(labels)

    def _number(self, device: Integers, parent: Integers) -> None:
        """Keep the columns by which a walk is traced back."""
        self.own.append(device)
        self.parents.append(parent)
        self.base.append(self.base[-1] + len(device))

    def _shortlist(self, labels: _Labels) -> _Labels:
        """The labels of the least bounds, in this order, with their own device as used."""
        order = np.arange(len(labels.bound))
        most = (6 if self.merge else 1) * self.width
        if len(order) > most:
            order = np.argpartition(labels.bound, most)
            self.dropped = min(self.dropped, float(labels.bound[order[most]]))
            order = np.sort(order[:most])
        labels = labels.rows(order[np.argsort(labels.bound[order], kind="stable")])
        labels.used = labels.used.copy()
        labels.used |= self.tables.members[labels.device]
        return labels

    def _unlike(self, labels: _Labels) -> _Labels:
        """One label of each set with the same used devices, device and first device.

        It gets the shortest length of its set, per relaxation. At most ``width`` labels stay.
        """
        used, device, first = labels.used, labels.device, labels.first
        keys = np.concatenate([np.packbits(used, axis=1), device[:, None], first[:, None]], axis=1)
        _, index, group = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        group = group.reshape(-1)
        shortest = np.full((len(index), labels.length.shape[1]), math.inf)
        np.minimum.at(shortest, group, labels.length)
        several = np.bincount(group) > 1
        np.logical_or.at(several, group, labels.mixed)
        order = np.argsort(index, kind="stable")
        if len(order) > self.width:
            bound = float(labels.bound[index[order[self.width]]])
            self.dropped = min(self.dropped, bound)
            order = order[: self.width]
        kept = labels.rows(index[order])
        kept.length, kept.mixed = shortest[order], several[order]
        return kept

    def _end(self, k: int, labels: _Labels) -> None:
        """Finish walks whose last stage begins at block ``k``.

        The way back is known here, so the price of beginning is refunded.
        """
        left = self.tables.shape[1] - k
        if left > self.tables.longest:
            return
        device, first = labels.device, labels.first
        ends = [
            r.arcs.ends[device, left - 1, first] - self.enter[at, first] - self.constant[at]
            for at, r in enumerate(self.relaxations)
        ]
        whole = (labels.length + np.array(ends).T).max(1)
        complete = labels.used[:, self.tables.needed].all(1)
        for who in np.flatnonzero((whole < self.cutoff) & complete):
            spans = self._trace(self.base[k] + int(who), left + k)
            self.finished.append(Walk(float(whole[who]), spans, bool(labels.mixed[who])))

    def _trace(self, label: int, until: int) -> list[Span]:
        spans: list[Span] = []
        while label >= 0:
            k = bisect_right(self.base, label) - 1
            spans.append((int(self.own[k][label - self.base[k]]), k, until))
            label, until = int(self.parents[k][label - self.base[k]]), k
        return spans[::-1]

    def _extend(self, k: int, labels: _Labels) -> None:
        """Add labels for all ways on from block ``k`` that may end below the cutoff."""
        longest, device = self.tables.longest, labels.device
        values, least = [], np.full((1, 1, 1), -math.inf)
        for at, r in enumerate(self.relaxations):
            values.append(labels.length[:, at, None, None] + r.arcs.at(k)[device])
            ahead = r.to_go[:, k + 1 : k + 1 + longest].T
            least = np.maximum(least, values[-1] + ahead - self.constant[at])
        ties, taken = self.tables.ties, labels.used
        if self.tables.teams:
            taken = taken.astype(float) @ self.tables.members.T.astype(float) > 0
        blocked = taken | ((~labels.used).astype(float) @ ties > 0)
        least[np.broadcast_to(blocked[:, None, :], least.shape)] = math.inf
        label, size, target = np.nonzero(least < self.cutoff)
        most = 20 * self.width
        if len(label) > most:
            value = least[label, size, target]
            keep = np.argpartition(value, most)
            self.dropped = min(self.dropped, float(value[keep[most]]))
            keep = np.sort(keep[:most])
            label, size, target = label[keep], size[keep], target[keep]
        grown = np.array([value[label, size, target] for value in values]).T + self.fixed.T[target]
        for more in np.unique(size):
            here = size == more
            who = label[here]
            self.waiting[k + int(more) + 1].append(
                _Labels(
                    target[here],
                    self.base[k] + who,
                    labels.used[who],
                    labels.first[who],
                    labels.mixed[who],
                    grown[here],
                    least[who, more, target[here]],
                )
            )
