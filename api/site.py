"""The HTTP side of a coordinator: its routes, the checks before them, and the server of both."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass

import uvicorn
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from api.admin import AdminRoutes
from api.anthropic.routes import AnthropicRoutes
from api.common import HANDLERS
from api.document import document_routes
from api.guard import HostGuard, guarded_protocol
from api.health import HealthRoutes
from api.key_book import KeyBook
from api.keys import KeyGuard
from api.metrics import Metrics
from api.openai.encoders import EncoderRoutes
from api.openai.routes import OpenAIRoutes
from api.openai.texts import TextRoutes
from api.page.routes import PageRoutes
from api.page.state import StateFeed
from api.tls import HttpTls, encrypted_protocol, http_tls
from api.traces import TraceRoutes
from api.tracking import REQUEST_ID, Answering, Tracking
from coordinator.config import CoordinatorConfig, usable
from coordinator.server import Coordinator
from coordinator.serving.admission import Admission
from coordinator.serving.requests import Requests
from wire.async_connection import ACCEPT_AT_ONCE
from wire.lobby import Lobby
from wire.transport import BACKLOG, bind, tune

MOST_HTTP_WAITING = 128
MOST_HTTP_OF_ONE = 96
"""The most HTTP connections without a whole request: in total, and of one address.

Clients keep some open between two requests."""

CLIENT_STALL_S = 60.0
"""An HTTP client that reads nothing of its answer for so long is dropped."""


@dataclass(frozen=True, slots=True)
class Ready:
    """Where a started coordinator can be reached."""

    control_port: int
    http_host: str
    http_port: int


class Site:
    """A coordinator's HTTP, which runs as long as the coordinator does."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._config = config = coordinator.config
        self._requests = Requests()
        self._feed = StateFeed(
            config,
            coordinator.roster,
            coordinator.models,
            coordinator.turns,
            self._requests,
            coordinator.story,
        )
        self._admission = Admission(coordinator.models, self._requests, config.most_waiting)
        self._keys = KeyBook(config.state_dir)

    async def run(self, on_ready: Callable[[Ready], None]) -> None:
        """Serve agents and clients until interrupted.

        Raises ConfigError, wire.identity.IdentityError, wire.errors.ConnectFailed.
        """
        config, coordinator = self._config, self._coordinator
        coordinator.prepare()
        with usable(config.state_dir):
            self._keys.make_local()
        tls = (
            http_tls(config.http_cert, config.http_key, config.identity_path)
            if config.http_tls
            else None
        )
        http_socket = bind(config.http_host, config.http_port)
        # Accepted connections inherit this. The answer to a client that is dead or reads nothing
        # would hold a KV slot for ever.
        tune(http_socket, CLIENT_STALL_S)
        with http_socket:
            async with coordinator.running() as control_port:
                self._feed.control_port = control_port
                ready = Ready(control_port, config.http_host, http_socket.getsockname()[1])

                def on_started() -> None:
                    http_socket.listen(BACKLOG)
                    coordinator.service.ready()
                    on_ready(ready)

                try:
                    # A task of its own, because uvicorn raises the signal that stopped it again.
                    # So the signal ends this await, and not the first one of the cleaning up.
                    await asyncio.ensure_future(
                        _serve_http(self._app(), http_socket, tls, on_started, self._stop)
                    )
                finally:
                    self._feed.close()

    def _stop(self) -> None:
        """End what requests wait for."""
        self._coordinator.stop()
        self._feed.close()

    def _app(self) -> ASGIApp:
        parts, models, requests = self._coordinator, self._coordinator.models, self._requests
        openai = OpenAIRoutes(models, parts.gateway, self._admission.require_room)
        texts = TextRoutes(models, openai)
        admin = AdminRoutes(
            self._config.cluster, parts.roster, parts.operations, models, parts.story
        )
        routes = Starlette(
            routes=[
                *openai.routes(),
                *texts.routes(),
                *AnthropicRoutes(openai, texts).routes(),
                *EncoderRoutes(models, openai, parts.encoders).routes(),
                *document_routes(),
                *admin.routes(),
                *HealthRoutes(models, requests).routes(),
                *Metrics(parts.roster, models, requests).routes(),
                *TraceRoutes(models, requests).routes(),
                *PageRoutes(self._config, self._feed, parts.inviting()).routes(),
            ],
            exception_handlers=HANDLERS,
        )
        app = Answering(routes, requests, self._admission.require_room)
        return guarded(app, self._config, self._keys)


def guarded(app: ASGIApp, config: CoordinatorConfig, keys: KeyBook) -> ASGIApp:
    """Put all checks of a request before ``app``. The last one here sees it first."""
    if not config.insecure_http:
        app = KeyGuard(app, keys, beyond=config.beyond)
    if config.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=config.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=(REQUEST_ID, "retry-after"),
        )
    names = (*config.http_hosts, config.http_host)
    return Tracking(HostGuard(app, names, config.cors_origins))


class _Server(uvicorn.Server):
    """A uvicorn server that tells when it accepts requests, and when it begins to stop."""

    def __init__(
        self, config: uvicorn.Config, on_started: Callable[[], None], on_stop: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._on_started = on_started
        self._on_stop = on_stop

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._on_stop()  # First, so that requests that wait are answered.
        await super().shutdown(sockets)


async def _serve_http(
    app: ASGIApp,
    http_socket: socket.socket,
    tls: HttpTls | None,
    on_started: Callable[[], None],
    on_stop: Callable[[], None],
) -> None:
    lobby = Lobby("HTTP", MOST_HTTP_WAITING, MOST_HTTP_OF_ONE)
    config = uvicorn.Config(
        app,
        log_level="critical",  # api.common.HANDLERS report errors once.
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=2,
        http=guarded_protocol(lobby) if tls is None else encrypted_protocol(lobby, tls),
        ws="none",
        backlog=ACCEPT_AT_ONCE,
    )
    await _Server(config, on_started, on_stop).serve(sockets=[http_socket])
