"""The coordinator: all its parts, control connections and block downloads, in one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from functools import partial
from typing import Any

from coordinator.config import CoordinatorConfig, usable
from coordinator.disk import Disk
from coordinator.errors import CoordinatorError
from coordinator.files.artifacts import ArtifactStore
from coordinator.files.compiled import Makers, Workshop
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
from coordinator.serving.answer import Shortcuts
from coordinator.serving.encoding import Encoders
from coordinator.serving.gateway import Gateway
from coordinator.serving.journal import AnswerJournal
from coordinator.serving.kept_answers import KeptAnswers
from coordinator.serving.standstills import Standstills
from coordinator.story import Story
from model.errors import ModelError
from wire import admission, limits
from wire.async_connection import AsyncConnection, serve
from wire.chunks import file_chunks
from wire.claim import Claim, Fingerprint
from wire.errors import AuthFailed, ProtocolError, VersionMismatch, WireError
from wire.hygiene import clean
from wire.identity import own_identity
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
from wire.transport import reason

log = logging.getLogger(__name__)

FIRST_MESSAGES = {
    AgentHello: limits.MAX_AGENT_HELLO_BYTES,
    BlocksHello: limits.MAX_HELLO_BYTES,
}
"""The messages that an agent's connection may begin with, and the largest header of each."""

OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

DOWNLOAD_IDLE_S = 120.0
"""The time that an agent may take between two blocks. It may write them to a slow card."""


class Coordinator:
    """Everything of a coordinator but its HTTP, which the package api puts over these parts."""

    def __init__(
        self,
        config: CoordinatorConfig,
        say: Callable[[str], None],
        service: ServiceManager | None = None,
        makers: Makers | None = None,
    ) -> None:
        """Make its parts. ``prepare`` makes their files, and ``running`` starts them.

        say: shows the user one line.
        makers: make files for backends on this machine.
        """
        self.config = config
        self._say = say
        self.service = service or ServiceManager()
        self._store = ArtifactStore(config.state_dir, config.storage_bytes)
        self.story = Story()
        self._book = None if config.insecure else DeviceBook(config.state_dir)
        self._disk = disk = Disk()
        names = NameBook(config.state_dir, disk)
        self.roster = Roster(config.cluster, names, self.story, self._book, disk)
        self.models, self.turns = Models(self.story), Turns()
        self.turns.settle = disk.flush
        self.models.progress = lambda: self.turns.progress
        self.operations = Operations(
            self.roster, self._store, QualityStore(config.state_dir), self.models, self.turns
        )
        self._keeper = Keeper(
            self.roster,
            self.models,
            self.turns,
            self.operations,
            LoadedFile(config.state_dir, disk),
            config.recovery_wait_s,
        )
        self._paces = Paces(self.roster, self.models, self.story)
        self._stalls = Stalls(self.roster, self.models)
        self._rebalancer = Rebalancer(
            self.roster, self.models, self.turns, self.operations, self.story
        )
        self.gateway = Gateway(
            self.roster,
            self.models,
            Shortcuts(config.prefix_cache, config.drafts),
            KeptAnswers(config.answer_cache_bytes),
            AnswerJournal(config.state_dir / "answers"),
        )
        self.operations.mover.warm = self.gateway.warm
        self._standstills = Standstills(self.roster, self.models, self.gateway)
        self.encoders = Encoders(self.roster, self.models)
        self._workshop = Workshop(self._store, self.roster, config.state_dir, makers)
        self._answerer: Answerer | None = None
        self._control: asyncio.Server | None = None
        self._idle_downloads = Lobby("downloads of blocks")
        self._rare_log = RareLog(log)

    @property
    def fingerprint(self) -> Fingerprint | None:
        """The fingerprint of its key, once it is prepared. None with --insecure."""
        return None if self._answerer is None else self._answerer.identity.fingerprint

    def prepare(self) -> None:
        """Make what the state directory must have. Raises ConfigError, IdentityError."""
        with usable(self.config.state_dir):
            self._store.prepare()
            self._workshop.prepare()
        self._answerer = self._own_answerer()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[int]:
        """Serve agents at the port that it yields, until the block ends.

        ``stop`` may leave them earlier. Raises wire.errors.ConnectFailed.
        """
        config = self.config
        asyncio.get_running_loop().set_exception_handler(self._on_loop_error)
        self._control, port = await serve(
            config.control_host,
            config.control_port,
            self._handle,
            answerer=self._answerer,
            executor=self._disk.executor,
        )
        async with self._advertised(port, self.fingerprint):
            self._keeper.resume()
            tasks = self._tasks()
            try:
                yield port
            finally:
                for task in tasks:
                    task.cancel()
                self.service.stopping()
                self.stop()
                self._disk.close()

    def stop(self) -> None:
        """Leave all agents, and end what waits for them. A second call does nothing."""
        # The order matters, because a dropped agent tries to join again at once.
        # Connections are not awaited: each lasts as long as its other end likes.
        if self._control is not None:
            self._control.close()
        self._keeper.close()
        self.roster.close()

    def _tasks(self) -> list[asyncio.Task[None]]:
        """Start the tasks that run until the coordinator stops."""
        tasks = [
            _endless(self._attend()),
            _endless(self._follow_book()),
            _endless(self._keeper.watch_links()),
            _endless(self._keeper.watch_use()),
        ]
        if self.config.rebalances:
            tasks.append(_endless(self._rebalancer.follow()))
        return tasks

    def _own_answerer(self) -> Answerer | None:
        """Return what agents must show. Raises IdentityError."""
        if self._book is None:
            return None
        identity = own_identity(self.config.identity_path)
        purposes: frozenset[Purpose] = frozenset(("control", "blocks"))
        return Answerer(identity, COORDINATOR, purposes, self._book.admit)

    def inviting(self) -> Callable[[], Awaitable[str]] | None:
        """Return what makes a token for one device, or None with --insecure."""
        book, fingerprint = self._book, self.fingerprint
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
                for name, state in self.models.present()
            ]
            self.service.status(
                f"cluster {self.config.cluster!r}: {count} agent{'s' * (count != 1)}, "
                + ("; ".join(present) or "no model")
            )
            self.service.alive()
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
        if not self.config.advertise:
            yield
            return
        from wire.discovery import Advertisement, DiscoveryUnavailable  # With zeroconf.

        loop = asyncio.get_running_loop()
        advertisement = Advertisement(
            self.config.cluster,
            f"shoal-{self.config.cluster}-{port}",
            self.config.control_host,
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
        cluster, where = self.config.cluster, f"{other.host}:{other.port}"
        self.story.tell("second coordinator", cluster, f"at {where}")
        log.warning(
            "another coordinator of cluster %r answers at %s: agents that search by mDNS may join "
            "either of them; stop one, or give it another --cluster",
            cluster,
            where,
        )

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
                chunks = file_chunks(path, offset, request.end)
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


def _require_introduced(hello: Message, claim: Claim | None) -> None:
    """Raise ProtocolError if the caller has introduced itself otherwise than its hello says."""
    if claim is None:
        return
    purpose = "control" if isinstance(hello, AgentHello) else "blocks"
    device = hello.device if isinstance(hello, AgentHello | BlocksHello) else ""
    if (claim.purpose, claim.device) != (purpose, device):
        raise ProtocolError("it has introduced itself as another device, or for something else")
