"""The HTTP port with TLS, on a real server: silent and dripping clients, and renewed files."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from api import guard
from api.tls import HttpTls, http_tls
from coordinator.config import ConfigError
from tests.api.test_guard import running, until_closed
from wire.claim import fingerprint_of
from wire.identity import own_identity

REQUEST = b"GET /devices HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
ANSWER = b'{"devices":[]}'


@pytest.fixture
def tls(tmp_path: Path) -> HttpTls:
    return http_tls(None, None, tmp_path / "identity.pem")


def run(test: Callable[[int], Awaitable[None]], tls: HttpTls, *, most: int = 64) -> None:
    async def main() -> None:
        async with running(most=most, tls=tls) as port:
            await asyncio.wait_for(test(port), 30)

    asyncio.run(main())


def trusting() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


async def ask(port: int, request: bytes = REQUEST) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusting())
    writer.write(request)
    answer = await reader.read()
    writer.close()
    return answer


def test_requests_are_answered_inside_tls(tls: HttpTls) -> None:
    async def test(port: int) -> None:
        assert (await ask(port)).endswith(ANSWER)
        long = b"GET /stream HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        assert b"7\n" in await ask(port, long)

    run(test, tls)


def test_a_request_that_comes_with_the_end_of_the_handshake_is_answered(tls: HttpTls) -> None:
    """A client may say it at once, in the packet that ends its handshake."""

    async def test(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        channel = trusting().wrap_bio(incoming, outgoing)
        while True:
            try:
                channel.do_handshake()
            except ssl.SSLWantReadError:
                writer.write(outgoing.read())
                incoming.write(await reader.read(65536))
            else:
                break
        channel.write(REQUEST)
        writer.write(outgoing.read())
        text = b""
        while not text.endswith(ANSWER):
            data = await reader.read(65536)
            assert data, text
            incoming.write(data)
            try:
                while more := channel.read(65536):
                    text += more
            except ssl.SSLWantReadError:
                continue
        writer.close()

    run(test, tls)


@pytest.mark.parametrize("beginning", [b"", b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/1.1\r\n\r\n"])
def test_a_handshake_that_does_not_end_is_not_waited_for(
    beginning: bytes, tls: HttpTls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "HEAD_S", 0.3)

    async def test(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(beginning)
        await until_closed(reader)
        writer.close()
        # Headers inside TLS have the same time.
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusting())
        writer.write(b"GET /devices HTTP/1.1\r\nX: ")
        assert await until_closed(reader) == ""
        writer.close()

    run(test, tls)


def test_silent_connections_make_room_before_their_handshake(tls: HttpTls) -> None:
    """asyncio's own TLS would hold each of them for a minute, in any number."""

    async def test(port: int) -> None:
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(40)]
        assert (await ask(port)).endswith(ANSWER)
        closed = [asyncio.ensure_future(until_closed(reader)) for reader, _ in silent[:30]]
        assert await asyncio.gather(*closed) == [""] * 30
        for _, writer in silent:
            writer.close()

    run(test, tls, most=8)


def test_clients_that_leave_during_the_handshake_leave_nothing_behind(tls: HttpTls) -> None:
    async def test(port: int) -> None:
        for beginning in (b"", b"\x16\x03\x01", b"x" * 4096):
            for _ in range(10):
                with socket.create_connection(("127.0.0.1", port)) as sock:
                    sock.sendall(beginning)
        assert (await ask(port)).endswith(ANSWER)
        tasks = [task for task in asyncio.all_tasks() if "_open" in repr(task)]
        await asyncio.gather(*tasks)

    run(test, tls)


def test_a_renewed_certificate_is_shown_from_then_on(tmp_path: Path) -> None:
    path = tmp_path / "http.pem"
    first, second = (own_identity(tmp_path / name) for name in ("one.pem", "two.pem"))
    path.write_bytes(first.path.read_bytes())
    tls = HttpTls(path)

    async def shown(port: int) -> bytes:
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusting())
        channel = writer.get_extra_info("ssl_object")
        writer.close()
        return fingerprint_of(channel.getpeercert(True))

    async def test(port: int) -> None:
        assert await shown(port) == first.fingerprint
        path.write_bytes(second.path.read_bytes())
        os.utime(path, ns=(1, 1))
        assert await shown(port) == second.fingerprint
        path.write_text("half of a file")
        os.utime(path, ns=(2, 2))
        assert await shown(port) == second.fingerprint

    run(test, tls)


def test_files_that_are_no_certificate_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.pem: no such file"):
        HttpTls(tmp_path / "nowhere.pem")
    (tmp_path / "x.pem").write_text("no certificate")
    with pytest.raises(ConfigError, match=r"x\.pem: expected a certificate and its key"):
        HttpTls(tmp_path / "x.pem")
    one, two = (own_identity(tmp_path / name).path for name in ("one.pem", "two.pem"))
    with pytest.raises(ConfigError, match="KEY_VALUES_MISMATCH"):
        HttpTls(one, two)
