"""Coordinators and agents on hosts of their own, which find and lose each other on a network."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import pytest

from model import costs
from model.families import load_spec
from model.quantize import Format
from testbed.bed import Testbed
from tests.system.cluster import FIXTURES, ROOT, START_TIMEOUT_S, last_json, wait_for
from tests.system.namespaces import NetworkCluster, bed_of, unavailable
from wire import limits
from wire.discovery import SEARCH_ROUND_S

pytestmark = pytest.mark.netns

LLAMA = FIXTURES / "llama"

FOUND_WITHIN_S = 20.0
"""How long it takes at most until an agent and its coordinator have found each other."""

LOST_WITHIN_S = 10.0
"""How long the loss of a device may go unnoticed."""

RECOVERED_WITHIN_S = 60.0
"""How long an answer may take to go on: all of it runs through the stages again."""

ZEROCONF_ASKS_S = 14.0
"""How long zeroconf asks for a service when nobody answers: an agent must go on after that."""

UNHEARD = "no coordinator of cluster {!r} answers by mDNS"
AGENTS = ("ash", "oak")
ENDLESS_CONTEXT = 20_000


@pytest.fixture
def bed() -> Iterator[Testbed]:
    """Hosts for two coordinators and two agents."""
    reason = unavailable()
    if reason is not None:
        pytest.skip(reason)
    with bed_of("hub", "hub-2", *AGENTS) as bed:
        yield bed


@pytest.fixture
def cluster(bed: Testbed, tmp_path: Path) -> Iterator[NetworkCluster]:
    """A cluster that the test starts as it likes."""
    cluster = NetworkCluster(tmp_path, bed)
    yield cluster
    cluster.stop()


def wait_until_listed(
    cluster: NetworkCluster, names: tuple[str, ...], since_s: float, what: str
) -> None:
    """Within FOUND_WITHIN_S of ``since_s``, and say how long it took."""
    timeout_s = FOUND_WITHIN_S - (time.monotonic() - since_s)
    cluster.wait_for_agents(*names, timeout_s=timeout_s)
    print(f"{what}: listed after {time.monotonic() - since_s:.2f} s")  # noqa: T201 - a figure
    shown = last_json(cluster.run("devices", "--json"))
    assert tuple(device["name"] for device in shown["devices"]) == names


def memory_for_two(model: Path, context_tokens: int) -> int:
    """A limit that one device cannot hold the model with at 32 bits, but two can."""
    spec = load_spec(model)
    blocks = range(spec.block_count)
    total = sum(
        costs.executed_bytes(spec, block, Format.of(32), 32)
        + costs.kv_bytes(spec, block, context_tokens)
        for block in blocks
    )
    rows = limits.PREFILL_CHUNK_TOKENS
    return int(0.75 * total) + costs.stage_buffer_bytes(spec, blocks, rows, context_tokens)


def load_on_two(cluster: NetworkCluster, model: Path, context_tokens: int) -> list[str]:
    """Load at 32 bits, hops too; the devices of the two stages."""
    answer = cluster.load(model, "--bits=32", "--hop-bits=32", f"--context={context_tokens}")
    devices = [stage["device"] for stage in answer["plan"]["stages"]]
    assert sorted(devices) == sorted(AGENTS)
    return devices


def others_seen(cluster: NetworkCluster) -> list[str]:
    """The texts of the coordinator's story about other coordinators."""
    told = cluster.get("/shoal/v1/events")["events"]
    return [event["text"] for event in told if event["kind"] == "second coordinator"]


def test_two_coordinators_of_a_cluster_see_each_other(
    cluster: NetworkCluster, bed: Testbed, tmp_path: Path
) -> None:
    (tmp_path / "second").mkdir()
    second = NetworkCluster(tmp_path / "second", bed, "hub-2")
    (tmp_path / "stranger").mkdir()
    stranger = NetworkCluster(tmp_path / "stranger", bed, AGENTS[0], "other")
    try:
        stranger.start_coordinator()
        cluster.start_coordinator()
        second.start_coordinator()
        for one, other in ((cluster, second), (second, cluster)):
            where = f"{other.address}:{other.control_port}"
            wait_for(partial(others_seen, one), FOUND_WITHIN_S, f"the news of {where}")
            assert others_seen(one) == [f"at {where}"]
            assert f"another coordinator of cluster 'shoal' answers at {where}" in one.log(
                "coordinator"
            )
        # A coordinator that was killed is still announced in caches, and another one starts.
        second.lose_coordinator()
        (tmp_path / "third").mkdir()
        second.directory = tmp_path / "third"
        cluster.processes["coordinator"].terminate()
        with cluster.processes.pop("coordinator") as process:
            process.wait(START_TIMEOUT_S)
        cluster.start_coordinator()
        second.start_coordinator()
        where = f"{second.address}:{second.control_port}"
        wait_for(lambda: others_seen(cluster), FOUND_WITHIN_S, f"the news of {where}")
        assert others_seen(cluster) == [f"at {where}"]
        assert others_seen(stranger) == []
    finally:
        second.stop()
        stranger.stop()


# ---- finding each other ------------------------------------------------------------------------


def test_agents_that_waited_find_a_new_coordinator(cluster: NetworkCluster) -> None:
    for name in AGENTS:
        cluster.start_agent(name)
    for name in AGENTS:
        cluster.wait_for_line(name, UNHEARD.format("shoal"), START_TIMEOUT_S)
    cluster.start_coordinator()
    wait_until_listed(cluster, AGENTS, time.monotonic(), "coordinator started last")


def test_new_agents_find_a_running_coordinator(cluster: NetworkCluster) -> None:
    cluster.start_coordinator()
    for name in AGENTS:
        cluster.start_agent(name)
    wait_for(lambda: all(map(cluster.has_started, AGENTS)), START_TIMEOUT_S, "the agents' start")
    wait_until_listed(cluster, AGENTS, time.monotonic(), "agents started last")


def test_an_impostor_that_announces_itself_is_passed_over(
    cluster: NetworkCluster, bed: Testbed, tmp_path: Path
) -> None:
    """Another host announces the same cluster, before the right one is there and after."""
    (tmp_path / "impostor").mkdir()
    impostor = NetworkCluster(tmp_path / "impostor", bed, "hub-2")
    tokens = [tmp_path / name for name in ("token", "other-token")]
    try:
        impostor.start_coordinator("--create-token", f"--token-file={tokens[1]}")
        cluster.start_coordinator("--no-mdns", "--create-token", f"--token-file={tokens[0]}")
        cluster.start_agent("ash", f"--token-file={tokens[0]}")
        cluster.wait_for_line("ash", UNHEARD.format("shoal"), START_TIMEOUT_S)
        with cluster.processes["coordinator"] as coordinator:
            coordinator.terminate()
        cluster.start_coordinator(f"--token-file={tokens[0]}")
        wait_until_listed(cluster, ("ash",), time.monotonic(), "the right one")
        assert "is another machine" not in cluster.log("ash")
        assert "connection refused" not in impostor.log("coordinator")
        assert impostor.names() == []
    finally:
        impostor.stop()


@pytest.mark.parametrize("late", ["hub", "ash"], ids=["coordinator", "agent"])
def test_an_address_may_come_late(cluster: NetworkCluster, late: str) -> None:
    cluster.remove_addresses(late)
    cluster.start_coordinator()
    cluster.start_agent("ash")
    cluster.wait_for_line("ash", UNHEARD.format("shoal"), START_TIMEOUT_S)
    cluster.add_address(late, "10.77.0.99")
    wait_until_listed(cluster, ("ash",), time.monotonic(), f"address of {late} came last")


def test_clusters_of_other_names_do_not_mix(bed: Testbed, tmp_path: Path) -> None:
    clusters = []
    for name, host in (("attic", "hub"), ("cellar", "hub-2")):
        (tmp_path / name).mkdir()
        clusters.append(NetworkCluster(tmp_path / name, bed, host, name))
    attic, cellar = clusters
    try:
        attic.start_coordinator()
        attic.start_agent("ash")
        cellar.start_agent("oak")
        attic.wait_for_agents("ash")
        cellar.wait_for_line("oak", UNHEARD.format("cellar"), START_TIMEOUT_S)
        cellar.start_coordinator()
        wait_until_listed(cellar, ("oak",), time.monotonic(), "the other cluster's coordinator")
        assert attic.names() == ["ash"]
    finally:
        for each in clusters:
            each.stop()


def test_an_address_that_two_hosts_have_leads_to_no_other_cluster(
    bed: Testbed, tmp_path: Path
) -> None:
    """As docker's bridge: what the coordinator announces is another cluster's on this host."""
    clusters = []
    for name, host in (("attic", "hub"), ("kitchen", "ash")):
        (tmp_path / name).mkdir()
        clusters.append(NetworkCluster(tmp_path / name, bed, host, name))
        clusters[-1].add_bridge(host, "docker0", "172.17.0.1")
    attic, kitchen = clusters
    try:
        kitchen.start_coordinator("--port=7420")
        attic.start_coordinator("--port=7420")
        started_s = time.monotonic()
        attic.start_agent("ash", "--coordinator=172.17.0.1")
        # It looks at the key of whoever answers, and does not even say what it wants.
        attic.wait_for_line("ash", "172.17.0.1:7420 is another machine", START_TIMEOUT_S)
        assert "nothing was told to it" in attic.log("ash")
        attic.processes["ash"].terminate()
        attic.processes["ash"].wait(60)
        attic.start_agent("ash")
        attic.wait_for_line("ash", "joined cluster 'attic'", START_TIMEOUT_S)
        assert time.monotonic() - started_s < START_TIMEOUT_S
        assert "joined cluster 'kitchen'" not in attic.log("ash")
        assert kitchen.names() == []
        (shown,) = attic.get("/shoal/v1/devices")["devices"]
        # The bridge comes last, and loopback not at all.
        hosts = [endpoint.rpartition(":")[0] for endpoint in shown["endpoints"]]
        assert hosts == [bed.network.address("ash"), "172.17.0.1"]
    finally:
        for each in clusters:
            each.stop()


def test_without_multicast_an_agent_asks_for_the_address(cluster: NetworkCluster) -> None:
    for host in cluster.bed.network.hosts:
        cluster.bed.fault(host, "multicast=off")
    cluster.start_coordinator()
    agent = cluster.start_agent("ash")
    cluster.wait_for_line("ash", UNHEARD.format("shoal"), START_TIMEOUT_S)
    assert "--coordinator HOST:PORT" in cluster.log("ash")
    assert cluster.names() == []
    agent.terminate()
    agent.wait(60)
    cluster.start_agent("ash", f"--coordinator={cluster.address}:{cluster.control_port}")
    cluster.wait_for_agents("ash")


# ---- generating across the network -------------------------------------------------------------


def test_a_split_model_computes_what_it_computes_whole(cluster: NetworkCluster) -> None:
    golden = np.load(LLAMA / "golden.npz")
    prompt, expected = golden["prompt"].tolist(), golden["continuation"].tolist()
    spec = load_spec(LLAMA)
    cluster.start_coordinator()
    for name in AGENTS:
        cluster.start_agent(name, f"--memory={memory_for_two(LLAMA, spec.max_context)}")
    cluster.wait_for_agents(*AGENTS)
    first, last = load_on_two(cluster, LLAMA, spec.max_context)
    before = {name: cluster.received_bytes(name) for name in AGENTS}
    body = {
        "prompt": prompt,
        "max_tokens": len(expected),
        "temperature": 0,
        "return_token_ids": True,
    }
    url = f"{cluster.url}/v1/completions"
    answer = cluster.bed.inside(
        cluster.host, lambda: httpx.post(url, json=body, timeout=60, trust_env=False).json()
    )
    assert answer["shoal"]["tokens"] == expected
    # Each row of hidden values went from the first to the last, each token the way back.
    rows = len(prompt) + len(expected) - 1
    received = {name: cluster.received_bytes(name) - before[name] for name in AGENTS}
    assert received[last] > rows * spec.hidden * 4
    assert received[first] > len(expected)


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    """A model that talks for minutes: no end token, and a context of 20,000 tokens."""
    model = Path(shutil.copytree(LLAMA, tmp_path / "model"))
    path = model / "config.json"
    config = json.loads(path.read_text())
    path.write_text(
        json.dumps(config | {"max_position_embeddings": ENDLESS_CONTEXT, "eos_token_id": None})
    )
    return model


def test_a_host_that_loses_its_link_is_named_and_its_answer_goes_on_when_it_is_back(
    cluster: NetworkCluster, endless: Path
) -> None:
    cluster.start_coordinator("--recovery-wait=120")
    for name in AGENTS:
        cluster.start_agent(name, f"--memory={memory_for_two(endless, ENDLESS_CONTEXT)}")
    cluster.wait_for_agents(*AGENTS)
    _, victim = load_on_two(cluster, endless, ENDLESS_CONTEXT)
    said = cluster.directory / "said"
    with said.open("w") as stdout:
        generation = subprocess.Popen(
            [
                *cluster.command("coordinator"),
                *("run", str(endless), "The", f"--url={cluster.url}"),
                *("--max-tokens=100000", "--temperature=2"),
            ],
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
    try:
        wait_for(lambda: said.stat().st_size > 0, 60, "the first token")
        cluster.bed.fault(victim, "cut")
        cut_s = time.monotonic()
        cluster.wait_for_line("coordinator", f"{victim}: device lost", LOST_WITHIN_S)
        print(f"link cut: named after {time.monotonic() - cut_s:.2f} s")  # noqa: T201 - a figure
        cluster.wait_for_line("coordinator", "cannot take its place", LOST_WITHIN_S)
        cluster.wait_for_line(victim, "; trying again", LOST_WITHIN_S)
        cluster.wait_for_line(victim, UNHEARD.format("shoal"), LOST_WITHIN_S)
        # No event to wait for: zeroconf falls silent, and the agent has to go on after that.
        time.sleep(ZEROCONF_ASKS_S - SEARCH_ROUND_S + 1)
        shown_bytes = said.stat().st_size
        cluster.bed.fault(victim, "heal")
        healed_s = time.monotonic()
        wait_until_listed(cluster, AGENTS, healed_s, "link healed")
        wait_for(lambda: said.stat().st_size > shown_bytes, RECOVERED_WITHIN_S, "another token")
        print(f"answered after {time.monotonic() - healed_s:.2f} s")  # noqa: T201 - a figure
        generation.send_signal(signal.SIGINT)
        _, stderr = generation.communicate(timeout=60)
    finally:
        if generation.poll() is None:
            generation.kill()
            generation.communicate()
    assert generation.returncode in (130, -signal.SIGINT), stderr
    assert f"{victim}: device lost" in stderr
    assert "The answer goes on" in stderr
    load_on_two(cluster, endless, ENDLESS_CONTEXT)


# ---- a coordinator that comes back -------------------------------------------------------------


def test_a_coordinator_that_moved_is_found_again(cluster: NetworkCluster) -> None:
    cluster.start_coordinator()
    for name in AGENTS:
        cluster.start_agent(name)
    cluster.wait_for_agents(*AGENTS)
    old_port = cluster.control_port
    cluster.lose_coordinator()
    cluster.start_coordinator()
    assert cluster.control_port != old_port
    wait_until_listed(cluster, AGENTS, time.monotonic(), "coordinator restarted")
