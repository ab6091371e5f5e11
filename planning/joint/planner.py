"""Chooses plans for several models on the same devices, or says why there are none.

The steps of ``solve_joint``:

1. Each model is planned with all devices to itself. The mean of the proved bounds bounds all plans.
2. Models are planned one after the other with what is left, in several orders. Then each in turn is
   planned again beside the others, as long as this helps (``rounds.py``).
3. The program of all models (``program.py``) looks for better plans, and proves how far the best is
   from them. If it is too large to write, step 1's bound is the proof.
4. The times of the found plans say how often the models' passes meet. Step 3 is repeated with that.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from planning.candidates import with_teams
from planning.exact.program import Choice
from planning.exact.solver import Outcome, SolverError, SolverName, default_solver, run
from planning.joint.contention import Use, use_of
from planning.joint.plan import (
    JointPlan,
    assess_joint,
    fits_together,
    mean,
    paces_of,
    value_at,
    verify_joint,
)
from planning.joint.problem import JointProblem, not_even_alone, replanned
from planning.joint.program import JointProgram
from planning.joint.rounds import Rounds
from planning.plan import InfeasiblePlan, Plan, PlanError, Proof, assess, keeps_budget, of_plan
from planning.planner import DEFAULT_GAP, SMALL_COUNTS, counts, solve, writable
from planning.problem import PlanningProblem
from planning.prompt import chunk_choices
from planning.time_limit import now_s

_LIMIT_MARGIN = 4e-6
_SAME = 5e-7
_PACE_ROUNDS = 4
_PACE_CHANGE = 1e-6
_ALONE_SHARE, _ROUNDS_SHARE = 0.2, 0.4
"""Parts of the time for each model alone, all together, and for planning in turn."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Plans of the program at some paces, or None, with a proved bound of all plans."""

    plans: tuple[Plan, ...] | None
    bound: float
    solver: str
    refused: bool = False
    """Whether it was proved that there are no plans."""


def solve_joint(
    problem: JointProblem,
    *,
    time_limit_s: float = 60.0,
    gap: float | None = None,
    solver: SolverName | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> JointPlan:
    """The best plans found for all models, verified, with a proved gap.

    It may end early with plans proved to be within ``gap`` of the best. None means 0 for small
    problems, else DEFAULT_GAP. Raises InfeasiblePlan with advice if no plans fit together, or
    PlanError if none were found and none are ruled out.
    """
    started_s = now_s()
    report = on_progress or (lambda _: None)
    deadline_s = started_s + time_limit_s
    alone = _alone(problem, _ALONE_SHARE * time_limit_s, solver, report)
    report("planning the models in turn")
    turns = Rounds(problem, alone, deadline_s=now_s() + _ROUNDS_SHARE * time_limit_s, solver=solver)
    best = turns.best()
    search = _Search(problem, alone, deadline_s, _gap(problem, gap), solver, report)
    best = search.improve(best)
    if best is None:
        from planning.joint.advice import explain

        if not search.refused:
            raise PlanError(
                f"no plans were found in {time_limit_s:g} s, although some may exist: allow more"
                " time, or fewer devices"
            )
        report("the models do not fit together: looking for what would help")
        raise explain(problem, solver, max(deadline_s - now_s(), 10.0))
    best = replace(best, proof=replace(best.proof, solve_s=now_s() - started_s))
    verify_joint(best, problem)
    return best


def _alone(
    problem: JointProblem,
    time_limit_s: float,
    solver: SolverName | None,
    report: Callable[[str], None],
) -> tuple[Plan, ...]:
    """Each model's best plan with all that fixed models leave. Raises InfeasiblePlan, PlanError."""
    fixed = [plan for plan in problem.fixed if plan is not None]
    found = []
    for m, name in enumerate(problem.names):
        if (known := problem.fixed[m]) is not None:
            found.append(replanned(problem.problems[m], known))
            continue
        report(f"planning {name} alone")
        share_s = time_limit_s / len(problem.free)
        try:
            plan = solve(problem.left(m, fixed), time_limit_s=share_s, solver=solver)
        except InfeasiblePlan as error:
            others = [problem.names[i] for i in problem.free if i != m]
            raise not_even_alone(error, name, others, loaded=bool(fixed)) from error
        except PlanError as error:
            raise PlanError(f"{name}: {error}") from error
        found.append(replanned(problem.problems[m], plan))
    return tuple(found)


def _gap(problem: JointProblem, asked: float | None) -> float:
    if asked is not None:
        return asked
    return 0.0 if total_counts(problem) <= SMALL_COUNTS else DEFAULT_GAP


def total_counts(problem: JointProblem) -> int:
    """About the number of counts of the program of all models."""
    return sum(counts(problem.problems[m]) for m in problem.free)


class _Search:
    """Looks for better plans with the program of all models, at paces that fit the plans."""

    def __init__(
        self,
        problem: JointProblem,
        alone: Sequence[Plan],
        deadline_s: float,
        gap: float,
        solver: SolverName | None,
        report: Callable[[str], None],
    ) -> None:
        self.problem, self.alone, self.deadline_s = problem, tuple(alone), deadline_s
        self.gap, self.solver, self.report = gap, solver, report
        self.refused = False
        fixed = [plan for plan in problem.fixed if plan is not None]
        self.full = {m: with_teams(problem.left(m, fixed)) for m in problem.free}
        self.written = all(map(writable, self.full.values()))
        self.least = mean(
            problem.shares,
            [
                plan.value if fixed_plan is not None else min(plan.value, plan.proof.bound)
                for plan, fixed_plan in zip(alone, problem.fixed, strict=True)
            ],
        )

    def improve(self, known: JointPlan | None) -> JointPlan | None:
        """The best plans found, ``known`` among them, with their proof."""
        best = None if known is None else self._with_bound(known, self.least, "search")
        if not self.written:
            return best
        paces = [plan.value for plan in self.alone] if best is None else paces_of(best)
        tried: list[tuple[float, ...]] = []
        for _ in range(_PACE_ROUNDS):
            if best is not None and (best.gap <= self.gap or self._left_s() <= 0):
                break
            self.report("solving the integer program of all models")
            answer = self._solve(paces, best)
            tried.append(tuple(paces))
            if answer.plans is None:
                self.refused = self.refused or (answer.refused and best is None)
                if best is not None and _close(paces, paces_of(best)):
                    best = self._with_bound(best, max(self.least, answer.bound), answer.solver)
                break
            found = assess_joint(self.problem, answer.plans, Proof(answer.solver, 0.0, 0.0))
            if best is None or found.value < best.value * (1 - _SAME):
                bound = answer.bound if _close(paces, paces_of(found)) else self.least
                best = self._with_bound(found, max(self.least, bound), answer.solver)
            elif _close(paces, paces_of(best)):
                best = self._with_bound(best, max(self.least, answer.bound), answer.solver)
            paces = paces_of(best)
            if any(_close(paces, old) for old in tried):
                break
        return best

    def _with_bound(self, plan: JointPlan, bound: float, solver: str) -> JointPlan:
        proof = Proof(solver, 0.0, min(bound, plan.value))
        return replace(plan, proof=proof, least=min(self.least, plan.value))

    def _left_s(self) -> float:
        return max(0.0, self.deadline_s - now_s())

    def _solve(self, paces: Sequence[float], known: JointPlan | None) -> Answer:
        """The best plans at the paces over all variants of the models' problems."""
        return solve_at(
            self.problem,
            self.full,
            paces,
            known=None if known is None else known.plans,
            deadline_s=self.deadline_s,
            gap=self.gap,
            solver=self.solver,
        )


def _close(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(math.isclose(a, b, rel_tol=_PACE_CHANGE) for a, b in zip(one, other, strict=True))


def solve_at(
    problem: JointProblem,
    full: dict[int, PlanningProblem],
    paces: Sequence[float],
    *,
    known: Sequence[Plan] | None = None,
    deadline_s: float,
    gap: float = 0.0,
    solver: SolverName | None = None,
) -> Answer:
    """The best plans if requests take about ``paces``, better than ``known``; and a proved bound.

    ``full``: the problem of each model to plan, with its teams, and with what fixed models leave.
    """
    fixed = {m: plan for m, plan in enumerate(problem.fixed) if plan is not None}
    choices = [one.variants for one in full.values()]
    chunks = [[use_of(plan, rows) for rows in plan_chunks(plan)] for plan in fixed.values()]
    combined = [
        (variants, uses)
        for variants in itertools.product(*choices)
        for uses in itertools.product(*chunks)
    ]
    best, bound, name = known, math.inf, solver or default_solver()
    value = math.inf if known is None else value_at(problem, known, paces)
    refused = True
    for index, (variants, uses) in enumerate(combined):
        left_s = max(0.0, deadline_s - now_s()) / (len(combined) - index)
        if not left_s and best is not None:
            return Answer(tuple(best), 0.0, name)
        found, proved, impossible = _solve_variant(
            problem,
            dict(zip(full, variants, strict=True)),
            dict(zip(fixed, uses, strict=True)),
            paces,
            (left_s, gap, value, solver),
            best,
        )
        refused = refused and impossible
        bound = min(bound, proved)
        if found is not None:
            plans = tuple(fixed[m] if m in fixed else found[m] for m in range(len(problem.names)))
            if (new := value_at(problem, plans, paces)) < value:
                best, value = plans, new
    if best is None:
        return Answer(None, bound, name, refused)
    return Answer(tuple(best), min(bound, value), name)


def plan_chunks(plan: Plan) -> tuple[int, ...]:
    """Sizes of a chunk of a plan's prompts; 0 alone if no prompt counts."""
    prompt, _ = plan.objective.tokens
    return chunk_choices(prompt) if prompt else (0,)


def _solve_variant(
    problem: JointProblem,
    variants: dict[int, PlanningProblem],
    uses: dict[int, Use],
    paces: Sequence[float],
    limits: tuple[float, float, float, SolverName | None],
    known: Sequence[Plan] | None,
) -> tuple[dict[int, Plan] | None, float, bool]:
    """Plans by model, a lower bound, and whether the variant was proved to have none.

    Plans must be better than ``known``, which the solver starts with where the variant has them.
    """
    left_s, gap, value, solver = limits
    cutoff = value * (1 - max(gap, _SAME)) if value < math.inf else math.inf
    started_s = now_s()
    bound = -math.inf
    for margin in (0.0, _LIMIT_MARGIN):
        # The start must be in the program, although only better plans are looked for.
        start = None if known is None else _start(variants, uses, known)
        within = cutoff if start is None else value
        program = JointProgram(problem, variants, uses, paces, cutoff=within, margin=margin)
        values = None if start is None else program.start(*start)
        outcome = _run(program, left_s - (now_s() - started_s), gap, solver, values)
        impossible = outcome.status == "infeasible"
        if bound == -math.inf:
            bound = cutoff if impossible else min(program.bound(outcome.bound), cutoff)
        if not outcome.values:
            return None, bound, impossible and cutoff == math.inf
        plans = plans_of(problem, variants, program.choices(outcome.values), outcome.solver)
        if plans is not None:
            return plans, bound, False
    return None, bound, False


def plans_of(
    problem: JointProblem,
    variants: dict[int, PlanningProblem],
    choices: dict[int, Choice],
    solver: str,
) -> dict[int, Plan] | None:
    """The plans of choices, with figures of the models' own problems; None if a limit breaks."""
    found: dict[int, Plan] = {}
    for m, variant in variants.items():
        choice = choices[m]
        plan = assess(variant, choice.stages, Proof(solver, 0.0, 0.0), choice.hop_bits)
        if not keeps_budget(plan, variant):
            return None
        found[m] = replanned(problem.problems[m], plan)
    whole = [known if known is not None else found[m] for m, known in enumerate(problem.fixed)]
    return found if fits_together(whole) else None


def _start(
    variants: dict[int, PlanningProblem],
    uses: dict[int, Use],
    plans: Sequence[Plan],
) -> tuple[dict[int, Choice], list[Use]] | None:
    """Plans as choices of the variants, with their use of devices; None if a variant lacks one."""
    choices: dict[int, Choice] = {}
    own: list[Use] = []
    for m, plan in enumerate(plans):
        if m in uses:
            own.append(uses[m])
            continue
        variant = variants[m]
        made, indices = of_plan(variant, plan)
        if len(made.devices) > len(variant.devices):
            return None
        stages = [(i, s.first, s.bits) for i, s in zip(indices, plan.stages, strict=True)]
        hops = tuple(stage.hop_bits or 0 for stage in plan.stages[:-1])
        choices[m] = Choice(stages, hops)
        own.append(use_of(plan, variant.chunk_rows))
    return choices, own


def _run(
    program: JointProgram,
    left_s: float,
    gap: float,
    solver: SolverName | None,
    start: Mapping[str, float] | None = None,
) -> Outcome:
    try:
        return run(
            program.program, time_limit_s=max(left_s, 0.1), solver=solver, gap=gap, start=start
        )
    except SolverError:
        return Outcome("unknown", solver or default_solver())
