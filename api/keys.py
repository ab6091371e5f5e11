"""Lets only requests with an API key pass, where keys are needed.

They are needed once a key was made, and always where HTTP listens beyond this machine. A proxy on
this machine makes strangers look local, so an address alone never admits anybody.
"""

from __future__ import annotations

import logging

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from api.common import error_response, tracked
from api.key_book import KeyBook
from coordinator.serving.urgency import urgency_named
from wire.rare_log import RareLog

log = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/", "/health", "/health/live", "/favicon.ico"})
OPEN_FOLDER = "/page/"
"""Paths that need no key: the page without any data, and whether the coordinator serves."""

KEY = "shoal.key"
"""Where an ASGI scope has the name of its key."""

STILL_KNOWN = "shoal.key.still_known"
"""Where it has a function that says whether the key is still known. Streams without end ask it."""

MOST_CHARACTERS = 512
"""Longer keys are not looked at."""


class KeyGuard:
    """ASGI middleware that answers 401 to requests without a known key."""

    def __init__(self, app: ASGIApp, keys: KeyBook, *, beyond: bool) -> None:
        """Guard ``app``. ``beyond``: HTTP listens beyond this machine."""
        self._app = app
        self._keys = keys
        self._beyond = beyond
        self._rare_log = RareLog(log, most=5)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._needs_key(scope["path"]):
            given = given_key(Headers(scope=scope))
            known = self._keys.known(given) if given else None
            if known is None:
                await self._refuse(scope, given)(scope, receive, send)
                return
            request = tracked(scope)
            request.key = scope[KEY] = known.name
            scope[STILL_KNOWN] = lambda: self._keys.known(given) is not None
            request.most_urgent = urgency_named(known.urgency)
        await self._app(scope, receive, send)

    def _needs_key(self, path: str) -> bool:
        is_open = path in OPEN_PATHS or path.startswith(OPEN_FOLDER)
        return not is_open and (self._beyond or self._keys.exists)

    def _refuse(self, scope: Scope, given: str) -> JSONResponse:
        message = self._reason(given)
        client = scope["client"][0] if scope.get("client") else "a client"
        self._rare_log.warning("key", "%s was refused: %s", client, message)
        body = {
            "message": message,
            "type": "invalid_request_error",
            "param": None,
            "code": "invalid_api_key",
        }
        return error_response(scope["path"], 401, body, {"WWW-Authenticate": "Bearer"})

    def _reason(self, given: str) -> str:
        how = (
            "send it as `Authorization: Bearer KEY` (the shoal command takes it from SHOAL_API_KEY)"
        )
        make = "`shoal key create NAME` on the coordinator's machine makes one"
        if given:
            return f"this API key is not known here, or was revoked: {make}"
        if self._keys.exists:
            return f"an API key is needed: {how}; {make}"
        return (
            "an API key is needed, because this coordinator listens beyond its own machine: "
            f"{make}; {how}. To do without keys, start the coordinator with --insecure-http"
        )


def given_key(headers: Headers) -> str:
    """The key that a request shows, or an empty text."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        key = headers.get("x-api-key", "")
    key = key.strip()
    return key if len(key) <= MOST_CHARACTERS else ""
