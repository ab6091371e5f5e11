"""The integer program of several models: one program for each, with shared devices.

The models' programs (planning/exact/program.py) are parts of one program. More rows say that

    memory and storage of each device   sum over models of the taken part of its limit  <=  1
    time[m]  >=  the objective of m alone + half of rounds_mk x busy_ki, if a stage of m is on i
    time[m]  >=  busy_mi + sum over other models k of rounds_mk x busy_ki    if m uses device i

The objective is the mean of time[m] by shares. ``rounds_mk`` are numbers, from about how long the
models' requests take (planning/joint/contention.py). So the program is linear and exact for them.
A model with a fixed plan adds its bytes and busy seconds as numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pulp

from planning.exact.program import Choice, PlanProgram
from planning.joint.contention import WAITED, Use, at_pace, block_busy_s, call_busy_s, rounds
from planning.joint.problem import JointProblem, device_names, taken
from planning.plan import Plan
from planning.problem import BlockOption, PlanningProblem

Aim = Literal["best", "any", "memory"]
"""The quantity to minimise: the mean time, nothing, or the memory that devices lack."""

_SCALE = 1e3
# The models' programs prefer fewer stages by up to 5e-7 of their own objectives.
_TIE_BREAK = 5e-7


@dataclass(frozen=True, slots=True)
class Terms:
    """The variables of a model, or its figures if its plan is fixed."""

    program: PlanProgram | None
    plan: Plan | None
    use: Use | None

    def leading(self, real: int) -> Any:
        """1 if the real device, alone or as a lead, has a stage of the model, which is planned."""
        return None if self.program is None else self.program.leading(real)


class JointProgram:
    """The program for one variant of each model's problem, with its teams as devices.

    ``variants``: by model; a fixed model has none. ``uses``: the use of devices of fixed plans.
    ``paces_s``: about how long a request of each model takes while all are busy.
    ``cutoff``: plans with a larger mean time are left out. ``margin``: share of each limit that
    stays unused.
    """

    def __init__(
        self,
        problem: JointProblem,
        variants: Mapping[int, PlanningProblem],
        uses: Mapping[int, Use],
        paces_s: Sequence[float],
        *,
        aim: Aim = "best",
        cutoff: float = math.inf,
        margin: float = 0.0,
    ) -> None:
        self.problem, self.variants = problem, dict(variants)
        self._paces_s, self._margin = paces_s, margin
        self.program = pulp.LpProblem("plans", pulp.LpMinimize)
        self.parts = {
            m: PlanProgram(
                one,
                aim="memory" if aim == "memory" else "any",
                margin=margin,
                shared=self.program,
                prefix=f"m{m}_",
            )
            for m, one in variants.items()
        }
        self._terms = [
            Terms(self.parts.get(m), plan, uses.get(m)) for m, plan in enumerate(problem.fixed)
        ]
        self._over: dict[str, tuple[Any, int]] = {}
        excess = [self._limit(name, short=aim == "memory") for name in self._names]
        self._unit_s = 1.0
        if aim == "memory":
            self.program.setObjective(pulp.lpSum(excess))
        elif aim == "best":
            self._minimise_time(cutoff)
        else:
            self.program.setObjective(pulp.lpSum([]))

    @property
    def _names(self) -> tuple[str, ...]:
        return device_names(self.problem.problems[0])

    def bound(self, bound: float | None) -> float:
        """A lower bound of the mean time, from the solver's ``bound`` (None: none)."""
        proved = -math.inf if bound is None else bound - 2 * _TIE_BREAK * _SCALE
        return max(_SCALE * (1 - 2 * _TIE_BREAK), proved) * self._unit_s

    def choices(self, values: Mapping[str, float]) -> dict[int, Choice]:
        """The decisions of a solution, for each model that is planned."""
        return {m: part.choice(values) for m, part in self.parts.items()}

    def start(self, choices: Mapping[int, Choice], uses: Sequence[Use]) -> dict[str, float] | None:
        """A value for every variable, which mean ``choices``. None if the program lacks an option.

        ``uses``: the use of devices of each model with them.
        """
        found: dict[str, float] = {}
        for m, part in self.parts.items():
            own = part.values(choices[m])
            if own is None:
                return None
            found |= own
        times_s = at_pace(uses, self._paces_s)
        for m, variable in self._times.items():
            found[variable.name] = (times_s[m] + uses[m].load_s) / self._unit_s
        for (m, k, name), variable in self._waits.items():
            used = name in uses[m].leads
            met_s = uses[k].busy_s.get(name, 0.0) if used else 0.0
            found[variable.name] = met_s / self._most_busy_s(k, name)
        return found

    def excess(self, values: Mapping[str, float]) -> dict[str, float]:
        """Bytes of memory that devices lack in a solution for the aim ``memory``."""
        return {name: scale * values[over.name] for name, (over, scale) in self._over.items()}

    def _limit(self, name: str, *, short: bool) -> Any:
        """Add rows by which all models together keep a device's limits. Returns the excess."""
        excess: list[Any] = []
        for at, kind in enumerate(("memory", "storage")):
            parts: list[Any] = []
            scale = 1.0
            for m, terms in enumerate(self._terms):
                if terms.plan is not None:
                    parts.append(float(taken(terms.plan).get(name, (0, 0))[at]))
                elif terms.program is not None:
                    limit, part = self._taken(m, terms.program, name, at)
                    scale = max(scale, float(limit))
                    parts.append(part)
            if short and kind == "memory":
                over = self.program.add_variable(f"over_{len(self._over)}", 0)
                self._over[name] = over, int(scale)
                self.program += pulp.lpSum(parts) <= 1 + over
                excess.append(scale * 1e-6 * over)
            elif len(parts) > 1:
                self.program += pulp.lpSum(parts) <= 1 - self._margin
        return pulp.lpSum(excess)

    def _taken(self, m: int, program: PlanProgram, name: str, at: int) -> tuple[int, Any]:
        """The model's limit of memory (0) or storage (1) of a device, and the part it takes."""
        variant = self.variants[m]
        real = self._names.index(name)
        device = variant.devices[real]
        limit = device.storage_bytes if at else device.memory_bytes
        unit = 1.0 / max(limit, 1)

        def holder(v: int) -> int:
            names = [one.name for one in variant.devices[v].holders]
            return names.index(name)

        def of_stage(v: int) -> float:
            return 0.0 if at else unit * variant.devices[v].holders[holder(v)].stage_bytes

        def of_block(v: int, block: int, option: BlockOption) -> float:
            return unit * variant.taken(v, block, option)[holder(v)][at]

        return limit, program.total_on(real, of_stage, of_block)

    def _minimise_time(self, cutoff: float) -> None:
        """Add the time of each model, and the objective."""
        problem = self.problem
        least = [
            terms.program.least_s if terms.program else terms.use.value if terms.use else 0.0
            for terms in self._terms
        ]
        self._unit_s = (
            math.fsum(s * one for s, one in zip(problem.shares, least, strict=True)) / _SCALE
        ) or 1.0
        self._waits: dict[tuple[int, int, str], Any] = {}
        self._times = {m: self.program.add_variable(f"time_{m}", 0) for m in range(len(least))}
        for m, terms in enumerate(self._terms):
            time = self._unit_s * self._times[m]
            if terms.program is not None:
                cost_s = terms.program.cost_s() + self._waited(m)
                self.program += self._scaled(time) >= self._scaled(cost_s)
            elif terms.use is not None:
                waited = self._scaled(self._waited(m))
                self.program += self._scaled(time) >= terms.use.value / self._unit_s + waited
            for name in self._names:
                self._take_turns(m, name)
        total = pulp.lpSum(s * self._times[m] for m, s in enumerate(problem.shares))
        self.program.setObjective(total)
        if cutoff < math.inf:
            self.program += total <= cutoff / self._unit_s + 2 * _TIE_BREAK * _SCALE

    def _scaled(self, seconds: Any) -> Any:
        return seconds * (1 / self._unit_s)

    def _waited(self, m: int) -> Any:
        """Seconds that a request waits on average for other models' passes."""
        own = self._terms[m]
        if self.problem.problems[m].objective.kind in ("throughput", "energy"):
            return pulp.lpSum([])
        found: list[Any] = []
        for name in self._names:
            if own.use is not None and name not in own.use.leads:
                continue
            here = None if own.use is not None else own.leading(self._names.index(name))
            for k, terms in enumerate(self._terms):
                if k == m:
                    continue
                part = WAITED * rounds(self._paces_s[m], self._paces_s[k])
                if terms.use is not None:
                    seconds = part * terms.use.busy_s.get(name, 0.0)
                    found.append(seconds if here is None else seconds * here)
                elif here is None:
                    found.append(part * self._busy(k, name))
                elif most_s := part * self._most_busy_s(k, name):
                    wait = self.program.add_variable(f"wait_{m}_{k}_{len(self._waits)}", 0)
                    self._waits[m, k, name] = wait
                    met = part / most_s * self._busy(k, name)
                    self.program += wait >= met - (1 - here)
                    found.append(most_s * wait)
        return pulp.lpSum(found)

    def _take_turns(self, m: int, name: str) -> None:
        """Add the row of a model's time on a device with other models' passes in between."""
        own = self._terms[m]
        if own.use is not None and name not in own.use.busy_s:
            return
        passes: list[Any] = []
        most_s = 0.0
        for k, terms in enumerate(self._terms):
            if k == m:
                continue
            often = rounds(self._paces_s[m], self._paces_s[k])
            if terms.use is not None:
                passes.append(often * terms.use.busy_s.get(name, 0.0))
                most_s += often * terms.use.busy_s.get(name, 0.0)
            else:
                passes.append(often * self._busy(k, name))
                most_s += often * self._most_busy_s(k, name)
        if not most_s:
            return
        time = self._unit_s * self._times[m]
        busy: Any
        away: Any = 0.0
        if own.use is not None:
            busy = own.use.busy_s[name] + own.use.load_s
        else:
            busy = self._busy(m, name) + self._load(m)
            away = most_s * (1 - self.parts[m].using(self._names.index(name)))
        self.program += self._scaled(time) >= self._scaled(busy + pulp.lpSum(passes) - away)

    def _busy(self, m: int, name: str) -> Any:
        """Computing seconds of one request of a model on a device."""
        variant, program = self.variants[m], self.parts[m]
        return program.total_on(
            self._names.index(name),
            lambda v: call_busy_s(variant, v),
            lambda v, block, option: block_busy_s(variant, block, option),
        )

    def _load(self, m: int) -> Any:
        """The part of a model's objective for loading blocks."""
        variant, program = self.variants[m], self.parts[m]
        weight = variant.objective.migration_weight
        if not weight or variant.objective.kind == "energy":
            return pulp.lpSum([])

        def of_block(real: int) -> Callable[[int, int, BlockOption], float]:
            def load_s(v: int, block: int, option: BlockOption) -> float:
                # A team counts on its lead alone.
                if variant.lead(v) != real:
                    return 0.0
                return weight * variant.load_s(v, block, option.bits)

            return load_s

        return pulp.lpSum(
            program.total_on(real, lambda v: 0.0, of_block(real)) for real in variant.real
        )

    def _most_busy_s(self, m: int, name: str) -> float:
        """More computing seconds than any request of a model takes of a device."""
        variant = self.variants[m]
        real = self._names.index(name)
        most = 0.0
        for v, device in enumerate(variant.devices):
            if v != real and name not in (part.name for part in device.holders):
                continue
            seconds = [
                max((block_busy_s(variant, k, option) for option in row), default=0.0)
                for k, row in enumerate(device.options)
            ]
            most = max(most, call_busy_s(variant, v) + math.fsum(seconds))
        return most
