"""Compares the predicted times of two models with measured ones: alone, and both at once.

    make bench-fidelity-joint
    python -m benchmarks.fidelity_joint --passes 1 --only joint,one-host --json

Four hosts have CPU quotas and links of their own, as in benchmarks/fidelity.py. Two models of
random weights are loaded together. A request is a prompt of PROMPT_TOKENS and OUTPUT_TOKENS more
tokens. First one model answers requests while the other is silent, then both answer all the time.
Each time is compared with what the joint plan predicts. Needs root.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.busy_hosts import await_rest
from benchmarks.fidelity import FAST, NAMES, RADIO, SLOW_HOST, WIRED, forget_calibration, say
from benchmarks.random_model import Shape, make_model
from calibration.machine import processor_name
from cli.client import Client
from cli.errors import CommandFailed
from model import costs
from model.quantize import Format
from model.spec import ModelSpec
from testbed.bed import Testbed
from testbed.cluster import Cluster
from testbed.lab import AgentSettings
from testbed.network import HUB, Host, Link, Network
from wire import limits

STATE = Path("/var/tmp/shoal-fidelity-joint")  # noqa: S108 - a fixed place, so models are kept
SHAPES = {
    "large": Shape(hidden=2048, ffn=5504, layers=20, heads=16),
    "small": Shape(hidden=1536, ffn=4096, layers=12, heads=12),
}
CONTEXT_TOKENS, PROMPT_TOKENS, OUTPUT_TOKENS, SEED = 256, 64, 12, 7
BITS = 8
CPU_PERCENT = {"ash": 40, "birch": 30, "cedar": 20, "dogwood": 15}
OBJECTIVE = {"kind": "request", "prompt_tokens": PROMPT_TOKENS, "output_tokens": OUTPUT_TOKENS}
ROOM = {"ash": 0.90, "birch": 0.70, "cedar": 0.50, "dogwood": 0.35}
"""Each host's memory, as a share of both models' bytes at 8 bits."""


@dataclass(frozen=True, slots=True)
class Case:
    """Where the layers of each model are: hosts in order, or wherever the planner wants."""

    name: str
    hosts: Mapping[str, Sequence[str]]

    def pins(self, model: str, spec: ModelSpec) -> dict[str, str]:
        hosts = self.hosts.get(model, ())
        if not hosts:
            return {}
        count = spec.block_count
        return {str(block): hosts[block * len(hosts) // count] for block in range(count)}


CASES = (
    Case("joint", {}),
    Case("one-host", {"large": ("ash", "birch"), "small": ("ash",)}),
    Case("both-on-two", {"large": ("ash", "birch"), "small": ("ash", "birch")}),
    Case("across", {"large": ("ash", "birch", "cedar"), "small": ("birch", "cedar")}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--state", type=Path, default=STATE, metavar="DIR")
    parser.add_argument("--only", type=lambda text: text.split(","), metavar="A,B")
    parser.add_argument("--passes", type=int, default=3, metavar="N")
    parser.add_argument("--requests", type=int, default=3, metavar="N", help="alone, of each model")
    parser.add_argument("--together-s", type=float, default=120.0, metavar="S")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    specs = {
        name: make_model(options.state / name, shape, CONTEXT_TOKENS)
        for name, shape in SHAPES.items()
    }
    cases = [case for case in CASES if not options.only or case.name in options.only]
    rows: list[dict[str, Any]] = []
    for number in range(options.passes):
        forget_calibration(options.state)
        with cluster(options.state, specs) as (bed, client):
            for case in cases:
                say(f"pass {number + 1} of {options.passes}, {case.name}")
                rows += run(bed, client, case, specs, options)
                report(rows, as_json=False)
    if options.json:
        report(rows, as_json=True)


def memory_bytes(specs: Mapping[str, ModelSpec]) -> dict[str, int]:
    """Each agent's limit."""
    total = buffers = 0
    for spec in specs.values():
        blocks = range(spec.block_count)
        total += sum(
            costs.executed_bytes(spec, block, Format.of(BITS), BITS)
            + costs.kv_bytes(spec, block, CONTEXT_TOKENS)
            for block in blocks
        )
        rows = limits.PREFILL_CHUNK_TOKENS
        buffers += costs.stage_buffer_bytes(spec, blocks, rows, CONTEXT_TOKENS)
    return {name: buffers + int(share * total) for name, share in ROOM.items()}


def network() -> Network:
    """The links of benchmarks/fidelity.py with lower quotas, because two models share them."""
    links = {(a, b): WIRED for a in NAMES for b in NAMES if a != b}
    for name in NAMES:
        if name not in ("cedar", SLOW_HOST):
            links[name, "cedar"] = links["cedar", name] = FAST
        if name != SLOW_HOST:
            links[name, SLOW_HOST] = links[SLOW_HOST, name] = RADIO
        links[HUB, name] = links[name, HUB] = Link()
    hosts = {HUB: Host()} | {name: Host(cpu_percent=CPU_PERCENT[name]) for name in NAMES}
    return Network(hosts, links, None)


@contextmanager
def cluster(state: Path, specs: Mapping[str, ModelSpec]) -> Iterator[tuple[Testbed, Client]]:
    """Start a coordinator and agents, which measure themselves for both models one at a time."""
    with Testbed(network(), "fidelity-joint") as bed:
        shoal = Cluster(bed, state / "hosts")
        shoal.start_coordinator()
        with Client(shoal.open_door(0)) as client:
            for count, (name, limit) in enumerate(memory_bytes(specs).items(), start=1):
                shoal.start_agent(name, AgentSettings(limit, 8 << 30))
                shoal.wait_for_agents(NAMES[:count])
                for model in specs:
                    say(f"{name}: calibrating for {model}")
                    with suppress(CommandFailed):
                        client.operate("/shoal/v1/plan", request(state, model), lambda step: None)
            yield bed, client


def request(state: Path, model: str) -> dict[str, Any]:
    return {
        "model": str((state / model).absolute()),
        "bits": [BITS],
        "max_weight_error": None,
        "context_tokens": CONTEXT_TOKENS,
        "objective": OBJECTIVE,
        "no_teams": True,
    }


def run(
    bed: Testbed,
    client: Client,
    case: Case,
    specs: Mapping[str, ModelSpec],
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Load both models as the case says. One row per model, alone and with both."""
    models = [
        request(options.state, name) | {"pins": case.pins(name, spec)}
        for name, spec in specs.items()
    ]
    answer = client.operate("/shoal/v1/load", {"models": models}, lambda step: None)
    predicted = {entry["model"]: entry for entry in answer["models"]}
    await_rest(bed, NAMES)
    seconds: dict[tuple[str, str], list[float]] = {}
    for name in specs:
        generate(client, name)
        seconds[name, "alone"] = [generate(client, name) for _ in range(options.requests)]
        say(f"{name} alone: {seconds[name, 'alone']}")
    with ThreadPoolExecutor(len(specs)) as pool:
        end = threading.Event()
        runs = {name: pool.submit(repeated, client, name, end) for name in specs}
        time.sleep(options.together_s)  # Requests are counted in this time.
        end.set()
        for name, found in runs.items():
            seconds[name, "together"] = found.result()
            say(f"{name} together: {seconds[name, 'together']}")
    client.post("/shoal/v1/unload", {})
    return [
        {
            "case": case.name,
            "model": name,
            "when": when,
            "stages": [
                [stage["device"], len(stage["bits"])] for stage in predicted[name]["plan"]["stages"]
            ],
            "predicted_s": predicted[name][f"predicted_{when}_s"],
            "all_measured_s": seconds[name, when],
            "measured_s": statistics.mean(seconds[name, when])
            if when == "together"
            else statistics.median(seconds[name, when]),
        }
        for name in specs
        for when in ("alone", "together")
    ]


def repeated(client: Client, model: str, end: threading.Event) -> list[float]:
    """Seconds of requests one after the other. The first and the last are left out."""
    found: list[float] = []
    while not end.is_set() or len(found) < 3:
        found.append(generate(client, model))
    return found[1:-1]


def generate(client: Client, model: str) -> float:
    """Seconds of one request until its last token."""
    random = np.random.default_rng(SEED)
    body = {
        "model": model,
        "prompt": random.integers(0, 256, PROMPT_TOKENS).tolist(),
        "max_tokens": OUTPUT_TOKENS + 1,
        "temperature": 0,
        "stream": True,
        "cache_prompt": False,
        "speculative.n_max": 0,  # A plan predicts passes of one row.
    }
    started_s = time.monotonic()
    with closing(client.stream("/v1/completions", body)) as events:
        for _ in events:
            pass
    return time.monotonic() - started_s


def report(rows: list[dict[str, Any]], *, as_json: bool) -> None:
    """Print each row's error, and the median of all."""
    errors: dict[str, list[float]] = {"alone": [], "together": []}
    for row in rows:
        row["error"] = row["predicted_s"] / row["measured_s"] - 1
        errors[row["when"]].append(abs(row["error"]))
    medians = {when: statistics.median(some) for when, some in errors.items() if some}
    if as_json:
        machine = {"machine": processor_name(), "date": date.today().isoformat()}
        print(json.dumps(machine | {"rows": rows, "median_error": medians}))
        return
    print(f"\n{processor_name()}, {date.today()}")
    print("| case | model | stages | when | predicted s | measured s | error |")
    print("| --- | --- | --- | --- | ---: | ---: | ---: |")
    for row in rows:
        stages = ", ".join(f"{device} {count}" for device, count in row["stages"])
        print(
            f"| {row['case']} | {row['model']} | {stages} | {row['when']} |"
            f" {row['predicted_s']:.2f} | {row['measured_s']:.2f} | {row['error']:+.1%} |"
        )
    print(", ".join(f"median error {when} {error:.1%}" for when, error in medians.items()))


if __name__ == "__main__":
    main()
