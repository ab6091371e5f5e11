"""Devices that are lost while they answer: the answer goes on as if nothing had happened."""

from __future__ import annotations

import json
import shutil
import signal
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from model import costs
from model.checkpoint import Checkpoint
from tests.system.cluster import FIXTURES, Cluster, streamed_tokens, wait_for
from wire import limits

NAMES = ("pi-1", "pi-2", "pi-3")
PINS = ("--pin=embedding:pi-1", "--pin=layers=1:pi-2", "--pin=head:pi-3")
CONTEXT = 2000
TOKENS = 400
LOST_AFTER = 20
REQUESTS: tuple[dict[str, Any], ...] = (
    {"prompt": "The lamp", "temperature": 0},
    {"prompt": "a long one " * 30, "temperature": 1.2, "seed": 5},
    {"prompt": "x", "temperature": 1, "top_p": 0.9, "seed": 6},
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that talks as long as it is let."""
    directory = tmp_path_factory.mktemp("endless") / "model"
    model = Path(shutil.copytree(FIXTURES / "llama", directory))
    config = json.loads((model / "config.json").read_text())
    changes = {"max_position_embeddings": CONTEXT, "eos_token_id": None}
    (model / "config.json").write_text(json.dumps(config | changes))
    return model


def start(cluster: Cluster, name: str, *options: str) -> None:
    cluster.start_agent(name, f"--coordinator=127.0.0.1:{cluster.control_port}", *options)


def start_all(cluster: Cluster, coordinator: tuple[str, ...] = (), *options: str) -> None:
    """The coordinator and all agents, these with ``options``."""
    cluster.start_coordinator(*coordinator)
    for name in NAMES:
        start(cluster, name, *options)
    cluster.wait_for_agents(*NAMES)


def load(cluster: Cluster, model: Path, *options: str) -> list[str]:
    """The devices of the stages."""
    answer = cluster.load(
        model,
        *("--bits=32", "--hop-bits=32", f"--context={CONTEXT}", "--slots=2"),
        *options,
    )
    return [stage["device"] for stage in answer["plan"]["stages"]]


def answer(cluster: Cluster, request: dict[str, Any], begun: threading.Event) -> list[int]:
    """The tokens of a streamed answer; ``begun`` once some are there."""
    return streamed_tokens(cluster, {**request, "max_tokens": TOKENS}, begun, LOST_AFTER)


def ask(cluster: Cluster, pool: ThreadPoolExecutor) -> list[Future[list[int]]]:
    """All requests at once, when the first two are being answered; the third stands in line."""
    events = [threading.Event() for _ in REQUESTS]
    answers = [
        pool.submit(answer, cluster, request, event)
        for request, event in zip(REQUESTS, events, strict=True)
    ]
    wait_for(lambda: sum(event.is_set() for event in events) >= 2, 60, "two answers")
    return answers


def state(cluster: Cluster) -> Any:
    return cluster.get("/shoal/v1/ps")["model"]


@pytest.fixture(scope="module")
def whole(shared_cluster: Cluster, model: Path) -> Cluster:
    """Three devices with a stage each. A test that kills one starts it again."""
    start_all(shared_cluster)
    assert load(shared_cluster, model, *PINS) == list(NAMES)
    return shared_cluster


@pytest.fixture(scope="module")
def undisturbed(whole: Cluster) -> list[list[int]]:
    """The answers to all requests while no device is lost."""
    answers = [answer(whole, request, threading.Event()) for request in REQUESTS]
    assert all(len(tokens) == TOKENS for tokens in answers)
    return answers


@pytest.mark.parametrize("victim", NAMES)
def test_answers_go_on_over_the_devices_that_are_left(
    whole: Cluster, model: Path, undisturbed: list[list[int]], victim: str
) -> None:
    cluster, said = whole, len(whole.log("coordinator"))
    with ThreadPoolExecutor(len(REQUESTS)) as pool:
        answers = ask(cluster, pool)
        cluster.kill(victim)
        cluster.processes[victim].wait()
        assert [future.result(60) for future in answers] == undisturbed
    left = state(cluster)
    assert left["state"] == "ready"
    devices = {stage["device"] for stage in left["plan"]["stages"]}
    assert devices <= set(NAMES) - {victim}
    log = cluster.log("coordinator")[said:]
    assert f"{victim}: device lost" in log
    assert f"{left['model']} is loaded again" in log
    # What was asked of a device that is back counts again.
    start(cluster, victim)
    cluster.wait_for_agents(*NAMES)
    assert load(cluster, model, *PINS) == list(NAMES)


def short_of_one(model: Path) -> str:
    """Memory with which two agents do not hold the model, and three do."""
    spec = Checkpoint.open(model).spec
    layer = costs.kv_bytes(spec, 1, CONTEXT) * 2
    buffers = costs.stage_buffer_bytes(
        spec, range(spec.block_count), limits.PREFILL_CHUNK_TOKENS, CONTEXT
    )
    return f"--memory={int(1.9 * layer) + buffers}"


def test_answers_wait_for_a_device_that_no_other_can_replace(cluster: Cluster, model: Path) -> None:
    memory = short_of_one(model)
    start_all(cluster, ("--no-mdns", "--recovery-wait=60"), memory)
    assert len(load(cluster, model)) == 3
    undisturbed = [answer(cluster, request, threading.Event()) for request in REQUESTS]
    with ThreadPoolExecutor(len(REQUESTS)) as pool:
        answers = ask(cluster, pool)
        cluster.kill("pi-2")
        cluster.processes["pi-2"].wait()
        told = wait_for(
            lambda: (now := state(cluster))["reason"] and "take its place" in now["reason"] and now,
            30,
            "an attempt",
        )
        assert told["state"] == "recovering"
        assert "memory is short" in told["reason"]
        start(cluster, "pi-2", memory)
        assert [future.result(60) for future in answers] == undisturbed
    assert state(cluster)["state"] == "ready"


def test_an_unload_ends_the_waiting(cluster: Cluster, model: Path) -> None:
    memory = short_of_one(model)
    start_all(cluster, ("--no-mdns", "--recovery-wait=600"), memory)
    load(cluster, model)
    cluster.processes["pi-3"].send_signal(signal.SIGKILL)
    wait_for(lambda: state(cluster)["state"] == "recovering", 60, "the loss")
    with ThreadPoolExecutor(1) as pool:
        name = state(cluster)["model"]
        waiting = pool.submit(cluster.run, "run", name, "x")
        assert cluster.run("unload").stdout == f"{name} is unloaded\n"
        assert waiting.result(30).returncode == 1
    assert state(cluster) is None


def test_a_coordinator_that_is_started_again_loads_what_was_loaded(
    cluster: Cluster, model: Path
) -> None:
    def restart(how: signal.Signals) -> None:
        coordinator = cluster.processes["coordinator"]
        coordinator.send_signal(how)
        coordinator.wait(60)
        if coordinator.stdout is not None:
            coordinator.stdout.close()
        # Nobody finds it by mDNS here: it has to come back where it was.
        cluster.start_coordinator("--no-mdns", f"--port={cluster.control_port}")

    start_all(cluster)
    load(cluster, model, *PINS)
    before = answer(cluster, REQUESTS[0], threading.Event())
    for how in (signal.SIGTERM, signal.SIGKILL):
        restart(how)
        # Asked for before the agents are back: it waits for them.
        assert answer(cluster, REQUESTS[0], threading.Event()) == before
        plan = state(cluster)["plan"]
        assert [stage["device"] for stage in plan["stages"]] == list(NAMES)
    assert cluster.run("unload").returncode == 0
    said = len(cluster.log("coordinator"))
    restart(signal.SIGTERM)
    cluster.wait_for_agents(*NAMES)
    assert state(cluster) is None
    assert "was loaded" not in cluster.log("coordinator")[said:]
