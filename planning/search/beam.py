"""Walks that enter each device at most once, grown block by block."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from planning.search.bounds import Priced
from planning.search.tables import Span, Tables
from planning.time_limit import now_s


@dataclass(frozen=True, slots=True)
class Walk:
    """A walk that enters no device twice. ``mixed``: others were dropped in its favour, which by
    the relaxations at hand are not shorter; ``bound`` holds for them too.
    """

    bound: float
    spans: list[Span]
    mixed: bool


def beam(
    tables: Tables,
    relaxations: Sequence[Priced],
    *,
    width: int,
    cutoff: float,
    deadline_s: float,
) -> tuple[list[Walk], float]:
    """Walks that enter no device twice, least bound first; and the least bound of what was left
    out for lack of space or time. Walks that are not below ``cutoff`` are left out too, and so are
    those that enter a device before its twin of a lower index.
    """
    ties = tables.ties
    devices, blocks, _ = tables.shape
    rank = range(len(relaxations))
    fixed = np.array([r.fixed for r in relaxations])
    constant = np.array([r.constant for r in relaxations])
    go = [r.to_go for r in relaxations]
    dropped = math.inf
    finished: list[Walk] = []
    # Of each label: its own device, the devices used, the first one, lengths, and its parent.
    own: list[Any] = []
    parents: list[Any] = []
    base = [0]
    waiting: list[list[tuple[Any, ...]]] = [[] for _ in range(blocks + 1)]
    start = np.flatnonzero(~(ties > 0).any(0))
    lengths = np.array([r.enter + r.fixed for r in relaxations]).T
    enter = np.array([r.enter for r in relaxations])
    bounds = (enter + [g[:, 0] for g in go]).T - constant
    first_used = np.zeros((devices, devices), dtype=bool)
    waiting[0].append(
        (
            start,
            start * 0 - 1,
            first_used[start],
            start,
            np.zeros(len(start), dtype=bool),
            lengths[start],
            bounds.max(1)[start],
        )
    )

    def trace(label: int, until: int) -> list[Span]:
        spans: list[Span] = []
        while label >= 0:
            k = bisect_right(base, label) - 1
            spans.append((int(own[k][label - base[k]]), k, until))
            label, until = int(parents[k][label - base[k]]), k
        return spans[::-1]

    for k in range(blocks):
        if not waiting[k]:
            own.append(np.empty(0, dtype=np.int64))
            parents.append(np.empty(0, dtype=np.int64))
            base.append(base[-1])
            continue
        device, parent, used, first, mixed, length, bound = (
            np.concatenate(parts) for parts in zip(*waiting[k], strict=True)
        )
        waiting[k] = []
        order = np.arange(len(bound))
        if now_s() > deadline_s:
            width = 1
        if len(bound) > 6 * width:
            order = np.argpartition(bound, 6 * width)
            dropped = min(dropped, float(bound[order[6 * width]]))
            order = np.sort(order[: 6 * width])
        order = order[np.argsort(bound[order], kind="stable")]
        device, parent, used, first, mixed, length, bound = (
            part[order] for part in (device, parent, used, first, mixed, length, bound)
        )
        used = used.copy()
        used[np.arange(len(device)), device] = True
        # Of labels that differ in nothing that lies ahead, one that is as short as the shortest.
        keys = np.concatenate([np.packbits(used, axis=1), device[:, None], first[:, None]], axis=1)
        _, index, group = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        shortest = np.full((len(index), length.shape[1]), math.inf)
        np.minimum.at(shortest, group.reshape(-1), length)
        several = np.bincount(group.reshape(-1)) > 1
        np.logical_or.at(several, group.reshape(-1), mixed)
        order = np.argsort(index, kind="stable")
        index, length, mixed = index[order], shortest[order], several[order]
        if len(index) > width:
            dropped = min(dropped, float(bound[index[width]]))
            index, length, mixed = index[:width], length[:width], mixed[:width]
        device, parent, used, first = device[index], parent[index], used[index], first[index]
        own.append(device)
        parents.append(parent)
        base.append(base[-1] + len(device))
        values = [length[:, r, None, None] + relaxations[r].arcs.at(k)[device] for r in rank]
        ahead = [go[r][:, k + 1 : k + 1 + tables.longest].T for r in rank]
        least = values[0] + ahead[0] - constant[0]
        for r in rank[1:]:
            np.maximum(least, values[r] + ahead[r] - constant[r], out=least)
        blocked = used | ((~used).astype(float) @ ties > 0)
        least[np.broadcast_to(blocked[:, None, :], least.shape)] = math.inf
        if blocks - k <= tables.longest:
            # The way back is known here: what the relaxations charge for beginning is refunded.
            ends = [
                r.arcs.ends[device, blocks - k - 1, first] - enter[at, first] - constant[at]
                for at, r in enumerate(relaxations)
            ]
            whole = (length + np.array(ends).T).max(1)
            for who in np.flatnonzero(whole < cutoff):
                spans = trace(base[k] + int(who), blocks)
                finished.append(Walk(float(whole[who]), spans, bool(mixed[who])))
        label, size, target = np.nonzero(least < cutoff)
        if len(label) > 20 * width:
            value = least[label, size, target]
            keep = np.argpartition(value, 20 * width)
            dropped = min(dropped, float(value[keep[20 * width]]))
            keep = np.sort(keep[: 20 * width])
            label, size, target = label[keep], size[keep], target[keep]
        grown = np.array([value[label, size, target] for value in values]).T + fixed.T[target]
        for more in np.unique(size):
            here = size == more
            who = label[here]
            waiting[k + int(more) + 1].append(
                (
                    target[here],
                    base[k] + who,
                    used[who],
                    first[who],
                    mixed[who],
                    grown[here],
                    least[who, more, target[here]],
                )
            )
    finished.sort(key=lambda walk: walk.bound)
    return finished, dropped
