"""The lobby: which silent connections are closed, and what a first message may be."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import pytest

from tests.machines import answering
from wire import limits, rare_log
from wire.async_connection import AsyncConnection, serve
from wire.codec import encode
from wire.connection import Connection, Listener
from wire.errors import ConnectionLost, ProtocolError, WireError
from wire.lobby import Lobby
from wire.messages import (
    AgentHello,
    Endpoint,
    Heartbeat,
    Message,
    PeerHello,
    ProbePing,
    RequestFailed,
)
from wire.rare_log import RareLog

HELLO = PeerHello("caller", "answerer")
HELLOS: dict[type[Message], int] = {PeerHello: limits.MAX_HELLO_BYTES}
ANSWER_S = 60.0


def crowd(lobby: Lobby, closed: list[str]) -> Callable[..., None]:
    """Lets guests in, by name; their names are in ``closed`` once they are."""

    def enter(*names: str, host: str) -> None:
        for name in names:
            lobby.enter(name, host, partial(closed.append, name))

    return enter


def test_the_oldest_of_the_most_crowded_address_makes_room() -> None:
    closed: list[str] = []
    lobby = Lobby("test", most=5, most_of_one=4)
    enter = crowd(lobby, closed)
    enter("a", "b", host="one")
    enter("x", "y", "z", host="other")
    assert closed == []
    enter("c", host="third")
    assert closed == ["x"]
    enter("d", host="third")  # Three addresses with two guests each: the first of them.
    assert (closed[1:], len(lobby)) == (["a"], 5)
    assert not lobby.leave("a")
    assert lobby.leave("b")
    assert len(lobby) == 4


def test_one_address_has_its_share_only() -> None:
    closed: list[str] = []
    lobby = Lobby("test", most=100, most_of_one=2)
    crowd(lobby, closed)("a", "b", "c", "d", host="one")
    assert closed == ["a", "b"]


def test_a_line_per_cause_and_minute(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    rare = RareLog(logging.getLogger("strangers"))
    for number in range(1000):
        rare.warning("knock", "%d knocked", number)
        rare.warning("ring", "%d rang", number)
    assert caplog.messages == ["0 knocked", "0 rang"]
    monkeypatch.setattr(rare_log, "PERIOD_S", 0.0)
    rare.warning("knock", "%d knocked", 7)
    assert caplog.messages[2:] == ["7 knocked (and 999 more before)"]


# ---- first messages, on real sockets ------------------------------------------------------------


def at_once(frame: bytes) -> bytes | WireError:
    """What a listener makes of these first bytes of a connection that stays open."""
    listener = Listener("127.0.0.1", 0)
    with socket.create_connection(("127.0.0.1", listener.port)) as sock:
        sock.sendall(frame)
        connection = listener.accept()
        assert connection is not None
        try:
            connection.receive_hello(HELLOS)
        except WireError as error:
            return error
        finally:
            connection.close()
            listener.close()
    return b""


@pytest.mark.parametrize(
    "frame",
    [
        encode(RequestFailed(1, "x" * 4_000_000))[:20],
        encode(PeerHello("x" * 2000, "y"))[:20],
        encode(ProbePing(1), limits.MAX_PAYLOAD_BYTES)[:20],
        encode(Heartbeat(1)),
    ],
    ids=["large", "large hello", "payload", "other"],
)
def test_a_first_message_that_may_not_be_is_refused_by_its_prefix(frame: bytes) -> None:
    assert isinstance(at_once(frame), ProtocolError)


def test_a_hello_is_read() -> None:
    assert at_once(encode(HELLO)) == b""


@pytest.mark.parametrize("encrypts", [False, True])
def test_who_says_hello_byte_by_byte_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, *, encrypts: bool
) -> None:
    monkeypatch.setattr(limits, "HELLO_TIMEOUT_S", 0.3)
    monkeypatch.setattr(limits, "HANDSHAKE_TIMEOUT_S", 0.3)
    listener = Listener("127.0.0.1", 0, answerer=answering() if encrypts else None)
    over = threading.Event()

    def drip(sock: socket.socket) -> None:
        for byte in encode(PeerHello("x" * 900, "y")):
            if over.wait(0.02):
                return
            with suppress(OSError):  # Nobody listens any more.
                sock.sendall(bytes([byte]))

    with socket.create_connection(("127.0.0.1", listener.port)) as sock:
        thread = threading.Thread(target=drip, args=(sock,))
        thread.start()
        connection = listener.accept()
        assert connection is not None
        try:
            with pytest.raises(ConnectionLost, match=r"too long to say who it is|in time"):
                connection.receive_hello(HELLOS)
        finally:
            over.set()
            thread.join()
            listener.close()


def test_who_has_said_hello_is_not_closed_for_others() -> None:
    listener = Listener("127.0.0.1", 0)
    endpoint = Endpoint("127.0.0.1", listener.port)
    with Connection.connect(endpoint) as member:
        member.send(HELLO)
        accepted = listener.accept()
        assert accepted is not None
        assert accepted.receive_hello(HELLOS) == HELLO
        silent = [socket.create_connection(("127.0.0.1", listener.port)) for _ in range(40)]
        guests = [listener.accept() for _ in silent]
        for sock in silent[:8]:
            sock.settimeout(ANSWER_S)
            assert sock.recv(1) == b""
        for sock in silent[8:]:
            sock.setblocking(False)
            with pytest.raises(BlockingIOError):
                sock.recv(1)
        member.send(Heartbeat(1))
        assert accepted.receive()[0] == Heartbeat(1)
    for connection in (accepted, *guests):
        assert connection is not None
        connection.close()
    for sock in silent:
        sock.close()
    listener.close()


def test_four_large_headers_do_not_keep_the_coordinators_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are refused by their prefixes, while somebody else is served."""
    monkeypatch.setattr(limits, "HELLO_TIMEOUT_S", 60.0)
    refused: list[str] = []
    hellos: dict[type[Message], int] = {AgentHello: limits.MAX_AGENT_HELLO_BYTES, **HELLOS}

    async def handle(connection: AsyncConnection) -> None:
        try:
            await connection.receive_hello(hellos)
        except ProtocolError as error:
            refused.append(str(error))
            raise
        await connection.send(Heartbeat(1))

    def call(port: int) -> None:
        large = encode(RequestFailed(1, "x" * 4_000_000))
        strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(4)]
        for stranger in strangers:
            stranger.sendall(large[:20])
            assert stranger.recv(1) == b""
            stranger.close()
        with Connection.connect(Endpoint("127.0.0.1", port)) as connection:
            connection.send(HELLO)
            assert connection.receive()[0] == Heartbeat(1)

    async def main() -> None:
        server, port = await serve("127.0.0.1", 0, handle)
        async with server:
            await asyncio.to_thread(call, port)

    asyncio.run(main())
    assert len(refused) == 4


def test_silent_connections_make_room_at_the_awaiting_end() -> None:
    async def handle(connection: AsyncConnection) -> None:
        await connection.receive_hello(HELLOS)
        while True:
            message, _ = await connection.receive()
            await connection.send(message)

    def call(port: int) -> None:
        with Connection.connect(Endpoint("127.0.0.1", port)) as member:
            member.set_receive_timeout(ANSWER_S)
            member.send(HELLO)
            silent = []
            for _ in range(100):
                silent.append(socket.create_connection(("127.0.0.1", port)))
                member.send(Heartbeat(1))
                assert member.receive()[0] == Heartbeat(1)
            silent[0].settimeout(ANSWER_S)
            assert silent[0].recv(1) == b""
            with Connection.connect(Endpoint("127.0.0.1", port)) as late:
                late.set_receive_timeout(ANSWER_S)
                late.send(HELLO)
                late.send(Heartbeat(2))
                assert late.receive()[0] == Heartbeat(2)
            for sock in silent:
                sock.close()

    async def main() -> None:
        server, port = await serve("127.0.0.1", 0, handle)
        async with server:
            await asyncio.to_thread(call, port)

    asyncio.run(main())


def test_a_listener_without_descriptors_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    """The process is filled up to its limit, and emptied again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    listener = Listener("127.0.0.1", 0)
    accepted: list[Connection | None] = []
    thread = threading.Thread(target=lambda: accepted.append(listener.accept()))
    caller = socket.socket()
    held = [socket.socket()]
    lowest = held[0].fileno()
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 1, hard))
    try:
        thread.start()
        caller.connect(("127.0.0.1", listener.port))
        deadline_s = time.monotonic() + ANSWER_S
        while not caplog.messages and time.monotonic() < deadline_s:
            thread.join(0.01)
        assert caplog.messages == ["cannot accept a connection: too many open files"]
        assert thread.is_alive()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    thread.join(ANSWER_S)
    assert accepted[0] is not None
    accepted[0].close()
    for sock in (caller, *held):
        sock.close()
    listener.close()
