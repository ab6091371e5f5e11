"""Joint plans beside what loading one model after the other gives, and where models wait."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from planning.exact.solver import SolverName
from planning.joint.contention import rounds, use_of
from planning.joint.forecast import simulated_s
from planning.joint.plan import JointPlan, mean, paces_of
from planning.joint.problem import JointProblem, device_names, taken
from planning.joint.rounds import in_turn
from planning.json_codec import to_plain

MOST_ORDERS = 6


@dataclass(frozen=True, slots=True)
class Turn:
    """Models loaded one after the other: each with the best plan that those before it leave.

    ``plan`` is None if one of the models finds no room.
    """

    order: tuple[str, ...]
    plan: JointPlan | None

    @property
    def together_s(self) -> tuple[float, ...] | None:
        return None if self.plan is None else self.plan.together_s

    @property
    def simulated_mean_s(self) -> float | None:
        """The mean time of a request by the simulation."""
        return None if self.plan is None else mean(self.plan.shares, simulated_s(self.plan))

    @property
    def value(self) -> float | None:
        return None if self.plan is None else self.plan.value


@dataclass(frozen=True, slots=True)
class Shared:
    """One device: the memory that each model takes, and its computing seconds for one request.

    ``memory_part``: of the device's limit, by all models. ``wait_s``: how long each model waits
    here for others during one of its requests, at most.
    """

    device: str
    memory_part: float
    memory_bytes: tuple[int, ...]
    busy_s: tuple[float, ...]
    wait_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class JointExplanation:
    """The work of a joint plan on each device, and what one after the other would give."""

    devices: tuple[Shared, ...]
    turns: tuple[Turn, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them."""
        return {
            "devices": to_plain(self.devices),
            "one_after_the_other": [
                {
                    "order": list(turn.order),
                    "planned_together_s": turn.together_s,
                    "planned_mean_s": turn.value,
                    "predicted_mean_s": turn.simulated_mean_s,
                }
                for turn in self.turns
            ],
        }


def better_of(plan: JointPlan, turns: Sequence[Turn]) -> JointPlan:
    """The plan, or that of a turn which is better, with the bound that holds for all plans.

    A turn is better only where time ended before the best plan was found.
    """
    best = min(
        (plan, *(turn.plan for turn in turns if turn.plan is not None)), key=lambda one: one.value
    )
    if best is plan:
        return plan
    bound = min(plan.least, best.value)
    return replace(best, proof=replace(plan.proof, bound=bound), least=bound)


def one_after_the_other(
    problem: JointProblem,
    *,
    time_limit_s: float,
    solver: SolverName | None = None,
    on_trial: Callable[[str, int, int], None] | None = None,
) -> tuple[Turn, ...]:
    """The models loaded in each order, at most MOST_ORDERS of them."""
    orders = list(itertools.islice(itertools.permutations(problem.free), MOST_ORDERS))
    found = []
    for at, order in enumerate(orders):
        names = tuple(problem.names[m] for m in order)
        if on_trial is not None:
            on_trial(", ".join(names), at, len(orders))
        plan = in_turn(problem, order, time_limit_s=time_limit_s / len(orders), solver=solver)
        found.append(Turn(names, plan))
    return tuple(found)


def shared_devices(problem: JointProblem, plan: JointPlan) -> tuple[Shared, ...]:
    """The work of the models on each device that any of them uses."""
    uses = [use_of(one, rows) for one, rows in zip(plan.plans, plan.chunk_tokens, strict=True)]
    paces = paces_of(plan)
    held = [
        {one.device: one.memory_bytes for s in own.stages for one in s.members or (s,)}
        for own in plan.plans
    ]
    parts = [taken(one) for one in plan.plans]
    found = []
    for name in device_names(problem.problems[0]):
        if not any(name in own for own in held):
            continue
        wait_s = []
        for m, use in enumerate(uses):
            passes = [
                rounds(paces[m], paces[k]) * other.busy_s.get(name, 0.0)
                for k, other in enumerate(uses)
                if k != m
            ]
            wait_s.append(
                max(0.0, use.busy_s[name] + math.fsum(passes) - use.alone_s)
                if name in use.busy_s
                else 0.0
            )
        found.append(
            Shared(
                device=name,
                memory_part=float(sum(own[name][0] for own in parts if name in own)),
                memory_bytes=tuple(own.get(name, 0) for own in held),
                busy_s=tuple(use.busy_s.get(name, 0.0) for use in uses),
                wait_s=tuple(wait_s),
            )
        )
    return tuple(found)
