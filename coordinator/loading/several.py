"""Several models that are planned, and loaded, together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from coordinator.loading.deployment import Planned
from planning.errors import RequestInvalid
from planning.joint.plan import JointPlan, assess_joint, verify_joint
from planning.joint.planner import solve_joint
from planning.joint.problem import JointProblem
from planning.joint.view import describe_joint
from planning.losses import with_assumed
from planning.plan import InfeasiblePlan, Proof
from planning.request import MOST_TOGETHER, LoadRequest, model_name
from planning.request_fields import WEIGHT_EXPECTED, is_weight
from planning.sensitivity import tightened, whole_loss

MAX_CHECKS = 8
"""The most joint plans that are measured to keep the models' budgets."""
_ALONE_LIMIT_S = 5.0
"""The time for each model's plan alone, which says what is known of it and whether it fits."""


@dataclass(frozen=True, slots=True)
class SeveralRequest:
    """Requests to plan or load models together, and how many requests each of them will get.

    replaces: end all other models first. Raises RequestInvalid.
    """

    requests: tuple[LoadRequest, ...]
    weights: tuple[float, ...]
    replaces: bool = False

    def __post_init__(self) -> None:
        if not 2 <= len(self.requests) <= MOST_TOGETHER:
            raise _wrong_number()
        if len(set(self.names)) < len(self.names):
            raise RequestInvalid(f"a model is named twice: {', '.join(self.names)}", "models")
        if len({request.objective for request in self.requests}) > 1:
            raise RequestInvalid("models that are planned together have one objective", "models")
        for request in self.requests:
            if request.check_quality:
                raise RequestInvalid("check_quality is for one model: drop it", "check_quality")
        if len({request.plan is None for request in self.requests}) > 1:
            raise RequestInvalid("plan: give a plan of every model, or of none", "plan")
        if len(self.weights) != len(self.requests) or not all(map(is_weight, self.weights)):
            raise _wrong_weights()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(model_name(request.model) for request in self.requests)

    @property
    def time_limit_s(self) -> float:
        return max(request.time_limit_s for request in self.requests)

    def each(self) -> list[LoadRequest]:
        """The requests for a quick plan of each model alone. They name the others."""
        return [
            replace(
                request,
                time_limit_s=min(request.time_limit_s, _ALONE_LIMIT_S),
                replaces=self.replaces,
                together=dict(zip(self.names, self.weights, strict=True)),
            )
            for request in self.requests
        ]

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> SeveralRequest:
        """Read a user's JSON. Raises RequestInvalid naming the field."""
        unknown = sorted(set(values) - {"models", "weights", "replaces"})
        if unknown:
            raise RequestInvalid(f"{unknown[0]}: known are models, weights, replaces", unknown[0])
        models = values["models"]
        if not isinstance(models, list) or not all(isinstance(one, dict) for one in models):
            raise RequestInvalid("models: expected a list of requests", "models")
        if len(models) > MOST_TOGETHER:
            raise _wrong_number()
        weights = values.get("weights", [1.0] * len(models))
        if not isinstance(weights, list) or not all(type(one) in (int, float) for one in weights):
            raise _wrong_weights()
        replaces = values.get("replaces", False)
        if not isinstance(replaces, bool):
            raise RequestInvalid("replaces: expected true or false", "replaces")
        requests = tuple(LoadRequest.from_dict(one) for one in models)
        return SeveralRequest(requests, tuple(map(float, weights)), replaces)


def _wrong_number() -> RequestInvalid:
    return RequestInvalid(f"models: expected 2 to {MOST_TOGETHER} requests", "models")


def _wrong_weights() -> RequestInvalid:
    return RequestInvalid(f"weights: expected {WEIGHT_EXPECTED} for each model", "weights")


@dataclass(frozen=True, slots=True)
class PlannedTogether:
    """A joint plan with the problem that it was made for, and each model's part as planned."""

    problem: JointProblem
    plan: JointPlan
    parts: tuple[Planned, ...]

    def describe(self) -> dict[str, Any]:
        """The joint plan as JSON."""
        slots = [part.request.slots for part in self.parts]
        return describe_joint(self.problem, self.plan, slots)


def _as_given(asked: SeveralRequest, parts: Sequence[Planned]) -> PlannedTogether:
    """The plans that the requests give, together. Raises PlanError if they do not fit."""
    problems = tuple(part.problem for part in parts)
    problem = JointProblem(asked.names, problems, asked.weights)
    plan = assess_joint(problem, [part.plan for part in parts], Proof("file", 0.0, 0.0))
    verify_joint(plan, problem)
    return PlannedTogether(problem, plan, tuple(parts))


async def plan_together(
    asked: SeveralRequest,
    parts: Sequence[Planned],
    measured: Callable[[Planned], Awaitable[float | None]],
    report: Callable[[str], None],
) -> PlannedTogether:
    """The best joint plan of models that were each planned alone.

    ``measured`` is awaited for what a part's plan loses by its bits, or None. Plans are made again
    while a model loses more than its budget. Plans that the requests give are taken as they are.
    Raises PlanError, InfeasiblePlan.
    """
    if all(part.request.plan is not None for part in parts):
        return _as_given(asked, parts)
    problems = [part.problem for part in parts]
    for attempt in range(MAX_CHECKS):
        problem = JointProblem(asked.names, tuple(problems), asked.weights)
        report("solving")
        try:
            plan = await asyncio.to_thread(solve_joint, problem, time_limit_s=asked.time_limit_s)
        except InfeasiblePlan as error:
            if attempt:  # Its advice is about tighter budgets, which nobody gave.
                break
            raise with_assumed(error, [part.losses for part in parts]) from None
        found = []
        tight = False
        for m, part in enumerate(parts):
            made = replace(part, plan=plan.plans[m], measured_kl=None)
            kl = await measured(made)
            budget = part.problem.quality_budget
            if kl is not None and budget is not None:
                total = whole_loss(part.problem, made.plan, kl)
                if total > budget:
                    problems[m] = tightened(part.problem, made.plan, total)
                    tight = True
            found.append(replace(made, measured_kl=kl))
        if not tight:
            whole = JointProblem(asked.names, tuple(part.problem for part in parts), asked.weights)
            return PlannedTogether(whole, plan, tuple(found))
    raise RequestInvalid(
        "the plans lose more than their budgets: raise quality_budget, or allow more bits",
        "quality_budget",
    )
