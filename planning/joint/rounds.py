"""Plans of several models by planning one model at a time beside the others.

It needs no program of all models, so it works for problems of any size. It proves nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from planning.exact.solver import SolverName
from planning.joint.plan import JointPlan, assess_joint, fits_together
from planning.joint.problem import JointProblem, replanned
from planning.plan import Plan, PlanError, Proof
from planning.planner import solve
from planning.problem import PlanningProblem
from planning.time_limit import now_s

_MOST_ORDERS = 6
_MOST_ROUNDS = 6
_BETTER = 1e-6


def in_turn(
    problem: JointProblem,
    order: Sequence[int],
    *,
    time_limit_s: float,
    solver: SolverName | None = None,
) -> JointPlan | None:
    """Each model planned with what those before it in ``order`` leave; None if one has no plan.

    This is what loading one model after the other gives.
    """
    plans = dict(_fixed(problem))
    until_s = now_s() + time_limit_s
    for at, m in enumerate(order):
        share_s = (until_s - now_s()) / (len(order) - at)
        plan = _plan(problem, m, problem.left(m, plans.values()), share_s, solver)
        if plan is None:
            return None
        plans[m] = plan
    return _together(problem, plans)


class Rounds:
    """Plans all models one at a time, until nothing gets better or time ends."""

    def __init__(
        self,
        problem: JointProblem,
        alone: Sequence[Plan],
        *,
        deadline_s: float,
        solver: SolverName | None = None,
    ) -> None:
        self.problem, self.alone = problem, tuple(alone)
        self.deadline_s, self.solver = deadline_s, solver
        self._needs = {m: _least_bytes(problem.problems[m]) for m in problem.free}

    def best(self) -> JointPlan | None:
        """The best plans found; None if none fit together."""
        best: JointPlan | None = None
        # Half the time is for first plans.
        middle_s = now_s() + 0.5 * self._left_s()
        for start in self._starts(middle_s):
            if start is not None and (best is None or start.value < best.value):
                best = start
            if best is not None and now_s() > middle_s:
                break
        for _ in range(_MOST_ROUNDS):
            if best is None or len(self.problem.names) < 2:
                break
            better = self._round(best)
            if better.value > best.value * (1 - _BETTER):
                return better
            best = better
        return best

    def _left_s(self) -> float:
        return max(0.0, self.deadline_s - now_s())

    def _starts(self, until_s: float) -> Iterator[JointPlan | None]:
        """First plans: each model as if alone, apart, with parts of all memory, and in turn."""
        free = self.problem.free
        yield self._if_fitting(dict(enumerate(self.alone)))
        yield self._all(self._apart(), until_s)
        for order in itertools.islice(itertools.permutations(free), _MOST_ORDERS):
            yield in_turn(
                self.problem,
                order,
                time_limit_s=max(0.1, (until_s - now_s()) / 3),
                solver=self.solver,
            )
        yield self._all(self._in_parts(), until_s)

    def _round(self, best: JointPlan) -> JointPlan:
        """Plan each model again beside the others, where that makes all of them faster."""
        for at, m in enumerate(self.problem.free):
            others = {k: plan for k, plan in enumerate(best.plans) if k != m}
            left = self.problem.left(m, others.values())
            used = {name for plan in others.values() for s in plan.stages for name in s.devices}
            for changed in (left, _without(left, used)):
                if changed is None or not self._left_s():
                    continue
                share_s = self._left_s() / (2 * (len(self.problem.free) - at))
                plan = _plan(self.problem, m, changed, share_s, self.solver)
                found = None if plan is None else self._if_fitting({**others, m: plan})
                if found is not None and found.value < best.value:
                    best = found
        return best

    def _all(self, changed: dict[int, PlanningProblem], until_s: float) -> JointPlan | None:
        """A plan of each changed problem; None if one has none."""
        plans = dict(_fixed(self.problem))
        for at, (m, one) in enumerate(changed.items()):
            share_s = max(0.1, (until_s - now_s()) / (3 * (len(changed) - at)))
            plan = _plan(self.problem, m, one, share_s, self.solver)
            if plan is None:
                return None
            plans[m] = plan
        return self._if_fitting(plans)

    def _if_fitting(self, plans: dict[int, Plan]) -> JointPlan | None:
        return _together(self.problem, plans) if fits_together(list(plans.values())) else None

    def _apart(self) -> dict[int, PlanningProblem]:
        """Each model on devices of its own, by what it needs at least."""
        fixed = [plan for _, plan in _fixed(self.problem)]
        problems = {m: self.problem.left(m, fixed) for m in self.problem.free}
        given: dict[int, set[str]] = {m: set() for m in problems}
        room = dict.fromkeys(problems, 0.0)
        some = next(iter(problems.values()), None)
        devices = [] if some is None else [some.devices[i] for i in some.real]
        for device in sorted(devices, key=lambda one: (-one.memory_bytes, one.name)):
            m = min(problems, key=lambda k: room[k] / max(self._needs[k], 1))
            given[m].add(device.name)
            room[m] += device.memory_bytes
        found = {}
        for m, one in problems.items():
            others = {name for k, names in given.items() if k != m for name in names}
            kept = _without(one, others)
            if kept is None:
                return {m: replace(one, devices=()) for m, one in problems.items()}
            found[m] = kept
        return found

    def _in_parts(self) -> dict[int, PlanningProblem]:
        """Each model with a part of every device, by what it needs at least."""
        fixed = [plan for _, plan in _fixed(self.problem)]
        total = math.fsum(self._needs.values()) or 1.0
        return {
            m: _with_part(self.problem.left(m, fixed), self._needs[m] / total)
            for m in self.problem.free
        }


def _fixed(problem: JointProblem) -> Iterable[tuple[int, Plan]]:
    return [(m, plan) for m, plan in enumerate(problem.fixed) if plan is not None]


def _together(problem: JointProblem, plans: dict[int, Plan]) -> JointPlan:
    ordered = [plans[m] for m in range(len(problem.names))]
    return assess_joint(problem, ordered, Proof("search", 0.0, 0.0))


def _plan(
    problem: JointProblem,
    m: int,
    changed: PlanningProblem,
    time_limit_s: float,
    solver: SolverName | None,
) -> Plan | None:
    """A plan of a changed problem, with the figures of the model's own; None without a plan."""
    if not changed.devices:
        return None
    try:
        plan = solve(changed, time_limit_s=max(time_limit_s, 0.1), solver=solver, advise=False)
        return replanned(problem.problems[m], plan)
    except PlanError:
        return None


def _without(problem: PlanningProblem, names: set[str]) -> PlanningProblem | None:
    """The problem without some devices; None if it needs one of them, or none is left."""
    some = {i for i in problem.real if problem.devices[i].name in names}
    needed = {*problem.pins.values(), *(i for team in problem.teams for i in team)}
    if some & needed or len(some | problem.excluded) == len(problem.real):
        return None
    return replace(problem, excluded=problem.excluded | some)


def _with_part(problem: PlanningProblem, part: float) -> PlanningProblem:
    devices = tuple(
        replace(
            device,
            memory_bytes=math.floor(part * device.memory_bytes),
            storage_bytes=math.floor(part * device.storage_bytes),
        )
        for device in problem.devices
    )
    return replace(problem, devices=devices)


def _least_bytes(problem: PlanningProblem) -> float:
    """About the least memory of all blocks of a model."""
    total = 0.0
    for block in range(problem.spec.block_count):
        sizes = [
            option.executed_bytes + problem.kv_bytes[block]
            for i in problem.real
            for option in problem.devices[i].options[block]
            if option.bits in problem.bits
        ]
        total += min(sizes, default=0)
    return total
