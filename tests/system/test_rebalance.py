"""`shoal rebalance` says whether another plan would be better, and moves the model there."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.system.cluster import TINY_OPT, Cluster, last_json, wait_for
from tests.system.scripted import ScriptedCluster, say, write_model

WAIT_S = 60
DELAY_S = 0.05
SAID = "I moved in the middle of this sentence, and nobody has noticed a thing."


def test_the_present_plan_is_compared_with_the_best_one(cluster: Cluster) -> None:
    cluster.start_coordinator()
    refused = cluster.run("rebalance", "--dry-run")
    assert refused.returncode == 1
    assert refused.stderr.strip() == "error: no model answers now: see `shoal ps`"
    cluster.start_agent("a1")
    cluster.wait_for_agents("a1")
    cluster.load(TINY_OPT, "--bits=8")
    before = cluster.get("/shoal/v1/ps")["model"]
    alone = last_json(cluster.run("rebalance", "--dry-run", "--json"))
    # The only device cannot do better.
    assert (alone["moves"], alone["gain"]) == (False, 0)
    assert alone["why"] == "no plan is better by the present figures"
    assert alone["present"]["stages"] == alone["plan"]["stages"]
    cluster.start_agent("a2")
    cluster.wait_for_agents("a1", "a2")
    compared = last_json(cluster.run("rebalance", "--dry-run", "--json"))
    assert compared["gain"] <= 1
    assert {stage["device"] for stage in compared["present"]["stages"]} == {"a1"}
    other = cluster.run("rebalance", "nothing", "--dry-run")
    assert other.stderr.strip() == "error: nothing does not answer now: see `shoal ps`"
    shown = cluster.run("rebalance", "tiny-opt", "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert "tiny-opt now; by the present figures" in shown.stdout
    after = cluster.get("/shoal/v1/ps")["model"]
    assert after["stages"] == before["stages"]
    # Without a better plan nothing is moved either way.
    kept = last_json(cluster.run("rebalance", "--json"))
    kinds = [event["kind"] for event in cluster.get("/shoal/v1/events")["events"]]
    # A move begins beside the present plan, or in its place.
    began = bool({"moved", "moving"} & set(kinds))
    assert ("moved_to" in kept, began) == (kept["moves"], kept["moves"])


def test_a_faster_device_gets_the_model_and_the_answer_goes_on_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = ScriptedCluster(tmp_path)
    cluster.measures = True  # The two devices are not alike.
    try:
        cluster.start_coordinator()
        where = f"--coordinator=127.0.0.1:{cluster.control_port}"
        options = where, "--memory=1G", "--backend=script_cpu"
        monkeypatch.setenv("SCRIPT_DELAY_S", str(DELAY_S))
        cluster.start_agent("slow", *options)
        cluster.wait_for_agents("slow", timeout_s=120)
        cluster.load(write_model(tmp_path / "plain", "plain"), "--bits=16", "--context=2048")
        monkeypatch.delenv("SCRIPT_DELAY_S")
        cluster.start_agent("fast", *options)
        cluster.wait_for_agents("fast", "slow", timeout_s=120)
        begun = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(streamed, cluster, begun)
            assert begun.wait(WAIT_S)
            moved = last_json(cluster.run("rebalance", "--json"))
            assert answer.result(WAIT_S) == SAID
        assert (moved["moves"], moved["moved_to"]) == (True, ["fast"])
        kinds = [event["kind"] for event in cluster.get("/shoal/v1/events")["events"]]
        told = [kind for kind in kinds if kind in ("moving", "moved", "replaced", "lost", "left")]
        assert told == ["moved"]
        assert cluster.names() == ["fast", "slow"]
    finally:
        cluster.stop()


class QuickCluster(ScriptedCluster):
    """A shoal whose coordinator waits seconds, not minutes, before it moves a model."""

    def command(self, name: str) -> list[str]:
        python, option, command, tree = super().command(name)
        quick = (
            "import coordinator.loading.rebalance as rule, coordinator.loading.rebalancing as loop"
        )
        quick += "; rule.STEADY_S = 2.0; loop.LOOK_S = 0.2\n"
        begin, run, rest = command.partition("from cli.main")
        return [python, option, f"{begin}{quick}{run}{rest}", tree]


def test_the_model_moves_by_itself_while_an_answer_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = QuickCluster(tmp_path)
    cluster.measures = True  # The two devices are not alike.
    try:
        cluster.start_coordinator("--rebalance=auto")
        where = f"--coordinator=127.0.0.1:{cluster.control_port}"
        options = where, "--memory=1G", "--backend=script_cpu"
        monkeypatch.setenv("SCRIPT_DELAY_S", str(DELAY_S))
        cluster.start_agent("slow", *options)
        cluster.wait_for_agents("slow", timeout_s=120)
        cluster.load(write_model(tmp_path / "plain", "plain"), "--bits=16", "--context=2048")
        monkeypatch.delenv("SCRIPT_DELAY_S")
        cluster.start_agent("fast", *options)
        cluster.wait_for_agents("fast", "slow", timeout_s=120)
        # Nothing is answered, so the new device is measured, and then its links.
        wait_for(lambda: len(cluster.get("/shoal/v1/devices")["links"]) == 2, WAIT_S, "links")
        said, devices = [], {"slow"}
        while devices != {"fast"}:
            said.append(streamed(cluster, threading.Event()))
            model = cluster.get("/shoal/v1/ps")["model"]
            devices = {stage["device"] for stage in model["stages"]}
        assert set(said) == {SAID}
        kinds = [event["kind"] for event in cluster.get("/shoal/v1/events")["events"]]
        assert [kind for kind in kinds if kind in ("moved", "moving", "lost")] == ["moved"]
        assert streamed(cluster, threading.Event()) == SAID
    finally:
        cluster.stop()


def streamed(cluster: Cluster, begun: threading.Event) -> str:
    """Return the text of a streamed answer. ``begun`` is set with its first piece."""
    messages = [{"role": "user", "content": say(SAID)}]
    body = {"messages": messages, "max_tokens": 200, "stream": True}
    url, text = f"{cluster.url}/v1/chat/completions", ""
    with httpx.stream("POST", url, json=body, timeout=WAIT_S, trust_env=False) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                text += event["choices"][0]["delta"].get("content") or ""
                if text:
                    begun.set()
    return text
