"""The loss in quality at fewer bits, as numbers for a plan: sensitivities, margins and budgets.

A sensitivity is the KL divergence that one block adds at one width, measured one block at a time.
The prediction for a plan is their sum times a margin, because errors of several blocks can
reinforce each other. The margin is the largest measured / predicted of whole plans
(docs/calibration.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from model.checkpoint import Checkpoint
from model.quantize import BITS
from model.spec import ModelSpec
from planning.plan import Plan, of_plan
from planning.problem import DEFAULT_HOPS, HopFormat, PlanningProblem
from wire.activations import HOP_BITS

ASSUMED_MARGIN = 1.5
"""The margin if no plan was checked. The largest measured so far is 1.48 (docs/calibration.md)."""

_NOISE_KL = 1e-7
"""Predicted sums up to this give no ratio: rounding in fp32 is as large."""

DEFAULT_QUALITY_BUDGET = 0.03
"""Nats per token that a plan may lose by default: perplexity times 1.03. The 4-bit format that
most people run loses as much (docs/planner.md, "How much may be lost")."""

PAPER_MAX_WEIGHT_ERROR = 1e-3
"""Bound on max|w - w_b| / 2^b for the paper's own program. At this value its model lost nothing
measurable (Source: DILEMMA, Table 1)."""

ASSUMED_KL_AT_4_BITS = 0.06
"""The loss of all blocks at 4 bits if nothing was measured. Others found about this for plain
4-bit rounding of Llama 3 8B (docs/planner.md)."""

ASSUMED_ARITHMETIC = 10.0
"""Factor on a layer's loss in an arithmetic of its own that was not measured. It is about the
factor measured on the demo model (docs/edgetpu.md)."""

LossKind = Literal["given", "calibrated", "estimated", "assumed", "unknown"]


@dataclass(frozen=True, slots=True)
class LossSource:
    """Where a plan's sensitivities come from.

    given: the user's file.
    calibrated: ``shoal calibrate --quality``.
    estimated: measured while planning, over ``tokens``.
    assumed: a typical model's.
    unknown: there are none.
    ``why``: one clause that says why they were not measured.
    """

    kind: LossKind
    tokens: int | None = None
    why: str = ""


Own = Mapping[str, Mapping[int, Mapping[int, float]]]
"""Arithmetic -> block of a layer -> bits -> KL divergence of the layer in that arithmetic."""


def budget_margin(checks: Iterable[tuple[float, float]]) -> float:
    """The factor on sums of sensitivities, from (predicted, measured) of whole plans.

    It is the largest ratio, and at least 1; without any plan ASSUMED_MARGIN.
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

    The default is there to choose widths. So it does not apply if they are ``decided``, by a given
    plan or a single width, with a bound on weight errors, or if the user wants no bound.
    """
    if quality_budget is not None or max_weight_error is not None or unbounded or decided:
        return quality_budget
    return DEFAULT_QUALITY_BUDGET


def assumed_losses(spec: ModelSpec) -> tuple[Mapping[int, float], ...]:
    """Assumed sensitivities for a model's shape, from a typical model. Nothing is measured.

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
    """The squared step of codes, relative to 4 bits. Losses are about proportional to it."""
    return 0.0 if bits >= 16 else (15 / (2**bits - 1)) ** 2


def with_assumed_arithmetic(
    own: Own, rows: Sequence[Mapping[int, float]], arithmetics: Iterable[str]
) -> Own:
    """``own``, with ASSUMED_ARITHMETIC times ``rows`` for the arithmetics that it does not have."""
    assumed = {
        block: {bits: ASSUMED_ARITHMETIC * kl for bits, kl in row.items()}
        for block, row in enumerate(rows)
    }
    return {arithmetic: assumed for arithmetic in arithmetics if arithmetic} | dict(own)


def scaled(rows: Sequence[Mapping[int, float]], margin: float) -> tuple[Mapping[int, float], ...]:
    """Sensitivities times the margin, as plans add them up against a budget."""
    return tuple({bits: kl * margin for bits, kl in row.items()} for row in rows)


def with_lossless(
    rows: Sequence[Mapping[int, float]], checkpoint: Checkpoint
) -> tuple[Mapping[int, float], ...]:
    """Sensitivities with 0 added for widths that were not measured and keep a block exactly.

    A width of the file's own codes has 0 even if another loss was assumed. If there is not one row
    per block, nothing is added: ``build_problem`` refuses such rows.
    """
    if len(rows) != checkpoint.spec.block_count:
        return tuple(rows)
    lossless = [checkpoint.lossless_format(block) for block in range(len(rows))]
    return tuple(
        {fmt.bits: 0.0, 32: 0.0} | dict(row) | ({} if fmt.bits >= 16 else {fmt.bits: 0.0})
        for row, fmt in zip(rows, lossless, strict=True)
    )


def scaled_own(own: Own, margin: float) -> Own:
    """The sensitivities of arithmetics times the margin, like ``scaled``."""
    return {
        arithmetic: {
            block: {bits: kl * margin for bits, kl in row.items()} for block, row in rows.items()
        }
        for arithmetic, rows in own.items()
    }


def choose_hops(
    asked: Iterable[int] | None, sensitivities: Mapping[int, float], quality_budget: float | None
) -> tuple[HopFormat, ...]:
    """The formats that hops may use, with the known ``sensitivities`` (bits -> KL divergence).

    ``asked`` None means DEFAULT_HOPS, or with a budget all formats of known sensitivity: a budget
    bounds the loss at few bits.
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
    """The problem with a budget that rules out ``plan``, which was measured above its budget.

    ``problem`` has the user's budget. If another plan keeps the tighter budget, and its measured
    divergence is as many times its prediction as here, it keeps the user's budget.
    """
    predicted = plan.total_sensitivity
    if predicted is None or problem.quality_budget is None:
        raise ValueError("there is no budget to tighten")
    budget = predicted * min(problem.quality_budget / measured_kl, 0.99)
    return replace(problem, quality_budget=budget)


def whole_loss(problem: PlanningProblem, plan: Plan, measured_kl: float) -> float:
    """The loss of a plan: the measured part of its blocks, with its hops and arithmetics added."""
    hops = (
        problem.hop_sensitivity(stage.hop_bits) or 0.0
        for stage in plan.stages
        if stage.hop_bits is not None
    )
    return measured_kl + own_share(problem, plan) + math.fsum(hops)


def own_share(problem: PlanningProblem, plan: Plan) -> float:
    """The predicted loss by devices' arithmetic and teams' sums, beyond that by the plan's bits."""
    problem, indices = of_plan(problem, plan)
    of_block = [
        index for index, stage in zip(indices, plan.stages, strict=True) for _ in stage.bits
    ]
    return math.fsum(
        max((problem.sensitivity(of_block[one.block], one.block, one.bits) or 0.0) - common, 0.0)
        for one in plan.placements
        if (common := problem.sensitivities[one.block].get(one.bits)) is not None
    )
