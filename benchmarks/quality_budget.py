"""Plans the demo model under several KL budgets, and measures whether each plan keeps its budget.

    python -m benchmarks.quality_budget

There are two equal devices. A layer takes as many milliseconds as it has bits, so the planner
spends all of the budget. Each budget is planned with the plain sum of sensitivities. It is also
planned with the margin that ``shoal calibrate --quality`` derives from eight random plans. If the
measured divergence is above the budget, the model is planned again as ``shoal plan
--check-quality`` does.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from backends.registry import BACKENDS, backend_class
from calibration.quality.blocks import check_plans, measure_plan_kl, measure_quality, random_plans
from calibration.quality.students import Options
from model.checkpoint import Checkpoint
from model.passages import built_in_text, split_passages
from model.quantize import Format
from model.tokenizer import Tokenizer
from planning.build import DeviceInput, RequestInput, build_problem
from planning.losses import MAX_CHECKS
from planning.plan import Plan
from planning.planner import solve
from planning.problem import PlanningProblem
from planning.sensitivity import budget_margin, scaled, tightened
from wire.profile import BlockTiming, DeviceProfile, LinkProfile

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples" / "tiny-opt" / "model"
BITS = (2, 3, 4, 5, 6, 8)
BUDGETS = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1)


def problem_of(
    checkpoint: Checkpoint, rows: Sequence[dict[int, float]], margin: float, budget: float
) -> PlanningProblem:
    """Return the problem of two devices that are slower with each bit, and the budget."""
    profile = DeviceProfile(
        "x", "x", 1, 1, "described", "", tuple((bits, bits) for bits in BITS),
        1 << 30, 1 << 30, 1 << 30, 0.0, 0.0,
    )  # fmt: skip
    timings = [
        BlockTiming(kind, 0, bits, bits * 1e-3, bits * 1e-3)
        for kind in ("embedding", "layer", "head")
        for bits in BITS
    ]
    request = RequestInput(
        checkpoint.spec,
        BITS,
        context_tokens=128,
        chunk_tokens=64,
        sensitivities=scaled(rows, margin),
        quality_budget=budget,
    )
    devices = [
        DeviceInput(name, profile, timings)
        for name in (
            "a",
            "b",
        )
    ]
    return build_problem(
        request, devices, [LinkProfile("a", "b", 1e-3, 1e8), LinkProfile("b", "a", 1e-3, 1e8)]
    )


def passages() -> list[str]:
    """Return the demo model's development questions with answers, as in docs/calibration.md."""
    entries = json.loads((ROOT / "examples" / "tiny-opt" / "dev.json").read_text())["data"]
    return [
        " ".join((paragraph["context"], qa["question"], qa["answers"][0]["text"]))
        for entry in entries
        for paragraph in entry["paragraphs"]
        for qa in paragraph["qas"]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--built-in-text", action="store_true", help="instead of the dev questions")
    parser.add_argument("--max-tokens", type=int, default=4096, metavar="N")
    parser.add_argument("--checked-plans", type=int, default=8, metavar="N")
    options = parser.parse_args()
    checkpoint = Checkpoint.open(MODEL)
    tokenizer = Tokenizer.load(MODEL)
    texts = built_in_text() if options.built_in_text else passages()
    sequences = split_passages(map(tokenizer.encode, texts), 128, options.max_tokens)
    backend = backend_class(next(iter(BACKENDS)))()
    with TemporaryDirectory() as name:
        directory = Path(name)
        how = Options(backend, threads=2)
        found = measure_quality(checkpoint, BITS, sequences, how, directory=directory)
        rows: list[dict[int, float]] = [{} for _ in range(checkpoint.spec.block_count)]
        for one in found:
            rows[one.block][one.bits] = one.kl
        plans = random_plans(checkpoint.spec.block_count, BITS, options.checked_plans)
        checks = check_plans(checkpoint, found, plans, sequences, how, directory=directory)
        margin = budget_margin((check.predicted_kl, check.measured_kl) for check in checks)

        def measured(plan: Plan) -> float:
            formats = [Format.of(placement.bits) for placement in plan.placements]
            return measure_plan_kl(checkpoint, formats, sequences, how, directory)

        print(f"{sum(map(len, sequences))} tokens, margin {margin:.2f} of {len(checks)} plans\n")
        print("| budget | margin | bits | sum | predicted | measured | of the budget | try |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for budget in BUDGETS:
            for used in (1.0, margin):
                problem = problem_of(checkpoint, rows, used, budget)
                plan = solve(problem)
                kl = measured(plan)
                tries = [(plan, kl)]
                while kl > budget and len(tries) < MAX_CHECKS:
                    plan = solve(tightened(problem, plan, kl))
                    kl = measured(plan)
                    tries.append((plan, kl))
                for number, (choice, real) in enumerate(tries, 1):
                    predicted = choice.total_sensitivity or 0.0
                    print(
                        f"| {budget:g} | {used:.2f} |"
                        f" {' '.join(str(item.bits) for item in choice.placements)} |"
                        f" {predicted / used:.2e} | {predicted:.2e} | {real:.2e} |"
                        f" {real / budget:.0%} | {number} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
