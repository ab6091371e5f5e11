"""A model goes back by itself to a device that is back, and its answers do not notice."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.system import test_recovery as recovery
from tests.system.cluster import Cluster, wait_for
from tests.system.test_recovery import NAMES, PINS, REQUESTS, model, start, start_all, state

__all__ = ["model"]

WAIT_S = 120

QUICK = """
import sys
import coordinator.loading.rebalance as rule, coordinator.loading.rebalancing as loop
rule.STEADY_S, rule.PAUSE_S, loop.LOOK_S = 4.0, 0.0, 0.2
from cli.main import main
sys.exit(main())
"""


class QuickCluster(Cluster):
    """A shoal whose coordinator waits seconds, not minutes, before it moves a model."""

    def command(self, name: str) -> list[str]:
        return [sys.executable, "-c", QUICK]


def devices(cluster: Cluster) -> list[str]:
    now = state(cluster)
    return [stage["device"] for stage in now["stages"]] if now["state"] == "ready" else []


@pytest.mark.thorough
def test_answers_go_over_to_a_device_that_is_back(
    tmp_path: Path, model: Path, request: pytest.FixtureRequest
) -> None:
    cluster = QuickCluster(tmp_path)
    request.addfinalizer(cluster.stop)
    start_all(cluster, ("--rebalance=auto",))
    assert recovery.load(cluster, model, *PINS) == list(NAMES)
    undisturbed = [recovery.answer(cluster, one, threading.Event()) for one in REQUESTS]
    cluster.kill("pi-2")
    cluster.processes["pi-2"].wait()
    wait_for(lambda: devices(cluster) and "pi-2" not in devices(cluster), WAIT_S, "a recovery")
    start(cluster, "pi-2")
    # Nothing is answered, so it is measured, and then its links.
    wait_for(lambda: len(cluster.get("/shoal/v1/devices")["links"]) == 6, WAIT_S, "links")

    def ask(which: int) -> None:
        """Ask until the model is where its user wanted it, and once more."""
        is_last = False
        while not is_last:
            is_last = devices(cluster) == list(NAMES)
            told = recovery.answer(cluster, REQUESTS[which], threading.Event())
            assert told == undisturbed[which]

    with ThreadPoolExecutor(len(REQUESTS)) as pool:
        for asked in [pool.submit(ask, which) for which in range(len(REQUESTS))]:
            asked.result(WAIT_S)
    events = cluster.get("/shoal/v1/events")["events"]
    moves = [event for event in events if event["kind"] in ("moved", "moving")]
    assert [event["kind"] for event in moves] == ["moved"]
    assert "it is what was asked for" in moves[0]["text"]
