"""Losses of a model's widths for a plan: where the figures come from, and keeping a budget."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from model.experts import ExpertCounts
from model.loss_estimate import LossEstimate
from model.spec import ModelSpec
from planning.plan import InfeasiblePlan, Plan, PlanError
from planning.problem import PlanningProblem
from planning.sensitivity import (
    LossSource,
    Own,
    assumed_losses,
    tightened,
    whole_loss,
    with_assumed_arithmetic,
)

PlanAgain: TypeAlias = Callable[[PlanningProblem], Awaitable[Plan]]
"""Plans a problem that has a tighter budget."""

MAX_CHECKS = 8
"""The most plans that are measured to keep one budget."""


@dataclass(frozen=True, slots=True)
class RawLosses:
    """Sensitivities without a margin, and the margin that planning applies to them.

    experts: how often rows took each expert, if that was measured, too.
    """

    rows: Sequence[Mapping[int, float]]
    hops: Mapping[int, float]
    own: Own
    margin: float
    source: LossSource
    experts: ExpertCounts | None = None


def estimated(known: LossEstimate, arithmetics: Iterable[str]) -> RawLosses:
    """Losses measured while planning. Hops and other arithmetics have assumed losses."""
    source = LossSource("estimated", known.tokens)
    raw = _beside(known.blocks, known.margin, source, arithmetics)
    return replace(raw, experts=known.experts)


def assumed(spec: ModelSpec, why: str, arithmetics: Iterable[str]) -> RawLosses:
    """A typical model's losses. ``why`` says why the model's own were not measured."""
    return _beside(assumed_losses(spec), 1.0, LossSource("assumed", None, why), arithmetics)


def _beside(
    rows: Sequence[Mapping[int, float]],
    margin: float,
    source: LossSource,
    arithmetics: Iterable[str],
) -> RawLosses:
    # A hop at 8 bits costs about as much as a block at 8 bits (docs/calibration.md).
    hops = {8: max(row[8] for row in rows), 16: 0.0}
    return RawLosses(rows, hops, with_assumed_arithmetic({}, rows, arithmetics), margin, source)


def with_assumed(error: InfeasiblePlan, sources: Iterable[LossSource]) -> InfeasiblePlan:
    """The same error, which says that a budget of assumed losses can only be dropped.

    Only the default budget takes assumed losses. So nobody can follow the advice to raise it.
    """
    assumes = any(source.kind == "assumed" for source in sources)
    if assumes and error.advice.quality_budget is not None:
        error.args = (
            f"{error}. These losses are assumed, and no budget that is given takes such: have the"
            " weights here to measure them, or give --quality-budget none",
        )
    return error


async def keep_measured(
    problem: PlanningProblem,
    plan: Plan,
    measured: Callable[[tuple[int, ...]], Awaitable[float]],
    again: PlanAgain | None,
) -> tuple[Plan, float]:
    """Plan ``again`` with tighter budgets until the measured plan keeps the problem's budget.

    ``measured`` gives the divergence of a width per block. Returns the plan and this part of its
    divergence. Raises PlanError after MAX_CHECKS plans, if none is left, or after the first without
    ``again``.
    """
    budget = problem.quality_budget or 0.0  # The caller has checked that there is one.
    for _ in range(MAX_CHECKS):
        kl = await measured(tuple(placement.bits for placement in plan.placements))
        total = whole_loss(problem, plan, kl)
        if total <= budget:
            return plan, kl
        if again is None:
            break
        try:
            plan = await again(tightened(problem, plan, total))
        except InfeasiblePlan:  # Its advice is about the tighter budget, which nobody gave.
            break
    raise PlanError(
        f"the plan's KL divergence is {total:.3g} with its hops, above the budget of "
        f"{budget:g}: raise the budget, or allow more bits"
    )
