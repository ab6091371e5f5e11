"""Requests and answers through a real server, and clients that go away."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from api.common import (
    ClientGone,
    describe,
    json_lines,
    on_error,
    read_json,
    server_sent_events,
    while_connected,
)
from coordinator.errors import AgentLost
from planning.errors import RequestInvalid
from wire.transport import bind

JSON = "application/json"


class Server:
    """Routes whose work tells when it begins, waits, and tells how it ended."""

    def __init__(self) -> None:
        self.port = 0
        self.begun = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.cleaned_up = asyncio.Event()
        self.may_clean_up = asyncio.Event()

    def app(self) -> Starlette:
        handled = (RequestInvalid, ClientGone, ClientDisconnect, HTTPException)
        return Starlette(
            routes=[
                Route("/echo", self.echo, methods=["POST"]),
                Route("/whole", self.whole, methods=["POST"]),
                Route("/lines", self.lines, methods=["POST"]),
                Route("/events", self.events, methods=["POST"]),
                Route("/broken", self.broken, methods=["POST"]),
            ],
            exception_handlers={kind: on_error for kind in handled},
        )

    async def echo(self, request: Request) -> Response:
        return JSONResponse(await read_json(request))

    async def whole(self, request: Request) -> Response:
        await read_json(request)
        return JSONResponse(await while_connected(request, self._work()))

    async def lines(self, request: Request) -> Response:
        await read_json(request)

        async def work(emit: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
            emit({"step": 1})
            return await self._work()

        return json_lines(work)

    async def events(self, request: Request) -> Response:
        async def events() -> AsyncIterator[dict[str, Any] | str]:
            yield {"text": "a\nb"}
            await self._work()

        return server_sent_events(events())

    async def broken(self, request: Request) -> Response:
        async def events() -> AsyncIterator[dict[str, Any] | str]:
            yield {"n": 1}
            yield "wait a little"
            raise AgentLost("pi", "gone")

        return server_sent_events(events())

    async def _work(self) -> dict[str, Any]:
        self.begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            await self.may_clean_up.wait()  # As stages that are unloaded.
            self.cleaned_up.set()
            raise
        return {}


@asynccontextmanager
async def running() -> AsyncIterator[Server]:
    server = Server()
    with bind("127.0.0.1", 0) as listening:
        server.port = listening.getsockname()[1]
        config = uvicorn.Config(server.app(), log_level="critical", lifespan="off")
        uvicorn_server = uvicorn.Server(config)
        serving = asyncio.ensure_future(uvicorn_server.serve(sockets=[listening]))
        try:
            yield server
        finally:
            uvicorn_server.should_exit = True
            await serving


def run(test: Callable[[Server], Awaitable[None]]) -> None:
    async def main() -> None:
        async with running() as server:
            await asyncio.wait_for(test(server), 30)

    asyncio.run(main())


async def post(
    server: Server, path: str, body: bytes, content_type: str = JSON
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send a request; the caller reads the answer, or goes away."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    writer.write(head.encode() + body)
    return reader, writer


async def answer(
    server: Server, path: str, body: bytes, content_type: str = JSON
) -> tuple[int, str]:
    reader, writer = await post(server, path, body, content_type)
    head, _, text = (await reader.read()).decode().partition("\r\n\r\n")
    writer.close()
    return int(head.split()[1]), text


def test_json_comes_in_and_goes_out() -> None:
    async def test(server: Server) -> None:
        body = json.dumps({"a": "\N{GRINNING FACE}"}).encode()
        assert (await answer(server, "/echo", body))[0] == 200
        assert (await answer(server, "/echo", body, JSON + "; charset=utf-8"))[0] == 200

    run(test)


def test_a_body_in_another_encoding_is_named_by_its_header() -> None:
    async def test(server: Server) -> None:
        body = gzip.compress(b"{}")
        given = f"{JSON}\r\nContent-Encoding: gzip"
        status, text = await answer(server, "/echo", body, given)
        assert status == 400
        assert "Content-Encoding: 'gzip'" in text
        status, _ = await answer(server, "/echo", b"{}", f"{JSON}\r\nContent-Encoding: identity")
        assert status == 200

    run(test)


def test_a_wrong_method_is_told_the_right_ones() -> None:
    async def test(server: Server) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET /echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        head = (await reader.read()).decode().lower()
        writer.close()
        assert head.split()[1] == "405"
        assert "\r\nallow: post\r\n" in head

    run(test)


def many_fields(count: int) -> bytes:
    """A body with so many fields, the last of which is there twice.

    The event loop reads it. To count each name would keep it from all else for half an hour.
    """
    names = [f'"{number:x}":0' for number in (*range(count, 0, -1), 0, 0)]
    return ("{" + ",".join(names) + "}").encode()


@pytest.mark.parametrize(
    ("body", "content_type", "words"),
    [
        (b"{}", "text/plain", "Content-Type"),
        (b"{", JSON, "not valid JSON"),
        (b"[" * 100_000, JSON, "not valid JSON"),
        (b"\xff", JSON, "not valid JSON"),
        (b"1" * 5000, JSON, "JSON"),
        (b'{"a": NaN}', JSON, "NaN is not JSON"),
        (b'{"a": -Infinity}', JSON, "-Infinity is not JSON"),
        (b'{"a": 1e999}', JSON, "too large"),
        (b"[]", JSON, "JSON object"),
        (b'{"a": ["\\ud800"]}', JSON, "surrogate"),
        (b'{"\\udfff": 1}', JSON, "surrogate"),
        (b'{"a": "\xed\xa0\x80"}', JSON, "byte 7 is not UTF-8"),
        ('{"a": "\\ud800"}'.encode("utf-16"), JSON, "not UTF-8"),
        (b'{"a": [{"b": 1, "c": 2, "b": 1}]}', JSON, "the field 'b' is there twice"),
        (many_fields(300_000), JSON, "the field '0' is there twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", JSON, "has 5000 digits"),
        (b'{"a": "' + b"x" * (4 << 20) + b'"}', JSON, "larger than"),
    ],
    ids=[
        *("type", "cut", "deep", "bytes", "number", "nan", "infinity", "huge", "list"),
        *("surrogate", "key", "raw surrogate", "utf-16", "twice", "many", "digits", "large"),
    ],
)
def test_what_is_no_json_object_is_refused(body: bytes, content_type: str, words: str) -> None:
    async def test(server: Server) -> None:
        status, text = await answer(server, "/echo", body, content_type)
        assert status == 400
        assert words in text

    run(test)


@pytest.mark.parametrize("path", ["/whole", "/lines", "/events"])
def test_work_ends_when_its_client_goes_away(path: str, caplog: pytest.LogCaptureFixture) -> None:
    async def test(server: Server) -> None:
        _, writer = await post(server, path, b"{}")
        await server.begun.wait()
        writer.close()
        await server.cancelled.wait()
        server.may_clean_up.set()
        if path != "/events":  # Whose generator may be cancelled wherever it waits.
            await server.cleaned_up.wait()

    with caplog.at_level(logging.WARNING):
        run(test)
    assert not caplog.records


def test_cleaning_up_is_not_cut_short(caplog: pytest.LogCaptureFixture) -> None:
    """A cancelled load has stages to unload: cancelling it once more would leave them."""

    async def test(server: Server) -> None:
        _, writer = await post(server, "/lines", b"{}")
        await server.begun.wait()
        writer.close()
        await server.cancelled.wait()
        for _ in range(100):  # Rounds of the event loop, in each of which it could happen.
            await asyncio.sleep(0)
        server.may_clean_up.set()
        await server.cleaned_up.wait()

    run(test)
    assert not caplog.records


def test_a_client_that_leaves_in_the_middle_of_its_request(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test(server: Server) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        head = f"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Type: {JSON}\r\n"
        writer.write(head.encode() + b'Content-Length: 100\r\n\r\n{"a":')
        await writer.drain()
        writer.close()
        assert (await answer(server, "/echo", b"{}"))[0] == 200

    run(test)
    assert not caplog.records


def test_an_error_in_a_stream_is_its_last_event() -> None:
    async def test(server: Server) -> None:
        status, text = await answer(server, "/broken", b"{}")
        assert status == 200
        events = [line for line in text.splitlines() if line.startswith("data: ")]
        assert json.loads(events[0][6:]) == {"n": 1}
        assert ": wait a little" in text.splitlines()
        assert json.loads(events[1][6:])["error"]["code"] == "device_lost"
        assert events[2:] == ["data: [DONE]"]

    run(test)


def test_a_full_disk_is_named() -> None:
    status, body = describe(OSError(28, "No space left on device", "/state/x"))
    assert status == 507
    assert (
        body["message"] == "the coordinator cannot use its disk: no space left on device (/state/x)"
    )
