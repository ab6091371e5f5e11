"""Planning problems of described labs, with the widths that their devices run."""

from __future__ import annotations

from typing import Any

from model.spec import ModelSpec
from planning.build import RequestInput
from planning.labs.lab import Lab, lab_problem
from planning.problem import PlanningProblem


def described_problem(
    lab: Lab, spec: ModelSpec, *, context_tokens: int = 64, **request: Any
) -> PlanningProblem:
    """The problem of ``spec`` over ``lab``; ``request`` are other fields of a RequestInput."""
    bits = request.pop("bits", lab.bits)
    return lab_problem(lab, RequestInput(spec, bits, context_tokens, **request))
