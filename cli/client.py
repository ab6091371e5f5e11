"""The command line's side of the coordinator's HTTP API."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import httpx

from api.key_book import LOCAL_FILE
from cli.errors import CommandFailed, CoordinatorUnreachable, UsageError
from cli.parser import DEFAULT_URL
from cli.service.running import running_in
from wire.addresses import is_loopback
from wire.service import default_state_dir

if TYPE_CHECKING:
    import ssl

CONNECT_TIMEOUT_S = 3.0
"""The time to connect to a coordinator on this machine or LAN.

Reading has no limit, because measuring and loading take long. Ctrl-C ends them."""

KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)
"""These notice a coordinator that loses its power before it answers."""


SERVICE_STATE = Path("/var/lib/shoal/coordinator")
"""The state directory of an installed coordinator."""

MAX_PORT = (1 << 16) - 1


def default_url() -> str:
    """The coordinator's URL: SHOAL_COORDINATOR, else this machine."""
    given = os.environ.get("SHOAL_COORDINATOR")
    if given:
        return given
    for directory in _state_dirs():
        running = running_in(directory)
        if running is not None and running.http == DEFAULT_URL.replace("http:", "https:"):
            return running.http
    return DEFAULT_URL


def _state_dirs() -> tuple[Path, ...]:
    """The state directories of coordinators of this machine, where users find them."""
    return SERVICE_STATE, default_state_dir("coordinator")


def api_key(url: str) -> str | None:
    """The API key for the coordinator at ``url``, or None.

    It is SHOAL_API_KEY. For this machine's coordinator it is else the local key of one that runs,
    or the newest one, as far as this user may read them. Raises UsageError.
    """
    given = os.environ.get("SHOAL_API_KEY", "").strip()
    if given and not (given.isascii() and given.isprintable()):
        raise UsageError("SHOAL_API_KEY: a key has only printable ASCII characters")
    if given:
        return given
    if not is_loopback(httpx.URL(url).host):
        return None
    found = []
    for directory in _state_dirs():
        path = directory / LOCAL_FILE
        with suppress(OSError, UnicodeDecodeError):
            key = path.read_text(encoding="ascii").strip()
            found.append((running_in(directory) is not None, path.stat().st_mtime, key))
    return max(found)[-1] if found else None


class Refused(CommandFailed):
    """The coordinator refuses a request. ``code`` is OpenAI's word for the reason, or None."""

    def __init__(self, message: str, code: str | None) -> None:
        super().__init__(message)
        self.code = code


class Client:
    """The API of a coordinator. All calls raise CoordinatorUnreachable and CommandFailed."""

    def __init__(self, url: str) -> None:
        self.url = _address(url)
        key = api_key(self.url)
        # Proxies of the environment do not lead to this machine or LAN.
        self._http = httpx.Client(
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
            trust_env=False,
            transport=httpx.HTTPTransport(
                verify=_encryption(self.url), trust_env=False, socket_options=KEEPALIVE
            ),
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.close()

    def get(self, path: str) -> dict[str, Any]:
        """Return the JSON object at ``path``."""
        with self._reporting():
            return _object(self._http.get(self.url + path))

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Send ``body`` to ``path``, and return the JSON object that answers it."""
        with self._reporting():
            return _object(self._http.post(self.url + path, json=body))

    def operate(
        self, path: str, body: Mapping[str, Any], on_step: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any]:
        """Run a plan or load, and return its result. ``on_step`` gets its progress."""
        with self._lines(path, body) as lines:
            for line in lines:
                event = json.loads(line)
                if "step" in event:
                    on_step(event["step"])
                elif "error" in event:
                    raise Refused(event["error"]["message"], event["error"].get("code"))
                else:
                    result: dict[str, Any] = event["result"]
                    return result
        raise CommandFailed("the coordinator stopped before it was done")

    def follow(self, path: str) -> Generator[dict[str, Any], None, None]:
        """Yield the objects of the server-sent events at ``path``, until the coordinator stops."""
        with (
            self._reporting(),
            self._http.stream(
                "GET", self.url + path, headers={"Accept": "text/event-stream"}
            ) as response,
        ):
            if response.status_code != 200:
                response.read()
                _object(response)
            for line in response.iter_lines():
                if line.startswith("data: "):
                    yield json.loads(line.removeprefix("data: "))

    def stream(
        self, path: str, body: Mapping[str, Any], on_notice: Callable[[str], None] | None = None
    ) -> Generator[dict[str, Any], None, None]:
        """Yield a completion's events as objects. ``on_notice`` gets the reason of a pause."""
        noticed = ""
        with self._lines(path, body) as lines:
            for line in lines:
                if line.startswith(": ") and on_notice is not None and line != noticed:
                    noticed = line  # It is repeated while the pause lasts.
                    on_notice(line.removeprefix(": "))
                data = line.removeprefix("data: ")
                if not line.startswith("data: ") or data == "[DONE]":
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise Refused(event["error"]["message"], event["error"].get("code"))
                yield event

    @contextmanager
    def _lines(self, path: str, body: Mapping[str, Any]) -> Iterator[Iterator[str]]:
        """Send ``body`` to ``path``, and yield the lines of the answer as they come."""
        with (
            self._reporting(),
            self._http.stream("POST", self.url + path, json=body) as response,
        ):
            if response.status_code != 200:
                response.read()
                _object(response)
            yield response.iter_lines()

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """Turn errors of the transport into CommandFailed."""
        try:
            yield
        except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError) as error:
            hint = ""
            if self.url.startswith("http:"):
                hint = f"; if it runs with --http-tls, say --url https{self.url[4:]}"
            raise CommandFailed(f"the coordinator stopped before it was done{hint}") from error
        except httpx.TransportError as error:
            raise CoordinatorUnreachable(
                f"no coordinator answers at {self.url}: start `shoal coordinator`, "
                "or name it with --url or SHOAL_COORDINATOR"
            ) from error
        except UnicodeEncodeError:
            raise  # What is sent is at fault, not the answer.
        except (httpx.DecodingError, ValueError, KeyError, TypeError) as error:
            raise CommandFailed(f"{self.url} does not answer like a coordinator") from error


def _address(url: str) -> str:
    """Return the URL of a coordinator, without a slash at its end. Raises UsageError."""
    try:
        parsed = httpx.URL(url)
        is_one = parsed.scheme in ("http", "https") and bool(parsed.host)
        is_one = is_one and (parsed.port is None or 0 < parsed.port <= MAX_PORT)
    except (httpx.InvalidURL, UnicodeError):
        is_one = False
    if not is_one:
        raise UsageError(
            f"{ascii(url)[1:-1]!r} is no address of a coordinator: give one such as {DEFAULT_URL} "
            "by --url or SHOAL_COORDINATOR"
        )
    return url.rstrip("/")


def _encryption(url: str) -> ssl.SSLContext | bool:
    """How to check the server at ``url``. Raises CommandFailed, CoordinatorUnreachable."""
    parsed = httpx.URL(url)
    if parsed.scheme != "https":
        return False
    # Importing ssl takes longer than most commands do otherwise.
    from cli.pins import Address, encryption

    address = Address(parsed.host, parsed.port or 443)
    return encryption(address, _state_dirs(), CONNECT_TIMEOUT_S)


def _object(response: httpx.Response) -> dict[str, Any]:
    values = response.json()
    if response.status_code != 200:
        raise Refused(values["error"]["message"], values["error"].get("code"))
    if not isinstance(values, dict):
        raise TypeError("expected an object")
    return values
