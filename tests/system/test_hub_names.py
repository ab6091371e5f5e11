"""Models by their names on a hub, with a coordinator: planned, loaded, asked and removed."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.hub_server import COMMIT, Hub, Repo, serve
from tests.system.cluster import COMMAND, TINY_OPT, Cluster, last_json, shoal


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    with serve() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        server.repos["org/tiny"] = Repo(
            {path.name: path.read_bytes() for path in TINY_OPT.iterdir()}
        )
        yield server


def ask_there(cluster: Cluster, path: str, **body: object) -> httpx.Response:
    return httpx.post(f"{cluster.url}/shoal/v1/{path}", json=body, timeout=60, trust_env=False)


def loads(cluster: Cluster) -> int:
    """How often the coordinator has loaded a model."""
    events = cluster.get("/shoal/v1/events")["events"]
    return sum(event["kind"] == "served" for event in events)


def refused(completed: subprocess.CompletedProcess[str]) -> str:
    assert completed.returncode == 1, completed.stderr
    (line,) = completed.stderr.splitlines()
    return line


def test_a_hubs_model_is_planned_loaded_and_asked_by_its_name(
    hub: Hub, cluster: Cluster, tmp_path: Path
) -> None:
    cluster.start_coordinator()
    cluster.start_agent("pi", f"--coordinator=127.0.0.1:{cluster.control_port}")
    cluster.wait_for_agents("pi")
    snapshot = tmp_path / "hf" / "hub" / "models--org--tiny" / "snapshots" / COMMIT

    planned = cluster.run("plan", "org/tiny", "--pin=head:pi", "--json")
    assert last_json(planned)["model"] == "tiny"
    assert last_json(planned)["quality"]["kind"] == "assumed"
    assert "its config.json alone is read" in planned.stderr
    assert {path.name for path in snapshot.iterdir()} <= {"config.json", "generation_config.json"}
    answer = ask_there(cluster, "load", model="org/tiny")
    assert (answer.status_code, "run `shoal pull org/tiny` there" in answer.text) == (400, True)

    ran = last_json(cluster.run("run", "org/tiny", "Once", "--max-tokens=4", "--json"))
    assert (ran["model"], len(ran["tokens"]) > 0) == ("tiny", True)
    loaded = cluster.get("/shoal/v1/ps")["model"]
    assert (loaded["model"], loaded["directory"]) == ("tiny", str(snapshot))
    asked = len(hub.requests)
    again = last_json(cluster.run("run", "org/tiny", "Once", "--max-tokens=4", "--json"))
    assert again["text"] == ran["text"]
    assert loads(cluster) == 1  # It was loaded already.
    (row,) = last_json(cluster.run("models", "--json"))["models"]
    assert (row["name"], row["fits"]) == ("org/tiny", True)
    assert "of 1 device that has joined" in cluster.run("models").stdout
    assert "run `shoal unload` first" in refused(cluster.run("rm", "org/tiny", "--yes"))

    assert cluster.run("unload").returncode == 0
    assert cluster.run("load", str(snapshot.parents[1])).returncode == 0
    assert cluster.get("/shoal/v1/ps")["model"]["directory"] == str(snapshot)
    cluster.run("run", str(snapshot.parents[1]), "Once", "--max-tokens=4")
    assert loads(cluster) == 2
    assert len(hub.requests) == asked
    result = ask_there(cluster, "load", model="org/tiny").text.splitlines()[-1]
    assert json.loads(result)["result"]["model"] == "tiny"


class Elsewhere(Cluster):
    """A cluster whose coordinator believes to be on another machine, with a cache of its own."""

    def command(self, name: str) -> list[str]:
        if name != "coordinator":
            return COMMAND
        setup = f'hostname far-away && HF_HOME={self.directory / "far"} exec "$@"'
        return ["unshare", "--uts", "sh", "-c", setup, "sh", *COMMAND]


@pytest.mark.netns
def test_the_coordinator_of_another_machine_needs_the_model_there(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Elsewhere(tmp_path)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return shoal(*arguments, f"--url={cluster.url}")

    try:
        cluster.start_coordinator()
        for command in (["load", "org/tiny"], ["run", "org/tiny", "Once"]):
            assert refused(run(*command)) == (
                f"error: org/tiny is not in {tmp_path / 'far' / 'hub'} on far-away, where the"
                " coordinator runs: run `shoal pull org/tiny` there"
            )
        assert hub.requests == []
        planned = run("plan", "org/tiny")  # It needs config.json alone, which is fetched there.
        assert "its config.json alone is read" in planned.stderr
        assert "no agent" in planned.stderr
        assert not (tmp_path / "hf").exists()
        with monkeypatch.context() as patch:
            patch.setenv("HF_HOME", str(tmp_path / "far"))
            last_json(shoal("pull", "org/tiny", "--json"))
            assert "no device has joined: compared with " in run("models").stdout
        message = refused(run("load", "org/tiny"))
        assert "no agent" in message  # The model was found.
        assert "no agent" in refused(run("load", "org/tiny", "--pin=layers=0:pi"))
    finally:
        cluster.stop()


@pytest.mark.thorough
def test_a_hubs_model_is_timed_from_its_config_and_shown_in_the_demo(
    hub: Hub, tmp_path: Path
) -> None:
    def asked_for_weights() -> int:
        return sum("model.safetensors" in path for _, path, _ in hub.requests)

    timed = shoal("calibrate", "--model=org/tiny", "--json", f"--state-dir={tmp_path / 'state'}")
    assert timed.returncode == 0, timed.stderr
    assert len(last_json(timed)["layers"]["layers"]) > 0
    assert asked_for_weights() == 0
    shown = shoal("demo", "--model=org/tiny", "--json", "--max-tokens=8")
    assert shown.returncode == 0, shown.stderr
    assert len(last_json(shown)["tokens"]) > 0
    assert asked_for_weights() > 0
    fetched = asked_for_weights()
    assert shoal("demo", "--model=org/tiny", "--json", "--max-tokens=8").returncode == 0
    assert asked_for_weights() == fetched
