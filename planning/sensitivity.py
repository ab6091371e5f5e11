"""What fewer bits cost in quality, as numbers for a plan: sensitivities, margins and budgets.

A sensitivity is the KL divergence that one block adds at one width. Sensitivities are measured one
block at a time; a plan's divergence is predicted as their sum times a margin, because errors of
several blocks can reinforce each other. The margin is the largest measured / predicted of whole
plans (docs/calibration.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from model.checkpoint import Checkpoint
from model.quantize import BITS
from model.spec import ModelSpec
from planning.plan import Plan
from planning.problem import DEFAULT_HOPS, HopFormat, PlanningProblem
from wire.activations import HOP_BITS

ASSUMED_MARGIN = 1.5
"""Where no plan was checked. The largest ratio measured so far is 1.48 (docs/calibration.md)."""

_NOISE_KL = 1e-7
"""Sums below it say nothing about ratios: rounding in fp32 is as large."""

DEFAULT_QUALITY_BUDGET = 0.03
"""Nats per token that a plan may lose unless told otherwise: perplexity times 1.03. The 4-bit
format that most people run loses as much (docs/planner.md, "How much may be lost")."""

PAPER_MAX_WEIGHT_ERROR = 1e-3
"""Bound on max|w - w_b| / 2^b for the paper's own program: at this value its model lost nothing
measurable (Source: DILEMMA, Table 1)."""

ASSUMED_KL_AT_4_BITS = 0.06
"""What all blocks at 4 bits lose where nothing was measured: about what others found for plain
4-bit rounding of Llama 3 8B (docs/planner.md)."""

ASSUMED_ARITHMETIC = 10.0
"""How many times as much a layer loses in an arithmetic of its own that was not measured: about as
much as on the demo model (docs/edgetpu.md)."""

LossKind = Literal["given", "calibrated", "estimated", "assumed", "unknown"]


@dataclass(frozen=True, slots=True)
class LossSource:
    """Where a plan's sensitivities come from.

    given: the user's file. calibrated: ``shoal calibrate --quality``. estimated: measured while
    planning, over ``tokens``. assumed: a typical model's. unknown: there are none. ``why`` says
    what kept them from being measured, in one clause.
    """

    kind: LossKind
    tokens: int | None = None
    why: str = ""


Own = Mapping[str, Mapping[int, Mapping[int, float]]]
"""By arithmetic, layer's block and bits: what the block adds where it is computed so."""


def budget_margin(checks: Iterable[tuple[float, float]]) -> float:
    """What sums of sensitivities are multiplied with, from (predicted, measured) of plans.

    The largest ratio, never below 1; ASSUMED_MARGIN without any plan.
    """
    ratios = [measured / predicted for predicted, measured in checks if predicted > _NOISE_KL]
    return max(1.0, *ratios) if ratios else ASSUMED_MARGIN


def applying_budget(
    quality_budget: float | None,
    max_weight_error: float | None,
    *,
    unbounded: bool,
    decided: bool,
) -> float | None:
    """The bound on a plan's KL divergence; None: there is none.

    The default one chooses widths. So it does not apply where they are ``decided``: by a given
    plan, a single width, a bound of another kind or the wish for none.
    """
    if quality_budget is not None or max_weight_error is not None or unbounded or decided:
        return quality_budget
    return DEFAULT_QUALITY_BUDGET


def assumed_losses(spec: ModelSpec) -> tuple[Mapping[int, float], ...]:
    """Sensitivities of a model of which only the shape is known: a typical one's, never measured.

    A block has its share of ASSUMED_KL_AT_4_BITS by its weights. At other widths it loses in
    proportion to the squared step of the codes.
    """
    sizes = [
        sum(math.prod(shape) for shape in spec.block_tensors(block).values())
        for block in range(spec.block_count)
    ]
    return tuple(
        {bits: ASSUMED_KL_AT_4_BITS * size / sum(sizes) * squared_step(bits) for bits in BITS}
        for size in sizes
    )


def squared_step(bits: int) -> float:
    """The squared step of codes, as a multiple of that at 4 bits: about what losses follow."""
    return 0.0 if bits >= 16 else (15 / (2**bits - 1)) ** 2


def with_assumed_arithmetic(
    own: Own, rows: Sequence[Mapping[int, float]], arithmetics: Iterable[str]
) -> Own:
    """``own``, and ASSUMED_ARITHMETIC times ``rows`` for arithmetics of which nothing is known."""
    assumed = {
        block: {bits: ASSUMED_ARITHMETIC * kl for bits, kl in row.items()}
        for block, row in enumerate(rows)
    }
    return {arithmetic: assumed for arithmetic in arithmetics if arithmetic} | dict(own)


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


def whole_loss(problem: PlanningProblem, plan: Plan, measured_kl: float) -> float:
    """What a plan loses: its blocks' measured part, with what its hops and arithmetics add."""
    hops = (
        problem.hop_sensitivity(stage.hop_bits) or 0.0
        for stage in plan.stages
        if stage.hop_bits is not None
    )
    return measured_kl + own_share(problem, plan) + math.fsum(hops)


def own_share(problem: PlanningProblem, plan: Plan) -> float:
    """What the arithmetic of single devices is predicted to add to what the plan's bits lose."""
    indices = {device.name: index for index, device in enumerate(problem.devices)}
    return math.fsum(
        max((problem.sensitivity(indices[one.device], one.block, one.bits) or 0.0) - common, 0.0)
        for one in plan.placements
        if (common := problem.sensitivities[one.block].get(one.bits)) is not None
    )
