"""Figures measured beside other programs, from the agent to the words for users."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.cluster import FIXTURES, Cluster, last_json
from wire.conditions import Conditions

MODEL = FIXTURES / "llama"


@pytest.fixture
def spinning() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Other programs that use what the test leaves of the processor."""
    children = [
        subprocess.Popen([sys.executable, "-c", "import os; os.nice(19)\nwhile True: pass"])
        for _ in os.sched_getaffinity(0)
    ]
    yield children
    for child in children:
        child.kill()
        child.wait()


def figures(device: dict[str, Any]) -> dict[str, Conditions]:
    """Under which conditions each figure of a device was measured."""
    return {name: Conditions(**of) for name, of in device["conditions"]}


@pytest.mark.thorough
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="others yield the only core")
def test_what_a_busy_machine_measured_is_marked_and_measured_again(
    tmp_path: Path, spinning: list[subprocess.Popen[bytes]]
) -> None:
    cluster = Cluster(tmp_path, measures=True)
    try:
        cluster.start_coordinator()
        cluster.start_agent("pi-3")
        cluster.wait_for_agents("pi-3")
        (device,) = cluster.get("/shoal/v1/devices")["devices"]
        assert device["noise"]["conditions"]["others_cores"] > 0.2
        answer = last_json(cluster.run("plan", str(MODEL), "--bits", "8", "--json"))
        (entry,) = answer["noise"]
        assert entry["device"] == "pi-3"
        assert "block times" in entry["figures"]
        assert "measured while other programs used" in entry["text"]
        assert "run `shoal devices --measure pi-3` when it is quiet" in entry["text"]
        shown = cluster.run("plan", str(MODEL), "--bits", "8").stdout
        assert "pi-3 *" in shown
        assert f"* {entry['text']}" in shown
        loaded = cluster.run("load", str(MODEL), "--bits", "8")
        assert loaded.returncode == 0, loaded.stderr
        assert f"* {entry['text']}" in loaded.stdout
        cluster.run("unload")
        for child in spinning:
            child.kill()
        before = figures(device)
        (device,) = last_json(cluster.run("devices", "--measure", "pi-3", "--json"))["devices"]
        # Other tests may run beside this one, but a figure only ever gives way to a better one.
        for name, conditions in figures(device).items():
            assert not conditions.is_noisy or conditions.noise <= before[name].noise
        unknown = cluster.run("devices", "--measure", "pi-4")
        assert (unknown.returncode, "pi-3" in unknown.stderr) == (1, True)
        cluster.load(MODEL, "--bits", "8")
        refused = cluster.run("devices", "--measure", "pi-3")
        assert refused.returncode == 1
        assert "run `shoal unload` first" in refused.stderr
    finally:
        cluster.stop()
