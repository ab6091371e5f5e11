"""How fast the planner proves how good its plans are, on made-up fleets with a quality budget.

    make bench-planner
    python benchmarks/planner.py --quick
    python benchmarks/planner.py --layers 80 --devices 32 --seeds 5 --gap 0.01 --json
    python benchmarks/planner.py --solver cbc --markdown

Per layers x devices: seconds until the gap is proved or the limit passes, the proved gap, and how
many of the seeds reached it; seeds without a plan, and those proved infeasible, are counted too and
never left out of "of how many". Instances have 4 widths, sensitivities that differ from layer to
layer, six kinds of device, each a little different, and three kinds of link. The devices' memory
holds the model at 8 bits 1.3 times in all; the budget is 1.5 times what 6 bits throughout take.
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
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from model.spec import LayerSpec, ModelSpec
from planning.exact.solver import default_solver
from planning.plan import InfeasiblePlan, PlanError
from planning.planner import solve
from planning.problem import BlockOption, Device, Objective, PlanningProblem
from wire.profile import LinkProfile

# What a middling device holds at 8 bits at the least.
LEAST_LAYERS = 1.1
WIDTHS = (4, 6, 8, 16)
BLOCK_PARAMETERS = 50_000_000
# (relative memory, milliseconds of a layer at 4 bits)
KINDS = ((2.0, 9.0), (4.0, 5.5), (4.0, 2.6), (8.0, 1.9), (8.0, 1.2), (3.0, 3.5))
# (round trip in seconds, bytes per second)
WIRES = ((0.4e-3, 110e6), (0.6e-3, 11.5e6), (3e-3, 5e6))


def spec(layers: int) -> ModelSpec:
    """A model of equal layers; only its hidden size and block count matter here."""
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


def instance(layers: int, count: int, seed: int, objective: Objective) -> PlanningProblem:
    """A random problem; the same for the same arguments."""
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
            )
        )
    wires = [rng.choice(WIRES) for _ in devices]
    links = {
        (i, j): LinkProfile(
            f"d{i}",
            f"d{j}",
            (wires[i][0] + wires[j][0]) / 2 * rng.uniform(0.9, 1.2),
            min(wires[i][1], wires[j][1]) * rng.uniform(0.8, 1.0),
        )
        for i, j in itertools.permutations(range(count), 2)
    }
    losses = []
    for k in range(blocks):
        depth = (k - 1) / max(1, layers - 1)
        shape = 1 + 2 * math.exp(-6 * depth) + 1.5 * math.exp(-8 * (1 - depth))
        loss = 0.02 * shape * math.exp(rng.gauss(0, 0.5)) * (2 if k in ends else 1)
        losses.append({b: loss * (4.0 ** (4 - b) if b < 16 else 1e-7) for b in WIDTHS})
    return PlanningProblem(
        spec=spec(layers),
        devices=tuple(devices),
        links=links,
        bits=WIDTHS,
        stored_bytes=tuple(stored),
        kv_bytes=(0,) * blocks,
        weight_errors=tuple({} for _ in range(blocks)),
        max_weight_error=(math.inf,) * blocks,
        sensitivities=tuple(losses),
        quality_budget=1.5 * math.fsum(row[6] for row in losses),
        objective=objective,
    )


def machine() -> str:
    """The processor's name, and how many of it the operating system sees."""
    info = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip()
        for line in (info.read_text().splitlines() if info.exists() else [])
        if line.startswith(("model name", "Model"))
    ]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{max(1, len(names))} x {name}, Python {platform.python_version()}"


def measure(options: argparse.Namespace, layers: int, count: int, kind: Any) -> dict[str, Any]:
    """One row of the table."""
    seconds, gaps, failed, infeasible = [], [], 0, 0
    for seed in range(options.seeds):
        problem = instance(layers, count, seed, Objective(kind, 256, 128))
        started_s = time.monotonic()
        try:
            plan = solve(
                problem, time_limit_s=options.limit, gap=options.gap, solver=options.solver
            )
        except InfeasiblePlan:
            infeasible += 1
            continue
        except PlanError:
            failed += 1
            continue
        seconds.append(time.monotonic() - started_s)
        gaps.append(plan.gap)
    return {
        "objective": kind,
        "layers": layers,
        "devices": count,
        "seeds": options.seeds,
        "no_plan": failed,
        "infeasible": infeasible,
        "median_s": statistics.median(seconds) if seconds else None,
        "worst_s": max(seconds, default=None),
        "median_gap": statistics.median(gaps) if gaps else None,
        "worst_gap": max(gaps, default=None),
        "within_gap": sum(gap <= options.gap * (1 + 1e-9) for gap in gaps),
    }


def cell(row: dict[str, Any]) -> str:
    """A row of the results in a few words, as docs/planner.md has them."""
    if row["infeasible"] == row["seeds"]:
        return "-"
    parts = []
    if row["median_s"] is not None:
        gaps = f"{row['median_gap']:.2%} ({100 * row['worst_gap']:.2f})"
        parts.append(f"{row['median_s']:.2f} s / {gaps.replace('%', ' %')}")
    if row["within_gap"] < row["seeds"]:
        parts.append(f"{row['within_gap']} of {row['seeds']}")
    for key, words in (("no_plan", "no plan"), ("infeasible", "infeasible")):
        if row[key]:
            parts.append(f"{words}: {row[key]}")
    return ", ".join(parts)


def markdown(rows: list[dict[str, Any]]) -> str:
    """One table per objective: layers down, devices across."""
    lines = []
    for kind in dict.fromkeys(row["objective"] for row in rows):
        own = {(row["layers"], row["devices"]): row for row in rows if row["objective"] == kind}
        layers, counts = (list(dict.fromkeys(key[at] for key in own)) for at in (0, 1))
        lines += [f"### {kind}", "", "| layers | " + " | ".join(map(str, counts)) + " |"]
        lines.append("|---" * (1 + len(counts)) + "|")
        lines += [
            f"| {layer} | " + " | ".join(cell(own[layer, count]) for count in counts) + " |"
            for layer in layers
        ]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Seconds and proved gaps of the planner, by layers and devices.",
        epilog="example: python benchmarks/planner.py --quick",
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 24, 32, 48, 80])
    parser.add_argument("--devices", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--objectives", nargs="+", default=["latency", "throughput"])
    parser.add_argument("--solver", choices=("highs", "cbc"), default=default_solver())
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=10.0, help="seconds per plan")
    parser.add_argument("--gap", type=float, default=0.01, help="stop where this is proved")
    parser.add_argument("--quick", action="store_true", help="12 and 32 layers, 2 to 8, 2 seeds")
    parser.add_argument(
        "--json", action="store_true", help="JSON lines instead of a table: heading, rows"
    )
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
    rows = []
    for kind in options.objectives:
        for layers, count in itertools.product(options.layers, options.devices):
            rows.append(measure(options, layers, count, kind))
            if options.json:
                print(json.dumps(rows[-1]), flush=True)
            else:
                Console(stderr=True).print(f"{kind} {layers} x {count} done")
    if options.json:
        return
    if options.markdown:
        print(", ".join(f"{key} {value}" for key, value in heading.items()))
        print(markdown(rows))
        return
    table = Table(title=", ".join(f"{key} {value}" for key, value in heading.items()))
    for column in ("objective", "layers", "devices", "s", "worst s", "gap", "worst gap", "reached"):
        table.add_column(column, justify="right")
    for row in rows:
        figures = [
            "-" if row[key] is None else form.format(row[key])
            for key, form in (
                ("median_s", "{:.2f}"),
                ("worst_s", "{:.2f}"),
                ("median_gap", "{:.2%}"),
                ("worst_gap", "{:.2%}"),
            )
        ]
        names = [row["objective"], str(row["layers"]), str(row["devices"])]
        table.add_row(*names, *figures, f"{row['within_gap']}/{row['seeds']}")
    Console().print(table)


if __name__ == "__main__":
    main()
