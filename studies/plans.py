"""Whether delta or a sum of KL divergences tells better what a mixed plan loses.

Random plans give each layer a width. For each plan both are known before it is measured: delta, the
largest weight error of all layers, and the sum of the KL divergences that the layers have alone.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from evaluation.bootstrap import Estimate
from studies.bench import ByWidth, Subject, widths_text
from studies.correlation import LEAST_PLANS, correlation, difference, random_plans, shuffled_plans
from studies.rounding import Rounding

OUTCOMES = ("loss", "kl", "exact_match", "f1")
"""Measured figures that a predictor should rank plans by."""

_RISING = {"loss": 1, "kl": 1, "exact_match": -1, "f1": -1}
"""Whether more loss by the prediction means more or less of the outcome."""

PREDICTORS = ("delta", "kl_sum", "bits")
"""``bits`` is the mean width, with its sign turned. Nothing is measured for it."""


PlanKind = Literal["any", "even"]
KINDS: tuple[PlanKind, ...] = ("any", "even")


@dataclass(frozen=True, slots=True)
class MixedPlan:
    """One random plan with what is predicted of it.

    delta: the largest max|w - w_b| / 2^b of its layers, the least delta that allows it.
    kl_sum: the sum of its layers' KL divergences, each measured alone, in nats per token.
    """

    subject: Subject
    delta: float
    kl_sum: float

    @property
    def least_bits(self) -> int:
        return min(self.subject.bits)

    @property
    def mean_bits(self) -> float:
        return sum(self.subject.bits) / len(self.subject.bits)

    def predicted(self, predictor: str) -> float:
        """Return what a predictor says. More means a worse model."""
        values = {"delta": self.delta, "kl_sum": self.kl_sum, "bits": -self.mean_bits}
        return values[predictor]


@dataclass(frozen=True, slots=True)
class Correlations:
    """Rank correlations of one outcome: by predictor, and by how much the sum is ahead of delta.

    All are 1 where a predictor ranks the plans as they measured.
    """

    outcome: str
    by: Mapping[str, Estimate]
    kl_sum_ahead: Estimate


@dataclass(frozen=True, slots=True)
class SameWidth:
    """Plans with the same narrowest width: the ranges of delta, the sum and the measured figure."""

    bits: int
    plans: int
    delta: tuple[float, float]
    kl_sum: tuple[float, float]
    measured: tuple[float, float]


@dataclass(frozen=True, slots=True)
class PlanSet:
    """Random plans of one kind, with one rounding.

    any: each layer has any width. even: all plans have equally many layers of each width, so the
    same bits, and only the order differs.
    """

    rounding: Rounding
    kind: PlanKind
    plans: tuple[MixedPlan, ...]

    def __str__(self) -> str:
        what = "of any bits" if self.kind == "any" else "of equal bits"
        return f"{len(self.plans)} random plans {what}, {self.rounding}"


def draw_plans(
    rounding: Rounding,
    kind: PlanKind,
    widths: Sequence[int],
    errors: Sequence[ByWidth],
    losses: Sequence[ByWidth],
    count: int,
    seed: int,
) -> PlanSet:
    """Draw ``count`` plans over layers with these weight errors and sensitivities."""
    drawn = random_plans if kind == "any" else shuffled_plans
    plans = (
        MixedPlan(
            Subject(f"{kind} {number}, {rounding}", bits, rounding),
            max(row[width] for row, width in zip(errors, bits, strict=True)),
            math.fsum(row[width] for row, width in zip(losses, bits, strict=True)),
        )
        for number, bits in enumerate(drawn(len(errors), widths, count, seed), start=1)
    )
    return PlanSet(rounding, kind, tuple(plans))


Measured = Callable[[MixedPlan], Mapping[str, Estimate]]


def correlations(
    plans: Sequence[MixedPlan], measured: Measured, seed: int
) -> tuple[Correlations, ...]:
    """Return the correlations of each outcome that was measured of all plans."""
    figures = [measured(plan) for plan in plans]
    found = []
    for outcome in OUTCOMES if len(plans) >= LEAST_PLANS else ():
        if not all(outcome in one for one in figures):
            continue
        values = [_RISING[outcome] * one[outcome].value for one in figures]
        predicted = {name: [plan.predicted(name) for plan in plans] for name in PREDICTORS}
        found.append(
            Correlations(
                outcome,
                {name: correlation(predicted[name], values, seed) for name in PREDICTORS},
                difference(predicted["kl_sum"], predicted["delta"], values, seed),
            )
        )
    return tuple(found)


def same_widths(
    plans: Sequence[MixedPlan], measured: Measured, outcome: str = "loss"
) -> tuple[SameWidth, ...]:
    """Return the spread among plans with the same narrowest width, which decides their delta."""
    found = []
    for bits in sorted({plan.least_bits for plan in plans}):
        some = [plan for plan in plans if plan.least_bits == bits]
        values = [one[outcome].value for plan in some if outcome in (one := measured(plan))]
        if values:
            deltas, sums = [plan.delta for plan in some], [plan.kl_sum for plan in some]
            ranges = ((min(of), max(of)) for of in (deltas, sums, values))
            found.append(SameWidth(bits, len(some), *ranges))
    return tuple(found)


def plans_csv(plans: Sequence[MixedPlan], measured: Measured) -> str:
    """Return one line for each plan. Figures that are not measured yet are empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["plan", "rounding", "bits_of_layers", "mean_bits", "delta", "kl_sum", *OUTCOMES]
    )
    for plan in plans:
        found = measured(plan)
        figures = [found[name].value if name in found else "" for name in OUTCOMES]
        bits = widths_text(plan.subject.bits)
        predicted = [plan.mean_bits, plan.delta, plan.kl_sum]
        name = plan.subject.label.partition(",")[0]
        writer.writerow([name, plan.subject.rounding, bits, *predicted, *figures])
    return text.getvalue()


def plan_json(plan: MixedPlan, found: Mapping[str, Estimate]) -> dict[str, Any]:
    """Return a plan as plain values for JSON."""
    return {
        "bits_of_layers": list(plan.subject.bits),
        "rounding": None if plan.subject.rounding is None else asdict(plan.subject.rounding),
        "delta": plan.delta,
        "kl_sum": plan.kl_sum,
        **{name: found[name].value for name in OUTCOMES if name in found},
    }
