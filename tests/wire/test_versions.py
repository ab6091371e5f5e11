"""Peers with other protocols: both sides hear the versions, and what to install."""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import msgpack
import pytest

from tests.machines import answering, calling
from wire import limits
from wire.async_connection import AsyncConnection, serve
from wire.codec import MAGIC, PREFIX, decode_header, decode_prefix, encode_refusal
from wire.connection import Connection, Listener, protocol_of_silent
from wire.errors import NoTls, ProtocolError, VersionMismatch
from wire.messages import PROTOCOL_VERSION, Endpoint, JoinRefused
from wire.versions import Stranger, shoal_version

HERE = f"shoal {shoal_version()} (protocol {PROTOCOL_VERSION})"
HOST = socket.gethostname()
HELLO, REFUSED, CHALLENGE = 1, 3, 26


def frame(version: int, code: int, values: list[object]) -> bytes:
    header: bytes = msgpack.packb(values)
    return PREFIX.pack(MAGIC, version, 0, code, len(header), 0) + header


def hello(version: int, shoal: str = "7.1", name: str = "pi") -> bytes:
    """What of a hello is the same in all versions, and something that is not."""
    return frame(version, HELLO, ["0" * 16, name, shoal, {"future": [1, 2]}])


def read(sock: socket.socket) -> bytes:
    """All that comes until the other end closes."""
    sock.settimeout(20)
    data = b""
    while more := sock.recv(4096):
        data += more
    return data


def told(data: bytes) -> tuple[int, str]:
    """The version and the text of a refusal, which is all that came."""
    magic, version, _, code, size, payload = PREFIX.unpack(data[: PREFIX.size])
    assert (magic, code, size, payload) == (MAGIC, REFUSED, len(data) - PREFIX.size, 0)
    (text,) = msgpack.unpackb(data[PREFIX.size :])
    return version, text


@pytest.mark.parametrize("version", [1, 2, PROTOCOL_VERSION + 1, 255])
@pytest.mark.parametrize("encrypts", [False, True])
@pytest.mark.parametrize("code", [HELLO, CHALLENGE])
def test_both_sides_hear_of_each_other(version: int, code: int, *, encrypts: bool) -> None:
    """The stranger comes without TLS, and begins with a hello or a handshake."""
    listener = Listener("127.0.0.1", 0, answerer=answering() if encrypts else None)
    with socket.create_connection(("127.0.0.1", listener.port)) as stranger:
        connection = listener.accept()
        assert connection is not None
        if code == HELLO:
            stranger.sendall(hello(version))
        else:
            stranger.sendall(frame(version, CHALLENGE, [1, bytes(32), "7.1", "future"]))
        with pytest.raises(VersionMismatch) as caught:
            connection.receive()
        answered, text = told(read(stranger))
    listener.close()
    story = str(caught.value)
    where = "127.0.0.1 (pi)" if code == HELLO else "127.0.0.1"
    theirs = f"shoal 7.1 (protocol {version})"
    assert story.startswith(f"{where} runs {theirs}, this machine runs {HERE}: install ")
    assert text.startswith(f"{HOST} runs {HERE}, this machine runs {theirs}: install ")
    # In words of the stranger's own version; the older one is to be upgraded.
    assert answered == version
    if version < PROTOCOL_VERSION:
        assert story.endswith(f": install shoal {shoal_version()} on {where}")
        assert text.endswith(f": install shoal {shoal_version()} on this machine")
    else:
        assert story.endswith(": install shoal 7.1 on this machine")
        assert text.endswith(f": install shoal 7.1 on {HOST}")


@pytest.mark.parametrize("encrypts", [False, True])
def test_a_server_tells_of_a_stranger_once_and_him_each_time(
    *, encrypts: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def handle(connection: AsyncConnection) -> None:
        await connection.receive(20)

    async def main() -> None:
        answerer = answering() if encrypts else None
        server, port = await serve("127.0.0.1", 0, handle, answerer=answerer)
        for _ in range(3):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(hello(9))
            assert told(await asyncio.wait_for(reader.read(), 20))[0] == 9
            writer.close()
        server.close()
        await server.wait_closed()

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())
    (line,) = caplog.messages
    assert "runs shoal 7.1 (protocol 9), this machine runs" in line


@pytest.mark.parametrize("version", [2, PROTOCOL_VERSION, 200])
def test_a_refusal_of_any_version_is_understood(version: int) -> None:
    data = encode_refusal("because", version)
    prefix = decode_prefix(data[: PREFIX.size])
    assert decode_header(prefix.kind, data[PREFIX.size :]) == JoinRefused("because")
    later = msgpack.packb(["because", {"and": 1}, 2])
    assert decode_header(JoinRefused, later) == JoinRefused("because")
    for wrong in ([], [1], "text"):
        with pytest.raises(ProtocolError):
            decode_header(JoinRefused, msgpack.packb(wrong))
    assert len(encode_refusal("ä" * 5000, version)) <= PREFIX.size + limits.MAX_HANDSHAKE_BYTES


def test_nothing_large_is_read_of_another_version() -> None:
    for code, size in ((REFUSED, limits.MAX_HANDSHAKE_BYTES + 1), (HELLO, 1), (9999, 1)):
        data = struct.pack("<4sBBHIQ", MAGIC, 9, 0, code, size, 0)
        with pytest.raises(VersionMismatch):
            decode_prefix(data)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xc1",
        b"\xff" * 9,
        msgpack.packb([]),
        msgpack.packb({"a": 1}),
        msgpack.packb(7),
        msgpack.packb(["x", ["deep"], {"a": 1}]),
        msgpack.packb(["x", b"\xff", None]),
    ],
    ids=range(8),
)
def test_a_stranger_who_says_nonsense_is_just_unknown(header: bytes) -> None:
    assert Stranger.of("h", 9, HELLO, header) == Stranger("h", 9)
    story = Stranger("h", 9).story()
    assert story.startswith("h runs a newer shoal (protocol 9), this machine runs")
    assert story.endswith(": install the shoal of h on this machine")


def test_what_a_stranger_says_of_himself_is_short_and_harmless() -> None:
    header = msgpack.packb(["x", "\x1b[2Jpi\n", "9" * 500])
    known = Stranger.of("h", 9, HELLO, header)
    assert (known.name, known.shoal) == ("[2Jpi", "9" * 48)


# ---- protocol 2, which says nothing ------------------------------------------------------------


@contextmanager
def old_peer() -> Iterator[Endpoint]:
    """As protocol 2 answers: it closes at other versions, and refuses a hello without an id."""

    def answer(sock: socket.socket) -> None:
        data = sock.recv(4096)
        if len(data) < PREFIX.size or data[4] != 2:
            return
        code = PREFIX.unpack(data[: PREFIX.size])[3]
        values = msgpack.unpackb(data[PREFIX.size :])
        if code == HELLO and len(values) == 5 and len(values[4]) == 17:
            sock.sendall(frame(2, REFUSED, ["device id or name is empty or too long"]))

    def run() -> None:
        while True:
            try:
                sock, _ = listening.accept()
            except OSError:
                return
            with sock:
                answer(sock)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield Endpoint("127.0.0.1", listening.getsockname()[1])
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join(20)


def test_an_older_peer_is_asked_in_its_own_words() -> None:
    with old_peer() as endpoint:
        with pytest.raises(NoTls, match="or an older version"):
            Connection.connect(endpoint, caller=calling())
        assert protocol_of_silent(endpoint) == 2


def test_one_who_just_closes_stays_unknown() -> None:
    listener = Listener("127.0.0.1", 0)

    def hang_up() -> None:
        connection = listener.accept()
        if connection is not None:
            connection.close()

    thread = threading.Thread(target=hang_up)
    thread.start()
    endpoint = Endpoint("127.0.0.1", listener.port)
    assert protocol_of_silent(endpoint) is None
    thread.join(20)
    listener.close()
    assert protocol_of_silent(endpoint) is None


def test_a_caller_of_another_version_is_shown_why() -> None:
    """The refusal reaches whoever connected, and is not lost with what he still sends."""
    listener = Listener("127.0.0.1", 0)
    caller = Connection.connect(Endpoint("127.0.0.1", listener.port))
    accepted = listener.accept()
    assert accepted is not None
    accepted._transport.send(encode_refusal("install shoal 9", 9))
    assert caller.receive()[0] == JoinRefused("install shoal 9")
    for connection in (caller, accepted):
        connection.close()
    listener.close()
