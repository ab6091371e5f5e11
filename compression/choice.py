"""Chooses a smaller model, the widths of its blocks and their devices as one optimisation.

The loss of a choice is that of the smaller model at its own bits, and what each block adds at its
width. The planner weighs widths and devices of one model together. Here it is asked for one model
after the other, with budgets that no worse choice can keep.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from planning.plan import InfeasiblePlan, Plan, PlanError

Rows = Sequence[Mapping[int, float]]
"""For each block: bits -> the divergence that it adds at this width, in nats per token."""

TOLERANCE = 0.01
"""The share of a choice's loss by which another may be better. Less of it takes more plans."""

_MOST_PLANS = 60


@dataclass(frozen=True, slots=True)
class Variant:
    """One smaller model.

    base: its divergence from the original at its own bits.
    rows: measures what its blocks add.
    plan: gives the fastest plan with these rows whose blocks add at most so much. Raises
        InfeasiblePlan if there is none, and PlanError if none was found in time.
    """

    base: float
    rows: Callable[[], Rows]
    plan: Callable[[Rows, float], Plan]


@dataclass(frozen=True, slots=True)
class Choice:
    """A variant by its number, with its widths and devices.

    loss: as predicted, the sum over the blocks included. bound: proved for the predictions: no
    choice loses less, or no choice takes fewer seconds.
    """

    variant: int
    plan: Plan
    loss: float
    bound: float


def least_loss(
    variants: Sequence[Variant], at_most_s: float, tolerance: float = TOLERANCE
) -> Choice | None:
    """Return the choice that loses least, of those whose token takes at most so long.

    None: there is none. Raises what the variants' functions raise, apart from InfeasiblePlan.
    """
    best: Choice | None = None
    bound = math.inf
    for number in sorted(range(len(variants)), key=lambda one: variants[one].base):
        variant = variants[number]
        if best is not None and variant.base >= best.loss:
            break  # This and all later ones lose as much at their own bits.
        most = math.inf if best is None else best.loss - variant.base
        plan, proved = _least(variant, at_most_s, most, tolerance)
        bound = min(bound, variant.base + proved)
        if plan is not None:
            best = Choice(number, plan, variant.base + _added(plan), bound)
    return None if best is None else replace(best, bound=min(bound, best.loss))


def fastest(variants: Sequence[Variant], at_most_loss: float) -> Choice | None:
    """Return the choice whose token takes least time, of those that lose at most so much.

    None: there is none. Raises as ``least_loss``.
    """
    best: Choice | None = None
    bound = math.inf
    for number, variant in enumerate(variants):
        if variant.base > at_most_loss:
            continue
        try:
            plan = variant.plan(variant.rows(), at_most_loss - variant.base)
        except InfeasiblePlan:
            continue
        bound = min(bound, plan.proof.bound)
        if best is None or plan.decode_s < best.plan.decode_s:
            best = Choice(number, plan, variant.base + _added(plan), bound)
    return None if best is None else replace(best, bound=min(bound, best.plan.decode_s))


def _least(
    variant: Variant, at_most_s: float, most: float, tolerance: float
) -> tuple[Plan | None, float]:
    """Return the variant's plan that adds least and less than ``most``, and a bound for all.

    A budget is halved while a fast enough plan keeps it. If none is found, the answer lies above,
    and the budget is a bound if the planner has proved that.
    """
    rows = variant.rows()
    whole = math.fsum(max(row.values()) for row in rows)
    proved, low, high, budget = 0.0, 0.0, most, min(most, whole)
    best: Plan | None = None
    for _ in range(_MOST_PLANS):
        found: Plan | None = None
        refuted = False
        try:
            found = variant.plan(rows, budget)
            refuted = found.proof.bound > at_most_s
        except InfeasiblePlan:
            refuted = True
        except PlanError:
            pass  # Neither found nor ruled out in the planner's time.
        if found is None or found.decode_s > at_most_s:
            low = budget
            if refuted:
                proved = math.inf if budget >= whole else budget
        elif _added(found) < high:
            best, high = found, _added(found)
        if best is None or high - low <= tolerance * (variant.base + high):
            break
        budget = (low + high) / 2
    return best, min(proved, high)


def _added(plan: Plan) -> float:
    """Return what the widths of a plan add to the loss. Plans of a budget always know it."""
    return plan.total_sensitivity or 0.0
