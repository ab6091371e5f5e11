"""A device that is revoked loses its connections to all others at once. Three whole agents.

The test is their coordinator. It unloads nothing, so only the agents end the connections.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent import daemon
from agent.config import AgentConfig
from agent.daemon import Agent
from calibration.trial import Trials
from tests.agent.teams import EPOCH
from tests.agent.test_daemon import ANSWER_S, Coordinator
from tests.agent.test_team_daemon import (
    SPEC,
    Device,
    ShareBackend,
    artifacts_of,
    load,
)
from tests.figures import leave_figures
from tests.team import shares_of
from wire.connection import Listener
from wire.identity import Identity, own_identity
from wire.introduction import COORDINATOR, Answerer, Purpose
from wire.invite import new_invite
from wire.messages import (
    ConnectStage,
    DevicesKnown,
    Done,
    Endpoint,
    Heartbeat,
    KnownDevice,
    PeerLost,
)

BEATS = 15


@dataclass
class Shoal:
    devices: list[Device]
    known: DevicesKnown

    def revoke(self, device: Device) -> None:
        left = tuple(item for item in self.known.devices if item.device != device.name)
        for one in self.devices:
            if one is not device:
                one.coordinator.send(DevicesKnown(left))


def config(directory: Path, identity: Identity, port: int) -> AgentConfig:
    leave_figures(directory / "calibration.json")
    return AgentConfig(
        name="pi",
        state_dir=directory,
        cluster="test",
        coordinator=Endpoint("127.0.0.1", port),
        bind_host="127.0.0.1",
        data_port=0,
        memory_bytes=None,
        storage_bytes=None,
        threads=1,
        backend="onnx_cpu",
        token=new_invite(identity.fingerprint),
    )


@pytest.fixture
def shoal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shoal]:
    monkeypatch.setattr(daemon, "backend_class", lambda name: ShareBackend)
    monkeypatch.setattr(Trials, "require", lambda *_: None)
    identity = own_identity(tmp_path / "coordinator.pem")
    purposes: frozenset[Purpose] = frozenset(("control", "blocks"))
    answerer = Answerer(identity, COORDINATOR, purposes, lambda claim: None)
    devices, known = [], []
    with ExitStack() as stack:
        for index, share in enumerate(shares_of(SPEC, (2, 1, 1))):
            listener = Listener("127.0.0.1", 0, answerer=answerer)
            coordinator = Coordinator(listener)
            stack.callback(coordinator.close)
            stack.callback(listener.close)
            home = tmp_path / str(index)
            home.mkdir()
            settings = config(home, identity, listener.port)
            agent = Agent(settings, lambda line: None)
            thread = threading.Thread(target=agent.run)
            thread.start()
            stack.callback(thread.join, ANSWER_S)
            stack.callback(agent.stop)
            hello = coordinator.welcome()
            made = tmp_path / f"made-{index}"
            made.mkdir()
            refs = artifacts_of(made, share, min(index, 1))
            endpoint = hello.endpoints[0]
            devices.append(Device(agent, coordinator, hello.device, endpoint, refs, share, made))
            own = own_identity(settings.identity_path)
            known.append(KnownDevice(hello.device, own.fingerprint))
        message = DevicesKnown(tuple(known))
        for device in devices:
            device.coordinator.send(message)
        yield Shoal(devices, message)


def heard(device: Device) -> PeerLost:
    """The loss that an agent reports within some heartbeats."""
    connection = device.coordinator.connection
    assert connection is not None
    for _ in range(BEATS):
        message, _ = connection.receive()
        if isinstance(message, PeerLost):
            return message
        connection.send(Heartbeat())
    raise AssertionError("nothing was lost")


def test_a_revoked_device_loses_its_team_and_its_hop_at_once(shoal: Shoal) -> None:
    """Others have called it, and it has called others."""
    load(shoal.devices)
    lead, revoked, last = shoal.devices
    hop = ConnectStage(7, EPOCH, revoked.name, (revoked.endpoint,), b"")
    assert lead.ask(hop) == Done(7)
    shoal.revoke(revoked)
    for device in (lead, last):
        loss = heard(device)
        assert (loss.epoch, loss.device) == (EPOCH, revoked.name)
    assert heard(revoked).epoch == EPOCH
