"""A restarted coordinator says what it waits for, and answers once it can."""

from __future__ import annotations

import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from tests.system.cluster import COMMAND, ROOT, TINY_OPT, Cluster, wait_for

WAIT_S = 120


def test_what_is_being_resumed_is_told_by_all_and_answers_come(cluster: Cluster) -> None:
    cluster.start_coordinator()
    cluster.start_agent("a1")
    cluster.wait_for_agents("a1")
    cluster.load(TINY_OPT, "--bits=8")
    question = {"model": "tiny-opt", "prompt": "Hello", "max_tokens": 3, "temperature": 0}
    undisturbed = ask(cluster, question)
    for name in ("coordinator", "a1"):
        cluster.kill(name)
        cluster.processes[name].wait()
    stdout = cluster.processes["coordinator"].stdout
    assert stdout is not None
    stdout.close()
    cluster.start_coordinator("--no-mdns", f"--recovery-wait={WAIT_S}")

    shown = cluster.run("ps").stdout
    assert "tiny-opt: resuming" in shown
    assert "waiting for a1" in shown
    told = cluster.get("/shoal/v1/ps")["model"]
    assert (told["model"], told["state"], told["waiting_for"]) == ("tiny-opt", "resuming", ["a1"])
    assert told["directory"] == str(TINY_OPT)
    (listed,) = cluster.get("/v1/models")["data"]
    assert listed["id"] == "tiny-opt"
    assert listed["shoal"]["state"] == "resuming"
    assert listed["shoal"]["waiting_for"] == ["a1"]

    asked = httpx.post(f"{cluster.url}/v1/completions", json=question, trust_env=False)
    assert (asked.status_code, asked.headers["Retry-After"]) == (503, "5")
    assert asked.json()["error"]["code"] == "model_loading"
    assert "tiny-opt is resuming: waiting for a1" in asked.json()["error"]["message"]
    health = httpx.get(f"{cluster.url}/health", trust_env=False)
    assert (health.status_code, health.json()["status"]) == (503, "resuming")
    assert cluster.get("/health/live") == {"status": "ok"}

    url = f"--url={cluster.url}"
    run = subprocess.Popen(
        [*COMMAND, "run", "tiny-opt", "Hello", "--max-tokens=3", "--temperature=0", url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        assert run.stderr is not None
        assert "tiny-opt is resuming: waiting for a1" in run.stderr.readline()
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(ask, cluster, question)
            cluster.start_agent("a1", f"--coordinator=127.0.0.1:{cluster.control_port}")
            assert answer.result(WAIT_S) == undisturbed
        text, errors = run.communicate(timeout=WAIT_S)
    finally:
        if run.poll() is None:
            run.kill()
            run.wait()
    assert run.returncode == 0, errors
    assert text.rstrip("\n") == undisturbed.rstrip("\n")
    assert cluster.get("/shoal/v1/ps")["model"]["state"] == "ready"
    assert cluster.get("/health") == {"status": "ok"}
    (listed,) = cluster.get("/v1/models")["data"]
    assert listed["shoal"]["state"] == "ready"
    story = [event["kind"] for event in cluster.get("/shoal/v1/events")["events"]]
    assert [kind for kind in story if kind in ("resuming", "joined", "served")] == [
        "resuming",
        "joined",
        "served",
    ]
    assert "served" in cluster.run("events").stdout


def test_a_load_and_what_became_of_it_are_told(cluster: Cluster) -> None:
    cluster.measures = True
    cluster.start_coordinator("--no-mdns", "--recovery-wait=0")
    cluster.start_agent("a1")
    cluster.wait_for_agents("a1")
    with ThreadPoolExecutor(2) as pool:
        loading = pool.submit(cluster.load, TINY_OPT, "--bits=8")
        wait_for(lambda: cluster.get("/shoal/v1/ps")["model"], 60, "the load to begin")
        assert cluster.get("/shoal/v1/ps")["model"]["state"] == "loading"
        assert cluster.get("/v1/models")["data"][0]["shoal"]["state"] == "loading"
        # Whoever asks now gets an answer, from the model that is being loaded.
        question = {"model": "tiny-opt", "prompt": "Hello", "max_tokens": 3}
        answer = pool.submit(ask, cluster, question)
        assert loading.result(WAIT_S)["state"] == "ready"
        assert isinstance(answer.result(WAIT_S), str)
    cluster.kill("a1")
    broken = wait_for(
        lambda: (now := cluster.get("/shoal/v1/ps")["model"])["state"] == "broken" and now,
        30,
        "the loss",
    )
    assert "a1: device lost" in broken["reason"]
    assert "a1: device lost" in cluster.run("ps").stdout
    (listed,) = cluster.get("/v1/models")["data"]
    assert listed["shoal"]["state"] == "broken"
    assert "a1: device lost" in listed["shoal"]["reason"]
    completed = cluster.run("run", "tiny-opt", "Hello")
    assert completed.returncode == 1
    assert "a1: device lost" in completed.stderr


def ask(cluster: Cluster, question: dict[str, Any]) -> str:
    """Ask as often as the coordinator says that it will answer later."""
    url, deadline_s = f"{cluster.url}/v1/completions", time.monotonic() + WAIT_S
    while True:
        answer = httpx.post(url, json=question, timeout=WAIT_S, trust_env=False)
        if answer.status_code != 503 or time.monotonic() > deadline_s:
            return str(answer.json()["choices"][0]["text"])
        time.sleep(float(answer.headers["Retry-After"]))  # As clients do.
