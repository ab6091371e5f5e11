"""The delay of an answer when a device is lost, on emulated hosts.

    make bench-recovery
    python -m benchmarks.recovery --rounds 3 --json

Three hosts have 30 % of a core and a wired link each (testbed/). The model has 943 million random
weights at 8 bits, a third of them on each host. Two seconds after an answer has begun, the middle
host is lost. Either its agent is killed (its connections end), or its cable is cut (it falls
silent). The model is then placed on the other two. The same answer, undisturbed over three hosts,
is measured right before. In the first round the others fetch the missing blocks. Later they have
them on their disks.

The model and the measurements of the hosts are kept in --state.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
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

STATE = Path("/var/tmp/shoal-recovery")  # noqa: S108 - a fixed place, so that a run can continue

HOSTS = NAMES[:3]
VICTIM = HOSTS[1]
STORAGE_BYTES = 8 << 30
LOST_AFTER_S = 2.0


class Trial:
    """One shoal, whose middle device is lost again and again."""

    def __init__(self, state: Path, bed: Testbed, temperature: float) -> None:
        self._bed = bed
        self._temperature = temperature
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
                # The hosts share a processor here, so they measure themselves one at a time.
                client.operate("/shoal/v1/plan", self._plain, lambda step: None)

    def lose(self, how: str, tokens: int) -> dict[str, Any]:
        """Lose the device once, and return the time of the answer without and with the loss."""
        lose, back = {"killed": (self._kill, self._restart), "cut": (self._cut, self._heal)}[how]
        with Client(self._url) as client:
            client.operate("/shoal/v1/load", self._body, lambda step: None)
            self._answer(client, 2)
            undisturbed_s = self._answer(client, tokens)
            timer = threading.Timer(LOST_AFTER_S, lose)
            timer.start()
            disturbed_s = self._answer(client, tokens)
            timer.join()
            left = client.get("/shoal/v1/ps")["model"]
            left_s = self._answer(client, tokens)
            client.post("/shoal/v1/unload", {})
        if any(stage["device"] == VICTIM for stage in left["stages"]):
            raise RuntimeError(f"{VICTIM} was not lost while the answer came")
        back()
        self._shoal.wait_for_agents(HOSTS)
        return {
            "how": how,
            "undisturbed_s": undisturbed_s,
            "disturbed_s": disturbed_s,
            "later_s": disturbed_s - undisturbed_s,
            "without_it_s": left_s,
            "fetched_bytes": sum(stage["fetched_bytes"] for stage in left["stages"]),
            "load_s": max(stage["load_s"] for stage in left["stages"]),
        }

    def _answer(self, client: Client, tokens: int) -> float:
        """Return the seconds until an answer of this many tokens was there."""
        body = {"prompt": [1], "max_tokens": tokens, "temperature": self._temperature, "seed": 1}
        started_s = time.perf_counter()
        answer = client.post("/v1/completions", body)
        if answer["usage"]["completion_tokens"] != tokens:
            raise RuntimeError(f"{tokens} tokens were asked for, and these came: {answer}")
        return time.perf_counter() - started_s

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
    for name in (
        "device",
        "undisturbed s",
        "with the loss",
        "later",
        "load s",
        "fetched MB",
        "after",
    ):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["how"],
            f"{row['undisturbed_s']:.1f}",
            f"{row['disturbed_s']:.1f}",
            f"{row['later_s']:.1f}",
            f"{row['load_s']:.1f}",
            f"{row['fetched_bytes'] / 1e6:.0f}",
            f"{row['without_it_s']:.1f}",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="How much later an answer ends when a device is lost; needs root.",
        epilog="example: python -m benchmarks.recovery --rounds 1 --json",
    )
    parser.add_argument("--state", type=Path, default=STATE, metavar="DIR", help=f"default {STATE}")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--tokens", type=int, default=80, metavar="N", help="of an answer")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0: greedy")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    make_model(options.state / "model", SHAPE, CONTEXT_TOKENS)
    # Real hosts would have to fetch the blocks that an earlier run left on these disks.
    shutil.rmtree(options.state / "hosts", ignore_errors=True)
    rows = []
    with Testbed(network(len(HOSTS)), "recovery") as bed:
        trial = Trial(options.state, bed, options.temperature)
        for number in range(options.rounds):
            for how in ("killed", "cut"):
                say(f"round {number + 1}: {how}")
                rows.append(trial.lose(how, options.tokens))
    if options.json:
        print(json.dumps({"temperature": options.temperature, "rows": rows}))
    else:
        report(rows)


if __name__ == "__main__":
    main()
