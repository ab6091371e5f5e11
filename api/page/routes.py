"""The routes of the page: its files, the state of the shoal, and the line that joins a device."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from api.common import read_json
from api.keys import KEY, STILL_KNOWN
from api.page.files import HEADERS, read_files
from api.page.state import MOST_WATCHERS, StateFeed
from api.page.users import End, user_of
from coordinator.config import CoordinatorConfig
from coordinator.roster.book import BadBook
from wire.addresses import is_everywhere, is_loopback, reachable_addresses

EVENTS = "text/event-stream"

FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip", "via")
"""Headers of proxies. A proxy on this machine makes strangers look local."""


class PageRoutes:
    """Route handlers of the page at ``/``."""

    def __init__(
        self,
        config: CoordinatorConfig,
        feed: StateFeed,
        invite: Callable[[], Awaitable[str]] | None = None,
        user_of: Callable[[End, End], int | None] = user_of,
    ) -> None:
        """Take what the routes need.

        invite: makes a token for one device. It may raise BadBook, OSError. None with --insecure.
        user_of: tells which user of this machine a connection comes from.
        """
        self._invite = invite
        self._user_of = user_of
        self._config = config
        self._feed = feed
        self._files = read_files()

    def routes(self) -> list[Route]:
        return [
            Route("/", self.index, methods=["GET"]),
            Route("/page/{path:path}", self.file, methods=["GET"]),
            Route("/shoal/v1/state", self.state, methods=["GET"]),
            Route("/shoal/v1/join", self.join, methods=["POST"]),
        ]

    async def index(self, request: Request) -> Response:
        return self._send(request, "index.html")

    async def file(self, request: Request) -> Response:
        return self._send(request, request.path_params["path"])

    def _send(self, request: Request, path: str) -> Response:
        """Answer one of the files that were read at the start. There are no others to reach."""
        found = self._files.get(path)
        if found is None:
            raise HTTPException(404, "the page has no such file")
        headers = {**HEADERS, "ETag": found.tag}
        if found.tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(found.content, headers=headers, media_type=found.media_type)

    async def state(self, request: Request) -> Response:
        """The state as JSON, or followed as server-sent events by clients that accept them."""
        if EVENTS not in request.headers.get("accept", ""):
            return JSONResponse(self._feed.state())
        if not self._feed.has_room:
            raise HTTPException(503, f"{MOST_WATCHERS} pages are open already: close one")
        return StreamingResponse(
            self._feed.stream(request.scope.get(STILL_KNOWN, lambda: True)),
            media_type=EVENTS,
            headers={"Cache-Control": "no-store"},
        )

    async def join(self, request: Request) -> Response:
        """The addresses where agents join, and a new token for those who ask and may have it.

        These are holders of an API key. Without one, they are the coordinator's own user and root,
        who can make tokens in its state directory.
        """
        wants_token = (await read_json(request)).get("token") is True
        config = self._config
        hosts = await asyncio.to_thread(reachable_addresses, config.control_host)
        others = [host for host in hosts if not is_loopback(host)]
        token = None
        if wants_token and self._invite and (request.scope.get(KEY) or self._is_own(request)):
            try:
                token = await self._invite()
            except (BadBook, OSError) as error:
                raise HTTPException(500, f"no token can be made: {error}") from error
        return JSONResponse(
            {
                "hosts": others if is_everywhere(config.control_host) else list(hosts),
                "port": self._feed.control_port,
                "token": token,
            }
        )

    def _is_own(self, request: Request) -> bool:
        """Whether the client runs here as root or as the coordinator's user, without a proxy."""
        client, server = request.client, request.scope.get("server")
        if client is None or server is None or not is_loopback(client.host):
            return False
        if any(name in request.headers for name in FORWARDED):
            return False
        return self._user_of((client.host, client.port), (server[0], server[1])) in (
            0,
            os.geteuid(),
        )
