"""A coordinator that stood still does not lose its agents."""

from __future__ import annotations

import signal
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.system.cluster import TINY_OPT, Cluster
from wire import limits

NAMES = ("pi-1", "pi-2")
QUESTION = "The lamp is in the attic. The meter in the cellar reads 42. Where is the lamp?"


@pytest.fixture
def loaded(cluster: Cluster) -> Cluster:
    cluster.start_coordinator()
    for name in NAMES:
        cluster.start_agent(name)
    cluster.wait_for_agents(*NAMES)
    cluster.load(TINY_OPT, "--bits=16", "--pin=head:pi-1", "--pin=embedding:pi-2")
    return cluster


def ask(cluster: Cluster) -> str:
    answer = httpx.post(
        f"{cluster.url}/v1/completions",
        json={"prompt": QUESTION, "temperature": 0, "max_tokens": 8},
        timeout=60,
        trust_env=False,
    ).json()
    text: str = answer["choices"][0]["text"]
    return text


def test_a_coordinator_that_was_stopped_loses_no_device(loaded: Cluster) -> None:
    devices = loaded.get("/shoal/v1/devices")["devices"]
    expected = ask(loaded)
    process = loaded.processes["coordinator"]
    process.send_signal(signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(ask, loaded)
            time.sleep(limits.LIVENESS_S + 3)  # As a laptop that was closed for a moment.
            process.send_signal(signal.SIGCONT)
            assert asked.result() == expected
    finally:
        process.send_signal(signal.SIGCONT)
    # Two more heartbeats: whoever was to be lost is lost by then.
    time.sleep(2 * limits.HEARTBEAT_S)
    after = loaded.get("/shoal/v1/devices")["devices"]
    for field in ("name", "device"):
        assert [item[field] for item in after] == [item[field] for item in devices]
    assert loaded.get("/shoal/v1/ps")["model"]["state"] == "ready"
    assert ask(loaded) == expected
    assert "device lost" not in loaded.log("coordinator")
    for name in NAMES:
        assert loaded.log(name).count("joined cluster") == 1
