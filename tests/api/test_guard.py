"""Foreign hosts, slow requests and silent connections, on a real server and real sockets."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from api import guard
from api.common import on_error, read_json
from api.guard import HostGuard, guarded_protocol
from api.tls import HttpTls, encrypted_protocol
from wire.lobby import Lobby
from wire.transport import bind

OWN = socket.gethostname()
SHORT = OWN.partition(".")[0]


async def devices(request: Request) -> Response:
    return JSONResponse({"devices": []})


async def load(request: Request) -> Response:
    return JSONResponse(await read_json(request))


async def stream(request: Request) -> Response:
    """An answer that takes longer than a request may."""

    async def parts() -> AsyncIterator[str]:
        for number in range(8):
            yield f"{number}\n"
            await asyncio.sleep(0.1)

    return StreamingResponse(parts())


@asynccontextmanager
async def running(*names: str, most: int = 64, tls: HttpTls | None = None) -> AsyncIterator[int]:
    """A guarded server; its port."""
    lobby = Lobby("HTTP", most, most)
    routes = [
        Route("/devices", devices),
        Route("/load", load, methods=["POST"]),
        Route("/shoal/v1/unload", load, methods=["POST"]),
        Route("/stream", stream, methods=["GET", "POST"]),
    ]
    app = HostGuard(
        Starlette(routes=routes, exception_handlers={ClientDisconnect: on_error}), names
    )
    with bind("127.0.0.1", 0) as listening:
        config = uvicorn.Config(
            app,
            log_level="critical",
            lifespan="off",
            http=guarded_protocol(lobby) if tls is None else encrypted_protocol(lobby, tls),
        )
        server = uvicorn.Server(config)
        serving = asyncio.ensure_future(server.serve(sockets=[listening]))
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            await serving


def run(test: Callable[[int], Awaitable[None]], *names: str, most: int = 64) -> None:
    async def main() -> None:
        async with running(*names, most=most) as port:
            await asyncio.wait_for(test(port), 30)

    asyncio.run(main())


async def ask(port: int, *headers: str, path: str = "/devices", body: str = "") -> tuple[int, str]:
    """Status and body of an answer to a request with just these headers."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    lines = [*headers, "Connection: close"]
    if body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    method = "POST" if body else "GET"
    writer.write("\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", body]).encode())
    head, _, text = (await reader.read()).decode().partition("\r\n\r\n")
    writer.close()
    return int(head.split()[1]), text


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "LOCALHOST:7421", "localhost.", "shoal.localhost", "127.0.0.1:7421"),
        *("127.1.2.3", "[::1]:7421", "[::ffff:127.0.0.1]", OWN, SHORT, f"{SHORT}.local:1"),
        *("shoal.lan", "SHOAL.lan.:80", "[fd00::7]", "[fd00::7%eth0]", "192.0.2.9"),
    ],
)
def test_this_machines_names_and_those_it_was_told_are_served(host: str) -> None:
    async def test(port: int) -> None:
        assert await ask(port, f"Host: {host}") == (200, '{"devices":[]}')
        assert (await ask(port, f"Host: {host}", f"Origin: http://{host}"))[0] == 200

    run(test, "shoal.lan", "fd00::07", "192.0.2.9")


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:7421", "localhost.evil.example", "127.0.0.1.evil.example"),
        *("notlocalhost", "198.51.100.1", "0.0.0.0", "[::]", "127.1", "2130706433", "0x7f000001"),  # noqa: S104 - to be refused
        *("", ":7421", "localhost:x", "localhost/", "a@localhost", "[::1", "::1", "localhost evil"),
        "e" * 5000,
    ],
)
def test_a_foreign_host_gets_nothing(host: str) -> None:
    """A page whose name was pointed at this machine: all that it can ask for."""

    async def test(port: int) -> None:
        for path, body in (("/devices", ""), ("/load", '{"a": 1}'), ("/no/such/path", "")):
            status, text = await ask(port, f"Host: {host}", path=path, body=body)
            if status == 400:  # What is no header at all does not reach the guard.
                continue
            assert status == 403
            error = json.loads(text)["error"]
            assert "--http-host" in error["message"]
            assert error["code"] == "host_not_allowed"
            assert len(text) < 500

    run(test, "shoal.lan", "0.0.0.0", "::")  # noqa: S104 - where it listens


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "https://evil.example:7421", "null", "", "file://", "x"]
)
def test_a_page_of_another_host_may_not_use_the_api(origin: str) -> None:
    async def test(port: int) -> None:
        for path, body in (("/devices", ""), ("/load", '{"a": 1}')):
            headers = ("Host: localhost", f"Origin: {origin}")
            status, text = await ask(port, *headers, path=path, body=body)
            assert status == 403
            assert "web pages" in text

    run(test)


def test_all_hosts_can_be_let_in() -> None:
    async def test(port: int) -> None:
        headers = ("Host: evil.example", "Origin: null")
        assert await ask(port, *headers, path="/load", body='{"a": 1}') == (200, '{"a":1}')

    run(test, "*")


# ---- requests that do not come ------------------------------------------------------------------


async def until_closed(reader: asyncio.StreamReader) -> str:
    try:
        return (await reader.read()).decode()
    except ConnectionError:
        return ""


@pytest.mark.parametrize(
    "beginning",
    [
        b"",
        b"GET /devices HTTP/1.1\r\nHost: localhost\r\nX: ",
        # The second request of a connection.
        b"GET /devices HTTP/1.1\r\nHost: localhost\r\n\r\nGET /devices HTTP/1.1\r\nHost: lo",
    ],
)
def test_headers_that_drip_are_not_waited_for(
    beginning: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "HEAD_S", 0.3)

    async def test(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(beginning)
        closed = asyncio.ensure_future(until_closed(reader))
        while not closed.done():
            if beginning:
                writer.write(b"x")  # Each byte would begin a time limit per read anew.
            await asyncio.wait([closed], timeout=0.05)
        writer.close()

    run(test)


def test_a_body_that_drips_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_S", 0.3)

    async def test(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(
            b"POST /load HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 1000\r\n\r\n{"
        )
        closed = asyncio.ensure_future(until_closed(reader))
        while not closed.done():
            writer.write(b" ")
            await asyncio.wait([closed], timeout=0.05)
        assert "408 Request Timeout" in closed.result()
        assert "longer than 0.3 s" in closed.result()
        writer.close()

    run(test)


def test_an_answer_may_take_longer_than_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "HEAD_S", 0.3)
    monkeypatch.setattr(guard, "BODY_S", 0.3)

    async def test(port: int) -> None:
        for body in ("", '{"a": 1}'):
            status, text = await ask(port, "Host: localhost", path="/stream", body=body)
            assert status == 200
            assert "7\n" in text

    run(test)


def test_silent_connections_make_room_and_answers_go_on() -> None:
    async def test(port: int) -> None:
        answering = asyncio.ensure_future(ask(port, "Host: localhost", path="/stream"))
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(40)]
        assert (await ask(port, "Host: localhost"))[0] == 200
        closed = [asyncio.ensure_future(until_closed(reader)) for reader, _ in silent[:30]]
        assert await asyncio.gather(*closed) == [""] * 30
        status, text = await answering
        assert (status, "7\n" in text) == (200, True)
        for _, writer in silent:
            writer.close()

    run(test, most=8)


def test_more_requests_than_can_be_answered_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MOST_REQUESTS", 2)

    async def test(port: int) -> None:
        parts = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        for reader, writer in parts:
            writer.write(b"GET /stream HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert b"200" in await reader.readuntil(b"\r\n\r\n")
        status, text = await ask(port, "Host: localhost")
        assert (status, json.loads(text)["error"]["code"]) == (503, "busy")
        unloading = await ask(port, "Host: localhost", path="/shoal/v1/unload", body="{}")
        assert unloading == (200, "{}")
        for reader, writer in parts:
            await reader.read()
            writer.close()
        assert (await ask(port, "Host: localhost"))[0] == 200

    run(test)


def test_a_connection_is_used_again() -> None:
    async def test(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(3):
            writer.write(b"GET /devices HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b"200" in await reader.readuntil(b"\r\n\r\n")
            assert await reader.readexactly(14) == b'{"devices":[]}'
        writer.close()

    run(test)
