"""A shoal with a token, as real processes: control, data and block connections."""

from __future__ import annotations

from tests.system.cluster import TINY_OPT, Cluster, last_json, wait_for


def test_who_knows_the_token_works_and_nobody_else_joins(cluster: Cluster) -> None:
    token, other = (cluster.directory / name for name in ("right.token", "wrong.token"))
    other.write_text("x" * 40)
    cluster.start_coordinator("--no-mdns", "--create-token", f"--token-file={token}")
    where = f"--coordinator=127.0.0.1:{cluster.control_port}"
    limit = "--memory=4500000"
    cluster.start_agent("one", where, limit, f"--token-file={token}")
    cluster.start_agent("two", where, limit, f"--token-file={token}")
    cluster.start_agent("other", where, f"--token-file={other}")
    cluster.start_agent("none", where)
    cluster.wait_for_agents("one", "two")
    wait_for(lambda: "the tokens differ" in cluster.log("other"), 20, "a line of the agent")
    wait_for(lambda: "a token is needed" in cluster.log("none"), 20, "a line of the agent")
    wait_for(lambda: "without a token" in cluster.log("coordinator"), 20, "a line of its log")
    loaded = cluster.load(TINY_OPT, "--bits=8", "--max-weight-error=none")
    assert len(loaded["plan"]["stages"]) == 2
    prompt = "The lamp is in the attic. Where is the lamp?"
    answer = last_json(cluster.run("run", loaded["model"], prompt, "--json"))
    assert "attic" in answer["text"]
    assert cluster.names() == ["one", "two"]
