"""Joint plans as JSON and as a picture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from model.spec import ModelSpec
from planning.insight.picture import plan_svg
from planning.insight.view import describe_plan
from planning.joint.compare import shared_devices
from planning.joint.forecast import simulated_s
from planning.joint.plan import JointPlan, mean
from planning.joint.problem import JointProblem
from planning.json_codec import to_plain

_HEAD = re.compile(r"<svg [^>]*width='([\d.]+)' height='([\d.]+)'")


def describe_joint(problem: JointProblem, plan: JointPlan, slots: Sequence[int]) -> dict[str, Any]:
    """A joint plan as JSON: each model's plan with its times, and each device with its models.

    Times are predicted seconds of one request of the objective, or joules of a token for energy.
    Those beside other models are simulated (planning/joint/forecast.py). ``planned_mean_s`` is what
    the planner minimised.
    """
    together_s = simulated_s(plan)
    return {
        "models": [
            {
                "model": name,
                "share": plan.shares[m],
                "plan": describe_plan(problem.problems[m].spec, plan.plans[m], slots[m]),
                "chunk_tokens": plan.chunk_tokens[m],
                "predicted_alone_s": plan.alone_s[m],
                "predicted_together_s": together_s[m],
            }
            for m, name in enumerate(plan.names)
        ],
        "devices": to_plain(shared_devices(problem, plan)),
        "objective": plan.plans[0].objective.kind,
        "predicted_mean_s": mean(plan.shares, together_s),
        "planned_mean_s": plan.value,
        "gap": plan.gap,
        "proven_optimal": plan.proven_optimal,
        "solver": plan.proof.solver,
        "solve_s": plan.proof.solve_s,
    }


def joint_svg(plan: JointPlan, specs: Sequence[ModelSpec], title: str, names: Sequence[str]) -> str:
    """The plans of all models below each other as one SVG file. ``names``: of all devices."""
    pictures = []
    for one, spec, name, alone_s, together_s in zip(
        plan.plans, specs, plan.names, plan.alone_s, simulated_s(plan), strict=True
    ):
        used = {device for stage in one.stages for device in stage.devices}
        unit = "J" if one.objective.kind == "energy" else "s"
        text = f"{name}: {alone_s:.3g} {unit} alone, {together_s:.3g} {unit} beside the others"
        unused = [device for device in names if device not in used]
        pictures.append(plan_svg(one, spec, f"{text} ({title})", unused))
    sizes = [_size(picture) for picture in pictures]
    width, height = max(w for w, _ in sizes), sum(h for _, h in sizes)
    parts, y = [], 0.0
    for picture, (_, own_height) in zip(pictures, sizes, strict=True):
        parts.append(picture.replace("<svg ", f"<svg y='{y:g}' ", 1).rstrip("\n"))
        y += own_height
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width:g}' height='{height:g}'"
        f" viewBox='0 0 {width:g} {height:g}' role='img'>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def _size(picture: str) -> tuple[float, float]:
    found = _HEAD.match(picture)
    if found is None:
        raise ValueError("a picture without a size")
    return float(found[1]), float(found[2])
