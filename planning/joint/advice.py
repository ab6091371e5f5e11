"""Says why several models do not fit together, and which changes would help. Each was tried."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

from planning import advice
from planning.candidates import with_teams
from planning.exact.solver import SolverError, SolverName, run
from planning.joint.problem import JointProblem
from planning.joint.program import JointProgram
from planning.joint.rounds import in_turn
from planning.plan import Advice, InfeasiblePlan
from planning.planner import writable
from planning.problem import PlanningProblem
from planning.time_limit import now_s

_LIMIT_MARGIN = 4e-6
_TRIAL_S = 5.0
_MB = 1_000_000


class JointInfeasible(InfeasiblePlan):
    """The models have no plans together. ``fitting`` names those of them that fit, by weight."""

    def __init__(self, message: str, found: Advice, fitting: tuple[str, ...]) -> None:
        super().__init__(message, found)
        self.fitting = fitting


def explain(
    problem: JointProblem, solver: SolverName | None, time_limit_s: float
) -> JointInfeasible:
    """The error for models that do not fit together. The numbers of its advice are rounded up."""
    trials = _Trials(now_s() + time_limit_s, solver)
    short = trials.shortage(problem)
    fitting = _fitting(problem, trials.possible)

    def possible(change: Callable[[PlanningProblem], PlanningProblem]) -> bool:
        return trials.possible(_changed(problem, change))

    found = Advice(
        memory_short_bytes=short,
        context_tokens=_enough_context(problem, possible),
        quality_budget=_enough_loss(problem, possible),
        more_devices=_enough_devices(problem, possible),
        whole_memory=_enough_memory(problem, possible),
        free_placement=_placement_hinders(problem, possible),
    )
    ways = _ways(problem, found, fitting)
    reason = "memory, storage or links are not enough for all of them"
    if short:
        parts = ", ".join(f"{name} {size / _MB:.1f} MB" for name, size in short)
        total = sum(size for _, size in short) / _MB
        reason = f"memory is short by {total:.1f} MB in all ({parts})"
    names = " and ".join(problem.names)
    message = f"{names} do not fit together: {reason}"
    return JointInfeasible(f"{message}: {', or '.join(ways)}" if ways else message, found, fitting)


class _Trials:
    """Says whether changed problems have plans, until a deadline."""

    def __init__(self, deadline_s: float, solver: SolverName | None) -> None:
        self.deadline_s, self.solver = deadline_s, solver

    def possible(self, problem: JointProblem) -> bool:
        """Whether plans are known to exist. False after the deadline."""
        left_s = min(_TRIAL_S, self.deadline_s - now_s())
        if left_s <= 0:
            return False
        program = self._program(problem, "any")
        if program is not None:
            status, _ = self._run(program, left_s)
            if status != "unknown":
                return status != "infeasible"
        orders = itertools.permutations(problem.free)
        return any(
            in_turn(problem, order, time_limit_s=left_s / 2, solver=self.solver) is not None
            for order in itertools.islice(orders, 2)
        )

    def shortage(self, problem: JointProblem) -> tuple[tuple[str, int], ...]:
        """Bytes of memory that devices lack for all models, the least sum; empty if not known."""
        program = self._program(problem, "memory")
        left_s = min(2 * _TRIAL_S, self.deadline_s - now_s())
        if program is None or left_s <= 0:
            return ()
        _, values = self._run(program, left_s)
        if not values:
            return ()
        found = program.excess(values)
        return tuple((name, _round_up(size)) for name, size in found.items() if size >= 1)

    def _program(self, problem: JointProblem, aim: str) -> JointProgram | None:
        fixed = [plan for plan in problem.fixed if plan is not None]
        full = {m: with_teams(problem.left(m, fixed)) for m in problem.free}
        if not all(map(writable, full.values())):
            return None
        paces = [1.0] * len(problem.names)
        if aim == "memory":
            return JointProgram(problem, full, {}, paces, aim="memory")
        return JointProgram(problem, full, {}, paces, aim="any", margin=_LIMIT_MARGIN)

    def _run(self, program: JointProgram, left_s: float) -> tuple[str, dict[str, float]]:
        try:
            outcome = run(program.program, time_limit_s=left_s, solver=self.solver, gap=0.02)
        except SolverError:
            return "unknown", {}
        return outcome.status, dict(outcome.values)


def _changed(
    problem: JointProblem, change: Callable[[PlanningProblem], PlanningProblem]
) -> JointProblem:
    return replace(problem, problems=tuple(change(one) for one in problem.problems))


def _fitting(problem: JointProblem, possible: Callable[[JointProblem], bool]) -> tuple[str, ...]:
    """The models that fit together, as many requests of them as possible."""
    stay = [m for m in range(len(problem.names)) if m not in problem.free]
    for count in range(len(problem.free) - 1, 0, -1):
        some = itertools.combinations(problem.free, count)
        for kept in sorted(some, key=lambda ms: -math.fsum(problem.weights[m] for m in ms)):
            if possible(problem.only(sorted([*stay, *kept]))):
                return tuple(problem.names[m] for m in sorted([*stay, *kept]))
    return ()


Possible = Callable[[Callable[[PlanningProblem], PlanningProblem]], bool]


def _enough_context(problem: JointProblem, possible: Possible) -> int | None:
    """The longest context for all models that fits, of a half, a quarter and so on."""
    tokens = max(advice.context_tokens(problem.problems[m]) for m in problem.free) // 2

    def shortened(one: PlanningProblem) -> PlanningProblem:
        now = advice.context_tokens(one)
        return advice.with_context(one, min(tokens, now)) if now else one

    while tokens >= advice.LEAST_CONTEXT_TOKENS:
        if possible(shortened):
            return tokens
        tokens //= 2
    return None


def _enough_devices(problem: JointProblem, possible: Possible) -> tuple[str, int] | None:
    """The name of a device, and the least number of more like it that are enough."""
    first = problem.problems[0]
    for count in range(1, advice.MOST_COUNTS + 1):
        for index in advice.kinds(first):
            at, more = index, count
            if possible(lambda one, at=at, more=more: advice.with_more(one, at, more)):  # type: ignore[misc]
                return first.devices[index].name, count
    return None


def _enough_memory(problem: JointProblem, possible: Possible) -> str | None:
    """A device whose whole memory is enough, if shoal may not use all of it yet."""
    for index, device in enumerate(problem.problems[0].devices):
        more = (device.memory_total_bytes or 0) > device.memory_bytes
        at = index
        if more and possible(lambda one, at=at: advice.with_memory(one, at)):  # type: ignore[misc]
            return device.name
    return None


def _enough_loss(problem: JointProblem, possible: Possible) -> float | None:
    """Twice, four or eight times the largest budget, if that is enough."""
    budgets = [one.quality_budget for one in problem.problems if one.quality_budget is not None]
    for factor in (2.0, 4.0, 8.0) if budgets else ():
        raised = factor * max(budgets)
        if possible(lambda one, to=raised: _with_budget(one, to)):  # type: ignore[misc]
            return raised
    return None


def _with_budget(problem: PlanningProblem, budget: float) -> PlanningProblem:
    return problem if problem.quality_budget is None else replace(problem, quality_budget=budget)


def _placement_hinders(problem: JointProblem, possible: Possible) -> bool:
    if not any(one.pins or one.excluded or one.teams for one in problem.problems):
        return False
    return possible(lambda one: replace(one, pins={}, excluded=frozenset(), teams=()))


def _ways(problem: JointProblem, found: Advice, fitting: tuple[str, ...]) -> list[str]:
    """The advice in words."""
    ways = []
    if fitting:
        left_out = [name for name in problem.names if name not in fitting]
        fit = " and ".join(fitting)
        verb = "fits" if len(fitting) == 1 else "fit"
        ways.append(f"leave out {' and '.join(left_out)} ({fit} {verb})")
    if found.context_tokens is not None:
        ways.append(
            f"shorten the contexts to {found.context_tokens} tokens (of all slots of a model"
            " together)"
        )
    if found.quality_budget is not None:
        ways.append(f"raise the quality budget to {found.quality_budget:g}")
    if found.free_placement:
        ways.append("drop the pins, exclusions and teams")
    if found.whole_memory is not None:
        ways.append(
            f"let shoal use more of {found.whole_memory}'s memory (its agent's --memory, other"
            " programs there)"
        )
    if found.more_devices is not None:
        name, count = found.more_devices
        number = "one" if count == 1 else str(count)
        ways.append(f"add {number} more device{'s' * (count > 1)} like {name}")
    return ways


def _round_up(size_bytes: float) -> int:
    """The size rounded up to 0.1 MB, as it is printed."""
    return -(-math.ceil(size_bytes) // 100_000) * 100_000
