"""Gives each HTTP request an id, follows requests for answers, and writes one log line for each."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.common import CLIENT_CLOSED_REQUEST, SCOPE_KEY, on_error, tracked
from coordinator.errors import QueueFull
from coordinator.serving.requests import InFlight, Requests
from coordinator.serving.urgency import HEADER
from wire.hygiene import clean_text

log = logging.getLogger(__name__)
"""Its lines about requests for answers have the level INFO. Other requests are DEBUG."""

ANSWERS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})
"""The paths whose requests are followed as requests for answers."""

REFUSED = (401, 403)
"""The statuses of strangers, who must not fill the log. The guards warn of them now and then."""

REQUEST_ID = "x-request-id"

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/+=-]{0,127}", re.ASCII)


class Tracking:
    """The outermost ASGI middleware: ids and log lines, also for requests that are refused.

    A client may send an id of its own in the header x-request-id. The answer's header has it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        client = scope["client"][0] if scope.get("client") else ""
        request = InFlight(_id(Headers(scope=scope)), path=scope["path"], client=client)
        scope[SCOPE_KEY] = request
        ended = False

        async def heard() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect" and not ended:
                request.error = request.error or "the client went away"
                request.status = request.status or CLIENT_CLOSED_REQUEST
            return message

        async def answer(message: Message) -> None:
            nonlocal ended
            if message["type"] == "http.response.start":
                request.status = request.status or message["status"]
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID] = request.id
                if request.path in ANSWERS:
                    headers[HEADER] = request.urgency.name.lower()
            elif not message.get("more_body"):
                ended = True
            await send(message)

        try:
            await self._app(scope, heard, answer)
        finally:
            _log(scope["method"], request)


class Answering:
    """ASGI middleware that keeps requests for answers among the requests in flight."""

    def __init__(self, app: ASGIApp, requests: Requests, require_room: Callable[[], None]) -> None:
        """``require_room`` raises QueueFull if no more requests may wait."""
        self._app = app
        self._requests = requests
        self._require_room = require_room

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in ANSWERS:
            await self._app(scope, receive, send)
            return
        with self._requests.serve(tracked(scope)):
            try:
                self._require_room()
            except QueueFull as error:
                response = await on_error(Request(scope), error)
                await response(scope, receive, send)
            else:
                await self._app(scope, receive, send)


def _id(headers: Headers) -> str:
    given = headers.get(REQUEST_ID, "")
    return given if _ID.fullmatch(given) else f"req-{secrets.token_hex(8)}"


def _log(method: str, request: InFlight) -> None:
    answers = method == "POST" and request.path in ANSWERS and request.status not in REFUSED
    level = logging.INFO if answers else logging.DEBUG
    if log.isEnabledFor(level):
        log.log(level, "%s", describe(method, request))


def describe(method: str, request: InFlight) -> str:
    """Describe an ended request in one line. Text of clients is only in ``error``, as JSON."""
    ended_s = request.ended_s or time.monotonic()
    parts = [f"{request.id} {method} {_shown(request.path)} {request.status} for {request.client}"]
    if request.key:
        parts.append(f"key {request.key}")
    if request.model:
        cached = f" ({request.cached_tokens} cached)" if request.cached_tokens else ""
        parts.append(
            f"{request.model}: {request.prompt_tokens} prompt tokens{cached}, "
            f"{request.answer_tokens} tokens"
        )
    if request.started_s is not None:
        parts.append(f"waited {request.started_s - request.arrived_s:.3f} s")
    if request.first_s is not None:
        parts.append(f"first token after {request.first_s - request.arrived_s:.3f} s")
    if request.token_s:
        parts.append(f"{1 / request.token_s:.1f} tokens/s")
    parts.append(f"took {ended_s - request.arrived_s:.3f} s")
    if request.error:
        parts.append(f"error: {_shown(request.error)}")
    return "; ".join(parts)


def _shown(text: str) -> str:
    """Text on one line, without control characters, and not too long."""
    return clean_text(text, 300)
