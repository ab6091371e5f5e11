"""Several models to plan for the same devices."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from planning.plan import InfeasiblePlan, Plan, PlanError, assess, of_plan
from planning.problem import PlanningProblem
from planning.request_fields import WEIGHT_EXPECTED, is_weight


@dataclass(frozen=True, slots=True)
class JointProblem:
    """Models that share devices, and how much each of them counts.

    ``problems``: one for each model, all with the same devices in the same order. Limits of memory
    and storage are those of a model that is alone. A device's limits may differ between models,
    because a chip holds more layers of some. Then each model takes a share of its own limit.
    ``weights``: requests of each model, in any unit: a plan minimises the mean time of a request.
    ``fixed``: plans of models that are loaded already and stay. None: the model is to be planned.

    Raises ValueError for problems that do not go together.
    """

    names: tuple[str, ...]
    problems: tuple[PlanningProblem, ...]
    weights: tuple[float, ...]
    fixed: tuple[Plan | None, ...] = ()

    def __post_init__(self) -> None:
        if not self.fixed:
            object.__setattr__(self, "fixed", (None,) * len(self.names))
        counts = {len(self.names), len(self.problems), len(self.weights), len(self.fixed)}
        if len(counts) != 1 or 0 in counts:
            raise ValueError("each model needs a name, a problem and a weight")
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"a model is named twice: {', '.join(self.names)}")
        if not all(map(is_weight, self.weights)):
            raise ValueError(f"weights: expected {WEIGHT_EXPECTED} each, not {self.weights}")
        first = self.problems[0]
        for name, problem in zip(self.names, self.problems, strict=True):
            if device_names(problem) != device_names(first):
                raise ValueError(f"{self.names[0]} and {name} are planned for different devices")
            if problem.objective.kind != first.objective.kind:
                raise ValueError(f"{self.names[0]} and {name} have different objectives")

    @property
    def shares(self) -> tuple[float, ...]:
        """The part of all requests that goes to each model."""
        total = math.fsum(self.weights)
        return tuple(weight / total for weight in self.weights)

    @property
    def free(self) -> tuple[int, ...]:
        """The models to plan."""
        return tuple(m for m, plan in enumerate(self.fixed) if plan is None)

    def left(self, model: int, beside: Iterable[Plan]) -> PlanningProblem:
        """The problem of one model with what plans of other models leave of each device."""
        return lessened(self.problems[model], beside)

    def only(self, models: Iterable[int]) -> JointProblem:
        """The problem of some of the models."""
        some = tuple(models)
        return JointProblem(
            tuple(self.names[m] for m in some),
            tuple(self.problems[m] for m in some),
            tuple(self.weights[m] for m in some),
            tuple(self.fixed[m] for m in some),
        )


def not_even_alone(
    error: InfeasiblePlan, name: str, others: Sequence[str], *, loaded: bool = False
) -> InfeasiblePlan:
    """The error of a model without a plan, although the ``others`` take nothing yet.

    Its advice is for this model alone, and says so. ``loaded``: further models take something.
    """
    without = f", even without {' and '.join(others)}" if others else ""
    beside = " beside what is loaded" if loaded else ""
    return InfeasiblePlan(f"{name}{without}{beside}: {error}", error.advice)


def device_names(problem: PlanningProblem) -> tuple[str, ...]:
    """The names of the real devices, in order."""
    return tuple(problem.devices[i].name for i in problem.real)


def taken(plan: Plan) -> dict[str, tuple[Fraction, Fraction]]:
    """Device name -> the parts of its memory and of its storage that a plan takes."""
    return {
        held.device: (
            _part(held.memory_bytes, held.memory_limit_bytes),
            _part(held.storage_bytes, held.storage_limit_bytes),
        )
        for stage in plan.stages
        for held in stage.members or (stage,)
    }


def lessened(problem: PlanningProblem, beside: Iterable[Plan]) -> PlanningProblem:
    """The problem with what other models' plans leave of each device's memory and storage."""
    parts = [taken(plan) for plan in beside]

    def left(limit: int, used: list[Fraction]) -> int:
        return max(0, math.floor(limit * (1 - sum(used, Fraction(0)))))

    devices = []
    for device in problem.devices:
        used = [own[device.name] for own in parts if device.name in own]
        if used and device.team is None:
            device = replace(
                device,
                memory_bytes=left(device.memory_bytes, [memory for memory, _ in used]),
                storage_bytes=left(device.storage_bytes, [storage for _, storage in used]),
            )
        devices.append(device)
    return replace(problem, devices=tuple(devices))


def replanned(problem: PlanningProblem, plan: Plan) -> Plan:
    """The same plan with its figures, limits included, from another problem of the same model.

    Raises PlanError like ``assess``.
    """
    made, indices = of_plan(problem, plan)
    stages = [
        (index, stage.first, stage.bits) for index, stage in zip(indices, plan.stages, strict=True)
    ]
    return assess(made, stages, plan.proof, [stage.hop_bits for stage in plan.stages[:-1]])


def check_shared_limits(names: Iterable[str], plans: Iterable[Plan]) -> None:
    """Raise PlanError if the plans together take more than a device has."""
    totals: dict[str, list[Fraction]] = {}
    by_device: dict[str, list[str]] = {}
    for name, plan in zip(names, plans, strict=True):
        for device, parts in taken(plan).items():
            total = totals.setdefault(device, [Fraction(0), Fraction(0)])
            by_device.setdefault(device, []).append(name)
            for at, part in enumerate(parts):
                total[at] += part
    for device, total in totals.items():
        for kind, part in zip(("memory", "storage"), total, strict=True):
            if part > 1:
                raise PlanError(
                    f"{' and '.join(by_device[device])} together take {float(part):.1%} of the"
                    f" {kind} of {device}"
                )


def _part(used_bytes: int, limit_bytes: int) -> Fraction:
    if not used_bytes:
        return Fraction(0)
    # More than any other model leaves, if there is nothing at all.
    return Fraction(used_bytes, limit_bytes) if limit_bytes > 0 else Fraction(2)
