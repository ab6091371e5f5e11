"""The best plan of one model beside models that are loaded already, and stay where they are.

The problem has the memory and storage that those leave. What they leave of the devices' time is
counted here: as in a joint plan, the mean time of a request of all models is minimised.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from planning.candidates import with_teams
from planning.exact.solver import SolverError, run
from planning.joint.contention import Use, settled, use_of
from planning.joint.plan import mean
from planning.joint.problem import JointProblem, replanned
from planning.joint.program import JointProgram
from planning.plan import Plan, PlanError, Proof, assess, verify
from planning.planner import DEFAULT_GAP, solve, writable
from planning.problem import PlanningProblem
from planning.time_limit import now_s

_ALONE_SHARE = 0.5
_WORTH = 1e-3
_ROUNDS = 3
_LIMIT_MARGIN = 4e-6


def solve_beside(
    problem: PlanningProblem, others: Sequence[Plan], *, time_limit_s: float = 60.0
) -> Plan:
    """The best plan found beside the plans of other models, verified.

    Its proved bound is that of a model with all devices to itself. Raises as ``solve``.
    """
    until_s = now_s() + time_limit_s
    shared = others and problem.objective.kind != "energy"
    share = _ALONE_SHARE if shared else 1.0
    first = solve(problem, time_limit_s=share * time_limit_s)
    known = [_use(replace(plan, objective=problem.objective)) for plan in others]
    if not shared or not _slowed(first, known) or not writable(problem):
        return first
    best = first
    full = with_teams(problem)
    for _ in range(_ROUNDS):
        paces = settled([_use(best), *known])
        found = _planned(problem, full, [*others], paces, until_s)
        if found is None or not _better(found, best, known):
            break
        best = found
    if best is first:
        return first
    took_s = time_limit_s - (until_s - now_s())
    bound = min(first.proof.bound, best.value)
    best = replace(best, proof=Proof(best.proof.solver, took_s, bound))
    try:
        verify(best, problem)
    except PlanError:  # The solver's rounding broke a limit.
        return first
    return best


def seconds_beside(plan: Plan, others: Sequence[Plan]) -> float:
    """The seconds of a request, and those by which it delays a request of each other model.

    So plans of one model can be compared that leave the others where they are. Loading does not
    count. All plans take the objective of ``plan``, which is not energy.
    """
    uses = [_use(plan), *(_use(replace(one, objective=plan.objective)) for one in others)]
    own_s, *others_s = settled(uses)
    delays_s = (s - use.alone_s for s, use in zip(others_s, uses[1:], strict=True))
    return own_s + math.fsum(delays_s)


def _planned(
    problem: PlanningProblem,
    full: PlanningProblem,
    others: Sequence[Plan],
    paces_s: Sequence[float],
    until_s: float,
) -> Plan | None:
    """The best plan over all variants beside models that stay, at these paces; None without one."""
    aim = problem.objective
    # The problem's limits are those that the others leave, so their own bytes count no more.
    fixed = (None, *(replace(plan, stages=(), objective=aim) for plan in others))
    count = 1 + len(others)
    names = ("", *map(str, range(len(others))))
    joint = JointProblem(names, (problem,) * count, (1.0,) * count, fixed)
    uses = {m: _use(replace(plan, objective=aim)) for m, plan in enumerate(others, start=1)}
    best: Plan | None = None
    for at, variant in enumerate(full.variants):
        left_s = max(0.1, until_s - now_s()) / (len(full.variants) - at)
        program = JointProgram(joint, {0: variant}, uses, paces_s, margin=_LIMIT_MARGIN)
        try:
            outcome = run(program.program, time_limit_s=left_s, gap=DEFAULT_GAP)
        except SolverError:
            continue
        if not outcome.values:
            continue
        choice = program.choices(outcome.values)[0]
        plan = assess(variant, choice.stages, Proof(outcome.solver, 0.0, 0.0), choice.hop_bits)
        plan = replanned(problem, plan)
        if best is None or _better(plan, best, list(uses.values())):
            best = plan
    return best


def _use(plan: Plan) -> Use:
    return use_of(plan, plan.chunk_tokens(plan.objective.tokens[0]))


def _slowed(plan: Plan, others: Sequence[Use]) -> bool:
    """Whether the plan or the others wait for each other."""
    uses = [_use(plan), *others]
    return any(
        seconds > (1 + _WORTH) * use.alone_s
        for seconds, use in zip(settled(uses), uses, strict=True)
    )


def _better(plan: Plan, best: Plan, others: Sequence[Use]) -> bool:
    """Whether all models together are faster with ``plan`` than with ``best``."""
    values = []
    for one in (plan, best):
        uses = [_use(one), *others]
        totals = [s + use.load_s for s, use in zip(settled(uses), uses, strict=True)]
        values.append(mean([1 / len(uses)] * len(uses), totals))
    return values[0] < (1 - _WORTH) * values[1]
