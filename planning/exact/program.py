"""The integer program of a plan: contiguous runs of blocks on devices in an order it chooses.

Indices i and j are devices, or teams of devices. Hops lead from lead to lead: the devices that have
links. Index r is a stretch: a longest run of consecutive blocks that are
alike on every device. Index g is a group: all blocks, of any stretch, that are alike on device i.
Index f is a format of hops, and o an option of a group.

    used[i]     binary: i has a stage; of all i with the same real device at most one has
    first[i], last[i]  binary: lead i has the first stage, the last stage
    start[i,r]  binary: the stage of i starts in stretch r;  end[i,r]: it ends there
    hop[i,j,f]  binary: the stage of j follows the stage of i, which sends in format f
    back[i,j]   the token returns to the first stage, i, from the last, j
    left[i,j]   number of blocks behind the hop from i to j
    a[i,r]      whole number: blocks of stretch r on i
    n[i,g,o]    whole number: blocks of group g that i runs with option o

All N blocks are still to come before the first stage, and each stage takes its own from ``left``.
So the hops form one path through all used devices, and a stage begins with block N - left. This
block lies in the stretch that start names, and the stage's last block in the stretch that end
names. So a[i,r] is the number of blocks of stretch r in the stage. Blocks of one stretch and group
are interchangeable. They are counted, not placed, and the program stays exact. If all layers are
alike, there are a few counts per device. If no two are alike, as with a quality budget, there is
one count per block and width. ``choice`` places the blocks.

``slowest`` is one more variable where the slowest stage counts. For throughput it is at least every
stage's compute with the link that leaves it. For a prompt it is at least the time of a chunk in
every stage, and on every link.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pulp

from planning.plan import Proof, assess
from planning.problem import BlockOption, HopFormat, PlanningProblem
from planning.teams import incidence
from planning.usable import LOSS_ROUNDING, Usable

StageChoice = tuple[int, int, tuple[int, ...]]
"""(device index, first block, bits per block)"""


@dataclass(frozen=True, slots=True)
class Choice:
    """The decisions of a plan: its stages in order, and the bits of each hop."""

    stages: list[StageChoice]
    hop_bits: tuple[int, ...]


Aim = Literal["best", "memory", "storage", "memory and storage", "sensitivity", "any"]
"""The quantity to minimise. ``best``: the problem's objective. ``memory``, ``storage``: the excess
over these limits, which may then be broken. ``sensitivity``: the loss. ``any``: none, for any plan
that fits."""

# Solvers compare the objective with absolute tolerances around 1e-6. Its unit is chosen so that
# its lower bound has this value.
_OBJECTIVE_SCALE = 1e3
# Of two equally fast plans the one with fewer stages wins. All stages together cost less than 1e-6
# of the objective.
_STAGE_TIE_BREAK = 5e-7


@dataclass(frozen=True, slots=True)
class Group:
    """Interchangeable blocks on one device, and the options of each of them."""

    blocks: tuple[int, ...]
    options: tuple[BlockOption, ...]


def _figures(
    problem: PlanningProblem, device: int, block: int, option: BlockOption
) -> tuple[float, ...]:
    """All figures of an option that a plan is judged by; less is better."""
    return (
        option.decode_s,
        problem.block_cost(device, block, option),
        problem.turn_s(block, option) if problem.slowest_counts else 0.0,
        option.executed_bytes,
        *(size for sizes in problem.taken(device, block, option) for size in sizes),
        problem.loss(device, block, option.bits),
    )


class PlanProgram:
    """The program for one variant of a problem, with one size of a prompt's chunks.

    ``margin`` is the share of each limit that stays unused. Plans with an objective above
    ``cutoff`` are left out. ``twins`` are pairs of devices whose exchange changes nothing. In plans
    the first device of a pair comes before the second.

    ``shared`` is a program that holds several models (planning/joint). This one then adds its rows
    there, with ``prefix`` before the names of its variables, and sets no objective.
    """

    def __init__(
        self,
        problem: PlanningProblem,
        *,
        aim: Aim = "best",
        margin: float = 0.0,
        cutoff: float = math.inf,
        twins: Sequence[tuple[int, int]] = (),
        shared: Any = None,
        prefix: str = "",
    ) -> None:
        short = () if aim in ("best", "sensitivity", "any") else tuple(aim.split(" and "))
        self._problem = problem
        self._devices = range(len(problem.devices))
        self._members = incidence(problem)
        self._led: dict[int, list[int]] = {}
        for i in self._devices:
            self._led.setdefault(problem.lead(i), []).append(i)
        self._total = problem.spec.block_count
        self._slowest: Any = None
        self._permitted = Usable(problem, fitting=not short)
        self._find_alike()
        self.program = pulp.LpProblem("plan", pulp.LpMinimize) if shared is None else shared
        self._prefix = prefix
        self._place()
        self._order(twins)
        excess = self._limit(short, margin)
        self._unit_s = self._least_s() / _OBJECTIVE_SCALE
        sensitivity = self._budget(margin)
        if shared is not None:
            return
        if aim == "best":
            cost = self._cost_s() * (1 / self._unit_s)
            self.program.setObjective(cost)
            if cutoff < math.inf:
                tie_break = _STAGE_TIE_BREAK * _OBJECTIVE_SCALE
                self.program += cost <= cutoff / self._unit_s + tie_break
        else:
            self.program.setObjective(sensitivity if aim == "sensitivity" else excess)

    def bound(self, bound: float | None) -> float:
        """A lower bound of the objective in its own unit, from the solver's ``bound`` (None: none).

        It is never below the sum of all blocks, each on its cheapest device.
        """
        tie_break = _STAGE_TIE_BREAK * _OBJECTIVE_SCALE
        proved = -math.inf if bound is None else bound - tie_break
        return max(_OBJECTIVE_SCALE, proved) * self._unit_s

    def choice(self, values: Mapping[str, float]) -> Choice:
        """The decisions of a solution.

        A solution counts options within a group. The widest of them go to the blocks with the
        largest weight errors.
        """
        errors = self._problem.weight_errors

        def count(variable: Any) -> int:
            return round(values[variable.name])

        follows = {i: (j, bits) for (i, j, bits), hop in self._hop_at.items() if count(hop)}
        hop_bits = []
        found: list[StageChoice] = []
        lead = next((i for i in self._led if count(self._first[i])), None)
        while lead is not None and len(found) < len(self._devices):
            device = next(i for i in self._led[lead] if count(self._used[i]))
            begin = found[-1][1] + len(found[-1][2]) if found else 0
            size = sum(round(self._value(cell, values)) for cell in self._a[device])
            bits: dict[int, int] = {}
            for g, group in enumerate(self._groups[device]):
                mine = [k for k in group.blocks if begin <= k < begin + size]
                if len(group.options) == 1:
                    bits.update((k, group.options[0].bits) for k in mine)
                    continue
                widths = [
                    option.bits
                    for o, option in enumerate(group.options)
                    for _ in range(count(self._n[device, g, o]))
                ]
                mine.sort(key=lambda k: (-max(errors[k].values(), default=0.0), k))
                bits.update(zip(mine, sorted(widths, reverse=True), strict=True))
            found.append((device, begin, tuple(bits[k] for k in sorted(bits))))
            lead, bits_sent = follows.get(lead, (None, 0))
            hop_bits.append(bits_sent)
        return Choice(found, tuple(hop_bits[:-1]))

    def values(self, choice: Choice) -> dict[str, float] | None:
        """A value for every variable, which together mean ``choice``: the inverse of ``choice``.

        None if it uses an option or a hop that the program leaves out because others beat it.
        """
        own = (variable.name for variable in self.program.variables())
        found = dict.fromkeys((name for name in own if name.startswith(self._prefix)), 0.0)

        def add(variable: Any, amount: float = 1.0) -> None:
            found[variable.name] += amount

        order = [self._problem.lead(device) for device, *_ in choice.stages]
        ways = list(zip(order, order[1:], choice.hop_bits, strict=False))
        add(self._first[order[0]])
        add(self._last[order[-1]])
        if (back := self._back.get((order[0], order[-1]))) is None:
            return None
        add(back)
        for (i, first, bits), way in itertools.zip_longest(choice.stages, ways):
            end = first + len(bits)
            add(self._used[i])
            for r, stretch in enumerate(self._stretches):
                inside = len(range(max(first, stretch.start), min(end, stretch.stop)))
                if first in stretch:
                    add(self._start[i][r])
                if end - 1 in stretch:
                    add(self._end[i][r])
                if inside and len(stretch) > 1:
                    add(self._a[i][r], inside)
            for g, group in enumerate(self._groups[i]):
                widths = [option.bits for option in group.options]
                for k in group.blocks:
                    if first <= k < end and bits[k - first] not in widths:
                        return None
                    if first <= k < end and len(widths) > 1:
                        add(self._n[i, g, widths.index(bits[k - first])])
            if way is not None:
                if way not in self._hop_at:
                    return None
                add(self._hop_at[way])
                add(self._left[way[:2]], self._total - end)
        if self._slowest is not None:
            found[self._slowest.name] = self._slowest_of(choice) / self._unit_s
        return found

    def _slowest_of(self, choice: Choice) -> float:
        """Seconds of the slowest stage, as the objective counts it."""
        problem, slowest_s = self._problem, 0.0
        for at, (i, first, bits) in enumerate(choice.stages):
            seconds = [problem.call_turn_s(i)]
            for k, width in enumerate(bits, first):
                option = problem.devices[i].option(k, width)
                seconds.append(math.inf if option is None else problem.turn_s(k, option))
            if at + 1 < len(choice.stages):
                way_s = problem.hop_turn_s(i, choice.stages[at + 1][0], choice.hop_bits[at])
            else:
                way_s = problem.return_turn_s(i, choice.stages[0][0])
            stage_s = math.fsum(seconds)
            slowest_s = max(
                slowest_s, *((stage_s, way_s) if problem.link_apart else (stage_s + way_s,))
            )
        if problem.shared_by is not None:
            slowest_s = max(slowest_s, self._around_s(choice) / problem.shared_by)
        return slowest_s

    def _around_s(self, choice: Choice) -> float:
        """Seconds of one token through all stages and back."""
        plan = assess(self._problem, choice.stages, Proof("", 0.0, 0.0), choice.hop_bits)
        return plan.decode_s

    @property
    def least_s(self) -> float:
        """A lower bound of the objective, in its own unit."""
        return _OBJECTIVE_SCALE * self._unit_s

    def cost_s(self) -> Any:
        """The objective in its own unit, for a program that holds several models; called once."""
        return self._cost_s()

    def using(self, real: int) -> Any:
        """1 if a stage uses the real device, alone or in a team."""
        return self._using(real)

    def leading(self, real: int) -> Any:
        """1 if the real device has a stage, alone or as the lead of a team."""
        return self._leading[real]

    def total_on(
        self,
        real: int,
        of_stage: Callable[[int], float],
        of_block: Callable[[int, int, BlockOption], float],
    ) -> Any:
        """The sum over the stage that uses the real device and over the stage's blocks.

        ``of_stage`` gets the device or team of the stage, ``of_block`` also a block and its option.
        """
        terms = []
        for v in np.flatnonzero(self._members[:, real]).tolist():
            terms.append(of_stage(v) * self._used[v])
            terms += [of_block(v, block, o) * count for _, count, o, block in self._counts(v)]
        return pulp.lpSum(terms)

    def _find_alike(self) -> None:
        """Find the stretches of blocks that are alike on all devices, and each device's groups."""
        problem, blocks = self._problem, range(self._total)
        options = [[self._permitted.options(i, k) for k in blocks] for i in self._devices]

        def looks(i: int, k: int) -> tuple[Any, ...]:
            costs = tuple((o.bits, *_figures(problem, i, k, o)) for o in options[i][k])
            return costs, problem.kv_bytes[k]

        self._stretches: list[range] = []
        for k in blocks:
            # No team has the embedding alone, so that it ends a stretch.
            apart = k == 1 and len(self._led) < len(self._devices)
            if k and not apart and all(looks(i, k) == looks(i, k - 1) for i in self._devices):
                self._stretches[-1] = range(self._stretches[-1].start, k + 1)
            else:
                self._stretches.append(range(k, k + 1))
        self._groups: list[list[Group]] = []
        for i in self._devices:
            alike: dict[tuple[Any, ...], list[int]] = {}
            for k in blocks:
                if options[i][k]:
                    alike.setdefault(looks(i, k), []).append(k)
            groups = [Group(tuple(ks), options[i][ks[0]]) for ks in alike.values()]
            self._groups.append(groups)
        self._usable = [[bool(row) for row in rows] for rows in options]

    def _variable(self, name: str, *limits: Any) -> Any:
        return self.program.add_variable(self._prefix + name, *limits)

    def _binary(self, name: str) -> Any:
        return self._variable(name, 0, 1, pulp.LpInteger)

    def _place(self) -> None:
        """Add rows that place every block on one device, and count widths per group there."""
        program = self.program
        self._used = [self._binary(f"used_{i}") for i in self._devices]
        self._start: list[list[Any]] = []
        self._end: list[list[Any]] = []
        self._a: list[list[Any]] = []
        self._n: dict[tuple[int, int, int], Any] = {}
        beyond: list[list[Any]] = [[] for _ in self._stretches]
        for i in self._devices:
            start = [self._binary(f"start_{i}_{r}") for r in range(len(self._stretches))]
            end = [self._binary(f"end_{i}_{r}") for r in range(len(self._stretches))]
            row = []
            for r, stretch in enumerate(self._stretches):
                here = pulp.lpSum(start[: r + 1]) - pulp.lpSum(end[:r])
                beyond[r].append(here - end[r])
                size, cell = len(stretch), here
                if size > 1:
                    cell = self._variable(f"a_{i}_{r}", 0, size, pulp.LpInteger)
                    program += cell >= here
                    program += cell <= size * here
                program += beyond[r][i] >= 0
                program += here <= (self._used[i] if self._usable[i][stretch.start] else 0)
                row.append(cell)
            program += pulp.lpSum(start) == self._used[i]
            program += pulp.lpSum(end) == self._used[i]
            if self._problem.devices[i].team is not None:
                program += end[0] == 0
            self._start.append(start)
            self._end.append(end)
            self._a.append(row)
            for g, group in enumerate(self._groups[i]):
                if len(group.options) > 1:
                    for o in range(len(group.options)):
                        self._n[i, g, o] = self._variable(
                            f"n_{i}_{g}_{o}", 0, len(group.blocks), pulp.LpInteger
                        )
                    counted = pulp.lpSum(self._n[i, g, o] for o in range(len(group.options)))
                    program += counted == self._of_group(i, group)
        for r, stretch in enumerate(self._stretches):
            program += pulp.lpSum(self._a[i][r] for i in self._devices) == len(stretch)
            program += pulp.lpSum(beyond[r]) <= 1

    def _order(self, twins: Sequence[tuple[int, int]]) -> None:
        """Add rows for one path of hops through the used devices, in the order of their blocks."""
        program, total, problem = self.program, self._total, self._problem
        leads = [*self._led]
        forms = self._forms()
        pairs = [pair for pair, some in forms.items() if some]
        ways_back = [(i, j) for i in leads for j in leads if problem.return_s(j, i) < math.inf]
        self._first = {i: self._binary(f"first_{i}") for i in leads}
        last = self._last = {i: self._binary(f"last_{i}") for i in leads}
        self._hop_at = {
            (i, j, form.bits): self._binary(f"hop_{i}_{j}_{form.bits}")
            for i, j in pairs
            for form in forms[i, j]
        }
        self._hop = {
            (i, j): pulp.lpSum(self._hop_at[i, j, form.bits] for form in forms[i, j])
            for i, j in pairs
        }
        self._back = {(i, j): self._variable(f"back_{i}_{j}", 0, 1) for i, j in ways_back}
        self._left = {(i, j): self._variable(f"left_{i}_{j}", 0, total - 1) for i, j in pairs}
        self._leading = {i: self._sum(self._used[v] for v in led) for i, led in self._led.items()}
        left = self._left
        entered = {}
        program += pulp.lpSum(self._first.values()) == 1
        program += pulp.lpSum(last.values()) == 1
        for i in leads:
            used, first = self._leading[i], self._first[i]
            leaving = [key for key in pairs if key[0] == i]
            entering = [key for key in pairs if key[1] == i]
            program += pulp.lpSum(self._hop[key] for key in leaving) + last[i] == used
            program += pulp.lpSum(self._hop[key] for key in entering) + first == used
            program += pulp.lpSum(self._back[key] for key in ways_back if key[0] == i) == first
            program += pulp.lpSum(self._back[key] for key in ways_back if key[1] == i) == last[i]
            start, end = (
                [self._sum(flags[v][r] for v in self._led[i]) for r in range(len(self._stretches))]
                for flags in (self._start, self._end)
            )
            program += first <= start[0]
            program += last[i] <= end[-1]
            remaining = pulp.lpSum(left[key] for key in entering) + total * first
            entered[i] = remaining
            beyond = pulp.lpSum(left[key] for key in leaving)
            own = [cell for v in self._led[i] for cell in self._a[v]]
            program += remaining - beyond == pulp.lpSum(own)
            for position, flags in (
                (total * used - remaining, start),
                ((total - 1) * used - beyond, end),
            ):
                spans = list(zip(self._stretches, flags, strict=True))
                program += position >= pulp.lpSum(span[0] * flag for span, flag in spans)
                program += position <= pulp.lpSum(span[-1] * flag for span, flag in spans)
        self._once()
        shared = self._members.sum(0) > 1
        for i, j in twins:
            if shared[i] or shared[j]:
                program += self._using(i) >= self._using(j)
            else:
                program += entered[i] >= entered[j]
        self._follow(pairs)

    def _forms(self) -> dict[tuple[int, int], list[HopFormat]]:
        """The formats of each hop between leads whose loss has room in the budget."""
        problem = self._problem
        room = self._permitted.room + LOSS_ROUNDING * (problem.quality_budget or 0.0)
        return {
            (i, j): [
                form
                for form in problem.hop_choices(i, j)
                if problem.quality_budget is None or (form.sensitivity or 0.0) <= room
            ]
            for i in self._led
            for j in self._led
            if i != j
        }

    @staticmethod
    def _sum(variables: Iterable[Any]) -> Any:
        """The sum of variables; the variable itself if it is one."""
        some = list(variables)
        return some[0] if len(some) == 1 else pulp.lpSum(some)

    def _using(self, real: int) -> Any:
        """1 if a stage uses the real device, alone or in a team."""
        return self._sum(self._used[v] for v in np.flatnonzero(self._members[:, real]).tolist())

    def _once(self) -> None:
        """Add rows by which each real device is used once at most, and teams asked for are used."""
        for real in np.flatnonzero(self._members.sum(0) > 1).tolist():
            self.program += self._using(real) <= 1
        for team in self._problem.teams:
            self.program += self._using(team[0]) == 1

    def _follow(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Add rows that tie ``left`` to hops, and limit the number of stages.

        No two devices follow each other both ways.
        """
        program, problem, left, total = self.program, self._problem, self._left, self._total
        if problem.least_stages > 1:
            program += pulp.lpSum(self._used) >= problem.least_stages
        if problem.most_stages is not None:
            program += pulp.lpSum(self._used) <= problem.most_stages
        for i, j in pairs:
            program += left[i, j] >= self._hop[i, j]
            program += left[i, j] <= (total - 1) * self._hop[i, j]
            if i < j and (j, i) in self._hop:
                both = self._hop[i, j] + self._hop[j, i]
                program += both <= self._leading[i]
                program += both <= self._leading[j]

    def _limit(self, short: tuple[str, ...], margin: float) -> Any:
        """Add rows of memory and storage, in units of about the limit. Returns the total excess."""
        excess = []
        scale = max(sum(device.memory_bytes for device in self._problem.devices), 1)
        for i in self._devices:
            counts = self._counts(i)
            taken_by = [self._problem.taken(i, block, option) for *_, option, block in counts]
            for m, resource, limit, fixed in [
                (m, *resource)
                for m, own in enumerate(self._problem.devices[i].holders)
                for resource in (
                    ("memory", own.memory_bytes, own.stage_bytes),
                    ("storage", own.storage_bytes, 0),
                )
            ]:
                at = int(resource == "storage")
                sizes = [taken[m][at] for taken in taken_by]
                unit = max(limit, fixed, *sizes, 1)
                taken = fixed / unit * self._used[i] + pulp.lpSum(
                    size / unit * count for size, (_, count, *_) in zip(sizes, counts, strict=True)
                )
                if resource in short:
                    over = self._variable(f"short_{resource}_{i}_{m}", 0)
                    self.program += taken <= limit / unit * self._used[i] + over
                    excess.append(unit / scale * over)
                else:
                    self.program += taken <= (1 - margin) * limit / unit * self._used[i]
        return pulp.lpSum(excess)

    def _budget(self, margin: float) -> Any:
        """Add the row of the budget. Returns the losses above each block's least, in units of room.

        Without a budget, or with an infinite one, there is no row.
        """
        problem, spare = self._problem, self._permitted
        if problem.quality_budget is None:
            return pulp.lpSum([])
        terms = [
            (problem.hop_sensitivity(bits) or 0.0, hop) for (*_, bits), hop in self._hop_at.items()
        ]
        for i in self._devices:
            # Blocks that are alike here may differ elsewhere, and so in their least loss.
            bases = [max(spare.least[k] for k in group.blocks) for group in self._groups[i]]
            terms += [
                (problem.loss(i, block, option.bits) - bases[g], count)
                for g, count, option, block in self._counts(i)
            ]
            for base, group in zip(bases, self._groups[i], strict=True):
                terms += [
                    (base - spare.least[stretch.start], cell)
                    for cell, stretch in zip(self._a[i], self._stretches, strict=True)
                    if stretch.start in group.blocks
                ]
        if spare.room == math.inf:
            unit = max(loss for loss, _ in terms) or 1.0
            return pulp.lpSum(loss / unit * count for loss, count in terms if loss)
        unit = max(spare.room, LOSS_ROUNDING * problem.quality_budget) or 1.0
        total = pulp.lpSum(loss / unit * count for loss, count in terms if loss)
        self.program += total <= (1 - margin) * spare.room / unit
        return total

    def _cost_s(self) -> Any:
        """The problem's objective in its own unit, with the tie break between stages."""
        problem = self._problem
        tie_break_s = self._unit_s * _OBJECTIVE_SCALE * _STAGE_TIE_BREAK / self._members.shape[1]
        terms = []
        for i in self._devices:
            terms += [problem.block_cost(i, k, o) * count for _, count, o, k in self._counts(i)]
            more_s = tie_break_s * len(problem.devices[i].holders)
            terms.append((problem.call_cost(i) + more_s) * self._used[i])
        terms += [problem.hop_cost(*key) * hop for key, hop in self._hop_at.items()]
        terms += [problem.return_cost(j, i) * way for (i, j), way in self._back.items()]
        if problem.slowest_counts:
            terms.append(problem.slowest_counts * self._slowest_s())
        return pulp.lpSum(terms)

    def _slowest_s(self) -> Any:
        """Seconds of the slowest stage or link. Adds the variable and its rows."""
        problem = self._problem
        slowest = self._slowest = self._variable("slowest", 0)
        around: list[Any] = []
        for i, led in self._led.items():
            counts = [cell for v in led for cell in self._counts(v)]
            terms = [problem.turn_s(k, option) * count for _, count, option, k in counts]
            terms += [problem.call_turn_s(v) * self._used[v] for v in led]
            ways = [
                problem.hop_turn_s(*key) * hop for key, hop in self._hop_at.items() if key[0] == i
            ]
            ways += [
                problem.return_turn_s(last, first) * way
                for (first, last), way in self._back.items()
                if last == i
            ]
            around += [*ways, *(problem.devices[v].call_s * self._used[v] for v in led)]
            around += [option.decode_s * count for _, count, option, _ in counts]
            for busy in (terms, ways) if problem.link_apart else ([*terms, *ways],):
                self.program += slowest >= pulp.lpSum(busy) * (1 / self._unit_s)
        if problem.shared_by is not None:
            # Each sequence has one row at a time on its way round.
            shared = pulp.lpSum(around) * (1 / problem.shared_by)
            self.program += slowest >= shared * (1 / self._unit_s)
        return self._unit_s * slowest

    def _counts(self, device: int) -> list[tuple[int, Any, BlockOption, int]]:
        """(group, count, option, a block of the group) for each option of each group."""
        found = []
        for g, group in enumerate(self._groups[device]):
            for o, option in enumerate(group.options):
                alone = len(group.options) == 1
                count = self._of_group(device, group) if alone else self._n[device, g, o]
                found.append((g, count, option, group.blocks[0]))
        return found

    def _of_group(self, device: int, group: Group) -> Any:
        """The number of blocks of a group on the device."""
        members = set(group.blocks)
        return pulp.lpSum(
            cell
            for cell, stretch in zip(self._a[device], self._stretches, strict=True)
            if stretch.start in members
        )

    def _least_s(self) -> float:
        """A lower bound: each block on its cheapest device, and all stages in balance."""
        problem = self._problem
        cost_s = [math.inf] * self._total
        turn_s = [math.inf] * self._total
        for i, groups in enumerate(self._groups):
            for group in groups:
                for k in group.blocks:
                    cost = min(problem.block_cost(i, k, option) for option in group.options)
                    cost_s[k] = min(cost_s[k], cost)
                    turn_s[k] = min([turn_s[k], *(problem.turn_s(k, o) for o in group.options)])
        least_s = math.fsum(value for value in cost_s if value < math.inf)
        if problem.slowest_counts:
            known_s = math.fsum(value for value in turn_s if value < math.inf)
            least_s += problem.slowest_counts * known_s / max(1, self._members.shape[1])
        return least_s or 1.0

    @staticmethod
    def _value(cell: Any, values: Mapping[str, float]) -> float:
        """The value of a variable or of a sum of variables."""
        if isinstance(cell, pulp.LpVariable):
            return values[cell.name]
        return math.fsum(factor * values[item.name] for item, factor in cell.items())
