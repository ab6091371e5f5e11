"""Who needs a token, and shoals without any, as real processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.system.cluster import TINY_OPT, Cluster, last_json, shoal, wait_for

PROMPT = "The lamp is in the attic. Where is the lamp?"


def test_a_shoal_without_tokens_lets_everybody_in_who_says_so(cluster: Cluster) -> None:
    cluster.start_coordinator("--no-mdns", "--insecure")
    where = f"--coordinator=127.0.0.1:{cluster.control_port}"
    limit = "--memory=4500000"
    for name in ("one", "two"):
        cluster.start_agent(name, where, limit, "--insecure")
    cluster.start_agent("other", where, f"--token-file={cluster.token()}")
    cluster.wait_for_agents("one", "two")
    loaded = cluster.load(TINY_OPT, "--bits=8", "--max-weight-error=none")
    assert len(loaded["plan"]["stages"]) == 2
    answer = last_json(cluster.run("run", loaded["model"], PROMPT, "--json"))
    assert "attic" in answer["text"]
    wait_for(lambda: "it runs with --insecure" in cluster.log("other"), 60, "a line of it")
    wait_for(lambda: "this side runs with --insecure" in cluster.log("coordinator"), 60, "its line")
    assert cluster.names() == ["one", "two"]


def test_an_agent_that_does_not_encrypt_stays_out(cluster: Cluster) -> None:
    cluster.start_coordinator()
    cluster.start_agent("open", f"--coordinator=127.0.0.1:{cluster.control_port}", "--insecure")
    wait_for(lambda: "without --insecure" in cluster.log("open"), 60, "a line of the agent")
    wait_for(lambda: "runs with --insecure" in cluster.log("coordinator"), 60, "its line")
    assert cluster.names() == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["agent"], "a token is needed to join: `shoal token create` makes one"),
        (["agent", "--token-file=OLD"], "one of an older shoal; make one where the coordinator"),
        (["agent", "--token-file=OLD", "--insecure"], "leave out the token, or --insecure"),
        (["coordinator", "--http=127.0.0.1:0", "--port=0", "--token-file=OLD"], "an older shoal"),
        (["coordinator", "--insecure", "--create-token", "--token-file=NEW"], "leave out the tok"),
        (["coordinator", "--create-token"], "name it with --token-file FILE"),
    ],
)
def test_what_does_not_start(options: list[str], said: str, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.write_text("0123456789abcdef0123456789abcdef0123456789")
    old.chmod(0o600)
    given = [option.replace("OLD", str(old)).replace("NEW", str(tmp_path)) for option in options]
    ended = shoal(*given, f"--state-dir={tmp_path / 'state'}")
    assert ended.returncode != 0
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr
