"""The handshake under hostile bytes: garbage, slowness, and callers without TLS."""

from __future__ import annotations

import asyncio
import logging
import queue
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.machines import answering, calling, identity_of
from wire import limits
from wire.async_connection import AsyncConnection, serve
from wire.claim import Claim
from wire.codec import PREFIX, encode
from wire.connection import Connection, Listener
from wire.errors import AuthFailed, ConnectionLost, ProtocolError, WireError
from wire.handshake import CAME_PLAIN, NEEDED
from wire.introduction import COORDINATOR
from wire.messages import (
    AuthAnswer,
    AuthChallenge,
    Endpoint,
    Heartbeat,
    Introduction,
    JoinRefused,
    Message,
)
from wire.tls import TlsTransport, own_client_context

UNKNOWN = "this shoal does not know that device"
ANSWER_S = 60.0


def admit(claim: Claim) -> None:
    if claim.device != "caller":
        raise AuthFailed(UNKNOWN, UNKNOWN)


class Machine:
    """Accepts connections and answers heartbeats; what came of each is in ``outcomes``."""

    def __init__(self) -> None:
        self.listener = Listener("127.0.0.1", 0, answerer=replace(answering(), admit=admit))
        self.endpoint = Endpoint("127.0.0.1", self.listener.port)
        self.outcomes: list[WireError | Message] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while (connection := self.listener.accept()) is not None:
            with connection:
                try:
                    connection.set_receive_timeout(ANSWER_S)
                    message, _ = connection.receive()
                    connection.send(message)
                    self.outcomes.append(message)
                except WireError as error:
                    self.outcomes.append(error)

    def close(self) -> None:
        self.listener.close()
        self._thread.join(ANSWER_S)

    def outcome(self) -> WireError | Message:
        """What the only connection came to; the machine is closed after."""
        self.close()
        (outcome,) = self.outcomes
        return outcome


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine()
    yield machine
    machine.close()


def inside(machine: Machine) -> Connection:
    """A connection that says what it likes inside TLS."""
    fingerprint = identity_of(COORDINATOR).fingerprint
    connection = Connection.connect(
        machine.endpoint,
        transport=lambda sock: TlsTransport(sock, own_client_context(), fingerprint),
    )
    connection.set_receive_timeout(ANSWER_S)
    return connection


def converse(connection: Connection) -> None:
    connection.set_receive_timeout(ANSWER_S)
    connection.send(Heartbeat(5))
    assert connection.receive()[0] == Heartbeat(5)


@pytest.mark.parametrize(
    "message",
    [
        AuthChallenge(1, bytes(32)),
        AuthChallenge(3, bytes(32)),
        AuthChallenge(2, b""),
        AuthChallenge(2, bytes(33)),
        AuthAnswer(bytes(32)),
        Introduction("control", "caller", COORDINATOR, b"x", b"x"),
        JoinRefused("no\x1b[2J"),
        Heartbeat(5),
    ],
    ids=str,
)
def test_a_handshake_that_begins_wrongly_is_refused(machine: Machine, message: Message) -> None:
    with inside(machine) as connection:
        connection.send(message)
        assert isinstance(connection.receive()[0], JoinRefused)
    outcome = machine.outcome()
    assert isinstance(outcome, AuthFailed)
    assert str(outcome).isprintable()


def test_a_larger_first_message_than_any_handshake_has_is_not_read(machine: Machine) -> None:
    with inside(machine) as connection:
        connection._transport.send(encode(JoinRefused("x" * 100_000))[: PREFIX.size])
        with pytest.raises(WireError):
            connection.receive()
    assert isinstance(machine.outcome(), ProtocolError)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n" * 4,
        bytes(64),
        b"\x16\x03\x01" + bytes(64),
        b"\x16",
        encode(AuthChallenge(2, bytes(32)))[:-1],
        b"S",
    ],
)
def test_garbage_ends_the_connection(machine: Machine, data: bytes) -> None:
    with socket.create_connection((machine.endpoint.host, machine.endpoint.port)) as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(4096):
            pass
    assert isinstance(machine.outcome(), WireError)


def test_a_caller_without_tls_is_told_by_its_prefix_alone(machine: Machine) -> None:
    """A stranger's header is not even waited for."""
    with socket.create_connection((machine.endpoint.host, machine.endpoint.port)) as sock:
        sock.sendall(encode(Heartbeat(1))[: PREFIX.size])
        assert NEEDED.encode() in sock.recv(4096)
    assert CAME_PLAIN in str(machine.outcome())


def test_a_valid_introduction_without_tls_is_refused(machine: Machine) -> None:
    """Whoever reads it could pass it on, so it counts only inside TLS."""
    with Connection.connect(machine.endpoint) as connection:
        connection.set_receive_timeout(ANSWER_S)
        connection.send(AuthChallenge(2, bytes(32)))
        assert connection.receive()[0] == JoinRefused(NEEDED)
    assert CAME_PLAIN in str(machine.outcome())


@pytest.mark.parametrize("encrypts", [False, True])
def test_a_slow_loris_is_dropped_however_it_dribbles(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, *, encrypts: bool
) -> None:
    monkeypatch.setattr(limits, "HANDSHAKE_TIMEOUT_S", 0.3)
    frame = encode(AuthChallenge(2, bytes(32)))
    dropped = threading.Event()
    if encrypts:
        with inside(machine) as connection:
            for byte in frame[:-1]:
                try:
                    connection._transport.send(bytes([byte]))
                except OSError:
                    dropped.set()
                    break
                dropped.wait(0.02)
    else:
        with socket.create_connection((machine.endpoint.host, machine.endpoint.port)) as sock:
            for byte in b"\x16\x03\x01\x01\x00" + bytes(60):
                try:
                    sock.sendall(bytes([byte]))
                except OSError:
                    dropped.set()
                    break
                dropped.wait(0.02)
    assert dropped.is_set()
    assert isinstance(machine.outcome(), ConnectionLost)


def test_the_handshake_leaves_the_timeout_as_it_was(machine: Machine) -> None:
    with Connection.connect(machine.endpoint, caller=calling()) as connection:
        # Longer than nothing: the deadline of the handshake is gone.
        connection.set_receive_timeout(0.05)
        with pytest.raises(ConnectionLost, match="no answer in time"):
            connection.receive()


class Warnings(logging.Handler):
    """What a module warns of, for whoever waits for it."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: queue.Queue[str] = queue.Queue()

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.put(record.getMessage())


@pytest.fixture
def warned() -> Iterator[Warnings]:
    handler = Warnings()
    logging.getLogger("wire").addHandler(handler)
    yield handler
    logging.getLogger("wire").removeHandler(handler)


def test_the_awaiting_end_speaks_the_same_handshake(warned: Warnings) -> None:
    handled: list[Message] = []

    async def handle(connection: AsyncConnection) -> None:
        message, _ = await connection.receive(ANSWER_S)
        handled.append(message)
        await connection.send(message)

    def call(port: int) -> None:
        endpoint = Endpoint("127.0.0.1", port)
        with Connection.connect(endpoint, caller=calling()) as connection:
            converse(connection)
        with Connection.connect(endpoint, caller=calling(device="mallory")) as connection:
            connection.set_receive_timeout(ANSWER_S)
            assert connection.receive()[0] == JoinRefused(UNKNOWN)
        assert UNKNOWN in warned.texts.get(timeout=ANSWER_S)
        with Connection.connect(endpoint) as connection:
            connection.set_receive_timeout(ANSWER_S)
            connection.send(Heartbeat(6))
            assert connection.receive()[0] == JoinRefused(NEEDED)
        assert CAME_PLAIN in warned.texts.get(timeout=ANSWER_S)

    async def main() -> None:
        answerer = replace(answering(), admit=admit)
        server, port = await serve("127.0.0.1", 0, handle, answerer=answerer)
        async with server:
            await asyncio.to_thread(call, port)

    asyncio.run(main())
    assert handled == [Heartbeat(5)]
