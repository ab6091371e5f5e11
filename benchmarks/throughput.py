"""Tokens per second of several generations at once over 1 to 4 emulated hosts, and predictions.

    make bench-throughput
    python -m benchmarks.throughput --hosts 1,4 --sequences 4 --json

Each host has 30 % of a core and a wired link (testbed/). The model has 943 million random weights
at 8 bits. For each number of hosts, the planner's best plan for throughput is loaded. It runs one
generation at a time, then several at once, in turns. A prompt is one token long, so every pass is a
token's. The client measures tokens per second of all generations, from the first request to the end
of the last answer. A plan predicts them from passes of several rows (planning/together.py).

The model and the measurements of the hosts are kept in --state.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.fidelity import CONTEXT_TOKENS, WIRED, plan_of, request, say
from benchmarks.random_model import Shape, make_model
from cli.client import Client
from planning.forecast import decode_tokens_per_s
from testbed.bed import Testbed
from testbed.cluster import Cluster
from testbed.lab import AgentSettings
from testbed.network import HUB, Host, Link, Network

STATE = Path("/var/tmp/shoal-throughput")  # noqa: S108 - a fixed place, so that a run can continue

SHAPE = Shape(hidden=2048, ffn=5632, layers=20, heads=16)
CPU_PERCENT = 30.0
BITS = 8
MEMORY_BYTES = 3 << 30
NAMES = ("ash", "birch", "cedar", "dogwood")


def network(hosts: int) -> Network:
    """Return this many equal hosts, and the coordinator's, whose links are not shaped."""
    names = NAMES[:hosts]
    links = {(a, b): WIRED for a in names for b in names if a != b}
    for name in names:
        links[HUB, name] = links[name, HUB] = Link()
    return Network(
        {HUB: Host()} | {name: Host(cpu_percent=CPU_PERCENT) for name in names}, links, None
    )


def measure(options: argparse.Namespace, hosts: int) -> dict[str, Any]:
    """Measure one number of hosts on a testbed of its own, and return a row of the table."""
    most = max(options.sequences)
    body = {
        **request(options.state, (BITS,)),
        "objective": {"kind": "throughput"},
        "slots": most,
        # Each host holds some of the layers, so there are as many stages as hosts.
        "pins": {
            str(1 + at * SHAPE.layers // hosts): name for at, name in enumerate(NAMES[:hosts])
        },
    }
    with Testbed(network(hosts), "throughput") as bed:
        shoal = Cluster(bed, options.state / "hosts")
        shoal.start_coordinator()
        url = shoal.open_door(0)
        with Client(url) as client:
            for count, name in enumerate(NAMES[:hosts], start=1):
                shoal.start_agent(name, AgentSettings(MEMORY_BYTES, 8 << 30))
                shoal.wait_for_agents(NAMES[:count])
                # The hosts share a processor here, so they measure themselves one at a time.
                plain = request(options.state, (BITS,))
                client.operate("/shoal/v1/plan", plain, lambda step: None)
            say(f"{hosts} hosts: planning and loading")
            described = client.operate("/shoal/v1/load", body, lambda step: None)["plan"]
        plan = plan_of(described)
        say(f"{hosts} hosts: measuring")
        generate(url, most, 2)
        rates: dict[int, list[float]] = {count: [] for count in (1, *options.sequences)}
        drawn: dict[int, list[float]] = {count: [] for count in rates}
        for _ in range(options.rounds):
            for count, found in rates.items():
                found.append(generate(url, count, options.tokens))
                drawn[count].append(generate(url, count, options.tokens, temperature=1.0))
    return {
        "hosts": hosts,
        "stages": [[stage.device, len(stage.bits)] for stage in plan.stages],
        "cells": [
            {
                "sequences": count,
                "tokens_per_s": statistics.median(found),
                "all_tokens_per_s": found,
                "drawn_tokens_per_s": statistics.median(drawn[count]),
                "drawn_against_greedy": statistics.median(
                    rate / greedy for rate, greedy in zip(drawn[count], found, strict=True)
                ),
                "against_one": statistics.median(
                    rate / alone for rate, alone in zip(found, rates[1], strict=True)
                ),
                "predicted_tokens_per_s": decode_tokens_per_s(plan, count),
            }
            for count, found in rates.items()
        ],
    }


def generate(url: str, count: int, tokens: int, temperature: float = 0.0) -> float:
    """Return tokens per second of this many generations at once, all together."""

    def one(first: int) -> None:
        body = {
            "prompt": [first],
            "max_tokens": tokens,
            "temperature": temperature,
            "speculative.n_max": 0,  # A plan predicts passes of one row of each sequence.
        }
        with Client(url) as client:
            answer = client.post("/v1/completions", body)
        if answer["usage"]["completion_tokens"] != tokens:
            raise RuntimeError(f"{tokens} tokens were asked for, and these came: {answer}")

    with ThreadPoolExecutor(count) as pool:
        started_s = time.perf_counter()
        list(pool.map(one, range(1, 1 + count)))
        return count * tokens / (time.perf_counter() - started_s)


def report(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(title="tokens per second of several generations at once")
    for name in ("hosts", "at once", "greedy", "temperature 1", "against one", "predicted"):
        table.add_column(name, justify="right")
    for row in rows:
        for cell in row["cells"]:
            table.add_row(
                str(row["hosts"]),
                str(cell["sequences"]),
                f"{cell['tokens_per_s']:.2f}",
                f"{cell['drawn_tokens_per_s']:.2f}",
                f"{cell['against_one']:.2f}",
                f"{cell['predicted_tokens_per_s']:.2f}",
            )
    Console().print(table)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Several generations at once over 1 to 4 emulated hosts; needs root.",
        epilog="example: python -m benchmarks.throughput --hosts 1,4 --sequences 4 --json",
    )
    parser.add_argument("--state", type=Path, default=STATE, metavar="DIR", help=f"default {STATE}")
    parser.add_argument("--hosts", type=_numbers, default=[1, 2, 3, 4], metavar="1,2,3,4")
    parser.add_argument("--sequences", type=_numbers, default=[4, 8], metavar="4,8")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--tokens", type=int, default=16, metavar="N", help="of a generation")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    make_model(options.state / "model", SHAPE, CONTEXT_TOKENS)
    rows = [measure(options, hosts) for hosts in options.hosts]
    if options.json:
        print(json.dumps({"context_tokens": CONTEXT_TOKENS, "rows": rows}))
    else:
        report(rows)


if __name__ == "__main__":
    main()
