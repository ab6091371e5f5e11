"""How long an answer pauses when a device is lost, on emulated hosts.

    make bench-recovery
    python -m benchmarks.recovery --rounds 3 --json

Three hosts have 30 % of a core and a wired link each (testbed/); the model has 943 million random
weights at 8 bits, a third of them on each host. While an answer comes, the agent of the middle one
is killed (its connections end) or its cable is cut (it falls silent); the model is then placed on
the other two. The pause is the longest between two pieces of the answer, measured by the client. In
the first round the others fetch what they lack; later they have it on their disks.

What was measured of the hosts, and the model, are kept in --state.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.fidelity import CONTEXT_TOKENS, request, say
from benchmarks.random_model import make_model
from benchmarks.throughput import BITS, MEMORY_BYTES, NAMES, SHAPE, network
from cli.client import Client
from testbed.bed import Testbed
from testbed.cluster import Cluster
from testbed.lab import AgentSettings

STATE = Path("/var/tmp/shoal-recovery")  # noqa: S108 - a fixed place, to go on where one was

HOSTS = NAMES[:3]
VICTIM = HOSTS[1]
STORAGE_BYTES = 8 << 30
LOST_AFTER = 8
"""Pieces of the answer, before the device is lost."""


class Trial:
    """One shoal, whose middle device is lost again and again."""

    def __init__(self, state: Path, bed: Testbed) -> None:
        self._bed = bed
        self._shoal = Cluster(bed, state / "hosts")
        self._shoal.start_coordinator()
        self._url = self._shoal.open_door(0)
        pins = {str(1 + at * SHAPE.layers // 3): name for at, name in enumerate(HOSTS)}
        self._plain = request(state, (BITS,))
        self._body = {**self._plain, "pins": pins}
        with Client(self._url) as client:
            for count, name in enumerate(HOSTS, start=1):
                self._start(name)
                self._shoal.wait_for_agents(HOSTS[:count])
                # One measures itself at a time: hosts here share a processor.
                client.operate("/shoal/v1/plan", self._plain, lambda step: None)

    def lose(self, how: str, tokens: int) -> dict[str, Any]:
        """One loss: the pause, and what came before and after it."""
        lose, back = {"killed": (self._kill, self._restart), "cut": (self._cut, self._heal)}[how]
        with Client(self._url) as client:
            client.operate("/shoal/v1/load", self._body, lambda step: None)
            arrivals_s = self._answer(client, tokens, lose)
            left = client.get("/shoal/v1/ps")["model"]
            client.post("/shoal/v1/unload", {})
        back()
        self._shoal.wait_for_agents(HOSTS)
        gaps_s = [after - before for before, after in pairwise(arrivals_s)]
        pause_s = max(gaps_s)
        at = gaps_s.index(pause_s)
        return {
            "how": how,
            "pause_s": pause_s,
            "fetched_bytes": sum(stage["fetched_bytes"] for stage in left["stages"]),
            "load_s": max(stage["load_s"] for stage in left["stages"]),
            "ms_per_token_before": median(gaps_s[:at]) * 1e3,
            "ms_per_token_after": median(gaps_s[at + 1 :]) * 1e3,
        }

    def _answer(self, client: Client, tokens: int, lose: Callable[[], None]) -> list[float]:
        """When each piece of an answer came, during which a device is lost."""
        body = {"prompt": [1], "max_tokens": tokens, "temperature": 1, "seed": 1, "stream": True}
        arrivals_s = []
        with closing(client.stream("/v1/completions", body)) as events:
            for _ in events:
                arrivals_s.append(time.perf_counter())
                if len(arrivals_s) == LOST_AFTER:
                    lose()
        return arrivals_s

    def _start(self, name: str) -> None:
        self._shoal.start_agent(name, AgentSettings(MEMORY_BYTES, STORAGE_BYTES))

    def _kill(self) -> None:
        for process in self._bed.processes(VICTIM):
            os.kill(process, signal.SIGKILL)

    def _restart(self) -> None:
        self._start(VICTIM)

    def _cut(self) -> None:
        self._bed.fault(VICTIM, "cut")

    def _heal(self) -> None:
        self._bed.fault(VICTIM, "heal")


def report(rows: list[dict[str, Any]]) -> None:
    table = Table(title="an answer that loses a device")
    for name in ("device", "pause s", "loading s", "fetched MB", "ms per token before", "after"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["how"],
            f"{row['pause_s']:.1f}",
            f"{row['load_s']:.1f}",
            f"{row['fetched_bytes'] / 1e6:.0f}",
            f"{row['ms_per_token_before']:.0f}",
            f"{row['ms_per_token_after']:.0f}",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="How long an answer pauses when a device is lost; needs root.",
        epilog="example: python -m benchmarks.recovery --rounds 1 --json",
    )
    parser.add_argument("--state", type=Path, default=STATE, metavar="DIR", help=f"default {STATE}")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--tokens", type=int, default=40, metavar="N", help="of an answer")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    make_model(options.state / "model", SHAPE, CONTEXT_TOKENS)
    # What an earlier run left on the hosts' disks would have to be fetched on real ones.
    shutil.rmtree(options.state / "hosts", ignore_errors=True)
    rows = []
    with Testbed(network(len(HOSTS)), "recovery") as bed:
        trial = Trial(options.state, bed)
        for number in range(options.rounds):
            for how in ("killed", "cut"):
                say(f"round {number + 1}: {how}")
                rows.append(trial.lose(how, options.tokens))
    if options.json:
        print(json.dumps({"rows": rows}))
    else:
        report(rows)


if __name__ == "__main__":
    main()
