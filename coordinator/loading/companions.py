"""Models that were planned together, when devices or figures have changed: a joint plan again.

A model that finds no room any more waits, and its error says so. The others go on.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from coordinator.loading.deployment import Deployment, Planned
from coordinator.loading.models import Models
from coordinator.loading.rebalance import Choice, revalued
from coordinator.loading.several import PlannedTogether, SeveralRequest, plan_together
from coordinator.loading.state import Present, request_of
from planning.joint.advice import JointInfeasible
from planning.joint.plan import assess_joint, mean, paces_of
from planning.plan import InfeasiblePlan
from planning.request import LoadRequest, model_name

PlanAlone = Callable[[LoadRequest], Awaitable[Planned]]
"""Plans one model as if those that were planned together with it were not there."""


@dataclass(frozen=True, slots=True)
class PlannedAgain:
    """Plans by model, and why each of the other models waits for room."""

    parts: Mapping[str, Planned]
    waiting: Mapping[str, str]


def companions(models: Models, name: str, *kinds: type[Present]) -> list[str]:
    """Return the models in one of these states that were planned together with ``name``."""
    present = dict(models.present())
    together = request_of(present[name]).together if name in present else {}
    return [
        other
        for other, state in present.items()
        if other != name
        and other in together
        and isinstance(state, kinds)
        and request_of(state).together == together
    ]


async def plan_again(
    requests: Iterable[LoadRequest], alone: PlanAlone, report: Callable[[str], None]
) -> PlannedAgain:
    """Plan models together again, with the weights that they were planned with.

    requests: as far as the devices that are here can carry them out. If all of them have a given
    plan, these are taken. Raises CoordinatorError, ModelError, and PlanError if no plans were found
    that may exist.
    """
    parts, waiting = {}, {}
    for request in requests:
        name = model_name(request.model)
        try:
            parts[name] = await alone(request)
        except InfeasiblePlan as error:
            waiting[name] = f"{name} waits for room: {error}"
    while len(parts) > 1 and not all(part.request.plan for part in parts.values()):
        try:
            together = await _planned_together(list(parts.values()), report)
        except InfeasiblePlan as error:
            for name in _left_out(error, parts):
                waiting[name] = f"{name} waits for room: {error}"
                del parts[name]
        else:
            return PlannedAgain(dict(zip(parts, together.parts, strict=True)), waiting)
    return PlannedAgain(parts, waiting)


def _left_out(error: InfeasiblePlan, parts: Mapping[str, Planned]) -> list[str]:
    """Return the models that must wait so that the others fit, or one if that is not known."""
    fitting = error.fitting if isinstance(error, JointInfeasible) else ()
    if fitting:
        return [name for name in parts if name not in fitting]
    return [min(parts, key=lambda name: parts[name].request.together[name])]


async def _planned_together(
    parts: Sequence[Planned], report: Callable[[str], None]
) -> PlannedTogether:
    requests = tuple(part.request for part in parts)
    weights = [one.together[model_name(one.model)] for one in requests]

    async def not_measured(part: Planned) -> None:
        """Measuring a loss takes longer than answers should wait."""

    return await plan_together(
        SeveralRequest(requests, tuple(weights)), parts, not_measured, report
    )


async def compared_together(
    group: Sequence[Deployment], parts: Sequence[Planned], report: Callable[[str], None]
) -> tuple[tuple[Planned, ...], Choice]:
    """Plan models that answer together again, and compare the mean time of a request of all.

    parts: a plan of each of them alone. Raises PlanError, InfeasiblePlan.
    """
    together = await _planned_together(parts, report)
    now = [revalued(one.plan, part.problem) for one, part in zip(group, parts, strict=True)]
    problem, then = together.problem, together.plan
    present = assess_joint(problem, now, then.proof)
    losses = [[plan.total_sensitivity for plan in plans] for plans in (now, then.plans)]
    loss_now, loss_then = (
        None if None in row else mean(problem.shares, [loss or 0.0 for loss in row])
        for row in losses
    )
    choice = Choice(
        tuple((one.name, plan.layout) for one, plan in zip(group, then.plans, strict=True)),
        mean(problem.shares, paces_of(present)),
        mean(problem.shares, paces_of(then)),
        loss_now,
        loss_then,
        max(plan.load_s + one.load_s for plan, one in zip(then.plans, group, strict=True)),
        is_wished=any(map(lacks_draft, group, together.parts)),
    )
    return together.parts, choice


def is_changed(deployment: Deployment, planned: Planned) -> bool:
    """Whether a deployment has to be loaded anew to be as planned."""
    return deployment.plan.layout != planned.plan.layout or lacks_draft(deployment, planned)


def lacks_draft(deployment: Deployment, planned: Planned) -> bool:
    """Whether a plan has the draft model that the user asked for, and the deployment has none."""
    return planned.draft is not None and deployment.draft is None
