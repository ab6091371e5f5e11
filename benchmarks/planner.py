"""How fast the planner proves how good its plans are, on made-up fleets.

    make bench-planner
    python benchmarks/planner.py --quick
    python benchmarks/planner.py --layers 80 32 --devices 32 64 128 256 --seeds 3
    python benchmarks/planner.py --results table.jsonl     # may be stopped, and goes on there

For layers x devices the report has the seconds until the gap is proved or the limit passes, the
proved gap, and the number of seeds that reached it. Seeds without a plan and infeasible ones are
counted too, and stay in the total.

Instances have 4 widths. They have six kinds of device, each a little different, and three kinds of
link. All memory together holds the model at 8 bits 1.3 times, and a middling device 1.1 layers: a
large fleet has more than it needs. There are two rules of quality. `kl`: sensitivities differ from
layer to layer, and the budget is 1.5 times the sum at 6 bits throughout. `delta`: weight errors
differ from layer to layer, and half of the layers must not have 4 bits. `teams` is `kl` with
devices that can share layers. Two thirds of them have links of a gigabit, quick enough for it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import random
import statistics
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from model.spec import LayerSpec, ModelSpec
from planning.exact.solver import default_solver
from planning.plan import InfeasiblePlan, PlanError
from planning.planner import solve
from planning.problem import BlockOption, Device, Objective, PlanningProblem
from wire.profile import LinkProfile

OBJECTIVES = ("latency", "throughput", "request", "energy")
RULES = ("kl", "delta", "teams")
ROW = ("objective", "rule", "layers", "devices")
# Share of the time limit that a plan may be late by without being called so.
LATE = 0.05


class Case(NamedTuple):
    """One plan to make."""

    objective: str
    rule: str
    layers: int
    devices: int
    seed: int


# What a middling device holds at 8 bits at the least.
LEAST_LAYERS = 1.1
WIDTHS = (4, 6, 8, 16)
BLOCK_PARAMETERS = 50_000_000
# Relative memory, and milliseconds of a layer at 4 bits.
KINDS = ((2.0, 9.0), (4.0, 5.5), (4.0, 2.6), (8.0, 1.9), (8.0, 1.2), (3.0, 3.5))
# The round trip in seconds, and bytes per second.
WIRES = ((0.4e-3, 110e6), (0.6e-3, 11.5e6), (3e-3, 5e6))
TEAM_WIRES = ((0.15e-3, 117e6), (0.3e-3, 110e6), (3e-3, 5e6))
SUM_S = 5e-5


def spec(layers: int) -> ModelSpec:
    """Return a model of equal layers. Only its hidden size and block count matter here."""
    layer = LayerSpec(
        hidden=2048,
        heads=32,
        kv_heads=8,
        head_dim=64,
        ffn=5632,
        norm="rmsnorm",
        norm_eps=1e-5,
        norm_position="pre",
        activation="silu",
        gated=True,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
    )
    return ModelSpec(
        vocab=32_000,
        hidden=2048,
        embed_dim=2048,
        max_context=2048,
        layers=(layer,) * layers,
        learned_positions=0,
        position_offset=0,
        final_norm=True,
        tied_head=False,
        bos_token=1,
        eos_tokens=(2,),
    )


def _links(
    rng: random.Random, count: int, kinds: Sequence[tuple[float, float]]
) -> dict[tuple[int, int], LinkProfile]:
    """Return the links of ``count`` devices, each with a wire of one of ``kinds``."""
    wires = [rng.choice(kinds) for _ in range(count)]
    return {
        (i, j): LinkProfile(
            f"d{i}",
            f"d{j}",
            (wires[i][0] + wires[j][0]) / 2 * rng.uniform(0.9, 1.2),
            min(wires[i][1], wires[j][1]) * rng.uniform(0.8, 1.0),
        )
        for i, j in itertools.permutations(range(count), 2)
    }


def _losses(rng: random.Random, layers: int) -> list[dict[int, float]]:
    """Return what each block loses at each width. First and last layers lose the most."""
    ends = (0, layers + 1)
    losses = []
    for k in range(layers + 2):
        depth = (k - 1) / max(1, layers - 1)
        shape = 1 + 2 * math.exp(-6 * depth) + 1.5 * math.exp(-8 * (1 - depth))
        loss = 0.02 * shape * math.exp(rng.gauss(0, 0.5)) * (2 if k in ends else 1)
        losses.append({b: loss * (4.0 ** (4 - b) if b < 16 else 1e-7) for b in WIDTHS})
    return losses


def instance(
    layers: int, count: int, seed: int, objective: Objective, rule: str = "kl"
) -> PlanningProblem:
    """Return a random problem, which depends only on the arguments. ``rule`` is one of RULES."""
    rng = random.Random(f"{layers} {count} {seed}")
    blocks = layers + 2
    ends = (0, blocks - 1)
    stored = [
        {b: int(BLOCK_PARAMETERS * (b + 0.25) / 8) * (2 if k in ends else 1) for b in WIDTHS}
        for k in range(blocks)
    ]
    kinds = [rng.choice(KINDS) for _ in range(count)]
    shares = [memory * rng.uniform(0.9, 1.1) for memory, _ in kinds]
    # More devices than blocks do not each get less than a layer, as they would of a fixed total.
    total = max(1.3 * sum(row[8] for row in stored), count * LEAST_LAYERS * stored[1][8])
    together = rule == "teams"
    devices = []
    for i, ((_, milliseconds), share) in enumerate(zip(kinds, shares, strict=True)):
        layer_s = 1e-3 * milliseconds * rng.uniform(0.9, 1.1)
        fixed, power = rng.uniform(0.1, 0.25), rng.uniform(0.75, 1.0)

        def row(k: int, s: float = layer_s, f: float = fixed, p: float = power) -> Any:
            factor = {0: 0.3, blocks - 1: 2.0}.get(k, 1.0)
            return tuple(
                BlockOption(b, stored[k][b], factor * s * (f + (1 - f) * (b / 4) ** p), 0.1 * s)
                for b in WIDTHS
            )

        devices.append(
            Device(
                f"d{i}",
                memory_bytes=int(total * share / sum(shares)),
                storage_bytes=10**12,
                options=(row(0), *[row(1)] * layers, row(blocks - 1)),
                call_s=rng.uniform(1e-4, 4e-4),
                watts=4 + 8 / milliseconds,
                shares=together,
                sum_s=SUM_S if together else 0.0,
            )
        )
    links = _links(rng, count, TEAM_WIRES if together else WIRES)
    losses = _losses(rng, layers)
    errors = [{b: math.sqrt(row[4]) * 2.0 ** (4 - b) for b in WIDTHS} for row in losses]
    by_loss = rule != "delta"
    return PlanningProblem(
        spec=spec(layers),
        devices=tuple(devices),
        links=links,
        bits=WIDTHS,
        stored_bytes=tuple(stored),
        kv_bytes=(0,) * blocks,
        weight_errors=({},) * blocks if by_loss else tuple(errors),
        max_weight_error=(math.inf if by_loss else statistics.median(row[4] for row in errors),)
        * blocks,
        sensitivities=tuple(losses) if by_loss else (),
        quality_budget=1.5 * math.fsum(row[6] for row in losses) if by_loss else None,
        objective=objective,
        group_size=64 if together else 0,
    )


def machine() -> str:
    """Name the processor, and its cores that the operating system sees."""
    info = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip()
        for line in (info.read_text().splitlines() if info.exists() else [])
        if line.startswith(("model name", "Model"))
    ]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{max(1, len(names))} x {name}, Python {platform.python_version()}"


def attempt(options: argparse.Namespace, case: Case) -> dict[str, Any]:
    """One plan: what the planner says, and what it took."""
    objective = Objective(case.objective, 256, 128)  # type: ignore[arg-type] # an argument's choice
    problem = instance(case.layers, case.devices, case.seed, objective, case.rule)
    wall_s, cpu_s = time.monotonic(), time.process_time()
    outcome: dict[str, Any] = {"status": "plan", "gap": None, "solver": None}
    try:
        plan = solve(problem, time_limit_s=options.limit, gap=options.gap, solver=options.solver)
        outcome |= {"gap": plan.gap, "solver": plan.proof.solver, "value": plan.value}
    except InfeasiblePlan as error:
        outcome |= {"status": "infeasible", "says": str(error)[:200]}
    except PlanError as error:
        outcome |= {"status": "none", "says": str(error)[:200]}
    took_s = time.monotonic() - wall_s
    return {
        **case._asdict(),
        **outcome,
        "seconds": took_s,
        "cpu_s": time.process_time() - cpu_s,
        "over": max(0.0, took_s / options.limit - 1),
    }


def summary(options: argparse.Namespace, found: list[dict[str, Any]]) -> dict[str, Any]:
    """All seeds of one row of the table."""
    gaps = [one["gap"] for one in found if one["gap"] is not None]
    seconds = [one["seconds"] for one in found]
    return {
        **{key: found[0][key] for key in ("objective", "rule", "layers", "devices")},
        "seeds": len(found),
        "no_plan": sum(one["status"] == "none" for one in found),
        "infeasible": sum(one["status"] == "infeasible" for one in found),
        "solver": "/".join(sorted({one["solver"] for one in found if one["solver"]})),
        "median_s": statistics.median(seconds),
        "worst_s": max(seconds),
        "median_gap": statistics.median(gaps) if gaps else None,
        "worst_gap": max(gaps, default=None),
        "worst_over": max(one["over"] for one in found),
        "within_gap": sum(gap <= options.gap * (1 + 1e-9) for gap in gaps),
    }


def cell(row: dict[str, Any]) -> str:
    """Return a row of the results in a few words, as docs/planner.md has them."""
    parts = [f"{row['median_s']:.2f} s"]
    if row["median_gap"] is not None:
        gaps = f"{row['median_gap']:.2%} ({100 * row['worst_gap']:.2f})"
        parts[0] += f" / {gaps.replace('%', ' %')}"
    if row["within_gap"] < row["seeds"]:
        parts.append(f"{row['within_gap']} of {row['seeds']}")
    for key, words in (("no_plan", "no plan"), ("infeasible", "infeasible")):
        if row[key]:
            parts.append(f"{words}: {row[key]}")
    if row["worst_over"] > LATE:
        parts.append(f"{row['worst_over']:.0%} over the limit".replace("%", " %"))
    return ", ".join(parts)


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return one table per objective: layers down, devices across."""
    lines = []
    for kind in dict.fromkeys((row["objective"], row["rule"]) for row in rows):
        own = {
            (row["layers"], row["devices"]): row
            for row in rows
            if (row["objective"], row["rule"]) == kind
        }
        layers, counts = (sorted({key[at] for key in own}) for at in (0, 1))
        lines += [f"### {', '.join(kind)}", "", "| layers | " + " | ".join(map(str, counts)) + " |"]
        lines.append("|---" * (1 + len(counts)) + "|")
        for layer in layers:
            cells = [cell(own[layer, c]) if (layer, c) in own else "" for c in counts]
            lines.append(f"| {layer} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def cases(options: argparse.Namespace) -> list[Case]:
    """Everything to measure, in order."""
    axes = options.objectives, options.rules, options.layers, options.devices, range(options.seeds)
    return [Case(*values) for values in itertools.product(*axes)]


def measured(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All cases, those that the file of results has from there; the others are added to it."""
    kept: dict[Case, dict[str, Any]] = {}
    if options.results is not None and options.results.exists():
        for line in options.results.read_text().splitlines():
            row = json.loads(line)
            kept[Case(*(row[name] for name in Case._fields))] = row
    found = []
    for case in cases(options):
        if (row := kept.get(case)) is None:
            row = attempt(options, case)
            if options.results is not None:
                with options.results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            if options.json:
                print(json.dumps(row), flush=True)
            else:
                gap = row["status"] if row["gap"] is None else f"{row['gap']:.2%}"
                Console(stderr=True).print(f"{tuple(case)}: {gap}, {row['seconds']:.2f} s")
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Seconds and proved gaps of the planner, by layers and devices.",
        epilog="example: python benchmarks/planner.py --quick",
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 24, 32, 48, 80])
    parser.add_argument("--devices", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64, 128, 256])
    parser.add_argument(
        "--objectives", nargs="+", default=["latency", "throughput", "request"], choices=OBJECTIVES
    )
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=RULES)
    parser.add_argument("--solver", choices=("highs", "cbc"), default=default_solver())
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=10.0, help="seconds per plan")
    parser.add_argument("--gap", type=float, default=0.01, help="stop where this is proved")
    parser.add_argument("--results", type=Path, help="a file that rows are added to, and read from")
    parser.add_argument("--quick", action="store_true", help="12 and 32 layers, 2 to 8, 2 seeds")
    parser.add_argument("--json", action="store_true", help="JSON lines: heading, plans")
    parser.add_argument("--markdown", action="store_true", help="the tables of docs/planner.md")
    options = parser.parse_args()
    if options.quick:
        options.layers, options.devices, options.seeds = [12, 32], [2, 4, 8], 2
    heading = {
        "machine": machine(),
        "solver": f"search, then {options.solver}",
        "date": date.today().isoformat(),
        "gap": options.gap,
        "limit_s": options.limit,
    }
    if options.json:
        print(json.dumps(heading), flush=True)
    found = measured(options)
    if options.json:
        return
    rows = [
        summary(options, list(group))
        for _, group in itertools.groupby(found, key=lambda row: [row[name] for name in ROW])
    ]
    title = ", ".join(f"{key} {value}" for key, value in heading.items())
    if options.markdown:
        print(f"{title}\n{markdown(rows)}")
    else:
        Console().print(as_table(title, rows))


def as_table(title: str, rows: list[dict[str, Any]]) -> Table:
    """The rows for a terminal."""
    table = Table(title=title)
    names = ("objective", "rule", "layers", "devices", "solver")
    figures = ("s", "worst s", "gap", "worst gap", "over", "reached")
    for column in (*names, *figures):
        table.add_column(column, justify="right")
    forms = (
        ("median_s", "{:.2f}"),
        ("worst_s", "{:.2f}"),
        ("median_gap", "{:.2%}"),
        ("worst_gap", "{:.2%}"),
        ("worst_over", "{:.0%}"),
    )
    for row in rows:
        values = ["-" if row[key] is None else form.format(row[key]) for key, form in forms]
        reached = f"{row['within_gap']}/{row['seeds']}"
        table.add_row(*(str(row[name]) for name in names), *values, reached)
    return table


if __name__ == "__main__":
    main()
