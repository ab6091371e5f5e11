"""Plans of several models as one file that a person can read, edit and load.

``plans`` has a plan of each model as ``planning.saved`` writes it. ``weights`` says how much each
counts. Figures are recomputed when it is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.bounded import read_bytes
from planning.joint.plan import JointPlan, assess_joint, verify_joint
from planning.joint.problem import JointProblem
from planning.plan import PlanError, Proof
from planning.request_fields import WEIGHT_EXPECTED, is_weight
from planning.saved import (
    MAX_FILE_BYTES,
    SavedPlan,
    parse_plan,
    plan_text,
    read_file,
    read_json,
)

FORMAT = 1
MAX_MODELS = 16
_KEYS = ("shoal_plans", "weights", "plans")


@dataclass(frozen=True, slots=True)
class SavedPlans:
    """The contents of a file with plans of several models, each with its weight."""

    source: str
    plans: tuple[SavedPlan, ...]
    weights: tuple[float, ...]

    def to_plan(self, problem: JointProblem) -> JointPlan:
        """The plans with figures from ``problem``, verified. Raises PlanError naming the file.

        The proved bound is 0, because no better plans were looked for.
        """
        models = tuple(plan.model for plan in self.plans)
        if models != problem.names:
            raise PlanError(
                f"{self.source}: its plans are of {', '.join(models)}, not of"
                f" {', '.join(problem.names)}"
            )
        plans = [plan.to_plan(own) for plan, own in zip(self.plans, problem.problems, strict=True)]
        found = assess_joint(problem, plans, Proof("file", 0.0, 0.0))
        try:
            verify_joint(found, problem)
        except PlanError as error:
            raise PlanError(f"{self.source}: {error}") from error
        return found


def plans_text(
    plan: JointPlan,
    weights: Sequence[float],
    *,
    slots: Sequence[int],
    context_tokens: Sequence[int],
    devices: Mapping[str, str] | None = None,
) -> str:
    """The file of a joint plan. ``devices``: ids by name, if they are known."""
    texts = [
        plan_text(one, name, slots=own_slots, context_tokens=context, devices=devices)
        for one, name, own_slots, context in zip(
            plan.plans, plan.names, slots, context_tokens, strict=True
        )
    ]
    entries = ",\n".join(
        "\n".join(f"    {line}" for line in text.rstrip("\n").split("\n")) for text in texts
    )
    lines = [
        "{",
        f'  "shoal_plans": {FORMAT},',
        f'  "weights": {json.dumps(list(weights))},',
        '  "plans": [',
        entries,
        "  ]",
        "}",
    ]
    return "\n".join(lines) + "\n"


def holds_several(path: Path) -> bool:
    """Whether a plan file is of several models. False if it cannot be read: its reader says why."""
    try:
        values = json.loads(read_bytes(path, MAX_MODELS * MAX_FILE_BYTES))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and "shoal_plans" in values


def read_plans(path: Path) -> SavedPlans:
    """The plans in a file. Raises PlanError with one line: file, place, what was expected."""
    return parse_plans(read_file(path, MAX_MODELS * MAX_FILE_BYTES), str(path))


def parse_plans(text: str | bytes, source: str) -> SavedPlans:
    """The plans in a text, which ``source`` names. Raises PlanError like ``read_plans``."""
    values = read_json(text, source)
    if not isinstance(values, dict) or "shoal_plans" not in values:
        raise PlanError(f"{source}: shoal_plans: expected {FORMAT}; a file of one plan has none")
    unknown = sorted(set(values) - set(_KEYS))
    if unknown:
        raise PlanError(f"{source}: {unknown[0]!r:.40}: known are {', '.join(_KEYS)}")
    if values["shoal_plans"] is True or values["shoal_plans"] != FORMAT:
        found = f"{values['shoal_plans']!r:.20}"
        raise PlanError(f"{source}: shoal_plans: {found}, this program reads {FORMAT}")
    plans = values.get("plans")
    if not isinstance(plans, list) or not 1 <= len(plans) <= MAX_MODELS:
        raise PlanError(f"{source}: plans: expected a list of 1 to {MAX_MODELS} plans")
    weights = values.get("weights", [1.0] * len(plans))
    if (
        not isinstance(weights, list)
        or len(weights) != len(plans)
        or not all(map(_is_weight, weights))
    ):
        raise PlanError(f"{source}: weights: expected {WEIGHT_EXPECTED} for each plan")
    saved = tuple(
        parse_plan(json.dumps(plan), f"{source}: plans[{index}]")
        for index, plan in enumerate(plans)
    )
    names = [plan.model for plan in saved]
    if len(set(names)) < len(names):
        raise PlanError(f"{source}: a model has two plans: {', '.join(names)}")
    return SavedPlans(source, saved, tuple(map(float, weights)))


def _is_weight(value: Any) -> bool:
    return type(value) in (int, float) and is_weight(value)
