"""A shoal with TLS, as real processes: who joins, who is known, who is revoked."""

from __future__ import annotations

import json
import ssl
from functools import partial

import httpx
import pytest

from tests.system.cluster import TINY_OPT, Cluster, last_json, shoal, wait_for
from wire.claim import shown
from wire.connection import Connection
from wire.errors import ConnectionLost
from wire.identity import own_identity
from wire.introduction import COORDINATOR, Caller
from wire.messages import BlocksHeld, BlocksHello, Endpoint, FindHolders

ANSWER_S = 60.0
PROMPT = "The lamp is in the attic. Where is the lamp?"


def says(cluster: Cluster, name: str, text: str) -> bool:
    return text in cluster.log(name)


def files_of(cluster: Cluster, name: str) -> Connection:
    """A connection for files, as this agent makes it. The coordinator waits for a request."""
    home = cluster.directory / name
    own = own_identity(cluster.directory / "coordinator" / "identity.pem")
    device = (home / "device-id").read_text().strip()
    identity = own_identity(home / "identity.pem")
    caller = Caller(identity, own.fingerprint, "blocks", device, COORDINATOR)
    connection = Connection.connect(Endpoint("127.0.0.1", cluster.control_port), caller=caller)
    connection.set_receive_timeout(ANSWER_S)
    connection.send(BlocksHello(device))
    connection.send(FindHolders(("0" * 64,)))
    assert isinstance(connection.receive()[0], BlocksHeld)
    return connection


def test_devices_join_by_a_token_and_are_known_by_their_keys_then(cluster: Cluster) -> None:
    token, old = cluster.directory / "token", cluster.directory / "old.token"
    old.write_text("x" * 40)
    old.chmod(0o600)
    cluster.start_coordinator("--no-mdns", "--create-token", f"--token-file={token}")
    where = f"--coordinator=127.0.0.1:{cluster.control_port}"
    limit = "--memory=4500000"
    assert token.stat().st_mode & 0o777 == 0o600
    for name in ("one", "two"):
        cluster.start_agent(name, where, limit, f"--token-file={token}")
    cluster.start_agent("old", where, f"--token-file={old}")
    cluster.wait_for_agents("one", "two")
    wait_for(partial(says, cluster, "old", "shoal token create"), 60, "a line of old")
    loaded = cluster.load(TINY_OPT, "--bits=8", "--max-weight-error=none")
    assert len(loaded["plan"]["stages"]) == 2
    answer = last_json(cluster.run("run", loaded["model"], PROMPT, "--json"))
    assert "attic" in answer["text"]

    # A device that has joined needs no token, and is told which ones may call it.
    two = cluster.processes["two"]
    two.terminate()
    two.wait(20)
    cluster.start_agent("two", where, limit)
    cluster.wait_for_agents("one", "two")

    # A revoked one is out while the coordinator runs, whatever it says.
    state = f"--state-dir={cluster.directory / 'coordinator'}"
    for item in last_json(shoal("token", "list", "--json", state))["tokens"]:
        assert item["uses"] is None
        last_json(shoal("token", "revoke", "--json", state, item["id"]))
    files = files_of(cluster, "one")
    assert last_json(cluster.run("devices", "revoke", "one", "--json"))["revoked"] == "one"
    with files, pytest.raises(ConnectionLost, match="closed"):
        files.receive()
    cluster.wait_for_agents("two")
    told = "one: device lost (it was revoked); to take it back, let it join by a new token"
    assert told in cluster.log("coordinator")
    unknown = cluster.run("devices", "revoke", "one")
    assert (unknown.returncode, "there is no device one; known: two" in unknown.stderr) == (1, True)
    wait_for(partial(says, cluster, "one", "does not know the token"), 60, "a line of one")

    # A token of one use lets it in again, with the key that it has.
    made = last_json(shoal("token", "create", "--json", state))
    where_now = f"--coordinator 127.0.0.1:{cluster.control_port}"
    assert made["join"] == f"shoal agent {where_now} --token-file -"
    again = cluster.directory / "again.token"
    again.write_text(made["token"])
    again.chmod(0o600)
    one = cluster.processes["one"]
    one.terminate()
    one.wait(20)
    cluster.start_agent("one", where, limit, f"--token-file={again}")
    cluster.wait_for_agents("one", "two")
    keys = {
        item["name"]: item["key"] for item in last_json(cluster.run("devices", "--json"))["devices"]
    }
    assert len(set(keys.values())) == 2
    one = cluster.processes["one"]
    one.terminate()
    one.wait(20)
    cluster.wait_for_agents("two")
    (absent,) = last_json(cluster.run("devices", "--json"))["absent"]
    assert (absent["name"], absent["key"]) == ("one", keys["one"])
    assert f"not here: one (key {absent['key']})" in cluster.run("devices").stdout
    assert last_json(shoal("token", "list", "--json", state)) == {"tokens": []}


def test_http_is_encrypted_by_option(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHOAL_FINGERPRINT", raising=False)
    cluster.start_coordinator("--no-mdns", "--http-tls")
    assert cluster.url.startswith("https://")
    refused = cluster.run("ps")
    assert (refused.returncode, "have not seen yet" in refused.stderr) == (1, True)
    own = own_identity(cluster.directory / "coordinator" / "identity.pem")
    assert shown(own.fingerprint) in refused.stderr
    monkeypatch.setenv("SHOAL_FINGERPRINT", shown(own.fingerprint))
    assert last_json(cluster.run("ps", "--json")) == {"model": None}
    plain = shoal("ps", f"--url={cluster.url.replace('https', 'http')}")
    assert "if it runs with --http-tls, say --url https://" in plain.stderr
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cadata=own.certificate)
    with httpx.Client(verify=context, trust_env=False) as client:
        assert "<title>" in client.get(f"{cluster.url}/").text
        headers = {"Accept": "text/event-stream"}
        with client.stream("GET", f"{cluster.url}/shoal/v1/state", headers=headers) as response:
            first = next(line for line in response.iter_lines() if line.startswith("data: "))
    assert json.loads(first.removeprefix("data: "))["shoal"]["cluster"]
