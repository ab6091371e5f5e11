"""Whom an agent lets in at its data port, and whom it calls, in a shoal with TLS."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from agent.config import AgentConfig, ConfigError
from agent.contacts import NOT_KNOWN
from agent.credentials import Credentials
from agent.peers import Entrance, PeerServer, connect_peer
from wire.connection import Connection, Listener
from wire.errors import ConnectFailed, WireError
from wire.identity import own_identity
from wire.introduction import Caller
from wire.invite import Invite, new_invite
from wire.messages import (
    DevicesKnown,
    Endpoint,
    JoinRefused,
    KnownDevice,
    Message,
    PeerHello,
    TokenSampled,
)

COORDINATOR_KEY = bytes(range(32))
KEY = b"k" * 16
ANSWER_S = 60.0


def config_of(directory: Path, name: str, token: Invite | None) -> AgentConfig:
    (directory / name).mkdir(exist_ok=True)
    return AgentConfig(
        name=name,
        state_dir=directory / name,
        cluster="test",
        coordinator=None,
        bind_host="127.0.0.1",
        data_port=0,
        memory_bytes=None,
        storage_bytes=None,
        threads=1,
        backend="onnx_cpu",
        token=token,
    )


class Ring:
    """Three devices that have joined. ``porch`` listens: ``attic`` is the one before it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.configs = {
            name: config_of(directory, name, new_invite(COORDINATOR_KEY))
            for name in ("attic", "porch", "cellar", "stranger")
        }
        self.credentials = {
            name: Credentials(config, name) for name, config in self.configs.items()
        }
        self.known = DevicesKnown(
            tuple(
                KnownDevice(name, own_identity(self.configs[name].identity_path).fingerprint)
                for name in ("attic", "porch", "cellar")
            )
        )
        for credentials in self.credentials.values():
            credentials.learn(self.known)
        self.listener = Listener("127.0.0.1", 0, answerer=self.credentials["porch"].of_others())
        self.endpoint = Endpoint("127.0.0.1", self.listener.port)
        self.delivered: list[Message] = []
        self.arrived = threading.Event()
        self.server = PeerServer("porch", self.listener, self.credentials["porch"].contacts)
        self.server.entrances = (Entrance("attic", KEY, self._deliver),)
        self.server.start()

    def _deliver(self, message: Message, payload: memoryview) -> None:
        self.delivered.append(message)
        self.arrived.set()

    def connect(self, name: str, key: bytes = b"") -> Connection:
        return connect_peer(
            name,
            "porch",
            [self.endpoint],
            caller=self.credentials[name].to_device("porch"),
            hop_key=key,
        )


@pytest.fixture
def ring(tmp_path: Path) -> Iterator[Ring]:
    made = Ring(tmp_path)
    yield made
    made.server.close()


def test_the_device_before_sends_to_the_stage(ring: Ring) -> None:
    with ring.connect("attic", KEY) as connection:
        connection.send(TokenSampled(1, 2, 0, 5, ""))
        assert ring.arrived.wait(ANSWER_S)
    assert ring.delivered == [TokenSampled(1, 2, 0, 5, "")]


def test_a_stranger_says_nothing_to_a_stage(ring: Ring) -> None:
    """It knows addresses and even the key of the hop, but has not joined."""
    with pytest.raises(ConnectFailed, match=NOT_KNOWN):
        ring.connect("stranger", KEY)
    assert ring.delivered == []


def test_another_member_cannot_be_the_device_before(ring: Ring) -> None:
    """It has joined and knows the key of the hop, but its certificate is its own."""
    caller = ring.credentials["cellar"].to_device("porch")
    with Connection.connect(ring.endpoint, caller=caller) as connection:
        connection.set_receive_timeout(ANSWER_S)
        connection.send(PeerHello("attic", "porch", KEY))
        with pytest.raises(WireError):
            connection.receive()
    assert isinstance(caller, Caller)
    lying = replace(caller, device="attic")
    with Connection.connect(ring.endpoint, caller=lying) as connection:
        connection.set_receive_timeout(ANSWER_S)
        connection.send(PeerHello("attic", "porch", KEY))
        assert connection.receive()[0] == JoinRefused(NOT_KNOWN)
    assert ring.delivered == []


def test_a_revoked_device_is_cut_off(ring: Ring) -> None:
    with ring.connect("cellar") as connection:
        left = DevicesKnown(ring.known.devices[:2])
        ring.credentials["porch"].learn(left)
        connection.set_receive_timeout(ANSWER_S)
        with pytest.raises(WireError):
            connection.receive()
    with pytest.raises(ConnectFailed, match=NOT_KNOWN):
        ring.connect("cellar")
    with ring.connect("attic", KEY):
        pass


def test_a_device_that_is_told_late_gets_in(ring: Ring) -> None:
    """The coordinator tells both at once, and either may hear it first."""
    porch = ring.credentials["porch"]
    porch.learn(DevicesKnown(ring.known.devices[1:]))
    threading.Timer(0.05, porch.learn, [ring.known]).start()
    with ring.connect("attic", KEY) as connection:
        assert connection.peer_host == "127.0.0.1"


def test_only_a_device_that_the_coordinator_named_is_called(ring: Ring) -> None:
    ring.credentials["attic"].learn(DevicesKnown(ring.known.devices[:1]))
    with pytest.raises(ConnectFailed, match="has not told the key of device porch"):
        ring.connect("attic", KEY)
    other = DevicesKnown((KnownDevice("porch", bytes(32)),))
    ring.credentials["attic"].learn(other)
    with pytest.raises(ConnectFailed, match="is another machine"):
        ring.connect("attic", KEY)


def test_a_device_that_has_joined_needs_no_token(tmp_path: Path) -> None:
    invite = new_invite(COORDINATOR_KEY)
    first = Credentials(config_of(tmp_path, "attic", invite), "attic")
    first.joined()
    again = Credentials(config_of(tmp_path, "attic", None), "attic").to_coordinator("blocks")
    before = first.to_coordinator("blocks")
    assert isinstance(again, Caller)
    assert isinstance(before, Caller)
    assert again.identity.fingerprint == before.identity.fingerprint
    assert (again.answerer, again.invite, before.invite) == (COORDINATOR_KEY, None, invite)
    (tmp_path / "attic" / "coordinator-fingerprint").write_text("nonsense")
    with pytest.raises(ConfigError, match="start with a token again"):
        Credentials(config_of(tmp_path, "attic", None), "attic")


def test_without_a_token_nothing_starts_unless_it_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`shoal token create` makes one"):
        Credentials(config_of(tmp_path, "attic", None), "attic")
    insecure = replace(config_of(tmp_path, "attic", None), insecure=True)
    credentials = Credentials(insecure, "attic")
    shown: list[Callable[[], object]] = [
        lambda: credentials.to_coordinator("control"),
        lambda: credentials.to_device("porch"),
        credentials.of_others,
    ]
    assert [show() for show in shown] == [None] * 3
    assert not (tmp_path / "attic" / "identity.pem").exists()
