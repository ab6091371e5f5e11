"""What fewer bits cost in quality, as numbers for a plan: sensitivities, margins and budgets.

A sensitivity is the KL divergence that one block adds at one width. Sensitivities are measured one
block at a time; a plan's divergence is predicted as their sum times a margin, because errors of
several blocks can reinforce each other. The margin is the largest measured / predicted of whole
plans (docs/calibration.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from model.checkpoint import Checkpoint
from planning.plan import Plan
from planning.problem import DEFAULT_HOPS, HopFormat, PlanningProblem
from wire.activations import HOP_BITS

ASSUMED_MARGIN = 1.5
"""Where no plan was checked. The largest ratio measured so far is 1.48 (docs/calibration.md)."""

_NOISE_KL = 1e-7
"""Sums below it say nothing about ratios: rounding in fp32 is as large."""

Own = Mapping[str, Mapping[int, Mapping[int, float]]]
"""By arithmetic, layer's block and bits: what the block adds where it is computed so."""


def budget_margin(checks: Iterable[tuple[float, float]]) -> float:
    """What sums of sensitivities are multiplied with, from (predicted, measured) of plans.

    The largest ratio, never below 1; ASSUMED_MARGIN without any plan.
    """
    ratios = [measured / predicted for predicted, measured in checks if predicted > _NOISE_KL]
    return max(1.0, *ratios) if ratios else ASSUMED_MARGIN


def scaled(rows: Sequence[Mapping[int, float]], margin: float) -> tuple[Mapping[int, float], ...]:
    """Sensitivities with the margin applied: what plans add up against a budget."""
    return tuple({bits: kl * margin for bits, kl in row.items()} for row in rows)


def with_lossless(
    rows: Sequence[Mapping[int, float]], checkpoint: Checkpoint
) -> tuple[Mapping[int, float], ...]:
    """Sensitivities, 0 where nothing was measured and the width keeps a block as it is.

    Rows that are not one per block stay as they are, for ``build_problem`` to refuse.
    """
    if len(rows) != checkpoint.spec.block_count:
        return tuple(rows)
    lossless = [checkpoint.lossless_format(block).bits for block in range(len(rows))]
    return tuple(
        {bits: 0.0 for bits in (16, 32) if bits >= least} | dict(row)
        for row, least in zip(rows, lossless, strict=True)
    )


def scaled_own(own: Own, margin: float) -> Own:
    """As ``scaled``."""
    return {
        arithmetic: {
            block: {bits: kl * margin for bits, kl in row.items()} for block, row in rows.items()
        }
        for arithmetic, rows in own.items()
    }


def choose_hops(
    asked: Iterable[int] | None, sensitivities: Mapping[int, float], quality_budget: float | None
) -> tuple[HopFormat, ...]:
    """What hops may be sent as, with the known ``sensitivities`` (bits -> KL divergence).

    Not asked for, it is the default alone, or every width of known sensitivity where there is a
    budget that bounds what narrow ones do.
    """
    if asked is not None:
        widths = sorted(set(asked))
    elif quality_budget is not None:
        widths = sorted(HOP_BITS)
    else:
        widths = [form.bits for form in DEFAULT_HOPS]
    forms = (
        HopFormat(bits, sensitivities[bits])
        if bits in sensitivities
        else HopFormat.unmeasured(bits)
        for bits in widths
    )
    return tuple(form for form in forms if asked is not None or form.sensitivity is not None)


def tightened(problem: PlanningProblem, plan: Plan, measured_kl: float) -> PlanningProblem:
    """The problem with so little budget that ``plan``, measured above its budget, is too much.

    ``problem`` has the user's budget. Another plan whose measured divergence is as many times its
    prediction keeps it.
    """
    predicted = plan.total_sensitivity
    if predicted is None or problem.quality_budget is None:
        raise ValueError("there is no budget to tighten")
    budget = predicted * min(problem.quality_budget / measured_kl, 0.99)
    return replace(problem, quality_budget=budget)


def own_share(problem: PlanningProblem, plan: Plan) -> float:
    """What the arithmetic of single devices is predicted to add to what the plan's bits lose."""
    indices = {device.name: index for index, device in enumerate(problem.devices)}
    return math.fsum(
        max((problem.sensitivity(indices[one.device], one.block, one.bits) or 0.0) - common, 0.0)
        for one in plan.placements
        if (common := problem.sensitivities[one.block].get(one.bits)) is not None
    )
