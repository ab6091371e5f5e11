"""Decoding speed of fresh processes, by the memory that holds their weights.

    make bench-pages
    make bench-pages ARGS='--processes 10 --bits 4,8 --threads 1,2 --json'

Every process loads the same stage (layers of random weights, Llama's shape) and times tokens. There
are three kinds of memory. Weights are mapped from prepared files, as an agent's are. Or they are on
the heap, as without prepared files. Or they are on a heap of huge pages
(GLIBC_TUNABLES=glibc.malloc.hugetlb=1).

In each round all kinds take turns, each in a process of its own. A process counts with the median
of its tokens, and with its fastest 5 %, which other work on the machine disturbs less. Spread is
the slowest process over the fastest.

The artifacts are kept in --state.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from backends.base import StageOptions
from backends.registry import backend_class
from calibration.layers import random_artifacts
from calibration.shapes import shape_spec
from model.quantize import Format
from model.spec import ModelSpec

STATE = Path("/var/tmp/shoal-pages")  # noqa: S108 - a fixed place, so that a run can continue
CONTEXT_TOKENS = 256
BEHIND = 32
HUGE = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
KINDS: dict[str, dict[str, str]] = {"mapped": {}, "heap": {}, "heap, huge pages": HUGE}


def stage_spec(layers: int) -> ModelSpec:
    """Return this many of Llama-1B's layers, with a small vocabulary."""
    spec = shape_spec("llama-1b")
    return replace(spec, layers=spec.layers[:1] * layers, vocab=1024)


def work(options: argparse.Namespace) -> dict[str, float]:
    """Load the stage in this process and time its tokens, in milliseconds."""
    spec, bits = stage_spec(options.layers), options.bits[0]
    home = options.state / f"{options.layers}-{bits}"
    names = json.loads((home / "blocks.json").read_text(encoding="ascii"))
    artifacts = [(block, home / name) for block, name in enumerate(names)]
    mapped = options.kind == "mapped"
    prepared = home / "prepared" if mapped else None
    chosen = StageOptions(1, CONTEXT_TOKENS, options.threads[0], prepared_dir=prepared)
    with closing(backend_class("onnx_cpu")().load(spec, artifacts, chosen)) as stage:
        stage.forward(0, 0, np.ones(BEHIND, np.int64), logits=False)
        times_ms = []
        for number in range(options.tokens + 5):
            started_s = time.perf_counter()
            stage.forward(0, BEHIND, np.array([number]))
            times_ms.append(1e3 * (time.perf_counter() - started_s))
    times_ms = times_ms[5:]
    return {"median_ms": median(times_ms), "fast_ms": float(np.quantile(times_ms, 0.05))}


def prepare(options: argparse.Namespace, bits: int) -> None:
    """Write the blocks of one width, unless they are there."""
    home = options.state / f"{options.layers}-{bits}"
    if not (home / "blocks.json").exists():
        home.mkdir(parents=True, exist_ok=True)
        spec = stage_spec(options.layers)
        formats = [Format.of(bits)] * spec.block_count
        made = list(random_artifacts(home, spec, range(spec.block_count), formats))
        (home / "blocks.json").write_text(json.dumps([path.name for _, path in made]))


def fresh(options: argparse.Namespace, kind: str, bits: int, threads: int) -> dict[str, float]:
    """Run a fresh process, and return its figures."""
    command = [
        *(sys.executable, "-m", "benchmarks.pages", f"--kind={kind}", f"--state={options.state}"),
        *(f"--bits={bits}", f"--threads={threads}", f"--layers={options.layers}"),
        f"--tokens={options.tokens}",
    ]
    environment = {**os.environ, **KINDS[kind]}
    completed = subprocess.run(  # noqa: S603 - our own command
        command, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    figures: dict[str, float] = json.loads(completed.stdout)
    return figures


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each width, number of threads and kind of memory."""
    cells = [
        (bits, threads, kind)
        for bits in options.bits
        for threads in options.threads
        for kind in KINDS
    ]
    for bits in options.bits:
        prepare(options, bits)
        fresh(options, "mapped", bits, 1)  # The first process prepares the files.
    found: dict[tuple[int, int, str], list[dict[str, float]]] = {cell: [] for cell in cells}
    rounds = track(range(options.processes), console=Console(stderr=True), transient=True)
    for _ in rounds:
        for bits, threads, kind in cells:
            found[bits, threads, kind].append(fresh(options, kind, bits, threads))
    rows = []
    for (bits, threads, kind), runs in found.items():
        row: dict[str, Any] = {"bits": bits, "threads": threads, "kind": kind}
        for figure in ("median_ms", "fast_ms"):
            values = [run[figure] for run in runs]
            against = [run[figure] for run in found[bits, threads, "mapped"]]
            row[figure] = median(values)
            row[f"{figure}_spread"] = max(values) / min(values)
            ratios = [own / mapped for own, mapped in zip(values, against, strict=True)]
            row[f"{figure}_against_mapped"] = median(ratios)
        rows.append(row)
    return rows


def report(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(title="ms per token of fresh processes, by where weights lie")
    headings = ("bits", "threads", "weights", "median", "spread", "against mapped")
    for name in (*headings, "fastest 5 %", "spread", "against mapped"):
        table.add_column(name, justify="right")
    for row in rows:
        figures = []
        for name in ("median_ms", "fast_ms"):
            figures += [f"{row[name]:.2f}", f"{row[f'{name}_spread']:.2f}"]
            figures.append(f"{row[f'{name}_against_mapped']:.3f}")
        table.add_row(str(row["bits"]), str(row["threads"]), row["kind"], *figures)
    Console(width=120).print(table)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Decoding speed of fresh processes, by the memory that their weights lie in.",
        epilog="example: python -m benchmarks.pages --processes 10 --bits 4,8 --threads 1,2",
    )
    parser.add_argument("--state", type=Path, default=STATE, metavar="DIR", help=f"default {STATE}")
    parser.add_argument("--processes", type=int, default=10, metavar="N", help="of each kind")
    parser.add_argument("--bits", type=_numbers, default=[4, 8], metavar="4,8")
    parser.add_argument("--threads", type=_numbers, default=[1, 2], metavar="1,2")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=80, metavar="N", help="of each process")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--kind", choices=list(KINDS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kind is not None:
        print(json.dumps(work(options)))
        return
    load = os.getloadavg()[0]
    rows = measure(options)
    if options.json:
        machine = platform.processor() or platform.machine()
        print(json.dumps({"machine": machine, "load_before": load, "rows": rows}))
    else:
        report(rows)
        print(f"load average when it began: {load:.1f}")


if __name__ == "__main__":
    main()
