"""A coordinator that other machines reach: who gets in, and how its user is told."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import httpx
import pytest

from coordinator.serving.urgency import HEADER
from tests.system.cluster import COMMAND, ROOT, TINY_OPT, Cluster, shoal, wait_for

QUESTION = {"model": "tiny-opt", "prompt": "Hello", "max_tokens": 3, "temperature": 0}


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    own = {**os.environ, **environment}
    own = {name: value for name, value in own.items() if value}
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, cwd=ROOT, env=own, timeout=60
    )


def test_a_coordinator_beyond_loopback_asks_for_a_key(cluster: Cluster) -> None:
    cluster.start_coordinator("--no-mdns", "--http=0.0.0.0:0")
    cluster.url = cluster.url.replace("0.0.0.0", "127.0.0.1")  # noqa: S104 - as it was told
    state = cluster.directory / "coordinator"
    advice = f"`shoal key create NAME --state-dir {state}` makes one"
    assert advice in " ".join(cluster.log("coordinator").split())

    # Whoever may read the state directory needs no key; others are told how to get one.
    here, elsewhere = {"STATE_DIRECTORY": str(state)}, {"STATE_DIRECTORY": "/nowhere"}
    assert run(here, "devices", f"--url={cluster.url}").returncode == 0
    refused = run(elsewhere, "devices", f"--url={cluster.url}")
    assert refused.returncode == 1
    assert "shoal key create NAME" in refused.stderr

    made = run(here, "key", "create", "alice")
    key = made.stdout.strip()
    assert key.startswith("sk-shoal-")
    assert "only now" in made.stderr
    with_key = {**elsewhere, "SHOAL_API_KEY": key}
    assert run(with_key, "devices", f"--url={cluster.url}").returncode == 0
    bearer = {"Authorization": f"Bearer {key}"}
    assert httpx.get(f"{cluster.url}/v1/models", headers=bearer).status_code == 200
    listed = run(here, "key", "list", "--json")
    assert [item["name"] for item in json.loads(listed.stdout)["keys"]] == ["alice"]
    assert [item["class"] for item in json.loads(listed.stdout)["keys"]] == [None]
    assert key not in listed.stdout

    made = json.loads(run(here, "key", "create", "nightly", "--class=bulk", "--json").stdout)
    assert (made["name"], made["class"]) == ("nightly", "bulk")
    for shown, asked, got in (
        (made["key"], "realtime", "bulk"),
        (key, "realtime", "realtime"),
        (key, "", "normal"),
    ):
        headers = {"Authorization": f"Bearer {shown}"} | ({HEADER: asked} if asked else {})
        answer = httpx.post(f"{cluster.url}/v1/completions", headers=headers, json={"prompt": "a"})
        assert answer.headers[HEADER] == got  # Although no model is loaded.

    assert run(here, "key", "revoke", "alice").returncode == 0
    assert httpx.get(f"{cluster.url}/v1/models", headers=bearer).status_code == 401
    assert httpx.get(f"{cluster.url}/health/live").status_code == 200
    assert key not in cluster.log("coordinator")


def test_a_line_of_the_log_and_a_list_tell_of_an_answer(cluster: Cluster) -> None:
    cluster.start_coordinator("--no-mdns", "--insecure-http")
    cluster.start_agent("a1")
    cluster.wait_for_agents("a1")
    cluster.load(TINY_OPT, "--bits=8")
    answer = httpx.post(
        f"{cluster.url}/v1/completions", json=QUESTION, headers={"X-Request-Id": "mine-1"}
    )
    assert answer.headers["x-request-id"] == "mine-1"
    usage = answer.json()["usage"]
    (told,) = cluster.get("/shoal/v1/requests")["ended"]
    assert (told["id"], told["model"], told["status"]) == ("mine-1", "tiny-opt", 200)
    assert told["prompt_tokens"] == usage["prompt_tokens"]
    assert told["answer_tokens"] == usage["completion_tokens"]
    assert 0 <= told["started_s"] <= told["first_token_s"] <= told["age_s"]
    line = wait_for(lambda: _line(cluster, "mine-1"), 60, "its line")
    assert "POST /v1/completions 200" in line
    refused = httpx.post(f"{cluster.url}/v1/completions", json={**QUESTION, "nonsense": 1})
    assert refused.status_code == 400
    assert wait_for(lambda: _line(cluster, "nonsense"), 60, "the line of its error")


def _line(cluster: Cluster, word: str) -> str:
    return next((line for line in cluster.log("coordinator").splitlines() if word in line), "")


@pytest.mark.parametrize(
    ("level", "logged"), [("warning", False), ("requests", True), ("info", True)]
)
def test_the_level_of_the_log_is_a_setting(cluster: Cluster, level: str, logged: bool) -> None:
    settings = cluster.directory / "coordinator.toml"
    settings.write_text(f'log_level = "{level}"\n')
    cluster.token()  # Otherwise the coordinator says that no device can join.
    cluster.start_coordinator("--no-mdns", f"--config={settings}")
    httpx.post(f"{cluster.url}/v1/completions", json=QUESTION)
    if logged:
        wait_for(lambda: "POST /v1/completions 503" in cluster.log("coordinator"), 60, "the line")
    else:
        httpx.get(f"{cluster.url}/health/live")
        assert cluster.log("coordinator") == ""


def test_a_wrong_level_is_told(tmp_path: Path) -> None:
    settings = tmp_path / "coordinator.toml"
    settings.write_text('log_level = "loud"\n')
    told = shoal("coordinator", f"--config={settings}")
    assert told.returncode == 2
    assert "one of error, warning, info, debug, requests" in told.stderr
