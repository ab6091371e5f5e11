"""The teams among which a plan is looked for, with the shares of their members.

Any set of devices could share layers, in any shares. Here are those that may pay: each member makes
the team faster than if it worked after the others with the same part of the model. Twins, which
are devices that can be exchanged, are taken in their order. So of sets that differ in twins alone,
those remain in which the twins of each kind are a run.

With many kinds of devices not all sets are tried. Then devices are clustered by their links, and
runs of devices of a cluster, sorted by speed, are the candidates. In all there are at most
MOST_TEAMS teams. Plans are optimal among plans with these teams.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, product, zip_longest

from model.share import Share, mlp_units, most_members, share_steps
from planning.problem import BlockOption, PlanningProblem
from planning.teams import (
    crowding,
    fractions,
    heads_part,
    make,
    refused,
    share_s,
    sharing,
    sum_s,
    sum_widths,
)
from planning.twins import twin_sets

MOST_TEAMS = 96
"""Teams of a problem, each with one division of the layers."""

MOST_MEMBERS = 16

_ALL_SETS = 512
"""With more sets than this only runs of devices are tried."""

_WORTH = 0.02
"""Part of a layer's time that 8-bit sums must save, to be tried beside wider ones."""

Kind = tuple[int, ...]
"""Devices that are twins, in order."""


def with_teams(problem: PlanningProblem) -> PlanningProblem:
    """The problem with all candidate teams as further devices; the same if there are none."""
    if len(problem.real) < len(problem.devices):
        return problem
    teams = _Candidates(problem).teams() if sharing(problem) else []
    if not teams:
        return problem
    made = tuple(make(problem, one.members, one.shares, one.sum_bits) for one in teams)
    return replace(problem, devices=(*problem.devices, *made))


def division(problem: PlanningProblem, members: Sequence[int]) -> Candidate | None:
    """The division of the layers over any devices by their speed, whether it pays or not.

    None if they cannot share layers (``teams.refused``), or have no width in common.
    """
    if refused(problem, members) is not None:
        return None
    finder = _Candidates(problem)
    found = finder._divisions(finder._lead_first(members), fast_only=True)
    return min(found, key=lambda one: one.layer_s, default=None)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A team to make. ``layer_s``: seconds of one row in a layer. ``gain``: its factor."""

    members: tuple[int, ...]
    shares: tuple[Share, ...]
    sum_bits: int
    layer_s: float
    gain: float


class _Candidates:
    """Finds the candidates of one problem."""

    def __init__(self, problem: PlanningProblem) -> None:
        self.problem = problem
        spec = problem.spec
        self.steps = share_steps(spec, problem.group_size)
        self.layer = spec.layers[0]
        self.by_heads = heads_part(self.layer)
        self.most_members = min(most_members(spec, problem.group_size), MOST_MEMBERS)
        named = {index for team in problem.teams for index in team}
        able = set(sharing(problem)) - named
        twins = [tuple(some) for some in twin_sets(problem) if able >= set(some)]
        self.kinds: list[Kind] = [some for some in twins if self._narrow(some[0])]
        self._known: dict[tuple[int, ...], list[Candidate]] = {}
        self._fastest_s: dict[tuple[tuple[int, ...], int], float] = {}
        self._sizes: dict[tuple[int, int], tuple[int, int, int, int]] = {}

    def teams(self) -> list[Candidate]:
        """All candidates: teams that the user named, then the others by their gain."""
        found = []
        for members in self.problem.teams:
            if refused(self.problem, members) is None:
                found += self._divisions(self._lead_first(members))
        sizes: dict[int, list[tuple[float, list[Candidate]]]] = {}
        for counts in self._counts():
            if not (first := self._paying(counts)):
                continue
            gain = max(one.gain for one in first)
            some = [one for run in self._runs(counts) for one in self._of(run)]
            sizes.setdefault(sum(counts.values()), []).append((gain, some))
        ranked = [sorted(some, key=lambda one: -one[0]) for _, some in sorted(sizes.items())]
        # The best of each number of members come first, then the second best, and so on. A whole
        # set of runs goes in or stays out, so that twins can still be exchanged.
        for some in filter(None, chain.from_iterable(zip_longest(*ranked))):
            if len(found) + len(some[1]) <= MOST_TEAMS:
                found += some[1]
        return found

    def _narrow(self, device: int) -> int | None:
        """The narrowest width at which the device runs a layer; None if it runs none."""
        widths = [o.bits for o in self.problem.devices[device].options[1]]
        return min((bits for bits in widths if bits in self.problem.bits), default=None)

    def _counts(self) -> Iterator[dict[int, int]]:
        """How many devices of each kind a team may have: kind -> count."""
        linked = {
            (a, b)
            for a, one in enumerate(self.kinds)
            for b, other in enumerate(self.kinds)
            if self._quick(one, other)
        }
        if math.prod(len(kind) + 1 for kind in self.kinds) <= _ALL_SETS:
            for sizes in product(*(range(len(kind) + 1) for kind in self.kinds)):
                counts = {kind: size for kind, size in enumerate(sizes) if size}
                if self._together(counts, linked):
                    yield counts
            return
        seen = set()
        for cluster in self._clusters(linked):
            for first in range(len(cluster)):
                for end in range(first + 2, min(len(cluster), first + self.most_members) + 1):
                    run = cluster[first:end]
                    counts = {kind: run.count(kind) for kind in run}
                    key = tuple(sorted(counts.items()))
                    if key not in seen and self._together(counts, linked):
                        seen.add(key)
                        yield counts

    def _together(self, counts: Mapping[int, int], linked: set[tuple[int, int]]) -> bool:
        if not 2 <= sum(counts.values()) <= self.most_members:
            return False
        return all((a, b) in linked for a in counts for b in counts if a != b or counts[a] > 1)

    def _quick(self, one: Kind, other: Kind) -> bool:
        """Whether two sums between devices of these kinds take less than a layer."""
        pair = one[:2] if one == other else (one[0], other[0])
        if len(pair) < 2 or pair not in self.problem.links or pair[::-1] not in self.problem.links:
            return False
        if not (width := self._width(pair)):
            return False
        narrowest = sum_widths(self.problem)[-1].bits
        sums_s = 2 * sum_s(self.problem, pair, 1, narrowest)
        return sums_s < max(self._alone_s(i, width) for i in pair)

    def _clusters(self, linked: set[tuple[int, int]]) -> list[list[int]]:
        """Devices, as their kinds, that all have quick links to each other, by speed."""
        clusters: list[list[int]] = []
        speed = [self._alone_s(kind[0], self._narrow(kind[0]) or 0) for kind in self.kinds]
        for kind in sorted(range(len(self.kinds)), key=lambda kind: speed[kind]):
            own = next(
                (c for c in clusters if all({(kind, o), (o, kind)} <= linked for o in c)), None
            )
            if own is None:
                clusters.append(own := [])
            own.append(kind)
        return [[kind for kind in c for _ in self.kinds[kind]] for c in clusters]

    def _runs(self, counts: Mapping[int, int]) -> Iterator[tuple[int, ...]]:
        """All sets with so many devices of each kind, in which those of a kind are a run."""
        choices = [
            [self.kinds[kind][at : at + size] for at in range(len(self.kinds[kind]) - size + 1)]
            for kind, size in counts.items()
        ]
        for runs in product(*choices):
            yield tuple(sorted(i for run in runs for i in run))

    def _paying(self, counts: Mapping[int, int]) -> list[Candidate]:
        """The divisions of the first set with these counts that pay; none if a member does not."""
        return self._of(next(self._runs(counts)))

    def _of(self, members: tuple[int, ...]) -> list[Candidate]:
        """The divisions of a set that pay."""
        if members not in self._known:
            found = []
            for one in self._divisions(self._lead_first(members)):
                if self._pays(one):
                    found.append(one)
            self._known[members] = found
        return self._known[members]

    def _pays(self, one: Candidate) -> bool:
        """Whether the team is faster than its members one after the other, with equal parts.

        Each member must also make it faster than a team of the others with the member after it.
        """
        if one.gain <= 1:
            return False
        if len(one.members) == 2:
            return True
        width = self._width(one.members)
        for i, share in zip(one.members, one.shares, strict=True):
            part = self._part(share)
            rest_s = self._fast_s(tuple(j for j in one.members if j != i), one.sum_bits)
            if one.layer_s >= (1 - part) * rest_s + part * self._alone_s(i, width):
                return False
        return True

    def _fast_s(self, members: tuple[int, ...], sum_bits: int) -> float:
        """Seconds of a layer in the fastest team of these members; inf if there is none."""
        key = (tuple(sorted(members)), sum_bits)
        if key not in self._fastest_s:
            some = self._divisions(self._lead_first(members), fast_only=True)
            seconds = (one.layer_s for one in some if one.sum_bits == sum_bits)
            self._fastest_s[key] = min(seconds, default=math.inf)
        return self._fastest_s[key]

    def _part(self, share: Share) -> float:
        part = fractions(self.problem, share)
        return self.by_heads * part.heads + (1 - self.by_heads) * part.columns

    def _width(self, members: Sequence[int]) -> int:
        """The narrowest width at which all members run a layer; 0 if there is none."""
        rows = [{o.bits for o in self.problem.devices[i].options[1]} for i in members]
        return min(set.intersection(*rows) & set(self.problem.bits), default=0)

    def _option(self, device: int, width: int) -> BlockOption:
        """How the device runs a layer at a width that it has."""
        return next(o for o in self.problem.devices[device].options[1] if o.bits == width)

    def _alone_s(self, device: int, width: int) -> float:
        option = self.problem.devices[device].option(1, width)
        return math.inf if option is None else option.decode_s

    def _lead_first(self, members: Sequence[int]) -> tuple[int, ...]:
        """The members in order, with the lead in front: who has the most memory for its stage.

        A device to which the embedding is pinned must lead.
        """
        devices, pinned = self.problem.devices, self.problem.pins.get(0)

        def rank(i: int) -> tuple[bool, int, int]:
            return i != pinned, devices[i].stage_bytes - devices[i].memory_bytes, i

        lead = min(members, key=rank)
        return (lead, *sorted(i for i in members if i != lead))

    def _divisions(self, members: tuple[int, ...], *, fast_only: bool = False) -> list[Candidate]:
        """The divisions of the layers over a team: by speed, by memory, and in equal parts.

        The latter two are left out where every member can hold the whole model by speed, and where
        they are no different.
        """
        if not (width := self._width(members)):
            return []
        lines = self._lines(members, width)
        whole = [1.0] * len(lines)
        by_speed = self._shares(lines, _balanced(lines, whole), whole)
        found = [by_speed]
        if not fast_only and not self._holds(members, by_speed, max(self.problem.bits)):
            if not self._holds(members, by_speed, width):
                room = self._room(members, width)
                found.append(self._shares(lines, _balanced(lines, room), room))
            found.append(self._shares(lines, [1 / len(lines)] * len(lines), whole))
        candidates = [
            self._candidate(members, shares, width, form.bits)
            for shares in dict.fromkeys(found)
            for form in sum_widths(self.problem)
        ]
        wide_s = {one.shares: one.layer_s for one in reversed(candidates)}
        return [
            one
            for one in candidates
            if one.sum_bits != 8 or one.layer_s < (1 - _WORTH) * wide_s[one.shares]
        ]

    def _lines(self, members: Sequence[int], width: int) -> list[tuple[float, float]]:
        """Per member (a, b): a share f of a layer takes about a + b f seconds."""
        low, high = 1 / len(members), min(1.0, 2 / len(members))
        if low == high:
            low = 0.5
        found = []
        for i in members:
            option = self._option(i, width)
            low_s, high_s = share_s(option, low)[0], share_s(option, high)[0]
            slope = max((high_s - low_s) / (high - low), 1e-3 * option.decode_s, 1e-12)
            found.append((low_s - slope * low, slope))
        return found

    def _room(self, members: Sequence[int], width: int) -> list[float]:
        """Per member, the part of all layers and the head that it has room for."""
        found = []
        for i in members:
            device = self.problem.devices[i]
            embedding, embedding_disk, need, disk = self._sizes_at(i, width)
            memory, storage = device.memory_bytes - device.stage_bytes, device.storage_bytes
            if i == members[0]:
                memory, storage = memory - embedding, storage - embedding_disk
            found.append(max(0.0, min(memory / max(need, 1), storage / max(disk, 1))))
        return found

    def _sizes_at(self, device: int, width: int) -> tuple[int, int, int, int]:
        """Bytes of memory and storage of the embedding, then of all other blocks, at a width.

        A block that the device does not run at the width counts at the first one that it has.
        """
        if (device, width) not in self._sizes:
            sizes = [0, 0, 0, 0]
            for block, options in enumerate(self.problem.devices[device].options):
                row = [o for o in options if o.bits in self.problem.bits]
                if row:
                    option = next((o for o in row if o.bits == width), row[0])
                    ((memory, storage),) = self.problem.taken(device, block, option)
                    sizes[2 * bool(block)] += memory
                    sizes[2 * bool(block) + 1] += storage
            self._sizes[device, width] = (sizes[0], sizes[1], sizes[2], sizes[3])
        return self._sizes[device, width]

    def _holds(self, members: Sequence[int], shares: Sequence[Share], width: int) -> bool:
        """Whether each member can hold its share of the whole model at a width."""
        rooms = self._room(members, width)
        return all(self._part(s) <= room for s, room in zip(shares, rooms, strict=True))

    def _shares(
        self, lines: Sequence[tuple[float, float]], parts: Sequence[float], room: Sequence[float]
    ) -> tuple[Share, ...]:
        """The shares with about these parts of the whole, in whole steps."""
        spans = [
            _spans(total, step, parts, lines, room)
            for total, step in (
                (self.layer.kv_heads, self.steps.kv_heads),
                (mlp_units(self.layer), self.steps.columns),
                (self.problem.spec.vocab, self.steps.vocab),
            )
        ]
        return tuple(Share(*own) for own in zip(*spans, strict=True))

    def _candidate(
        self, members: tuple[int, ...], shares: tuple[Share, ...], width: int, sum_bits: int
    ) -> Candidate:
        problem = self.problem
        slowest = [0.0, 0.0]
        after_s = 0.0
        for i, share in zip(members, shares, strict=True):
            option = self._option(i, width)
            part = fractions(problem, share)
            for half, at in enumerate((part.heads, part.columns)):
                slowest[half] = max(slowest[half], share_s(option, at)[0])
            after_s += self._part(share) * option.decode_s
        slowest[1] *= crowding(problem, shares, 1)
        layer_s = self.by_heads * slowest[0] + (1 - self.by_heads) * slowest[1]
        layer_s += 2 * sum_s(problem, members, 1, sum_bits)
        return Candidate(members, shares, sum_bits, layer_s, after_s / layer_s)


def _balanced(lines: Sequence[tuple[float, float]], room: Sequence[float]) -> list[float]:
    """Parts with a sum of 1 that all take as long, at most ``room`` each; else as room is."""
    if sum(room) <= 1:
        total = sum(room)
        return [part / total if total else 1 / len(room) for part in room]

    def parts(seconds: float) -> list[float]:
        return [
            min(max((seconds - a) / b, 0.0), most) for (a, b), most in zip(lines, room, strict=True)
        ]

    low, high = min(a for a, _ in lines), max(a + b for a, b in lines)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if sum(parts(middle)) >= 1 else (middle, high)
    return parts(high)


def _spans(
    total: int,
    step: int,
    parts: Sequence[float],
    lines: Sequence[tuple[float, float]],
    room: Sequence[float],
) -> list[tuple[int, int]]:
    """Half-open ranges of about these parts of the total, in steps, each with one at least.

    Steps left over go where there is room for them, and where they cost the least time.
    """
    pieces = -(-total // step)
    counts = [max(1, math.floor(part * pieces + 1e-9)) for part in parts]

    def seconds(member: int, count: int) -> float:
        a, b = lines[member]
        return a + b * count / pieces

    while sum(counts) > pieces:
        most = max(
            (m for m in range(len(counts)) if counts[m] > 1),
            key=lambda m: (seconds(m, counts[m]), m),
        )
        counts[most] -= 1
    while sum(counts) < pieces:
        least = min(
            range(len(counts)),
            key=lambda m: (counts[m] + 1 > room[m] * pieces, seconds(m, counts[m] + 1), m),
        )
        counts[least] += 1
    ends = [min(sum(counts[: m + 1]) * step, total) for m in range(len(counts))]
    return list(zip([0, *ends], ends, strict=False))
