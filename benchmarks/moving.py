"""Milliseconds per token while a shoal changes, where the model moves by itself and where it stays.

    make bench-moving
    python -m benchmarks.moving --only join --svg docs/moving.svg

Hosts have shares of a core and wired links (testbed/). One client asks for an answer after the
other, with a pause between them. In each scenario something changes:

- join: a host that has three times as much of a core joins;
- link: the links of the second of two hosts degrade 20 times, and heal; a third host is there, as
  fast as the second;
- throttle: the host that runs the model throttles to 30 %; another one is there, as fast as it was;
- member: one of two hosts that share each layer throttles to 30 %.

Each scenario runs twice, with ``--rebalance auto`` and ``off``. A token's time is from its
predecessor's arrival at the client to its own. The measurements of the hosts are kept in --state.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import threading
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.fidelity import CONTEXT_TOKENS, request, say
from benchmarks.moving_picture import moving_svg
from benchmarks.random_model import Shape, make_model
from cli.client import Client
from testbed.bed import Testbed
from testbed.cluster import Cluster
from testbed.lab import AgentSettings
from testbed.network import HUB, Host, Link, Network

STATE = Path("/var/tmp/shoal-moving")  # noqa: S108 - a fixed place, so that a run can continue

SHAPE = Shape(hidden=1536, ffn=4096, layers=12, heads=12)
MEMORY_BYTES = 2 << 30
STORAGE_BYTES = 4 << 30
WIRED = Link(1e-3, 12.5e6)
NEAR = Link(0.1e-3, 125e6)
"""Fast enough that the planner lets two hosts share each layer."""
DEGRADED = "link:rate=5,delay=20"
"""A twentieth of the rate in Mbit/s, and 20 times the delay in ms."""

ANSWER_TOKENS = 64
TOKEN = 200
"""All tokens of the answers. It is one with a text."""
REST_S = 3.0
"""The client's pause between two answers. Devices and links are measured meanwhile."""

FIRST_STAGE, LAST_STAGE = 0, -1
"""In the place of a host: the one that runs this stage when something happens to it first."""

Timed = tuple[float, str]
"""Seconds since the client began, and what happened."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """A change of the shoal.

    hosts: the percent of a core of each host.
    late: the host that joins at the first fault, or empty.
    wishes: for the plan, as in the body of `POST /shoal/v1/load`.
    faults: what happens when: seconds, host, fault in the testbed's words, and the picture's words.
    """

    title: str
    hosts: Mapping[str, float]
    wishes: Mapping[str, Any]
    last_s: float
    faults: tuple[tuple[float, str | int, str, str], ...]
    late: str = ""
    link: Link = WIRED


SCENARIOS = {
    "join": Scenario(
        "A device joins that has three times as much of a core",
        {"ash": 12.0, "birch": 36.0},
        {},
        180.0,
        ((20.0, "birch", "join", "birch joins"),),
        late="birch",
    ),
    "link": Scenario(
        "The links of a device degrade 20 times, and heal; another one is as fast",
        {"ash": 8.0, "birch": 40.0, "cedar": 40.0},
        {"pins": {"0": "ash"}},
        300.0,
        ((20.0, LAST_STAGE, DEGRADED, "links degrade"), (200.0, LAST_STAGE, "heal", "links heal")),
    ),
    "throttle": Scenario(
        "A device throttles to 30 %",
        {"ash": 20.0, "birch": 20.0},
        {"no_teams": True},
        180.0,
        ((20.0, FIRST_STAGE, "slow=6", "it throttles"),),
    ),
    "member": Scenario(
        "One of two devices that share each layer throttles to 30 %",
        {"ash": 20.0, "birch": 20.0},
        {},
        180.0,
        ((20.0, "birch", "slow=6", "birch throttles"),),
        link=NEAR,
    ),
}


class Trial:
    """One scenario with one setting of --rebalance."""

    def __init__(self, state: Path, bed: Testbed, scenario: Scenario, rebalance: str) -> None:
        self._bed = bed
        self._scenario = scenario
        self._shoal = Cluster(bed, state / "hosts")
        self._shoal.start_coordinator(f"--rebalance={rebalance}")
        self._url = self._shoal.open_door(0)
        self._began_s = 0.0
        self._happened: list[Timed] = []
        self._struck: dict[int, str] = {}
        """The host of each stage to which something happened."""
        plain = request(state, (8,))
        with Client(self._url) as client:
            # The hosts share a processor here, so they measure themselves one at a time, before.
            for count, name in enumerate(scenario.hosts, start=1):
                self._start(name)
                self._shoal.wait_for_agents(list(scenario.hosts)[:count])
                client.operate("/shoal/v1/plan", plain, lambda step: None)
            if scenario.late:
                self._stop(client, scenario.late)
            body = {**plain, **scenario.wishes, "objective": {"kind": "latency"}}
            client.operate("/shoal/v1/load", body, lambda step: None)
            self._answer(client, [])

    def run(self) -> dict[str, Any]:
        """Return the times of all tokens, and what happened."""
        tokens: list[tuple[float, float]] = []
        with Client(self._url) as client:
            number = client.get("/shoal/v1/events")["events"][-1]["number"]
            self._began_s = time.monotonic()
            timers = [
                threading.Timer(at, self._fault, fault) for at, *fault in self._scenario.faults
            ]
            for timer in timers:
                timer.start()
            while time.monotonic() - self._began_s < self._scenario.last_s:
                self._answer(client, tokens)
                time.sleep(REST_S)
            for timer in timers:
                timer.join()
            events = client.get(f"/shoal/v1/events?after={number}")["events"]
            model = client.get("/shoal/v1/ps")["model"]
        offset_s = time.time() - (time.monotonic() - self._began_s)
        moves = [
            (event["time_s"] - offset_s, event["kind"], event["text"])
            for event in events
            if event["kind"] in ("moved", "moving", "move kept", "slow", "lost")
        ]
        return {
            "tokens": [(round(at, 3), round(took_s * 1e3, 2)) for at, took_s in tokens],
            "happened": self._happened,
            "moves": moves,
            "devices": [stage["device"] for stage in model["stages"]],
        }

    def _answer(self, client: Client, tokens: list[tuple[float, float]]) -> None:
        """Stream one answer, and add when each token came and how long it took."""
        body = {
            "prompt": [1],
            "max_tokens": ANSWER_TOKENS,
            "temperature": 0,
            "stream": True,
            "logit_bias": {str(TOKEN): 100},  # Other tokens of random weights may have no text.
            "speculative.n_max": 0,
        }
        last_s, count = None, 0
        with closing(client.stream("/v1/completions", body)) as events:
            for event in events:
                now_s = time.monotonic()
                choices = event["choices"]
                came = bool(choices) and not choices[0]["finish_reason"]
                if came and last_s is not None:
                    tokens.append((now_s - self._began_s, now_s - last_s))
                if came:
                    last_s, count = now_s, count + 1
        if count < ANSWER_TOKENS - 1:  # The last one may come with the end.
            raise RuntimeError(f"{ANSWER_TOKENS} tokens were asked for, and {count} came")

    def _fault(self, where: str | int, fault: str, words: str) -> None:
        host = where if isinstance(where, str) else self._running(where)
        self._happened.append((time.monotonic() - self._began_s, words))
        if fault == "join":
            self._start(host)
        else:
            self._bed.fault(host, fault)

    def _running(self, stage: int) -> str:
        if stage not in self._struck:
            with Client(self._url) as client:
                stages = client.get("/shoal/v1/ps")["model"]["stages"]
            self._struck[stage] = stages[stage]["device"]
        return self._struck[stage]

    def _stop(self, client: Client, name: str) -> None:
        """Stop the agent of a host, and wait until it has left. Its measurements stay there."""
        for process in self._bed.processes(name):
            os.kill(process, signal.SIGTERM)
        while any(one["name"] == name for one in client.get("/shoal/v1/devices")["devices"]):
            time.sleep(0.2)  # Leaving tells no event here.

    def _start(self, name: str) -> None:
        self._shoal.start_agent(name, AgentSettings(MEMORY_BYTES, STORAGE_BYTES))


def network(scenario: Scenario) -> Network:
    """Return the hosts of a scenario, and the coordinator's, whose links are not shaped."""
    names = list(scenario.hosts)
    links = {(a, b): scenario.link for a in names for b in names if a != b}
    for name in names:
        links[HUB, name] = links[name, HUB] = Link()
    hosts = {name: Host(cpu_percent=percent) for name, percent in scenario.hosts.items()}
    return Network({HUB: Host()} | hosts, links, None)


def measure(state: Path, name: str) -> dict[str, Any]:
    """Run a scenario with both settings, and return their results with figures of each."""
    scenario = SCENARIOS[name]
    found: dict[str, Any] = {"name": name, "title": scenario.title, "last_s": scenario.last_s}
    for setting in ("auto", "off"):
        say(f"{name}: --rebalance {setting}")
        with Testbed(network(scenario), "moving") as bed:
            result = Trial(state, bed, scenario, setting).run()
        found[setting] = result | figures(result["tokens"], scenario)
    return found


def figures(tokens: list[tuple[float, float]], scenario: Scenario) -> dict[str, float]:
    """Return median milliseconds before the first fault and in the last 30 s, and the longest."""
    first_s = scenario.faults[0][0]
    began = [took for at, took in tokens if at < first_s]
    ended = [took for at, took in tokens if at > scenario.last_s - 30]
    return {
        "before_ms": statistics.median(began),
        "after_ms": statistics.median(ended),
        "longest_ms": max(took for _, took in tokens),
        "mean_ms": statistics.fmean(took for _, took in tokens),
    }


def report(rows: list[dict[str, Any]]) -> None:
    table = Table(title="a shoal that changes")
    for name in ("scenario", "rebalance", "before ms", "in the end ms", "longest ms", "tokens"):
        table.add_column(name, justify="right")
    for row in rows:
        for setting in ("auto", "off"):
            one = row[setting]
            shown = [f"{one[key]:.0f}" for key in ("before_ms", "after_ms", "longest_ms")]
            table.add_row(row["name"], setting, *shown, str(len(one["tokens"])))
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Milliseconds per token while a shoal changes; needs root. Takes 40 minutes.",
        epilog="example: python -m benchmarks.moving --only join --json",
    )
    parser.add_argument("--state", type=Path, default=STATE, metavar="DIR", help=f"default {STATE}")
    parser.add_argument("--only", choices=tuple(SCENARIOS), action="append", help="default: all")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the results")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    make_model(options.state / "model", SHAPE, CONTEXT_TOKENS)
    shutil.rmtree(options.state / "hosts", ignore_errors=True)
    load_before = os.getloadavg()[0]
    rows = [measure(options.state, name) for name in options.only or SCENARIOS]
    result = {
        "rows": rows,
        "machine": f"{os.cpu_count()} cores of {platform.machine()}",
        "date": time.strftime("%Y-%m-%d"),
        "load": load_before,
    }
    if options.svg is not None:
        options.svg.write_text(moving_svg(result))
    if options.json:
        print(json.dumps(result))
    else:
        report(rows)


if __name__ == "__main__":
    main()
