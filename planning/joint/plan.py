"""Plans of several models together, with the times that each takes alone and beside the others.

``assess_joint`` computes the figures, and ``verify_joint`` checks plans from any source. Neither
needs a solver.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from planning.joint.contention import Use, at_pace, settled, use_of
from planning.joint.problem import JointProblem, check_shared_limits
from planning.plan import OPTIMALITY_GAP, Plan, PlanError, Proof, verify
from planning.prompt import chunk_choices

_RELATIVE_ERROR = 1e-9


@dataclass(frozen=True, slots=True)
class JointPlan:
    """One plan for each model. Times are predicted, in the seconds of the objective (or joules).

    ``chunk_tokens``: rows of a chunk of each model's prompts; 0 if no prompt counts.
    ``alone_s``: a request of each model while the others are silent.
    ``together_s``: the same while all models answer all the time (planning/joint/contention.py).
    ``proof``: its bound is a proved lower bound of ``value`` of all plans for which the models'
    requests take about as long, so that they meet as often as here.
    ``least``: a proved lower bound of ``value`` of all plans, each model with all devices to itself
    """

    names: tuple[str, ...]
    plans: tuple[Plan, ...]
    shares: tuple[float, ...]
    chunk_tokens: tuple[int, ...]
    alone_s: tuple[float, ...]
    together_s: tuple[float, ...]
    proof: Proof
    least: float = 0.0

    @property
    def value(self) -> float:
        """The mean time of a request while all models answer, by the models' shares."""
        return mean(self.shares, self.together_s)

    @property
    def gap(self) -> float:
        """The largest share of ``value`` that better plans could save, 0 to 1."""
        return max(0.0, (self.value - self.proof.bound) / self.value) if self.value else 0.0

    @property
    def proven_optimal(self) -> bool:
        return self.gap <= OPTIMALITY_GAP


def mean(shares: Sequence[float], seconds: Sequence[float]) -> float:
    """The mean by shares."""
    return math.fsum(share * one for share, one in zip(shares, seconds, strict=True))


def uses_of(plans: Sequence[Plan]) -> list[tuple[tuple[int, ...], list[Use]]]:
    """Sizes of chunks for all models, and the plans' use of devices with them; all combinations."""
    choices = []
    for plan in plans:
        prompt, _ = plan.objective.tokens
        choices.append(chunk_choices(prompt) if prompt else (0,))
    return [
        (rows, [use_of(plan, own) for plan, own in zip(plans, rows, strict=True)])
        for rows in itertools.product(*choices)
    ]


def value_at(problem: JointProblem, plans: Sequence[Plan], paces_s: Sequence[float]) -> float:
    """The mean time of a request at given paces, with the best chunks."""
    return min(mean(problem.shares, _totals(uses, paces_s)) for _, uses in uses_of(plans))


def _totals(uses: Sequence[Use], paces_s: Sequence[float]) -> list[float]:
    return [seconds + use.load_s for seconds, use in zip(at_pace(uses, paces_s), uses, strict=True)]


def assess_joint(problem: JointProblem, plans: Sequence[Plan], proof: Proof) -> JointPlan:
    """The plans with their times alone and together, and the chunks that suit all of them best.

    Limits are not checked here: ``verify_joint`` does that.
    """
    found = (
        JointPlan(
            names=problem.names,
            plans=tuple(plans),
            shares=problem.shares,
            chunk_tokens=rows,
            alone_s=tuple(use.value for use in uses),
            together_s=tuple(
                seconds + use.load_s for seconds, use in zip(settled(uses), uses, strict=True)
            ),
            proof=proof,
        )
        for rows, uses in uses_of(plans)
    )
    return min(found, key=lambda one: one.value)


def paces_of(plan: JointPlan) -> tuple[float, ...]:
    """The paces at which the plan's times are what they are."""
    loads = (
        one.objective.migration_weight * one.load_s if one.objective.kind != "energy" else 0.0
        for one in plan.plans
    )
    return tuple(
        together_s - load_s for together_s, load_s in zip(plan.together_s, loads, strict=True)
    )


def fits_together(plans: Sequence[Plan]) -> bool:
    """Whether every device has room for what all plans put there."""
    try:
        check_shared_limits([""] * len(plans), plans)
    except PlanError:
        return False
    return True


def verify_joint(plan: JointPlan, problem: JointProblem) -> None:
    """Check plans against the problem without trusting a solver or the plans' own figures.

    Raises PlanError naming the first violation. Each plan is checked against its own problem
    (``planning.plan.verify``). Then come each device's memory and storage for all models together,
    plans that should stay as they are, all times, and the proved bound.
    """
    if plan.names != problem.names or len(plan.plans) != len(problem.names):
        raise PlanError(f"the plans are of {', '.join(plan.names)}")
    for name, own, one, stays in zip(
        problem.names, problem.problems, plan.plans, problem.fixed, strict=True
    ):
        try:
            verify(one, own)
        except PlanError as error:
            raise PlanError(f"{name}: {error}") from error
        if stays is not None and one.layout != stays.layout:
            raise PlanError(f"{name} is loaded already, and its blocks would move")
    check_shared_limits(problem.names, plan.plans)
    actual = assess_joint(problem, plan.plans, plan.proof)
    if plan.chunk_tokens != actual.chunk_tokens:
        raise PlanError(f"chunks of {plan.chunk_tokens} rows, recomputed {actual.chunk_tokens}")
    for what, claimed, known in (
        ("share of requests", plan.shares, actual.shares),
        ("time alone", plan.alone_s, actual.alone_s),
        ("time together", plan.together_s, actual.together_s),
    ):
        for name, ours, theirs in zip(plan.names, claimed, known, strict=True):
            if not math.isclose(ours, theirs, rel_tol=_RELATIVE_ERROR):
                raise PlanError(f"{name}: {what} {ours}, recomputed {theirs}")
    if not max(plan.proof.bound, plan.least) <= plan.value * (1 + OPTIMALITY_GAP):
        raise PlanError(f"the proved bound {plan.proof.bound} is above {plan.value}")
