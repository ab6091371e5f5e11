"""The cost of a split on this machine: decode speed of 1, 2 and 3 agents, interleaved.

    make bench
    make bench ARGS='--rounds 5 --bits 8 --json'

Each run is a whole `shoal demo` (processes, mDNS, plan, load) of the same model at the same width.
Memory limits force the split. The report has medians of the time per token, measured and predicted,
and of the speed over that of one agent in the same round. All processes share this machine, so hops
have no wire but compete for its cores.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).parents[1]
PROMPT = "The lamp is in the attic."


def demo(options: argparse.Namespace, agents: int) -> dict[str, Any]:
    """Run `shoal demo` once, and return its JSON object. Exits if it fails."""
    command = [
        *(sys.executable, "-m", "cli", "demo", "--json"),
        *(f"--agents={agents}", f"--bits={options.bits}", "--max-weight-error=none"),
        *(f"--prompt={PROMPT}", "--temperature=2", f"--max-tokens={options.tokens}"),
    ]
    if options.model:
        command.append(f"--model={options.model}")
    completed = subprocess.run(  # noqa: S603 - our own command
        command, capture_output=True, text=True, cwd=ROOT, check=False
    )
    if completed.returncode:
        sys.exit(completed.stderr.strip())
    answer: dict[str, Any] = json.loads(completed.stdout.splitlines()[-1])
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Decode speed of 1, 2 and 3 agents on this machine, interleaved.",
        epilog="example: python benchmarks/split.py --rounds 5 --bits 16 --json",
    )
    parser.add_argument("--model", type=Path, help="default: the embedded tiny OPT")
    parser.add_argument("--bits", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    measured_ms: dict[int, list[float]] = defaultdict(list)
    predicted_ms: dict[int, list[float]] = defaultdict(list)
    counts = (1, 2, 3)
    for _ in track(range(options.rounds), console=Console(stderr=True), transient=True):
        for agents in counts:
            answer = demo(options, agents)
            if answer["decode_tokens_per_s"] is None:
                continue
            measured_ms[agents].append(1e3 / answer["decode_tokens_per_s"])
            predicted_ms[agents].append(answer["plan"]["predicted_ms_per_token"])
    rows = [
        {
            "agents": agents,
            "measured_ms_per_token": statistics.median(measured_ms[agents]),
            "predicted_ms_per_token": statistics.median(predicted_ms[agents]),
            "speed_ratio_to_one_agent": statistics.median(
                one / many for one, many in zip(measured_ms[1], measured_ms[agents], strict=True)
            ),
        }
        for agents in counts
    ]
    if options.json:
        print(json.dumps({"machine": platform.processor() or platform.machine(), "rows": rows}))
        return
    table = Table(title=f"{options.rounds} interleaved rounds at {options.bits} bits, medians")
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(str(row["agents"]), *(f"{row[key]:.3f}" for key in list(row)[1:]))
    Console().print(table)


if __name__ == "__main__":
    main()
