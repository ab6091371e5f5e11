"""A connection of a machine to itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from agent.loopback import loopback_pair
from wire.errors import WireError
from wire.identity import own_identity
from wire.messages import Heartbeat
from wire.tls import TlsTransport


@pytest.mark.parametrize("encrypted", [True, False])
def test_both_ends_speak_and_are_closed(encrypted: bool, tmp_path: Path) -> None:
    identity = own_identity(tmp_path / "identity.pem") if encrypted else None
    with loopback_pair(identity) as ends:
        for near, far in (ends, ends[::-1]):
            assert isinstance(near._transport, TlsTransport) is encrypted
            near.send(Heartbeat(load=0.25))
            message, _ = far.receive()
            assert message == Heartbeat(load=0.25)
    for end in ends:
        with pytest.raises(WireError):
            end.send(Heartbeat())


def test_a_handshake_that_fails_is_told(tmp_path: Path) -> None:
    identity = own_identity(tmp_path / "identity.pem")
    other = own_identity(tmp_path / "other.pem")
    wrong = dataclasses.replace(identity, certificate=other.certificate)
    with pytest.raises(WireError, match="another machine"), loopback_pair(wrong):
        pass
