"""Plans models together, and one after the other, on described labs. Prints a table.

    python -m benchmarks.joint [--time-limit S] [--case N]

It needs no devices: every figure is predicted. "One after the other" is what loading the models in
that order gives: each has the best plan for what the models before it leave.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from calibration.shapes import write_shape
from model.families import load_spec
from planning.build import RequestInput
from planning.joint.compare import Turn, better_of, one_after_the_other
from planning.joint.plan import JointPlan
from planning.joint.planner import solve_joint
from planning.joint.problem import JointProblem
from planning.labs.lab import lab_problem
from planning.labs.lab_file import read_lab
from planning.losses import assumed
from planning.plan import PlanError
from planning.problem import Objective, ObjectiveKind
from planning.request import DEFAULT_BITS, DEFAULT_CONTEXT_TOKENS
from planning.sensitivity import DEFAULT_QUALITY_BUDGET, choose_hops, scaled

LABS = Path(__file__).parents[1] / "examples" / "labs"


@dataclass(frozen=True, slots=True)
class Case:
    """Models on a lab, with the requests that go to each."""

    lab: str
    models: tuple[str, ...]
    weights: tuple[float, ...]
    objective: ObjectiveKind = "request"


CASES = (
    Case("home-4-pis", ("llama-1b", "qwen3-0.6b"), (1, 1)),
    Case("home-4-pis", ("llama-1b", "qwen3-0.6b"), (1, 3)),
    Case("home-4-pis", ("qwen2.5-1.5b", "qwen3-0.6b"), (1, 1), "latency"),
    Case("home-4-pis", ("smollm2-1.7b", "llama-1b"), (1, 1)),
    Case("four-pis-8b", ("llama-8b", "llama-3b"), (1, 1)),
    Case("four-pis-8b", ("llama-8b", "qwen3-4b", "llama-1b"), (1, 1, 1)),
    Case("smart-city-16", ("llama-3b", "llama-1b"), (1, 2)),
)


def problem_of(case: Case, *, context_tokens: int = DEFAULT_CONTEXT_TOKENS) -> JointProblem:
    """The case's models on its lab, with the default budget and a typical model's losses."""
    lab = read_lab(LABS / f"{case.lab}.yaml")
    bits = tuple(width for width in DEFAULT_BITS if width in lab.bits) or lab.bits
    problems = []
    for name in case.models:
        with TemporaryDirectory() as folder:
            spec = load_spec(write_shape(name, Path(folder)))
        raw = assumed(spec, "", [device.arithmetic for device in lab.devices])
        asked = [form.bits for form in lab.hop_formats] or None
        request = RequestInput(
            spec,
            bits,
            min(context_tokens, spec.max_context),
            objective=Objective(case.objective),
            sensitivities=scaled(raw.rows, raw.margin),
            own_sensitivities=raw.own,
            quality_budget=DEFAULT_QUALITY_BUDGET,
            hop_formats=choose_hops(
                asked, scaled([raw.hops], raw.margin)[0], DEFAULT_QUALITY_BUDGET
            ),
        )
        problems.append(lab_problem(lab, request))
    return JointProblem(case.models, tuple(problems), case.weights)


def run(case: Case, time_limit_s: float) -> tuple[JointPlan | str, tuple[Turn, ...]]:
    """The joint plan, or why there is none; and the models one after the other."""
    problem = problem_of(case)
    turns = one_after_the_other(problem, time_limit_s=time_limit_s)
    try:
        return better_of(solve_joint(problem, time_limit_s=time_limit_s), turns), turns
    except PlanError as error:
        return str(error), turns


def row_of(case: Case, plan: JointPlan | str, turns: Sequence[Turn]) -> str:
    """One row of the table."""
    weights = ":".join(f"{weight:g}" for weight in case.weights)
    lead = f"| {case.lab} | {', '.join(case.models)} | {weights} | {case.objective} |"
    if isinstance(plan, str):
        return f"{lead} {plan} |"
    values = [turn.value for turn in turns]
    orders = ["does not fit" if value is None else _seconds(value) for value in values]
    known = [value for value in values if value is not None]
    worst = "does not fit" if None in values else f"x {max(known) / plan.value:.2f}"
    best = f"x {min(known) / plan.value:.2f}" if known else "does not fit"
    simulated = [
        "-" if turn.simulated_mean_s is None else _seconds(turn.simulated_mean_s)
        for turn in (Turn((), plan), *turns)
    ]
    return (
        f"{lead} {_seconds(plan.value)} | {plan.gap:.0%} | {'; '.join(orders)} | {best} | {worst} |"
        f" {simulated[0]} | {'; '.join(simulated[1:])} |"
    )


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.0f} ms"


HEADING = (
    "| lab | models | requests | objective | joint | gap | one after the other, by order | best"
    " order | worst order | joint, simulated | orders, simulated |\n"
    "| --- | --- | --- | --- | ---: | ---: | --- | ---: | ---: | ---: | --- |"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--time-limit", type=float, default=60.0, metavar="S")
    parser.add_argument("--case", type=int, metavar="N", help="Only this row, from 1.")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    cases = CASES if options.case is None else CASES[options.case - 1 : options.case]
    if not options.json:
        print(HEADING)
    for case in cases:
        plan, turns = run(case, options.time_limit)
        if options.json:
            print(
                json.dumps(
                    {
                        "lab": case.lab,
                        "models": case.models,
                        "weights": case.weights,
                        "joint_s": plan if isinstance(plan, str) else plan.value,
                        "orders": [[list(turn.order), turn.value] for turn in turns],
                    }
                ),
                flush=True,
            )
        else:
            print(row_of(case, plan, turns), flush=True)


if __name__ == "__main__":
    main()
