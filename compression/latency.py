"""The fastest plan of a smaller model on a described lab."""

from __future__ import annotations

from collections.abc import Sequence

from compression.choice import Rows
from model.quantize import Format
from model.spec import ModelSpec
from planning.build import RequestInput
from planning.labs.lab import Lab, lab_problem
from planning.plan import Plan
from planning.planner import solve
from planning.problem import ONE_TOKEN

TIME_LIMIT_S = 10.0


def plan_on(
    lab: Lab,
    spec: ModelSpec,
    formats: Sequence[Format],
    context_tokens: int,
    losses: tuple[Rows, float] | None = None,
) -> Plan:
    """Return the plan with the fastest token whose blocks have any of these formats.

    losses: what each block adds, and how much all may add. None: no bound.
    Raises LabError if no device runs them, InfeasiblePlan, and PlanError.
    """
    rows, budget = losses or (None, None)
    bits = tuple(fmt.bits for fmt in formats)
    request = RequestInput(
        spec,
        bits,
        min(context_tokens, spec.max_context),
        formats=dict(zip(bits, formats, strict=True)),
        objective=ONE_TOKEN,
        sensitivities=rows,
        quality_budget=budget,
    )
    return solve(lab_problem(lab, request), time_limit_s=TIME_LIMIT_S, advise=False)
