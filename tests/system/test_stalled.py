"""A device that beats on while its stage hangs is replaced, and welcomed back."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.system.cluster import wait_for
from tests.system.scripted import ScriptedCluster, say, write_model

WAIT_S = 60
SAID = "I was away for a moment."


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[ScriptedCluster]:
    cluster = ScriptedCluster(tmp_path)
    yield cluster
    (tmp_path / "hang.taken").unlink(missing_ok=True)
    cluster.stop()


def ask(cluster: ScriptedCluster, prompt: str) -> str:
    body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 100}
    url = f"{cluster.url}/v1/chat/completions"
    answer = httpx.post(url, json=body, timeout=WAIT_S, trust_env=False)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def test_the_answer_goes_on_elsewhere_and_the_device_comes_back(
    scripted: ScriptedCluster, tmp_path: Path
) -> None:
    scripted.start_coordinator()
    where = f"--coordinator=127.0.0.1:{scripted.control_port}"
    for name in ("a1", "a2"):
        scripted.start_agent(name, where, "--memory=1G", "--backend=script_cpu")
    scripted.wait_for_agents("a1", "a2", timeout_s=120)
    model = write_model(tmp_path / "plain", "plain")
    loaded = scripted.load(model, "--bits=16", "--context=2048")
    (first,) = [stage["device"] for stage in loaded["stages"]]
    assert ask(scripted, say(SAID)) == SAID
    path = tmp_path / "hang"
    path.touch()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, scripted, f"[[hang]]{path}[[end]]{say(SAID)}")
        assert answer.result(WAIT_S) == SAID
    taken = path.with_name("hang.taken")
    assert taken.exists()  # The device hangs to this moment.
    (other,) = scripted.names()
    assert other != first
    told = scripted.get("/shoal/v1/events")["events"]
    (left,) = [event for event in told if event["kind"] == "left"]
    assert left["subject"] == first
    assert "alive, but a pass of its stage has computed for" in left["text"]
    taken.unlink()
    wait_for(lambda: len(scripted.names()) == 2, WAIT_S, "the device to join again")
    assert ask(scripted, say(SAID)) == SAID
