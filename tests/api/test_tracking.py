"""Ids, log lines, keys, origins and the bounded line of requests, on a real server and sockets."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from api import common
from api.common import HANDLERS, read_json, server_sent_events, while_connected
from api.key_book import FILE, LOCAL_FILE, BadKey, KeyBook
from api.site import guarded
from api.tracking import Answering
from coordinator.config import CoordinatorConfig
from coordinator.errors import CoordinatorError, NotReady, QueueFull
from coordinator.serving.requests import Requests, current
from wire.transport import bind

COMPLETIONS = "/v1/completions"


class Line:
    """An Admission whose line is as full as a test says."""

    def __init__(self) -> None:
        self.error: CoordinatorError | None = None

    def require_room(self) -> None:
        if self.error is not None:
            raise self.error


class Server:
    """Routes as those for answers, which wait until a test lets them go on."""

    def __init__(self, config: CoordinatorConfig) -> None:
        self.port = 0
        self.requests = Requests()
        self.line = Line()
        self.begun = asyncio.Event()
        self.may_end = asyncio.Event()
        routes = [
            Route(COMPLETIONS, self.complete, methods=["POST"]),
            Route("/v1/chat/completions", self.stream, methods=["POST"]),
            Route("/health", self.health),
            Route("/shoal/v1/devices", self.health),
        ]
        inner: ASGIApp = Starlette(routes=routes, exception_handlers=HANDLERS)
        inner = Answering(inner, self.requests, self.line.require_room)
        self.app = guarded(inner, config, KeyBook(config.state_dir))

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def complete(self, request: Request) -> Response:
        await read_json(request)
        return JSONResponse(await while_connected(request, self._work()))

    async def _work(self) -> dict[str, Any]:
        request = current()
        request.asks("llama", 3)
        request.starts(1, 1)
        request.cached_tokens += 1
        self.begun.set()
        await self.may_end.wait()
        request.answers(1)
        request.answers(1)
        return {"id": request.id}

    async def stream(self, request: Request) -> Response:
        async def events() -> AsyncIterator[dict[str, Any] | str]:
            yield {"n": 1}
            current().asks("llama", 3)
            self.begun.set()
            await self.may_end.wait()
            raise NotReady("llama is loading", 5)

        await read_json(request)
        return server_sent_events(events())


@asynccontextmanager
async def running(config: CoordinatorConfig) -> AsyncIterator[Server]:
    server = Server(config)
    with bind("127.0.0.1", 0) as listening:
        server.port = listening.getsockname()[1]
        settings = uvicorn.Config(server.app, log_level="critical", lifespan="off")
        uvicorn_server = uvicorn.Server(settings)
        serving = asyncio.ensure_future(uvicorn_server.serve(sockets=[listening]))
        try:
            yield server
        finally:
            uvicorn_server.should_exit = True
            await serving


def run(
    directory: Path,
    test: Callable[[Server], Awaitable[None]],
    *,
    http_host: str = "127.0.0.1",
    insecure_http: bool = False,
    cors_origins: tuple[str, ...] = (),
) -> None:
    """Run a test on a server that says it listens at ``http_host``, and listens on loopback."""
    config = CoordinatorConfig(
        cluster="shoal",
        state_dir=directory,
        control_host="127.0.0.1",
        control_port=0,
        http_host=http_host,
        http_port=0,
        advertise=False,
        insecure_http=insecure_http,
        cors_origins=cors_origins,
    )

    async def main() -> None:
        async with running(config) as server:
            await asyncio.wait_for(test(server), 30)

    asyncio.run(main())


async def opened(
    server: Server, path: str, *headers: str, method: str = "POST"
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send a request; the caller reads the answer, or goes away."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    body = "{}" if method == "POST" else ""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *headers]
    lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    writer.write("\r\n".join([*lines, "Connection: close", "", body]).encode())
    return reader, writer


async def ask(
    server: Server, path: str, *headers: str, method: str = "POST"
) -> tuple[int, dict[str, str], str]:
    """Status, headers and text of an answer."""
    reader, writer = await opened(server, path, *headers, method=method)
    head, _, text = (await reader.read()).decode().partition("\r\n\r\n")
    writer.close()
    first, *others = head.split("\r\n")
    named = dict(line.split(": ", 1) for line in others)
    return int(first.split()[1]), {name.lower(): value for name, value in named.items()}, text


# ---- ids and log lines -------------------------------------------------------------------------


def test_every_answer_has_an_id_and_a_clients_own_is_kept(tmp_path: Path) -> None:
    async def test(server: Server) -> None:
        server.may_end.set()
        _, headers, text = await ask(server, COMPLETIONS, "X-Request-Id: mine-7")
        assert headers["x-request-id"] == json.loads(text)["id"] == "mine-7"
        found = set()
        for given in ("", "x" * 129, "a b", "\x7f", "ü"):
            _, headers, _ = await ask(server, "/health", f"X-Request-Id: {given}", method="GET")
            found.add(headers["x-request-id"])
        assert len(found) == 5
        assert all(name.startswith("req-") for name in found)
        status, headers, _ = await ask(
            server, "/no/such", "Origin: http://evil.example", method="GET"
        )
        assert (status, headers["x-request-id"][:4]) == (403, "req-")

    run(tmp_path, test)


def test_each_request_for_an_answer_has_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(server: Server) -> None:
        server.may_end.set()
        await ask(server, COMPLETIONS, "X-Request-Id: mine-7")
        await ask(server, "/health", method="GET")

    with caplog.at_level(logging.INFO, "api.tracking"):
        run(tmp_path, test)
    (record,) = caplog.records
    line = record.getMessage()
    assert line.startswith("mine-7 POST /v1/completions 200 for 127.0.0.1; llama: 3 prompt tokens")
    for part in ("(1 cached), 2 tokens", "waited 0.0", "first token after", "tokens/s", "took"):
        assert part in line


@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/chat/completions"])
def test_a_client_that_goes_away_is_in_its_line_and_no_longer_in_flight(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    async def test(server: Server) -> None:
        with server.requests.changed.watch() as changed:
            _, writer = await opened(server, path)
            await server.begun.wait()
            (request,) = server.requests.in_flight
            assert request.state in ("waiting", "prompt")
            writer.close()
            while server.requests.in_flight:
                changed.clear()
                await changed.wait()
        assert server.requests.ended == (request,)
        assert request.error == "the client went away"

    with caplog.at_level(logging.INFO, "api.tracking"):
        run(tmp_path, test)
    assert "error: the client went away" in caplog.text


def test_a_stream_says_why_it_pauses_and_its_failure_is_in_the_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "COMMENT_S", 0.05)

    async def test(server: Server) -> None:
        reader, writer = await opened(server, "/v1/chat/completions")
        await reader.readuntil(b": llama has no free slot: waiting in line\n\n")
        server.may_end.set()
        rest = (await reader.read()).decode()
        assert "llama is loading" in rest
        assert "data: [DONE]" in rest
        writer.close()

    with caplog.at_level(logging.INFO, "api.tracking"):
        run(tmp_path, test)
    assert "error: llama is loading" in caplog.text


def test_a_full_line_says_when_to_ask_again(tmp_path: Path) -> None:
    async def test(server: Server) -> None:
        server.line.error = QueueFull(7, 3)
        status, headers, text = await ask(server, COMPLETIONS)
        assert (status, headers["retry-after"]) == (429, "3")
        error = json.loads(text)["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        assert "7 requests wait" in error["message"]
        assert not server.requests.in_flight
        assert (await ask(server, "/health", method="GET"))[0] == 200

    run(tmp_path, test)


# ---- keys --------------------------------------------------------------------------------------


def bearer(key: str) -> str:
    return f"Authorization: Bearer {key}"


def test_no_key_is_asked_for_on_loopback_until_one_was_made(tmp_path: Path) -> None:
    async def test(server: Server) -> None:
        server.may_end.set()
        assert (await ask(server, COMPLETIONS))[0] == 200
        key = KeyBook(tmp_path).create("alice")
        status, headers, text = await ask(server, COMPLETIONS)
        assert (status, headers["www-authenticate"]) == (401, "Bearer")
        assert json.loads(text)["error"]["code"] == "invalid_api_key"
        assert "shoal key create" in text
        for header in (bearer(key), f"authorization: bearer {key}", f"X-Api-Key: {key}"):
            assert (await ask(server, COMPLETIONS, header))[0] == 200
        assert server.requests.ended[0].key == "alice"
        for wrong in ("", key[:-1], key + "x", "ü", "x" * 5000):
            status, _, text = await ask(server, COMPLETIONS, bearer(wrong))
            assert status == 401
            assert key not in text
        KeyBook(tmp_path).revoke("alice")
        assert (await ask(server, COMPLETIONS, bearer(key)))[0] == 401
        assert (await ask(server, COMPLETIONS))[0] == 401, "without keys left, nobody gets in"

    run(tmp_path, test)


def test_beyond_loopback_a_key_is_needed_and_how_to_get_one_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(server: Server) -> None:
        status, _, text = await ask(server, "/shoal/v1/devices", method="GET")
        assert status == 401
        for word in ("shoal key create NAME", "Authorization: Bearer", "--insecure-http"):
            assert word in text
        assert (await ask(server, "/health", method="GET"))[0] == 200
        status, headers, _ = await ask(server, COMPLETIONS)
        assert (status, headers["x-request-id"][:4]) == (401, "req-")
        assert not server.requests.ended, "strangers do not fill the list"
        for _ in range(20):
            await ask(server, COMPLETIONS)

    with caplog.at_level(logging.INFO):
        run(tmp_path, test, http_host="0.0.0.0")  # noqa: S104 - only told so
    assert 0 < len(caplog.records) < 10, "nor the log"


@pytest.mark.parametrize(
    ("path", "method", "header", "status", "kind"),
    [
        ("/v1/messages", "POST", "", 401, "authentication_error"),
        ("/v1/messages/count_tokens", "POST", "", 401, "authentication_error"),
        ("/v1/messages", "POST", "Origin: http://evil.example", 403, "permission_error"),
        ("/v1/messages/none", "POST", "known", 404, "not_found_error"),
    ],
)
def test_refusals_have_the_form_of_the_api_that_is_asked(
    path: str, method: str, header: str, status: int, kind: str, tmp_path: Path
) -> None:
    async def test(server: Server) -> None:
        key = KeyBook(tmp_path).create("alice")
        given = f"x-api-key: {key}" if header == "known" else header or "X-None: 1"
        found, _, text = await ask(server, path, given, method=method)
        body = json.loads(text)
        assert (found, body["type"], body["error"]["type"]) == (status, "error", kind)
        found, _, text = await ask(server, "/v1/none" + path, given, method=method)
        assert json.loads(text)["error"]["type"] == "invalid_request_error"

    run(tmp_path, test)


def test_who_says_so_needs_no_key_anywhere(tmp_path: Path) -> None:
    async def test(server: Server) -> None:
        KeyBook(tmp_path).create("alice")
        assert (await ask(server, "/shoal/v1/devices", method="GET"))[0] == 200

    run(tmp_path, test, http_host="0.0.0.0", insecure_http=True)  # noqa: S104 - only told so


def test_a_key_that_is_made_meanwhile_brings_no_revoked_one_back(tmp_path: Path) -> None:
    """Each command reads the file, and writes all keys."""
    KeyBook(tmp_path).create("lost")
    names = [f"key-{index}" for index in range(16)]
    with ThreadPoolExecutor(17) as pool:
        made = [pool.submit(KeyBook(tmp_path).create, name) for name in names[:8]]
        revoked = pool.submit(KeyBook(tmp_path).revoke, "lost")
        made += [pool.submit(KeyBook(tmp_path).create, name) for name in names[8:]]
        for future in made:
            future.result()
        revoked.result()
    assert {key.name for key in KeyBook(tmp_path).listed()} == set(names)


def test_the_file_has_hashes_only_and_is_its_owners(tmp_path: Path) -> None:
    book = KeyBook(tmp_path)
    keys = [book.create(name) for name in ("alice", "bob")]
    text = (tmp_path / FILE).read_text()
    assert not any(key in text for key in keys)
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600
    assert [key.name for key in book.listed()] == ["alice", "bob"]
    with pytest.raises(BadKey, match="revoke it first"):
        book.create("alice")
    with pytest.raises(BadKey, match="known: alice, bob"):
        book.revoke("carol")
    for name in ("", "local", "a b", "-x", "x" * 64, "a\n"):
        with pytest.raises(BadKey, match="cannot be used"):
            book.create(name)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"keys": [{"name": "a"}]}', '{"keys": {}}'])
def test_a_damaged_file_lets_only_the_local_key_in(tmp_path: Path, text: str) -> None:
    book = KeyBook(tmp_path)
    key = book.create("alice")
    book.make_local()
    local = (tmp_path / LOCAL_FILE).read_text().strip()
    assert (tmp_path / LOCAL_FILE).stat().st_mode & 0o777 == 0o600

    def named(given: str) -> str | None:
        known = book.known(given)
        return None if known is None else known.name

    assert (named(key), named(local)) == ("alice", "local")
    (tmp_path / FILE).write_text(text)
    assert (named(key), named(local)) == (None, "local")
    with pytest.raises(BadKey, match="damaged"):
        book.create("bob")
    book.make_local()
    assert named(local) is None, "each start has a local key of its own"


# ---- pages of other origins --------------------------------------------------------------------


def test_pages_of_allowed_origins_may_ask_and_read(tmp_path: Path) -> None:
    async def test(server: Server) -> None:
        server.may_end.set()
        key = KeyBook(tmp_path).create("page")
        origin = "Origin: https://chat.lan"
        asked = "Access-Control-Request-Method: POST"
        wanted = "Access-Control-Request-Headers: authorization,content-type,x-stainless-os"
        status, headers, _ = await ask(server, COMPLETIONS, origin, asked, wanted, method="OPTIONS")
        assert (status, headers["access-control-allow-origin"]) == (200, "https://chat.lan")
        assert "authorization" in headers["access-control-allow-headers"]
        status, headers, _ = await ask(server, COMPLETIONS, origin, bearer(key))
        assert (status, headers["access-control-allow-origin"]) == (200, "https://chat.lan")
        other = await ask(server, COMPLETIONS, "Origin: https://evil.example", bearer(key))
        assert other[0] == 403
        assert "--cors-origin https://evil.example" in other[2]

    run(tmp_path, test, cors_origins=("https://chat.lan",))


def test_pages_of_other_origins_may_not_ask_by_default(tmp_path: Path) -> None:
    async def test(server: Server) -> None:
        status, headers, _ = await ask(server, COMPLETIONS, "Origin: https://chat.lan")
        assert status == 403
        assert "access-control-allow-origin" not in headers

    run(tmp_path, test)
