"""The page's files, the state that it follows, and the line that joins a device."""

from __future__ import annotations

import asyncio
import fnmatch
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Receive, Scope, Send

from api import keys
from api.common import HANDLERS
from api.key_book import KeyBook
from api.page import state as states
from api.page.files import read_files
from api.page.routes import PageRoutes
from api.page.state import State, StateFeed
from api.page.users import user_of
from api.site import guarded
from coordinator.config import CoordinatorConfig
from coordinator.loading.models import Models
from coordinator.loading.state import LoadBegan
from coordinator.loading.turns import Turns
from coordinator.roster.measurements import Step
from coordinator.roster.members import Roster
from coordinator.serving.requests import InFlight, Requests
from coordinator.story import Story
from planning.request import LoadRequest

ROOT = Path(__file__).parents[2]
STATIC = ROOT / "api" / "page" / "static"
TOKEN = "shoal1.fingerprint.secret"  # noqa: S105 - made up


class Parts:
    """A feed with all that it reads."""

    def __init__(self, directory: Path, *, token: str = "", bind: str = "127.0.0.1"):
        self.config = CoordinatorConfig(
            cluster="attic",
            state_dir=directory,
            control_host=bind,
            control_port=7420,
            http_host="127.0.0.1",
            http_port=0,
            advertise=False,
        )
        self.token = token
        self.user: int | None = os.geteuid()
        """The user that local clients run as."""
        self.story = Story()
        self.roster = Roster("attic", story=self.story)
        self.models, self.turns, self.requests = Models(self.story), Turns(), Requests()
        self.feed = StateFeed(
            self.config, self.roster, self.models, self.turns, self.requests, self.story
        )

    async def invite(self) -> str:
        return self.token

    def client(self, *, address: str = "127.0.0.1", key: str = "") -> TestClient:
        """A client at ``address`` whose requests were admitted with the key of this name."""
        routes = PageRoutes(self.config, self.feed, self.invite, lambda *_: self.user).routes()
        app = Starlette(routes=routes, exception_handlers=HANDLERS)
        return TestClient(_with_key(app, key), client=(address, 40000))


def _with_key(app: ASGIApp, key: str) -> ASGIApp:
    async def admitted(scope: Scope, receive: Receive, send: Send) -> None:
        if key:
            scope[keys.KEY] = key
        await app(scope, receive, send)

    return admitted


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    return Parts(tmp_path)


# ---- files --------------------------------------------------------------------------------------


def test_the_page_and_each_of_its_files_forbid_foreign_scripts(parts: Parts) -> None:
    client = parts.client()
    paths = ["/", *(f"/page/{name}" for name in read_files())]
    assert len(paths) > 15
    for path in paths:
        answer = client.get(path)
        assert answer.status_code == 200
        rules = dict(
            rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; ")
        )
        assert rules["default-src"] == "'none'"
        assert rules["script-src"] == rules["connect-src"] == "'self'"
        assert rules["require-trusted-types-for"] == "'script'"
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_browser_that_has_a_file_is_told_so(parts: Parts) -> None:
    client = parts.client()
    tag = client.get("/page/app.js").headers["etag"]
    again = client.get("/page/app.js", headers={"If-None-Match": tag})
    assert (again.status_code, again.content) == (304, b"")
    assert client.get("/page/app.js", headers={"If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize(
    "path", ["no.js", "../routes.py", "%2e%2e/routes.py", "..%2froutes.py", "vendor", "/etc/passwd"]
)
def test_no_other_file_is_reached(parts: Parts, path: str) -> None:
    answer = parts.client().get(f"/page/{path}")
    assert answer.status_code == 404
    assert "message" in answer.json()["error"]


def test_scripts_have_a_type_that_browsers_run(parts: Parts) -> None:
    client = parts.client()
    types = {Path(name).suffix: client.get(f"/page/{name}") for name in read_files()}
    assert types[".js"].headers["content-type"] == "text/javascript; charset=utf-8"
    assert types[".css"].headers["content-type"].startswith("text/css")
    assert types[".svg"].headers["content-type"] == "image/svg+xml"


def test_the_page_asks_for_nothing_from_elsewhere() -> None:
    """No address but the page's own files is in a script, a style or the document."""
    for name, file in read_files().items():
        if name.startswith("vendor/") or name.endswith(".svg"):
            continue
        text = file.content.decode()
        assert not re.findall(r"""(?:src|href|from|import|url)\s*[=(]?\s*["'(]https?:""", text), (
            name
        )
        for imported in re.findall(r'from "([^"]+)"', text):
            assert (STATIC / imported).exists(), imported


def test_an_installation_has_every_file_of_the_page() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    (line,) = re.findall(r'^"api.page" = (\[.*\])$', text, re.MULTILINE)
    patterns = json.loads(line)
    for name in read_files():
        depth = [
            pattern for pattern in patterns if pattern.count("/") == f"static/{name}".count("/")
        ]
        assert any(fnmatch.fnmatch(f"static/{name}", pattern) for pattern in depth), name


def test_vendored_files_are_those_that_their_list_describes() -> None:
    text = (STATIC.parent / "README.md").read_text()
    listed = dict(re.findall(r"^\| `([\w.]+\.js)` .*\| `([0-9a-f]{64})` \|$", text, re.MULTILINE))
    found = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (STATIC / "vendor").glob("*.js")
    }
    assert listed == found
    for name in ("preact", "htm", "marked"):
        assert (STATIC / "vendor" / f"LICENSE.{name}").stat().st_size > 500


# ---- the state ----------------------------------------------------------------------------------


def test_the_state_has_the_parts_that_its_type_names(parts: Parts) -> None:
    parts.story.tell("joined", "pi-1")
    with parts.requests.serve(InFlight("r-1", "/v1/chat/completions", "10.0.0.2")) as request:
        request.asks("tiny-opt", 7)
        state = parts.client().get("/shoal/v1/state").json()
    assert set(state) == set(typing.get_type_hints(State))
    assert state["shoal"]["cluster"] == "attic"
    assert [event["kind"] for event in state["events"]] == ["joined"]
    (shown,) = state["requests"]
    assert (shown["id"], shown["state"], shown["prompt_tokens"]) == ("r-1", "waiting", 7)
    assert "age_s" not in shown


def test_a_load_is_shown_with_the_last_step_of_each_of_its_parts(parts: Parts) -> None:
    async def loading() -> None:
        request = LoadRequest(ROOT / "examples" / "tiny-opt" / "model")
        async with parts.turns.asked(lambda step: None):
            parts.models.apply("tiny-opt", LoadBegan(request))
            for done in (1, 2):
                for device in ("pi-1", "pi-2"):
                    parts.turns.report(Step("load", device, done, 4, "bytes"))
            operation = parts.feed.state()["operation"]
            assert operation is not None
            assert [(step["label"], step["done"]) for step in operation["steps"]] == [
                ("pi-1", 2),
                ("pi-2", 2),
            ]
            assert parts.feed.state()["models"][0]["state"] == "loading"
        assert parts.feed.state()["operation"] is None

    asyncio.run(loading())


def first_events(parts: Parts, happens: Mapping[int, Any], count: int) -> list[dict[str, Any]]:
    """The first ``count`` events of a stream. After event N the function ``happens[N]`` runs."""

    async def read() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        stream = parts.feed.stream()
        async for text in stream:
            if text.startswith("data: "):
                found.append(json.loads(text.removeprefix("data: ")))
                happens.get(len(found), lambda: None)()
            if len(found) == count:
                await stream.aclose()
        return found

    return asyncio.run(asyncio.wait_for(read(), 30))


def test_a_stream_begins_whole_and_goes_on_with_what_changed(parts: Parts) -> None:
    first, second = first_events(parts, {1: lambda: parts.story.tell("joined", "pi-1")}, 2)
    assert set(first) == set(typing.get_type_hints(State))
    assert list(second) == ["events"]
    assert second["events"][-1]["subject"] == "pi-1"


def test_a_quiet_stream_shows_that_it_lives(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "TICK_S", 0.01)
    monkeypatch.setattr(states, "QUIET_S", 0.02)

    async def read() -> list[str]:
        return [text async for text in _first(parts.feed, 3)]

    texts = asyncio.run(asyncio.wait_for(read(), 30))
    assert texts[0].startswith("data: ")
    assert texts[1:] == [": nothing new\n\n"] * 2


async def _first(feed: StateFeed, count: int) -> typing.AsyncIterator[str]:
    stream = feed.stream()
    for _ in range(count):
        yield await anext(stream)
    await stream.aclose()


def test_streams_end_when_the_coordinator_stops(parts: Parts) -> None:
    events = first_events(parts, {1: parts.feed.close}, 99)
    assert len(events) == 1


def test_who_watches_with_a_revoked_key_watches_no_longer(parts: Parts, tmp_path: Path) -> None:
    """A stream has no end of its own."""
    book = KeyBook(tmp_path)
    key = book.create("alice")
    routes = PageRoutes(parts.config, parts.feed, parts.invite).routes()
    app = guarded(Starlette(routes=routes), parts.config, KeyBook(tmp_path))
    headers = {"host": "127.0.0.1", "accept": "text/event-stream", "authorization": f"Bearer {key}"}
    scope = {
        "type": "http",
        "method": "GET",
        "path": "/shoal/v1/state",
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }
    sent: list[Any] = []

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)
        if len(sent) == 2:
            book.revoke("alice")

    asyncio.run(asyncio.wait_for(app(scope, receive, send), 20))
    assert sent[0]["status"] == 200
    assert sent[1]["body"].startswith(b"data: ")
    assert sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}
    assert parts.feed.watchers == 0


def test_a_page_too_many_is_refused(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "MOST_WATCHERS", 0)
    answer = parts.client().get("/shoal/v1/state", headers={"Accept": "text/event-stream"})
    assert answer.status_code == 503
    assert "close one" in answer.json()["error"]["message"]


# ---- joining ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "key", "header", "is_told"),
    [
        ("127.0.0.1", "", "", True),
        ("127.0.0.1", "", "x-forwarded-for", False),
        ("192.168.1.7", "", "", False),
        ("192.168.1.7", "laptop", "", True),
        ("127.0.0.1", "laptop", "forwarded", True),
    ],
)
def test_the_token_is_for_this_machine_and_for_holders_of_a_key(
    tmp_path: Path, address: str, key: str, header: str, is_told: bool
) -> None:
    client = Parts(tmp_path, token=TOKEN).client(address=address, key=key)
    headers = {header: "10.0.0.9"} if header else {}
    answer = client.post("/shoal/v1/join", json={"token": True}, headers=headers).json()
    assert answer["token"] == (TOKEN if is_told else None)
    assert answer["port"] == 7420
    assert client.post("/shoal/v1/join", json={}, headers=headers).json()["token"] is None
    assert TOKEN not in json.dumps(client.get("/shoal/v1/state").json())


@pytest.mark.parametrize("user", [65534, None])
def test_another_user_of_this_machine_is_not_told_the_token(
    tmp_path: Path, user: int | None
) -> None:
    parts = Parts(tmp_path, token=TOKEN)
    parts.user = user
    assert parts.client().post("/shoal/v1/join", json={"token": True}).json()["token"] is None


CALLER = """
import os, socket, sys
port, user, host = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
os.setuid(user)  # From here on, modules of this Python may be out of reach.
with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
    sock.connect((host, port))
    sock.recv(1)
"""


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("user", [None, 65534])
def test_the_kernel_tells_whose_a_connection_is(host: str, user: int | None) -> None:
    if user is not None and os.geteuid() != 0:
        pytest.skip("only root can become another user")
    expected = os.geteuid() if user is None else user
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as server:
        server.settimeout(30)
        port = server.getsockname()[1]
        arguments = [sys.executable, "-c", CALLER, str(port), str(expected), host]
        with subprocess.Popen(arguments) as process:
            sock, client = server.accept()
            with sock:
                assert user_of(client[:2], (host, port)) == expected
                assert user_of((client[0], client[1] ^ 1), (host, port)) is None
        assert process.returncode == 0


def test_a_connection_that_its_process_has_closed_is_nobodys() -> None:
    """The kernel shows it as root's, who may have tokens made."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname()[:2])
        sock, address = server.accept()
        with sock:
            assert user_of(address, server.getsockname()) == os.geteuid()
            client.close()
            assert sock.recv(1) == b""  # The kernel has heard of it, too.
            assert user_of(address, server.getsockname()) is None


def test_a_form_of_another_site_does_not_get_the_token(tmp_path: Path) -> None:
    client = Parts(tmp_path, token=TOKEN).client()
    answer = client.post(
        "/shoal/v1/join", content='{"token": true}', headers={"Content-Type": "text/plain"}
    )
    assert answer.status_code == 400
    assert TOKEN not in answer.text


def test_agents_are_told_an_address_that_they_reach(tmp_path: Path) -> None:
    answer = Parts(tmp_path, bind="0.0.0.0").client().post("/shoal/v1/join", json={}).json()  # noqa: S104 - where it listens
    assert not [host for host in answer["hosts"] if host.startswith("127.")]
    assert Parts(tmp_path).client().post("/shoal/v1/join", json={}).json()["hosts"] == ["127.0.0.1"]
