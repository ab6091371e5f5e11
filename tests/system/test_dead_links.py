"""Dead links between living devices: named, planned around, and used again."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from model import costs
from model.families import load_spec
from model.quantize import Format
from testbed.bed import Testbed
from tests.system.cluster import FIXTURES, START_TIMEOUT_S, last_json
from tests.system.namespaces import NetworkCluster, bed_of, unavailable
from tests.team import write_plan
from wire import limits

pytestmark = pytest.mark.netns

AGENTS = ("ash", "elm", "oak")
CONTEXT = 3000
TOKENS = 2000
LOST_AFTER = 20
OPTIONS = ("--bits=32", "--hop-bits=32", f"--context={CONTEXT}")

CHANGED_WITHIN_S = 60.0
"""Patience with what takes some seconds on a machine that is not busy."""


@pytest.fixture
def bed() -> Iterator[Testbed]:
    """Hosts for a coordinator and three agents."""
    reason = unavailable()
    if reason is not None:
        pytest.skip(reason)
    with bed_of("hub", *AGENTS) as bed:
        yield bed


@pytest.fixture
def cluster(bed: Testbed, tmp_path: Path) -> Iterator[NetworkCluster]:
    """A cluster that the test starts as it likes."""
    cluster = NetworkCluster(tmp_path, bed)
    yield cluster
    cluster.stop()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model that talks as long as it is let."""
    model = Path(shutil.copytree(FIXTURES / "llama", tmp_path / "model"))
    path = model / "config.json"
    config = json.loads(path.read_text())
    changes = {"max_position_embeddings": CONTEXT, "eos_token_id": None}
    path.write_text(json.dumps(config | changes))
    return model


def start(cluster: NetworkCluster, model: Path, *names: str) -> None:
    """Agents of which any two can hold the model, and none alone."""
    spec = load_spec(model)
    blocks = range(spec.block_count)
    total_bytes = sum(
        costs.executed_bytes(spec, block, Format.of(32), 32) + costs.kv_bytes(spec, block, CONTEXT)
        for block in blocks
    )
    rows = limits.PREFILL_CHUNK_TOKENS
    memory_bytes = int(0.75 * total_bytes) + costs.stage_buffer_bytes(spec, blocks, rows, CONTEXT)
    cluster.start_coordinator("--no-mdns", "--recovery-wait=120")
    at = f"--coordinator={cluster.address}:{cluster.control_port}"
    for name in names:
        cluster.start_agent(name, at, f"--memory={memory_bytes}")
    cluster.wait_for_agents(*names, timeout_s=START_TIMEOUT_S)


def load(cluster: NetworkCluster, model: Path) -> tuple[str, str]:
    """The devices of the two stages."""
    plan = cluster.load(model, *OPTIONS)["plan"]
    first, last = [stage["device"] for stage in plan["stages"]]
    return first, last


def missing(cluster: NetworkCluster) -> set[tuple[str, str]]:
    """Directions without a link, as `shoal devices` has them."""
    shown = last_json(cluster.run("devices", "--json"))
    return {(link["source"], link["target"]) for link in shown["no_links"]}


def answer(cluster: NetworkCluster, begun: threading.Event) -> list[int]:
    """The tokens of a streamed answer; ``begun`` once some are there."""
    body = {"prompt": "The", "temperature": 0, "max_tokens": TOKENS, "stream": True}
    body["return_token_ids"] = True
    tokens = list[int]()

    def read() -> None:
        nonlocal tokens
        url = f"{cluster.url}/v1/completions"
        with httpx.stream("POST", url, json=body, timeout=120, trust_env=False) as response:
            for count, line in enumerate(response.iter_lines()):
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    assert "error" not in event, event
                    tokens = event.get("shoal", {}).get("tokens", tokens)
                if count == LOST_AFTER:
                    begun.set()

    cluster.bed.inside(cluster.host, read)
    return tokens


def test_a_firewall_is_not_called_lack_of_memory(cluster: NetworkCluster, model: Path) -> None:
    start(cluster, model, "ash", "elm")
    cluster.bed.fault("elm", "firewall")
    shown = last_json(cluster.run("devices", "--json"))
    assert shown["no_links"] == []
    for command in ("plan", "load"):
        completed = cluster.run(command, str(model), *OPTIONS)
        assert completed.returncode == 1
        assert (
            "no plan fits: ash cannot reach elm (cannot connect to 10.77.0.3:" in completed.stderr
        )
        assert "no answer in time" in completed.stderr
        assert "let ash connect to TCP port" in completed.stderr
        assert "memory" not in completed.stderr
    assert missing(cluster) == {("ash", "elm")}
    table = cluster.run("devices").stdout
    assert "no link: ash cannot reach elm (cannot connect to 10.77.0.3:" in table
    assert cluster.log("coordinator").count("no link from ash to elm") == 1
    # What was opened is seen at once.
    cluster.bed.fault("elm", "heal")
    load(cluster, model)
    assert missing(cluster) == set()


def test_a_pair_that_was_cut_off_since_it_was_measured_is_planned_around(
    cluster: NetworkCluster, model: Path
) -> None:
    start(cluster, model, *AGENTS)
    first, last = load(cluster, model)
    assert cluster.run("unload").returncode == 0
    cluster.bed.fault(last, f"lose={first}")
    ring = load(cluster, model)
    assert set(ring) != {first, last}
    assert {frozenset(pair) for pair in missing(cluster)} == {frozenset((first, last))}


def test_an_answer_goes_on_around_a_pair_that_is_cut_off(
    cluster: NetworkCluster, model: Path
) -> None:
    start(cluster, model, *AGENTS)
    ring = load(cluster, model)
    undisturbed = answer(cluster, threading.Event())
    assert len(undisturbed) == TOKENS
    begun = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        going_on = pool.submit(answer, cluster, begun)
        assert begun.wait(CHANGED_WITHIN_S)
        cluster.bed.fault(ring[0], f"lose={ring[1]}")
        assert going_on.result(120) == undisturbed
    state = cluster.get("/shoal/v1/ps")["model"]
    assert state["state"] == "ready"
    assert {stage["device"] for stage in state["plan"]["stages"]} != set(ring)
    log = cluster.log("coordinator")
    assert "link lost: " in log
    assert "check the network between them" in log
    assert "check its power" not in log
    assert cluster.names() == list(AGENTS)
    # By hand as well.
    assert set(load(cluster, model)) != set(ring)


def test_an_answer_goes_on_when_two_members_of_a_team_are_cut_off(
    cluster: NetworkCluster, tmp_path: Path, model: Path
) -> None:
    start(cluster, model, *AGENTS)
    plan = write_plan(tmp_path, model, [(("ash", "elm"), 4, (1, 1)), (("oak",), 1, ())])
    (team, _) = cluster.load(model, *OPTIONS, f"--plan={plan}")["stages"]
    assert [member["device"] for member in team["members"]] == ["ash", "elm"]
    undisturbed = answer(cluster, threading.Event())
    assert len(undisturbed) == TOKENS
    begun = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        going_on = pool.submit(answer, cluster, begun)
        assert begun.wait(CHANGED_WITHIN_S)
        cluster.bed.fault("ash", "lose=elm")
        assert going_on.result(120) == undisturbed
    assert cluster.names() == list(AGENTS)
    assert {frozenset(pair) for pair in missing(cluster)} == {frozenset(("ash", "elm"))}
    log = cluster.log("coordinator")
    assert "link lost: " in log
    assert "check its power" not in log
    # Who asks for this team now is told why there is none.
    refused = cluster.run("load", str(model), *OPTIONS, f"--plan={plan}")
    assert refused.returncode == 1
    assert "cannot share layers: ash cannot reach elm" in refused.stderr
