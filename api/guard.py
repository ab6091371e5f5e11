"""Guards all HTTP routes: it checks host names, and limits the time of a request.

A web page can point its own name at this machine's address (DNS rebinding). Then browsers of its
visitors talk to this machine, and send the page's name as the host. So only known names are served.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Collection
from typing import Any

import h11
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from api.common import error_response
from wire.hygiene import clean_text
from wire.lobby import Lobby

HEAD_S = 15.0
"""The time for a request's line and headers. uvicorn closes an idle connection after 5 s."""

BODY_S = 60.0
"""The time for a request's body: 4 MiB at about half a megabit per second."""

MOST_REQUESTS = 192
"""The most requests at once, including those that wait for a slot."""

RETRY_BUSY_S = 10

ALWAYS_SERVED = ("/shoal/v1/unload", "/health", "/health/live", "/metrics")
"""Paths that MOST_REQUESTS does not bound, because they can end an overload, or show it."""

ANY_HOST = "*"
"""The setting that serves every host name."""

UNSPECIFIED = ("0.0.0.0", "::")  # noqa: S104 - left out of the known names

LONGEST_SHOWN = 80

_HOST = re.compile(
    r"(?:\[(?P<v6>[0-9A-Fa-f:.]+(?:%[\w.-]+)?)\]|(?P<name>[^\s:/\[\]@]+))(?::\d{0,5})?", re.ASCII
)
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(?P<host>[^/]+)", re.ASCII)


class HostGuard:
    """ASGI middleware that refuses unknown hosts and origins, and more than MOST_REQUESTS at once.

    Known are loopback names and addresses, the address that the client connected to, this machine's
    name, and ``names``. The port does not matter. ALWAYS_SERVED is exempt from the number.
    ``origins`` are known beside these, as whole origins.
    """

    def __init__(
        self, app: ASGIApp, names: Collection[str] = (), origins: Collection[str] = ()
    ) -> None:
        self._app = app
        self._answering = 0
        self._any = ANY_HOST in names
        self._origins = frozenset(origins)
        own = socket.gethostname().lower()
        short = own.partition(".")[0]
        # An address that means all interfaces is not a name of this machine.
        named = {name for name in map(_normal, names) if name not in UNSPECIFIED}
        self._names = {own, short, f"{short}.local", "localhost", *named}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = None if scope["type"] != "http" or self._any else self._refusal(scope)
        if message is not None:
            response = _error(scope, 403, message, "invalid_request_error", "host_not_allowed")
            await response(scope, receive, send)
        elif scope.get("path") in ALWAYS_SERVED:
            await self._app(scope, receive, send)
        elif self._answering >= MOST_REQUESTS:
            message = f"{MOST_REQUESTS} requests are being answered: try again later"
            response = _error(scope, 503, message, "server_error", "busy")
            response.headers["Retry-After"] = str(RETRY_BUSY_S)
            await response(scope, receive, send)
        else:
            self._answering += 1
            try:
                await self._app(scope, receive, send)
            finally:
                self._answering -= 1

    def _refusal(self, scope: Scope) -> str | None:
        """The reason why a request is refused, or None.

        Browsers always send a host. A request without one comes from a program, and is served.
        """
        for name, value in scope["headers"]:
            if name == b"host" and not self._is_known(value.decode("latin-1"), scope):
                shown = _shown(value)
                return (
                    f"the host {shown!r} is not known here: use an address of this machine, or "
                    f"start the coordinator with --http-host {_suggested(shown)}"
                )
            if name == b"origin" and not self._is_allowed(value):
                origin = _ORIGIN.fullmatch(value.decode("latin-1"))
                if origin is None or not self._is_known(origin["host"], scope):
                    shown = _shown(value)
                    name = _suggested(shown.partition("://")[2])
                    return (
                        f"web pages of {shown!r} may not use this shoal: to let them, start the "
                        f"coordinator with --cors-origin {'ORIGIN' if name == 'NAME' else shown}, "
                        f"or with --http-host {name} if that is a proxy before this shoal"
                    )
        return None

    def _is_allowed(self, origin: bytes) -> bool:
        return ANY_HOST in self._origins or origin.decode("latin-1") in self._origins

    def _is_known(self, host: str, scope: Scope) -> bool:
        match = _HOST.fullmatch(host)
        if match is None:
            return False
        name = _normal(match["v6"] or match["name"])
        if name in self._names or name.endswith(".localhost"):
            return True
        address = _address(name)
        if address is None:
            return False
        server = scope.get("server")
        return address.is_loopback or (server is not None and address == _address(server[0]))


class GuardedProtocol(H11Protocol):
    """uvicorn's protocol with time limits, and a lobby for connections without a whole request.

    uvicorn itself waits for ever for a request. A connection whose request is being answered has
    left the lobby, and has no time limit.
    """

    lobby: Lobby
    """Set by ``guarded_protocol``."""

    _phase = ""
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._follow()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._follow()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._follow()

    def connection_lost(self, exc: Exception | None) -> None:
        self._enter("lost")
        super().connection_lost(exc)

    def _follow(self) -> None:
        """Enter the phase of the current request."""
        if self._phase == "lost":
            return
        state = self.conn.their_state
        if state is h11.IDLE:
            self._enter("head")
        elif state is h11.SEND_BODY:
            self._enter("body")
        else:
            self._enter("whole")

    def _enter(self, phase: str) -> None:
        if phase == self._phase:
            return
        self._phase = phase
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        self.lobby.leave(self)
        if phase in ("head", "body"):
            self.lobby.enter(self, self.client[0] if self.client else "", self.transport.abort)
            limit_s = HEAD_S if phase == "head" else BODY_S
            self._deadline = self.loop.call_later(limit_s, self._on_late)

    def _on_late(self) -> None:
        """Close the connection. A client that sends a body is told why."""
        if self._phase == "body" and not self.cycle.response_started:
            text = f"the request took longer than {BODY_S:g} s to arrive"
            body = b'{"error":{"message":"%s","type":"invalid_request_error"}}' % text.encode()
            self.transport.write(
                b"HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(body), body)
            )
        self.transport.close()


def guarded_protocol(lobby: Lobby) -> type[GuardedProtocol]:
    """Make the protocol class of one server."""
    return type("GuardedProtocol", (GuardedProtocol,), {"lobby": lobby})


def _error(scope: Scope, status: int, message: str, kind: str, code: str) -> JSONResponse:
    body = {"message": message, "type": kind, "param": None, "code": code}
    return error_response(scope["path"], status, body)


def _normal(name: str) -> str:
    """A host name or address in the form for comparing."""
    name = name.strip("[]").lower().removesuffix(".")
    address = _address(name)
    return name if address is None else str(address)


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _shown(value: bytes) -> str:
    """A stranger's header as short, printable text."""
    return clean_text(value.decode("latin-1"), LONGEST_SHOWN)


def _suggested(host: str) -> str:
    """The setting that would admit a host, or NAME if the host is malformed."""
    match = _HOST.fullmatch(host)
    if match is None or re.fullmatch(r"[A-Za-z0-9.:-]+", match["v6"] or match["name"]) is None:
        return "NAME"
    return match["v6"] or match["name"]
