"""The time to load a model whose blocks are on other devices already, and who sends them.

    make bench-peer-loading
    python -m benchmarks.peer_loading --json

Four hosts and the coordinator's have a port of 100 Mbit/s each (testbed/). The model has 242
million random weights at 8 bits, a quarter of them on each host. It is loaded for the first time,
and then so that each host has the quarter of another one. This is done once with agents that fetch
from each other, and once with agents that ask the coordinator for everything.

The model and the measurements of the hosts are kept in --state.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.fidelity import CONTEXT_TOKENS, request, say
from benchmarks.random_model import Shape, make_model
from benchmarks.throughput import BITS, NAMES
from cli.client import Client
from testbed.bed import Testbed
from testbed.cluster import Cluster
from testbed.lab import AgentSettings
from testbed.network import HUB, Host, Link, Network

STATE = Path("/var/tmp/shoal-peer-loading")  # noqa: S108 - a fixed place, so that a run can continue

SHAPE = Shape(hidden=1024, ffn=2816, layers=20, heads=8)
LAN = Link(0.0002, 12.5e6)
MEMORY_BYTES = 2 << 30
STORAGE_BYTES = 8 << 30

SOURCES = {"coordinator": True, "devices": False}

ALONE = "import agent.blocks, sys; agent.blocks.LEAST_BYTES = 1 << 62; "
ALONE += "from cli.main import main; sys.exit(main(sys.argv[1:]))"
"""An agent that asks nobody but the coordinator for files."""


class Agents(Cluster):
    """A shoal whose agents may be made to fetch from the coordinator alone."""

    def __init__(self, bed: Testbed, state_dir: Path, *, alone: bool) -> None:
        super().__init__(bed, state_dir)
        self._alone = alone

    def _start(self, host: str, arguments: list[str], stdout: int) -> subprocess.Popen[Any]:
        if not self._alone or host == HUB:
            return super()._start(host, arguments, stdout)
        with self.log(host).open("a") as log:
            return self.bed.popen(
                host,
                [sys.executable, "-c", ALONE, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=log,
                start_new_session=True,
            )


def sent_bytes(bed: Testbed, host: str) -> int:
    """The bytes that a host's port has sent so far."""
    table = bed.inside(host, Path("/proc/thread-self/net/dev").read_text)
    line = next(line for line in table.splitlines() if line.strip().startswith("eth0:"))
    return int(line.split()[9])


def measure(state: Path, *, alone: bool) -> list[dict[str, Any]]:
    """Load the model twice on a testbed of its own, and return a row for each load."""
    hosts = {HUB: Host()} | {name: Host() for name in NAMES}
    plain = request(state, (BITS,))
    rows = []
    directory = state / "hosts"
    shutil.rmtree(directory, ignore_errors=True)
    with Testbed(Network(hosts, {}, LAN), "peer-loading") as bed:
        shoal = Agents(bed, directory, alone=alone)
        shoal.start_coordinator()
        url = shoal.open_door(0)
        with Client(url) as client:
            for count, name in enumerate(NAMES, start=1):
                shoal.start_agent(name, AgentSettings(MEMORY_BYTES, STORAGE_BYTES))
                shoal.wait_for_agents(NAMES[:count])
                # The hosts share a processor here, so they measure themselves one at a time.
                client.operate("/shoal/v1/plan", plain, lambda step: None)
            for load in ("first", "moved"):
                order = NAMES if load == "first" else (*NAMES[1:], NAMES[0])
                pins = {str(1 + at * SHAPE.layers // 4): name for at, name in enumerate(order)}
                began: dict[str, float] = {}

                def on_step(step: dict[str, Any], began: dict[str, float] = began) -> None:
                    began.setdefault(step["phase"], time.perf_counter())

                before = sent_bytes(bed, HUB)
                client.operate("/shoal/v1/load", {**plain, "pins": pins}, on_step)
                ended_s = time.perf_counter()
                stages = client.get("/shoal/v1/ps")["model"]["stages"]
                rows.append(
                    {
                        "agents fetch from": "the coordinator" if alone else "each other",
                        "load": load,
                        "fetch_and_load_s": ended_s - began["load"],
                        "coordinator_sent_bytes": sent_bytes(bed, HUB) - before,
                        "fetched_bytes": sum(stage["fetched_bytes"] for stage in stages),
                        "from_peers_bytes": sum(stage["from_peers_bytes"] for stage in stages),
                    }
                )
                say(str(rows[-1]))
    return rows


def report(rows: list[dict[str, Any]]) -> None:
    table = Table(title="loading over four ports of 100 Mbit/s")
    names = (
        "agents fetch from",
        "load",
        "seconds",
        "coordinator sent MB",
        "fetched MB",
        "from devices",
    )
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["agents fetch from"],
            row["load"],
            f"{row['fetch_and_load_s']:.1f}",
            f"{row['coordinator_sent_bytes'] / 1e6:.0f}",
            f"{row['fetched_bytes'] / 1e6:.0f}",
            f"{row['from_peers_bytes'] / 1e6:.0f}",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="How long a model takes to load whose blocks other devices have; needs root.",
        epilog="example: python -m benchmarks.peer_loading --json",
    )
    parser.add_argument("--state", type=Path, default=STATE, metavar="DIR", help=f"default {STATE}")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", choices=sorted(SOURCES), help="default: both")
    options = parser.parse_args()
    make_model(options.state / "model", SHAPE, CONTEXT_TOKENS)
    sources = [options.only] if options.only else list(SOURCES)
    rows = [row for name in sources for row in measure(options.state, alone=SOURCES[name])]
    if options.json:
        print(json.dumps({"rows": rows}))
    else:
        report(rows)


if __name__ == "__main__":
    main()
