"""The coordinator process: control connections, block downloads, and HTTP, in one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from coordinator.config import ConfigError, CoordinatorConfig
from coordinator.disk import Disk
from coordinator.errors import CoordinatorError
from coordinator.files.artifacts import ArtifactStore
from coordinator.files.compiled import Makers, Workshop
from coordinator.http.admin import AdminRoutes
from coordinator.http.common import HANDLERS
from coordinator.http.document import document_routes
from coordinator.http.guard import HostGuard, guarded_protocol
from coordinator.http.health import HealthRoutes
from coordinator.http.keys import KeyGuard
from coordinator.http.metrics import Metrics
from coordinator.http.openai.encoders import EncoderRoutes
from coordinator.http.openai.routes import OpenAIRoutes
from coordinator.http.openai.texts import TextRoutes
from coordinator.http.page.routes import PageRoutes
from coordinator.http.page.state import StateFeed
from coordinator.http.tls import HttpTls, encrypted_protocol, http_tls
from coordinator.http.traces import TraceRoutes
from coordinator.http.tracking import REQUEST_ID, Answering, Tracking
from coordinator.keys import KeyBook
from coordinator.loading.keeper import Keeper
from coordinator.loading.models import Models
from coordinator.loading.operations import Operations
from coordinator.loading.paces import Paces
from coordinator.loading.rebalancing import Rebalancer
from coordinator.loading.recovery import LoadedFile
from coordinator.loading.stalls import Stalls
from coordinator.loading.state import Serving, describe
from coordinator.loading.turns import Turns
from coordinator.quality.store import QualityStore
from coordinator.roster.book import DeviceBook
from coordinator.roster.holders import holders
from coordinator.roster.members import Roster
from coordinator.roster.names import NameBook
from coordinator.serving.admission import Admission
from coordinator.serving.encoding import Encoders
from coordinator.serving.gateway import Gateway, Shortcuts
from coordinator.serving.journal import AnswerJournal
from coordinator.serving.kept_answers import KeptAnswers
from coordinator.serving.requests import Requests
from coordinator.serving.standstills import Standstills
from coordinator.story import Story
from model.errors import ModelError
from wire import admission, limits
from wire.async_connection import ACCEPT_AT_ONCE, AsyncConnection, serve
from wire.chunks import file_chunks
from wire.claim import Claim, Fingerprint
from wire.errors import AuthFailed, ProtocolError, VersionMismatch, WireError
from wire.hygiene import clean
from wire.identity import IdentityError, own_identity
from wire.introduction import COORDINATOR, Answerer, Purpose
from wire.lobby import Lobby
from wire.messages import (
    AgentHello,
    BlockDamaged,
    BlocksHeld,
    BlocksHello,
    Done,
    Endpoint,
    FetchBlock,
    FilesMade,
    FindHolders,
    Heartbeat,
    MakeFiles,
    Message,
    RequestFailed,
)
from wire.rare_log import RareLog
from wire.service import ServiceManager
from wire.transport import BACKLOG, bind, reason, tune

log = logging.getLogger(__name__)

FIRST_MESSAGES = {
    AgentHello: limits.MAX_AGENT_HELLO_BYTES,
    BlocksHello: limits.MAX_HELLO_BYTES,
}
"""The messages that an agent's connection may begin with, and the largest header of each."""

MOST_HTTP_WAITING = 128
MOST_HTTP_OF_ONE = 96
"""The most HTTP connections without a whole request: in total, and of one address.

Clients keep some open between two requests."""

CLIENT_STALL_S = 60.0
"""An HTTP client that reads nothing of its answer for so long is dropped."""

OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

DOWNLOAD_IDLE_S = 120.0
"""The time that an agent may take between two blocks. It may write them to a slow card."""


@dataclass(frozen=True, slots=True)
class Ready:
    """Where a started coordinator can be reached."""

    control_port: int
    http_host: str
    http_port: int


class Coordinator:
    """Everything the coordinator process runs."""

    def __init__(
        self,
        config: CoordinatorConfig,
        say: Callable[[str], None],
        service: ServiceManager | None = None,
        makers: Makers | None = None,
    ) -> None:
        """Make its parts. ``run`` starts them.

        say: shows the user one line.
        makers: make files for backends on this machine.
        """
        self._config = config
        self._say = say
        self._service = service or ServiceManager()
        self._store = ArtifactStore(config.state_dir, config.storage_bytes)
        self._story = Story()
        self._book = None if config.insecure else DeviceBook(config.state_dir)
        self._disk = disk = Disk()
        names = NameBook(config.state_dir, disk)
        self.roster = Roster(config.cluster, names, self._story, self._book, disk)
        self._models, turns = Models(self._story), Turns()
        turns.settle = disk.flush
        self._models.progress = lambda: turns.progress
        self._operations = Operations(
            self.roster, self._store, QualityStore(config.state_dir), self._models, turns
        )
        self._keeper = Keeper(
            self.roster,
            self._models,
            turns,
            self._operations,
            LoadedFile(config.state_dir, disk),
            config.recovery_wait_s,
        )
        self._paces = Paces(self.roster, self._models, self._story)
        self._stalls = Stalls(self.roster, self._models)
        self._rebalancer = Rebalancer(
            self.roster, self._models, turns, self._operations, self._story
        )
        self._gateway = Gateway(
            self.roster,
            self._models,
            Shortcuts(config.prefix_cache, config.drafts),
            KeptAnswers(config.answer_cache_bytes),
            AnswerJournal(config.state_dir / "answers"),
        )
        self._operations.mover.warm = self._gateway.warm
        self._standstills = Standstills(self.roster, self._models, self._gateway)
        self._encoders = Encoders(self.roster, self._models)
        self._requests = Requests()
        self._feed = StateFeed(
            config, self.roster, self._models, turns, self._requests, self._story
        )
        self._admission = Admission(self._models, self._requests, config.most_waiting)
        self._keys = KeyBook(config.state_dir)
        self._workshop = Workshop(self._store, self.roster, config.state_dir, makers)
        self._idle_downloads = Lobby("downloads of blocks")
        self._rare_log = RareLog(log)

    async def run(self, on_ready: Callable[[Ready], None]) -> None:
        """Serve until interrupted. Raises ConfigError, wire.errors.ConnectFailed."""
        config = self._config
        self._prepare()
        asyncio.get_running_loop().set_exception_handler(self._on_loop_error)
        answerer = self._answerer()
        fingerprint = None if answerer is None else answerer.identity.fingerprint
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
            control, control_port = await serve(
                config.control_host,
                config.control_port,
                self._handle,
                answerer=answerer,
                executor=self._disk.executor,
            )
            self._feed.control_port = control_port
            ready = Ready(control_port, config.http_host, http_socket.getsockname()[1])
            async with self._advertised(control_port, fingerprint):

                def on_started() -> None:
                    http_socket.listen(BACKLOG)
                    self._service.ready()
                    on_ready(ready)

                def on_stop() -> None:
                    # The order matters, because a dropped agent tries to join again at once.
                    # Connections are not awaited: each lasts as long as its other end likes.
                    control.close()
                    self._keeper.close()
                    self.roster.close()
                    self._feed.close()

                self._keeper.resume()
                tasks = self._tasks()
                try:
                    # A task of its own, because uvicorn raises the signal that stopped it again.
                    # So the signal ends this await, and not the first one of the cleaning up.
                    await asyncio.ensure_future(
                        _serve_http(self._app(fingerprint), http_socket, tls, on_started, on_stop)
                    )
                finally:
                    for task in tasks:
                        task.cancel()
                    self._service.stopping()
                    on_stop()
                    self._disk.close()

    def _prepare(self) -> None:
        """Make what the state directory must have. Raises ConfigError."""
        try:
            self._store.prepare()
            self._keys.make_local()
        except OSError as error:
            raise ConfigError(
                f"state directory {self._config.state_dir} is not usable: {error.strerror}"
            ) from error

    def _tasks(self) -> list[asyncio.Task[None]]:
        """Start the tasks that run until the coordinator stops."""
        tasks = [
            _endless(self._attend()),
            _endless(self._follow_book()),
            _endless(self._keeper.watch_links()),
            _endless(self._keeper.watch_use()),
        ]
        if self._config.rebalances:
            tasks.append(_endless(self._rebalancer.follow()))
        return tasks

    def _answerer(self) -> Answerer | None:
        """Return what agents must show. Raises ConfigError."""
        if self._book is None:
            return None
        try:
            identity = own_identity(self._config.identity_path)
        except IdentityError as error:
            raise ConfigError(str(error)) from error
        purposes: frozenset[Purpose] = frozenset(("control", "blocks"))
        return Answerer(identity, COORDINATOR, purposes, self._book.admit)

    def _inviting(self, fingerprint: Fingerprint | None) -> Callable[[], Awaitable[str]] | None:
        """Return what makes a token for one device, or None with --insecure."""
        book = self._book
        if book is None or fingerprint is None:
            return None

        async def invite() -> str:
            return (await self._disk.run(partial(book.invite, fingerprint))).text

        return invite

    async def _attend(self) -> None:
        """Tell the service manager that the event loop runs, and what it serves."""
        while True:
            count = len(self.roster.members)
            present = [
                name if isinstance(state, Serving) else f"{name}, {describe(state)}"
                for name, state in self._models.present()
            ]
            self._service.status(
                f"cluster {self._config.cluster!r}: {count} agent{'s' * (count != 1)}, "
                + ("; ".join(present) or "no model")
            )
            self._service.alive()
            await asyncio.sleep(limits.HEARTBEAT_S)

    async def _follow_book(self) -> None:
        """See which devices may join. Other programs change the file, and a disk may be slow."""
        while True:
            await self.roster.tell_known()
            await asyncio.sleep(limits.HEARTBEAT_S)

    def _on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log in one line a lack of resources: asyncio accepts again after a second."""
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in OUT_OF_RESOURCES:
            self._rare_log.warning("accept", "cannot accept connections: %s", reason(error))
        else:
            loop.default_exception_handler(context)

    @contextlib.asynccontextmanager
    async def _advertised(self, port: int, fingerprint: Fingerprint | None) -> AsyncIterator[None]:
        """Announce by mDNS in the background: it takes seconds, and joining does not need it."""
        if not self._config.advertise:
            yield
            return
        from wire.discovery import Advertisement, DiscoveryUnavailable  # With zeroconf.

        loop = asyncio.get_running_loop()
        advertisement = Advertisement(
            self._config.cluster,
            f"shoal-{self._config.cluster}-{port}",
            self._config.control_host,
            port,
            fingerprint,
            lambda other: loop.call_soon_threadsafe(self._tell_of_other, other),
        )

        async def announce() -> None:
            try:
                await asyncio.to_thread(advertisement.__enter__)
            except DiscoveryUnavailable as error:
                self._say(f"{error}; agents need --coordinator HOST:{port}")

        task = asyncio.create_task(announce())
        try:
            yield
        finally:
            await asyncio.shield(task)
            await asyncio.to_thread(advertisement.__exit__, None, None, None)

    def _tell_of_other(self, other: Endpoint) -> None:
        """Tell of another coordinator of this cluster."""
        cluster, where = self._config.cluster, f"{other.host}:{other.port}"
        self._story.tell("second coordinator", cluster, f"at {where}")
        log.warning(
            "another coordinator of cluster %r answers at %s: agents that search by mDNS may join "
            "either of them; stop one, or give it another --cluster",
            cluster,
            where,
        )

    def _app(self, fingerprint: Fingerprint | None) -> ASGIApp:
        admin = AdminRoutes(
            self._config.cluster, self.roster, self._operations, self._models, self._story
        )
        openai = OpenAIRoutes(self._models, self._gateway, self._admission.require_room)
        texts = TextRoutes(self._models, openai)
        encoders = EncoderRoutes(self._models, openai, self._encoders)
        page = PageRoutes(self._config, self._feed, self._inviting(fingerprint))
        health = HealthRoutes(self._models, self._requests)
        metrics = Metrics(self.roster, self._models, self._requests)
        traces = TraceRoutes(self._models, self._requests)
        routes = Starlette(
            routes=[
                *openai.routes(),
                *texts.routes(),
                *encoders.routes(),
                *document_routes(),
                *admin.routes(),
                *health.routes(),
                *metrics.routes(),
                *traces.routes(),
                *page.routes(),
            ],
            exception_handlers=HANDLERS,
        )
        app = Answering(routes, self._requests, self._admission.require_room)
        return guarded(app, self._config, self._keys)

    async def _handle(self, connection: AsyncConnection) -> None:
        """Serve one incoming connection: an agent's control connection, or a block download."""
        try:
            hello = await connection.receive_hello(FIRST_MESSAGES)
            _require_introduced(hello, connection.claim)
            connection.admit = admission.report
            if isinstance(hello, AgentHello):
                await self.roster.serve(hello, connection)
            elif isinstance(hello, BlocksHello):
                with self.roster.beside(connection):
                    await self._serve_files(hello.device, connection)
        except AuthFailed as error:
            cause = error.refusal or "refused"
            self._rare_log.warning(cause, "connection refused: %s", error)
        except VersionMismatch:
            raise  # wire.async_connection.serve knows whether it was told before.
        except ProtocolError as error:
            cause = type(error).__name__
            self._rare_log.warning(cause, "connection from %s dropped: %s", connection.peer, error)
        except WireError as error:
            log.info("connection dropped: %s", error)
        except (OSError, CoordinatorError) as error:
            self._rare_log.warning("files", "no files for %s: %s", connection.peer, error)

    async def _serve_files(self, device: str, connection: AsyncConnection) -> None:
        """Send files that an agent asks for, or make them, until the connection ends."""
        while True:
            # An idle connection may be closed to make room for others.
            self._idle_downloads.enter(connection, connection.peer_host, connection.close)
            try:
                request = clean((await connection.receive(DOWNLOAD_IDLE_S))[0])
            finally:
                self._idle_downloads.leave(connection)
            match request:
                case MakeFiles():
                    await self._workshop.serve(device, request, connection)
                case FilesMade():
                    await self._workshop.take(device, request, connection)
                case BlockDamaged():
                    await self._repair(request, connection)
                case FindHolders():
                    found = await holders(self.roster, device, request.sha256s)
                    await connection.send(BlocksHeld(found))
                case FetchBlock():
                    if not await self._send(request, connection):
                        self._rare_log.warning(
                            "block", "%s asked for a block that does not exist", connection.peer
                        )
                        return
                case _:
                    raise ProtocolError(
                        f"unexpected {type(request).__name__} on a connection of files"
                    )

    async def _send(self, request: FetchBlock, connection: AsyncConnection) -> bool:
        """Send an artifact's bytes. Returns False if there is no such artifact.

        An unreadable artifact is made again with the same bytes. Raises OSError, MakingFailed.
        """
        offset, store = request.offset, self._store
        for is_last in (False, True):
            path = store.path(request.sha256)
            if path is None and not store.can_make(request.sha256):
                return False
            try:
                if path is None:
                    raise FileNotFoundError(request.sha256)
                chunks = file_chunks(path, offset)
                while (chunk := await asyncio.to_thread(next, chunks, None)) is not None:
                    await connection.send(*chunk)
                    offset = chunk[0].offset + len(chunk[1])
                break
            except OSError:
                if is_last:
                    raise
                await asyncio.to_thread(store.repair, request.sha256)
        return True

    async def _repair(self, damaged: BlockDamaged, connection: AsyncConnection) -> None:
        """Check a file that did not arrive whole, and make it again if it is damaged."""
        repairing = asyncio.ensure_future(asyncio.to_thread(self._store.repair, damaged.sha256))
        while not repairing.done():
            await connection.send(Heartbeat())
            await asyncio.wait({repairing}, timeout=limits.HEARTBEAT_S)
        try:
            repairing.result()
        except (CoordinatorError, ModelError, OSError) as error:
            await connection.send(RequestFailed(0, str(error)))
        else:
            await connection.send(Done(0))


def _endless(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Run work that should not end before the coordinator. If it fails, the log says so at once."""

    def ended(task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.error("a part of the coordinator has ended: restart it", exc_info=error)

    task = asyncio.create_task(work)
    task.add_done_callback(ended)
    return task


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


def _require_introduced(hello: Message, claim: Claim | None) -> None:
    """Raise ProtocolError if the caller has introduced itself otherwise than its hello says."""
    if claim is None:
        return
    purpose = "control" if isinstance(hello, AgentHello) else "blocks"
    device = hello.device if isinstance(hello, AgentHello | BlocksHello) else ""
    if (claim.purpose, claim.device) != (purpose, device):
        raise ProtocolError("it has introduced itself as another device, or for something else")


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
        log_level="critical",  # coordinator.http.common.HANDLERS report errors once.
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=2,
        http=guarded_protocol(lobby) if tls is None else encrypted_protocol(lobby, tls),
        ws="none",
        backlog=ACCEPT_AT_ONCE,
    )
    await _Server(config, on_started, on_stop).serve(sockets=[http_socket])
