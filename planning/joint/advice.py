"""Says why several models do not fit together, and which changes would help."""

from __future__ import annotations

from planning.exact.solver import SolverName
from planning.joint.problem import JointProblem
from planning.plan import InfeasiblePlan


def explain(
    problem: JointProblem, solver: SolverName | None, time_limit_s: float
) -> InfeasiblePlan:
    return InfeasiblePlan("no plans fit together")
