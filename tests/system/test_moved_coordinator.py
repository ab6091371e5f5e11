"""A coordinator moves to another state directory, as to another machine, at the same address."""

from __future__ import annotations

from tests.system.cluster import TINY_OPT, Cluster, last_json, shoal, wait_for

PROMPT = "The lamp is in the attic. Where is the lamp?"


def test_agents_follow_a_coordinator_to_another_machine(cluster: Cluster) -> None:
    """They need no new token, and the model that was loaded is loaded there again."""
    token, archive = cluster.directory / "token", cluster.directory / "old.tar"
    cluster.start_coordinator("--no-mdns", "--create-token", f"--token-file={token}")
    where = f"--coordinator=127.0.0.1:{cluster.control_port}"
    for name in ("one", "two"):
        cluster.start_agent(name, where, "--memory=4500000", f"--token-file={token}")
    cluster.wait_for_agents("one", "two")
    loaded = cluster.load(TINY_OPT, "--bits=8", "--max-weight-error=none")
    answer = last_json(cluster.run("run", loaded["model"], PROMPT, "--json"))

    old = f"--state-dir={cluster.directory / 'coordinator'}"
    new = f"--state-dir={cluster.directory / 'elsewhere'}"
    assert shoal("coordinator", "export", str(archive), old).returncode == 0
    process = cluster.processes["coordinator"]
    process.terminate()
    process.wait(20)
    assert process.stdout is not None
    process.stdout.close()
    assert shoal("coordinator", "import", str(archive), new).returncode == 0
    cluster.start_coordinator("--no-mdns", f"--port={cluster.control_port}", new)
    cluster.wait_for_agents("one", "two")

    def is_ready() -> bool:
        model = cluster.get("/shoal/v1/ps")["model"]
        return model is not None and model["state"] == "ready"

    wait_for(is_ready, 60, "the model")
    assert (
        last_json(cluster.run("run", loaded["model"], PROMPT, "--json"))["text"] == answer["text"]
    )
