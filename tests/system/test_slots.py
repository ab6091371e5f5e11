"""Several requests at once, over agents that are processes of their own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from agent.peers import connect_peer
from benchmarks.fidelity import plan_of
from planning.forecast import rows_at_once
from tests.system.cluster import FIXTURES, Cluster, last_json, wait_for
from tests.system.members import Member
from wire.errors import ConnectionLost
from wire.messages import Activation, Endpoint

NAMES = ("pi-1", "pi-2", "pi-3")
SLOTS = 3
ENDLESS_CONTEXT = 20_000
TIMEOUT_S = 60


@pytest.fixture
def shared(cluster: Cluster, tmp_path: Path) -> Cluster:
    """A model that never ends by itself, split over three agents, with slots for three."""
    model = Path(shutil.copytree(FIXTURES / "llama", tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    changes = {"max_position_embeddings": ENDLESS_CONTEXT, "eos_token_id": None}
    (model / "config.json").write_text(json.dumps(config | changes))
    cluster.start_coordinator()
    for name in NAMES:
        cluster.start_agent(name, f"--coordinator=127.0.0.1:{cluster.control_port}")
    cluster.wait_for_agents(*NAMES)
    answer = cluster.load(
        model,
        *("--bits=32", f"--context={ENDLESS_CONTEXT}", f"--slots={SLOTS}"),
        *("--pin=embedding:pi-1", "--pin=layers=1:pi-2", "--pin=head:pi-3"),
    )
    assert [stage["device"] for stage in answer["plan"]["stages"]] == list(NAMES)
    assert answer["slots"] == {"total": SLOTS, "used": 0, "waiting": 0, "classes": {}}
    return cluster


def tokens_of(cluster: Cluster, body: dict[str, Any]) -> list[int]:
    """The tokens of one answer, streamed or not."""
    body = {"max_tokens": 40, "return_token_ids": True, **body}
    answer = httpx.post(
        f"{cluster.url}/v1/completions", json=body, timeout=TIMEOUT_S, trust_env=False
    )
    assert answer.status_code == 200, answer.text
    if not body.get("stream"):
        return list(answer.json()["shoal"]["tokens"])
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    return list(json.loads(lines[-2])["shoal"]["tokens"])


def test_requests_at_once_get_what_each_gets_alone(shared: Cluster) -> None:
    requests: list[dict[str, Any]] = [
        {"prompt": "The lamp", "temperature": 0},
        {"prompt": "The lamp", "temperature": 1.5, "seed": 1},
        {"prompt": "a long one " * 30, "temperature": 0, "stream": True},
        {"prompt": "and another " * 20, "temperature": 1.0, "top_p": 0.9, "seed": 2},
        {"prompt": "x", "temperature": 2, "seed": 3, "top_k": 20, "stream": True},
        {"prompt": "The end", "temperature": 0, "max_tokens": 1},
    ]
    alone = [tokens_of(shared, request) for request in requests]
    assert len(set(map(tuple, alone))) == len(requests)
    with ThreadPoolExecutor(len(requests)) as pool:
        for _ in range(3):
            assert list(pool.map(lambda request: tokens_of(shared, request), requests)) == alone


def test_rows_go_round_in_groups(shared: Cluster) -> None:
    plan = plan_of(shared.get("/shoal/v1/ps")["model"]["plan"])
    at_once = max(rows_at_once(plan, count) for count in range(1, 1 + SLOTS))
    assert at_once < SLOTS
    requests = [{"prompt": word, "max_tokens": 200, "ignore_eos": True} for word in ("a", "b", "c")]
    with ThreadPoolExecutor(SLOTS) as pool:
        list(pool.map(partial(tokens_of, shared), requests))
    stages = shared.get("/shoal/v1/trace?request=last")["stages"]
    passes = [item for item in stages[0]["passes"] if item["rows"] == 1]
    assert len(passes) > 100
    assert max(item["together"] for item in passes) <= at_once


class Endless:
    """A generation that goes on until it is closed; open once its first token is there."""

    def __init__(self, cluster: Cluster, stack: ExitStack) -> None:
        body = {"prompt": "The", "max_tokens": 100_000, "temperature": 2, "stream": True}
        self._response = stack.enter_context(
            httpx.stream(
                *("POST", f"{cluster.url}/v1/completions"),
                json=body,
                timeout=TIMEOUT_S,
                trust_env=False,
            )
        )
        self._lines = self._response.iter_lines()
        self.read()

    def read(self) -> dict[str, Any]:
        """The next event."""
        event: dict[str, Any] = json.loads(self._data().removeprefix("data: "))
        return event

    def close(self) -> None:
        self._response.close()

    def _data(self) -> str:
        return next(line for line in self._lines if line.startswith("data: "))


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_who_leaves_or_is_lost_among_several(shared: Cluster, stack: ExitStack) -> None:
    def slots() -> Any:
        return shared.get("/shoal/v1/ps")["model"]["slots"]

    first, second = Endless(shared, stack), Endless(shared, stack)
    # A third one is answered meanwhile.
    assert len(tokens_of(shared, {"prompt": "x", "temperature": 0})) == 40
    assert slots() == {"total": SLOTS, "used": 2, "waiting": 0, "classes": {"normal": 2}}
    third = Endless(shared, stack)
    assert last_json(shared.run("ps", "--json"))["model"]["slots"]["used"] == SLOTS
    assert f"{SLOTS} of {SLOTS} slots" in shared.run("ps").stdout
    # One more waits until somebody goes away.
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(tokens_of, shared, {"prompt": "x", "temperature": 0})
        wait_for(lambda: slots()["waiting"] == 1, TIMEOUT_S, "a line")
        third.close()
        assert len(late.result(TIMEOUT_S)) == 40
    # A stranger speaks for a device of the ring, which nobody notices.
    middle = next(
        device for device in shared.get("/shoal/v1/devices")["devices"] if device["name"] == "pi-2"
    )["device"]
    port = next(
        connection.laddr.port
        for connection in psutil.Process(shared.processes["pi-2"].pid).net_connections("tcp4")
        if connection.status == psutil.CONN_LISTEN
    )
    stranger = Member(shared)
    endpoint = Endpoint("127.0.0.1", port)
    with connect_peer("stranger", middle, [endpoint], caller=stranger.to(middle)) as peer:
        peer.send(Activation(1, 2, 0, ENDLESS_CONTEXT, 1, 32, True), bytes(4))
        with pytest.raises(ConnectionLost):
            peer.receive()
    assert "choices" in second.read()
    second.close()
    wait_for(lambda: slots()["used"] == 1, TIMEOUT_S, "the end of the second")
    fourth = Endless(shared, stack)
    assert "choices" in first.read()
    shared.kill("pi-2")
    wait_for(lambda: "loaded again" in shared.log("coordinator"), TIMEOUT_S, "recovery")
    wait_for(lambda: slots()["used"] == 2, TIMEOUT_S, "both answers")
    assert "choices" in first.read()
    assert "choices" in fourth.read()
