"""A coordinator that stands by takes over when the one before it is killed."""

from __future__ import annotations

import json

import pytest

from coordinator.claim import claim, claim_alone
from coordinator.config import ConfigError
from tests.system.cluster import TINY_OPT, Cluster, shoal, wait_for
from tests.system.test_coordinator_killed import ask, kinds

WAIT_S = 60


def test_the_model_stays_loaded_and_answers_are_the_same(cluster: Cluster) -> None:
    cluster.start_coordinator()
    for name in ("a1", "a2"):
        cluster.start_agent(name)
    cluster.wait_for_agents("a1", "a2")
    cluster.load(TINY_OPT, "--bits=8", "--pin=embedding:a1", "--pin=head:a2")
    before = ask(cluster)
    first = cluster.processes.pop("coordinator")
    state = f"--state-dir={cluster.directory / 'coordinator'}"
    where = f"--port={cluster.control_port}", f"--http={cluster.url.removeprefix('http://')}"
    other = shoal("coordinator", "--no-mdns", "--bind=127.0.0.1", state, *where)
    assert other.returncode == 1
    assert "another coordinator runs with the state directory" in other.stderr
    assert "--standby" in other.stderr
    standby = cluster.spawn(
        "coordinator",
        "coordinator",
        "--json",
        "--no-mdns",
        "--bind=127.0.0.1",
        state,
        *where,
        "--standby",
    )
    log = cluster.directory / "coordinator.log"
    wait_for(lambda: "standing by" in log.read_text(), WAIT_S, "the word of the second one")
    assert ask(cluster) == before
    with first:
        first.kill()
    assert standby.stdout is not None
    assert json.loads(standby.stdout.readline())["http"] == cluster.url
    wait_for(
        lambda: (model := cluster.get("/shoal/v1/ps")["model"]) and model["state"] == "ready",
        WAIT_S,
        "the model to answer again",
    )
    assert ask(cluster) == before
    assert "adopted" in kinds(cluster)
    assert "served" not in kinds(cluster)


def test_one_coordinator_at_a_time_has_a_state_directory(cluster: Cluster) -> None:
    cluster.start_coordinator()
    directory = cluster.directory / "coordinator"
    assert claim(directory) is None
    with pytest.raises(ConfigError, match="another coordinator runs"):
        claim_alone(directory)
    cluster.processes["coordinator"].terminate()
    with cluster.processes.pop("coordinator") as process:
        process.wait(WAIT_S)
    claim_alone(directory).close()
    (directory / "file").touch()
    with pytest.raises(ConfigError, match="is not usable"):
        claim(directory / "file")
