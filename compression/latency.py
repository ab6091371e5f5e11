"""The predicted time of a token, by the best plan of a smaller model on a described lab."""

from __future__ import annotations

from model.quantize import Format
from model.spec import ModelSpec
from planning.build import RequestInput
from planning.labs.lab import Lab, lab_problem
from planning.plan import InfeasiblePlan, Plan
from planning.planner import solve
from planning.problem import ONE_TOKEN

TIME_LIMIT_S = 10.0


def plan_on(lab: Lab, spec: ModelSpec, fmt: Format, context_tokens: int) -> Plan | None:
    """Return the plan with the fastest token when all blocks have these bits, or None if none fits.

    Raises LabError if no device runs them.
    """
    request = RequestInput(
        spec,
        (fmt.bits,),
        min(context_tokens, spec.max_context),
        formats={fmt.bits: fmt},
        objective=ONE_TOKEN,
    )
    try:
        return solve(lab_problem(lab, request), time_limit_s=TIME_LIMIT_S)
    except InfeasiblePlan:
        return None
