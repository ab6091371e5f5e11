"""Keeps the agents that have joined. An agent is a member as long as its heartbeats come."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import astuple, dataclass, field, replace
from functools import partial
from typing import TypeVar

from coordinator.disk import Disk
from coordinator.errors import REJOIN, AgentFailed, AgentLost, NoAgents
from coordinator.roster.book import BadBook, Device, DeviceBook
from coordinator.roster.links import Failure, Links
from coordinator.roster.names import NameBook
from coordinator.story import Story
from coordinator.watching import Signal
from model.errors import ModelError
from model.spec import ModelSpec
from planning.problem import NoLink
from wire import hygiene, limits
from wire.addresses import is_loopback, is_shared
from wire.async_connection import AsyncConnection
from wire.claim import Fingerprint
from wire.errors import ProtocolError, WireError
from wire.hygiene import (
    are_plausible,
    clean,
    implausible_gauges,
    implausible_profile,
    is_plausible,
    is_plausible_link,
)
from wire.messages import (
    AgentHello,
    BlocksFetched,
    BlocksFound,
    CancelRequest,
    CoordinatorWelcome,
    DeviceMeasured,
    DevicesKnown,
    Done,
    Endpoint,
    FiguresChanged,
    FilesMade,
    Heartbeat,
    HopMeasured,
    JoinRefused,
    LinkChanged,
    LinkMeasured,
    Message,
    ModelMeasured,
    PassFailed,
    PeerLost,
    Progress,
    PromptScored,
    QualityMeasured,
    RequestFailed,
    SequenceFailed,
    StageBeat,
    StageDamaged,
    StageLoaded,
    TeamMeasured,
    TextsEncoded,
    TokenSampled,
    TraceTaken,
)
from wire.profile import BlockTiming, DeviceProfile, LinkProfile
from wire.rare_log import RareLog

log = logging.getLogger(__name__)

MAX_MEMBERS = 256
"""More devices than anyone has on a shelf. A flood of joins stops here."""

MOST_LINES = 30
"""Lines a minute about lost members. Without a token, anybody may join and leave."""
SIGN_OF_LIFE_S = 2 * limits.HEARTBEAT_S
"""A living agent sends a heartbeat within this time."""

LAST_WORDS_S = 0.25
"""The last message of a dying device arrives within this time."""

LIFE_CHECKS = 4
"""The wait for a sign of life has so many parts. A coordinator that stood still loses one."""

_ANSWERS = (
    ModelMeasured,
    DeviceMeasured,
    LinkMeasured,
    QualityMeasured,
    HopMeasured,
    BlocksFetched,
    BlocksFound,
    FilesMade,
    StageLoaded,
    TeamMeasured,
    TraceTaken,
    Done,
    Progress,
    RequestFailed,
)

_REPORTS = (
    TokenSampled,
    PromptScored,
    SequenceFailed,
    TextsEncoded,
    PassFailed,
    PeerLost,
    StageDamaged,
)
"""The messages that answer no request, for the subscribers of members."""

Answer = TypeVar("Answer", bound=Message)
Result = TypeVar("Result")
OnProgress = Callable[[Progress], None]
OnResult = Callable[[QualityMeasured | HopMeasured], None]


@dataclass(frozen=True, slots=True)
class _Pending:
    """A request that waits for its answer. The callbacks get what comes before the answer."""

    answer: asyncio.Future[Message]
    on_progress: OnProgress | None
    on_result: OnResult | None


@dataclass(slots=True, eq=False)
class Member:
    """A joined agent. ``name`` is unique in the cluster and belongs to ``device``."""

    device: str
    name: str
    version: str
    endpoints: tuple[Endpoint, ...]
    profile: DeviceProfile
    connection: AsyncConnection
    joined_s: float
    """On the monotonic clock."""
    run: str = ""
    """The id of the agent's process, or empty if the agent does not send one."""
    attempt: int = 0
    """Grows with each connection of one run."""
    port: int = 0
    """The port at which it listens on all its addresses. 0 means only at ``endpoints``."""
    advertised: tuple[Endpoint, ...] = ()
    """The endpoints of --advertise, where other agents reach it."""
    kept: dict[int, int] = field(default_factory=dict)
    """The newest sequence of each stage that it has kept for this coordinator, by epoch.

    Stages that were taken over or unloaded are left out.
    """
    told: DevicesKnown | None = None
    """The devices that this one was told it may connect to."""
    memory_available_bytes: int = 0
    load: float = 0.0
    """The share of its processor in use."""
    celsius: float | None = None
    beats: Mapping[int, StageBeat] = field(default_factory=dict)
    """The state of each of its stages in the newest heartbeat, by epoch."""
    lost: AgentLost | None = None
    timings: dict[ModelSpec, dict[int, list[BlockTiming]]] = field(default_factory=dict)
    """The measured block times of each model, by bits."""
    heard: asyncio.Event = field(default_factory=asyncio.Event)
    """Set by each of its messages. A waiter clears it first."""
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    _pending: dict[int, _Pending] = field(default_factory=dict)
    _cancelling: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def is_asked(self) -> bool:
        """Whether it has an open request."""
        return bool(self._pending)

    @property
    def is_here(self) -> bool:
        """Whether it runs on the coordinator's machine."""
        host = self.connection.peer_host
        return is_loopback(host) or host == self.connection.local_host

    def endpoints_for(self, source: Member) -> tuple[Endpoint, ...]:
        """The endpoints where ``source`` may reach this agent, the likeliest first.

        They are those that the agent announces, and its address as this coordinator sees it. For
        an agent on the coordinator's machine, that is the coordinator's own address. Loopback
        addresses are only for an agent on the same machine.
        """
        host = self.connection.peer_host
        if self.is_here:
            host = source.connection.local_host
        seen = [Endpoint(host, self.port)] if self.port and is_shared(host) else []
        found = tuple(dict.fromkeys((*self.advertised, *seen, *self.endpoints)))
        if source.is_here if self.is_here else source.connection.peer_host == host:
            return found
        return tuple(item for item in found if not is_loopback(item.host)) or found

    @property
    def connected_s(self) -> float:
        """The time for which it has been a member."""
        return time.monotonic() - self.joined_s

    async def request(
        self,
        build: Callable[[int], Message],
        expect: type[Answer],
        on_progress: OnProgress | None = None,
        on_result: OnResult | None = None,
    ) -> Answer:
        """Send ``build(request number)``, and wait for the answer.

        on_result: gets the parts of an answer that come before its end.
        The wait has no limit while heartbeats come, because measuring and loading take long.
        Raises AgentFailed, AgentLost.
        """
        if self.lost is not None:
            raise self.lost.with_traceback(None)
        number = next(self._numbers)
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._pending[number] = _Pending(future, on_progress, on_result)
        try:
            await self.send(build(number))
            answer = await future
        except asyncio.CancelledError:
            # Otherwise it would be busy for minutes with a request that nobody waits for.
            task = asyncio.ensure_future(self._cancel(number))
            self._cancelling.add(task)
            task.add_done_callback(self._cancelling.discard)
            raise
        finally:
            self._pending.pop(number, None)
            if future.done() and not future.cancelled():
                future.exception()  # Otherwise asyncio complains that nobody looked at it.
        if isinstance(answer, RequestFailed):
            raise AgentFailed(self.name, answer.reason)
        if not isinstance(answer, expect):
            raise AgentFailed(self.name, f"unexpected answer {type(answer).__name__}")
        return answer

    async def send(self, message: Message) -> None:
        """Send without waiting for an answer. Raises AgentLost."""
        try:
            await self.connection.send(message)
        except WireError as error:
            raise self.lost or AgentLost(self.name, str(error)) from error

    async def lives(self) -> bool:
        """Wait until the agent sends something or is lost. Returns whether it is alive.

        A living agent may have lost its connections to other devices.
        """
        await asyncio.sleep(LAST_WORDS_S)
        self.heard.clear()
        if self.lost is None:
            await self.heard.wait()
        return self.lost is None

    async def _cancel(self, number: int) -> None:
        with contextlib.suppress(AgentLost):
            await self.send(CancelRequest(number))

    def take_figures(self, profile: DeviceProfile) -> None:
        """Store the measured figures of ``profile``, but none of its limits. Raises AgentFailed."""
        wrong = implausible_profile(profile)
        if wrong is not None:
            raise AgentFailed(self.name, f"reported {wrong}")
        self.profile = replace(
            self.profile,
            memory_read_bytes_per_s=profile.memory_read_bytes_per_s,
            disk_write_bytes_per_s=profile.disk_write_bytes_per_s,
            call_s=profile.call_s or self.profile.call_s,
            relay_s=profile.relay_s,
            sum_s=profile.sum_s,
            conditions=profile.conditions,
        )

    def take_better(self, changed: FiguresChanged) -> None:
        """Store figures that the agent measured again by itself, and how much memory it has now.

        Raises AgentFailed.
        Times are stored only for blocks and widths that it was asked for before.
        """
        self.take_figures(changed.profile)
        self.profile = replace(self.profile, memory_bytes=changed.profile.memory_bytes)
        if not all(map(is_plausible, changed.timings)):
            raise AgentFailed(self.name, "reported an impossible time")
        if not changed.spec:
            return
        try:
            known = self.timings.get(ModelSpec.from_dict(changed.spec), {})
        except ModelError as error:
            raise AgentFailed(
                self.name, f"reported times of an impossible model: {error}"
            ) from error
        better = {(item.kind, item.variant, item.bits): item for item in changed.timings}
        for width, timings in known.items():
            known[width] = [
                better.get((item.kind, item.variant, item.bits), item) for item in timings
            ]

    def resolve(self, number: int, answer: Message) -> None:
        """Give an answer, a part of it or progress to the request. Late ones are dropped."""
        pending = self._pending.get(number)
        if pending is None:
            return
        if isinstance(answer, Progress):
            if pending.on_progress is not None:
                pending.on_progress(answer)
        elif isinstance(answer, (QualityMeasured, HopMeasured)):
            if pending.on_result is not None:
                pending.on_result(answer)
        elif not pending.answer.done():
            pending.answer.set_result(answer)

    def fail(self, error: AgentLost) -> None:
        """Mark the agent as lost, and fail every open request."""
        self.lost = error
        self.heard.set()  # Wakes the waiters, since no message will.
        for pending in self._pending.values():
            if not pending.answer.done():
                pending.answer.set_exception(error)


OnEvent = Callable[[Member, Message], None]
OnLost = Callable[[Member, AgentLost], None]


class Roster:
    """All members, and the links between them."""

    def __init__(
        self,
        cluster: str,
        names: NameBook | None = None,
        story: Story | None = None,
        book: DeviceBook | None = None,
        disk: Disk | None = None,
    ) -> None:
        """Without ``names``, names last as long as this roster.

        book: the devices that may join by TLS. None without TLS.
        disk: writes the files of both. None: they are written at once.
        """
        self._disk = disk
        self._book = book
        self._beside: set[AsyncConnection] = set()
        """The connections of devices that carry files."""
        self._tellings: set[asyncio.Task[None]] = set()
        self.names = names or NameBook()
        self._cluster = cluster
        self._story = story or Story()
        self._subscribers: list[tuple[OnEvent, OnLost]] = []
        self._members: dict[str, Member] = {}
        self._links = Links()
        self._closed = False
        self._rare_log = RareLog(log, most=MOST_LINES)
        self.keeps: frozenset[int] = frozenset()
        """The epochs whose stages joining agents keep."""
        self.changed = Signal()
        """Fires when a device joins or is lost, and when a link works again."""

    def subscribe(self, on_event: OnEvent, on_lost: OnLost) -> None:
        """Call ``on_event`` for messages that answer no request, and ``on_lost`` for lost members.

        ``on_event`` may raise ProtocolError for a message that no working agent sends.
        """
        self._subscribers.append((on_event, on_lost))

    @property
    def members(self) -> tuple[Member, ...]:
        """Living members, ordered by name."""
        return tuple(sorted(self._members.values(), key=lambda member: member.name))

    def find(self, device: str) -> Member | None:
        """The living member with this device id."""
        return self._members.get(device)

    def require_members(self) -> tuple[Member, ...]:
        """The living members. Raises NoAgents if there are none."""
        if not self._members:
            raise NoAgents(
                "no agent has joined: start `shoal agent` on each device; where multicast is "
                "blocked, with --coordinator HOST:PORT"
            )
        return self.members

    def link(self, source: Member, target: Member) -> LinkProfile | None:
        """The link as last measured, or None if it was never measured or has failed."""
        return self._links.get((source.device, target.device))

    def link_failure(self, source: Member, target: Member) -> Failure | None:
        """The failure of the link, or None if it works or was never tried."""
        return self._links.failure((source.device, target.device))

    def fail_link(self, source: Member, target: Member, reason: str, *, used: bool = False) -> None:
        """Mark a link as failed. Plans do not use it until it is measured again.

        used: it failed in use, so the way back is measured again too.
        """
        if self.find(source.device) is not source or self.find(target.device) is not target:
            return  # One of them was lost meanwhile, and its links are forgotten.
        if self._links.fail((source.device, target.device), reason, used=used):
            log.warning("no link from %s to %s: %s", source.name, target.name, reason)
            self._story.tell("link failed", f"{source.name} to {target.name}", reason)

    def links_to_measure(
        self, members: Sequence[Member], *, asked: bool = False
    ) -> list[tuple[Member, Member]]:
        """The ordered pairs whose link was never measured, or has failed and is due again.

        asked: a user waits for the best plan.
        """
        return [
            (source, target)
            for source, target in itertools.permutations(members, 2)
            if self._links.is_due((source.device, target.device), asked=asked)
        ]

    def links(self) -> tuple[LinkProfile, ...]:
        """Every working link between living members, ordered by name."""
        return tuple(
            link
            for source in self.members
            for target in self.members
            if (link := self.link(source, target)) is not None
        )

    def failed_links(self) -> tuple[tuple[NoLink, Failure], ...]:
        """Every failed link between living members, ordered by name."""
        return tuple(
            (NoLink(source.name, target.name, failure.reason, _addresses(source, target)), failure)
            for source, target in itertools.permutations(self.members, 2)
            if (failure := self.link_failure(source, target)) is not None
        )

    def links_to_retry(self, failed_before_s: float | None = None) -> list[tuple[Member, Member]]:
        """Failed links that are due again, or that failed before ``failed_before_s``."""
        now_s = time.monotonic()
        return [
            (source, target)
            for source, target in itertools.permutations(self.members, 2)
            if (failure := self.link_failure(source, target)) is not None
            and (
                failure.due_s <= now_s
                if failed_before_s is None
                else failure.failed_s < failed_before_s
            )
        ]

    def set_link(
        self, source: Member, target: Member, measured: LinkMeasured | LinkChanged
    ) -> None:
        """Store a link as its source measured it. Raises AgentFailed if that is impossible."""
        conditions = measured.conditions if isinstance(measured, LinkMeasured) else None
        figures = measured.rtt_s, measured.bytes_per_s, measured.rtt_p90_s
        if not (is_plausible_link(*figures) and are_plausible(conditions)):
            raise AgentFailed(source.name, "reported an impossible link")
        link = LinkProfile(
            source.name,
            target.name,
            hygiene.within_range(measured.rtt_s, hygiene.ROUND_TRIP_SECONDS),
            hygiene.within_range(measured.bytes_per_s, hygiene.LINK_BYTES_PER_S),
            min(measured.rtt_p90_s, hygiene.ROUND_TRIP_SECONDS[1]),
            conditions,
        )
        if self._links.set((source.device, target.device), link):
            log.warning("the link from %s to %s works again", source.name, target.name)
            self._story.tell("link works", f"{source.name} to {target.name}")
            self.changed.fire()

    async def serve(self, hello: AgentHello, connection: AsyncConnection) -> None:
        """Serve an agent's control connection until it ends."""
        refusal = self._refusal(hello)
        if refusal is not None:
            await connection.send(JoinRefused(refusal))
            return
        hello = typing.cast("AgentHello", clean(hello))
        name = await self._named(hello, connection)
        if name is None:
            return
        kept = {
            stage.epoch: stage.newest_sequence for stage in hello.kept if stage.epoch in self.keeps
        }
        member = Member(
            device=hello.device,
            name=name,
            version=hello.version,
            endpoints=hello.endpoints,
            profile=hello.profile,
            connection=connection,
            joined_s=time.monotonic(),
            run=hello.run,
            attempt=hello.attempt,
            port=hello.port,
            advertised=hello.advertised,
            kept=kept,
        )
        self._members[member.device] = member
        heartbeat = asyncio.create_task(self._beat(member))
        try:
            await connection.send(CoordinatorWelcome(self._cluster, member.name, tuple(kept)))
            if self._book is not None:
                await self._name_in(self._book, member)
                await self.tell_known()
            log.info("%s joined from %s", member.name, connection.peer)
            self._story.tell("joined", member.name, f"from {connection.peer}")
            self.changed.fire()
            while True:
                message, _ = await connection.receive(limits.LIVENESS_S)
                self._receive(member, clean(message))
        except ProtocolError as error:
            self._lose(member, AgentLost(member.name, str(error), broke_protocol=True))
        except WireError as error:
            self._lose(member, AgentLost(member.name, str(error), may_return=True))
        finally:
            heartbeat.cancel()
            self._lose(member, AgentLost(member.name, "its connection ended"))

    @contextlib.contextmanager
    def beside(self, connection: AsyncConnection) -> Iterator[None]:
        """Serve a device's connection that carries files. It ends when the device is revoked."""
        self._beside.add(connection)
        try:
            yield
        finally:
            self._beside.discard(connection)

    async def _named(self, hello: AgentHello, connection: AsyncConnection) -> str | None:
        """The name of an agent that may join, once it is on the disk, or None if it may not.

        Others may join meanwhile. So this looks again.
        """
        while await self._replaces(hello, connection):
            name = self.names.assign(hello.device, hello.name, self._members.keys())
            if self._disk is not None:
                await self._disk.flush()
            refusal = self._refusal(hello)
            if refusal is not None:
                await connection.send(JoinRefused(refusal))
                return None
            if hello.device not in self._members:
                return name
        return None

    async def _at_disk(self, work: Callable[[], Result]) -> Result:
        """Do work on the book's file."""
        return work() if self._disk is None else await self._disk.run(work)

    async def tell_known(self) -> None:
        """Tell all members which devices may call them, if that has changed. Drop the revoked ones.

        The messages leave in tasks of their own, because a member may be slow to take one. A member
        that is asked to connect to another one before waits a little (agent.credentials).
        """
        if self._book is None:
            return
        try:
            known = await self._at_disk(self._book.known)
        except BadBook as error:
            self._rare_log.warning("book", "%s", error)
            return
        may_join = {(item.device, item.fingerprint) for item in known.devices}
        for connection in tuple(self._beside):
            if _is_revoked(connection, may_join):
                connection.close()
        for member in tuple(self._members.values()):
            if _is_revoked(member.connection, may_join):
                self._lose(member, AgentLost(member.name, "it was revoked", advice=REJOIN))
            elif member.told != known:
                member.told = known
                task = asyncio.create_task(_tell(member, known))
                self._tellings.add(task)
                task.add_done_callback(self._tellings.discard)

    async def known(self) -> tuple[Device, ...]:
        """All devices that may join, oldest first. None without TLS. Raises BadBook."""
        return () if self._book is None else await self._at_disk(self._book.devices)

    async def revoke(self, name: str) -> Device:
        """Let a device of this name or id join no more, and drop it. Raises BadBook, OSError."""
        if self._book is None:
            raise BadBook(
                "this coordinator runs with --insecure: any device may join, so none can be revoked"
            )
        gone = await self._at_disk(partial(self._book.revoke_device, name))
        await self.tell_known()
        return gone

    async def _name_in(self, book: DeviceBook, member: Member) -> None:
        """Note a member's name, by which people revoke it."""
        try:
            await self._at_disk(partial(book.named, member.device, member.name))
        except (BadBook, OSError) as error:
            self._rare_log.warning("book", "cannot note the name of %s: %s", member.name, error)

    async def _replaces(self, hello: AgentHello, connection: AsyncConnection) -> bool:
        """Whether the agent may join. It may not if a living member has its device id.

        An agent that lost its connection may come back before the loss is seen here. The same
        process is known by ``run``. Another process of that device may join only once the member
        is dead.
        """
        while (previous := self._members.get(hello.device)) is not None:
            if hello.run and hello.run == previous.run:
                if hello.attempt < previous.attempt:
                    await connection.send(
                        JoinRefused("a later connection of this agent has joined")
                    )
                    return False
            elif await self._is_alive(previous):
                self._rare_log.warning(
                    "twin", "%s has the device id of %s", connection.peer, previous.name
                )
                await connection.send(
                    JoinRefused(
                        f"{previous.name} at {previous.connection.peer_host} has the same device id"
                        " and is alive; was its disk copied? Delete the file device-id in this"
                        " agent's state directory and start it again"
                    )
                )
                return False
            self._lose(previous, AgentLost(previous.name, "it joined again", may_return=True))
        if self._closed:  # It may have been closed during the awaits above.
            await connection.send(JoinRefused("the coordinator stops"))
        return not self._closed

    async def _is_alive(self, member: Member) -> bool:
        """Whether the member sends something within SIGN_OF_LIFE_S.

        A member that lost its power or network leaves an open connection behind. Messages that it
        sent before may still arrive. They are read first, and do not count.
        """
        for _ in range(LIFE_CHECKS):
            await asyncio.sleep(SIGN_OF_LIFE_S / 2 / LIFE_CHECKS)
        member.heard.clear()
        for _ in range(LIFE_CHECKS):
            if self._members.get(member.device) is not member or member.heard.is_set():
                break
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(member.heard.wait(), SIGN_OF_LIFE_S / LIFE_CHECKS)
        return self._members.get(member.device) is member and member.heard.is_set()

    def drop(self, member: Member, why: str) -> None:
        """Lose a member that is alive but of no use. It may join again."""
        self._lose(member, AgentLost(member.name, why))

    def close(self) -> None:
        """Drop every member, and let no more join."""
        self._closed = True
        for member in self.members:
            self._lose(member, AgentLost(member.name, "the coordinator stops"))

    def _receive(self, member: Member, message: Message) -> None:
        member.heard.set()
        if isinstance(message, Heartbeat):
            if not 0 <= message.memory_available_bytes <= hygiene.MAX_BYTES:
                raise ProtocolError(f"it has {message.memory_available_bytes} bytes of memory")
            member.memory_available_bytes = message.memory_available_bytes
            wrong = implausible_gauges(message)
            if wrong is not None:
                raise ProtocolError(f"it has {wrong}")
            member.load, member.celsius = message.load, message.celsius
            member.beats = {stage.epoch: stage for stage in message.stages}
            if message.stages:
                self._tell(member, message)
        elif isinstance(message, _ANSWERS):
            if not _is_possible(message):
                raise ProtocolError(f"it sent an impossible {type(message).__name__}")
            member.resolve(message.request, message)
        elif isinstance(message, LinkChanged):
            target = self._members.get(message.device)
            if target is None or target is member or self.link(member, target) is None:
                return  # The target or the link was lost meanwhile.
            try:
                self.set_link(member, target, message)
            except AgentFailed as error:
                raise ProtocolError(str(error)) from error
        elif isinstance(message, FiguresChanged):
            try:
                member.take_better(message)
            except AgentFailed as error:
                raise ProtocolError(str(error)) from error
        elif isinstance(message, _REPORTS):
            self._tell(member, message)
        else:
            raise ProtocolError(f"{member.name} sent an unexpected {type(message).__name__}")

    def _tell(self, member: Member, message: Message) -> None:
        for on_event, _ in self._subscribers:
            on_event(member, message)

    async def _beat(self, member: Member) -> None:
        try:
            while True:
                await asyncio.sleep(limits.HEARTBEAT_S)
                await member.send(Heartbeat())
        except AgentLost:
            pass  # ``serve``, which reads the connection, sees the loss too.

    def _lose(self, member: Member, error: AgentLost) -> None:
        if self._members.get(member.device) is not member:
            return
        del self._members[member.device]
        self._links.forget(member.device)
        if not self._closed:
            self._rare_log.warning("lost", "%s", error)
        member.fail(error)
        member.connection.close()
        self._story.tell("left", member.name, error.cause)
        for _, on_lost in self._subscribers:
            on_lost(member, error)
        self.changed.fire()

    def _refusal(self, hello: AgentHello) -> str | None:
        if self._closed:
            return "the coordinator stops"
        if len(self._members) >= MAX_MEMBERS and hello.device not in self._members:
            return f"the cluster is full ({MAX_MEMBERS} agents)"
        if hello.cluster not in ("", self._cluster):
            return (
                f"this is cluster {self._cluster!r}, and the agent wants {hello.cluster!r:.50}: "
                f"give it --cluster {self._cluster}, or the address of another coordinator"
            )
        if not hello.device or len(hello.device) > 64 or not 0 < len(hello.name) <= 63:
            return "device id or name is empty or too long"
        if not (hello.name.isprintable() and hello.device.isprintable()):
            return "the name or the device id is not printable"
        if len(hello.version) > 64:
            return "its version is too long"
        if len(hello.advertised) > 64 or not 0 <= hello.port < 1 << 16 or len(hello.run) > 64:
            return "it has more than 64 addresses, or an impossible port"
        if len(hello.kept) > hygiene.MAX_STAGES or not all(
            0 < stage.epoch < 1 << 62 and 0 <= stage.newest_sequence < 1 << 53
            for stage in hello.kept
        ):
            return "it keeps a stage that no coordinator has loaded"
        if not 0 < len(hello.endpoints) <= 64 or any(
            len(endpoint.host) > 255 or not 0 < endpoint.port < 1 << 16
            for endpoint in (*hello.endpoints, *hello.advertised)
        ):
            return "it has no addresses, more than 64, or impossible ones"
        if self.names.is_name(hello.device, besides=hello.device):
            return f"the device id {hello.device!r} is another device's name"
        wrong = implausible_profile(hello.profile)
        return None if wrong is None else f"its profile has {wrong}"


def _is_revoked(connection: AsyncConnection, may_join: Set[tuple[str, Fingerprint]]) -> bool:
    """Whether the caller has introduced itself by a key that may not join any more."""
    claim = connection.claim
    return claim is not None and (claim.device, claim.fingerprint) not in may_join


def _addresses(source: Member, target: Member) -> tuple[str, ...]:
    """The ``host:port`` texts where ``source`` looks for ``target``."""
    return tuple(f"{item.host}:{item.port}" for item in target.endpoints_for(source))


def _is_possible(message: Message) -> bool:
    """Whether an answer's figures are plausible. Block times and links are checked elsewhere."""
    sizes: tuple[int, ...] = ()
    figures: tuple[float, ...] = ()
    if isinstance(message, Progress):
        sizes = message.done, message.total
        if message.unit not in ("bytes", "steps"):
            return False
    elif isinstance(message, StageLoaded):
        figures = (message.load_s,)
        sizes = message.memory_bytes, *_parted(message)
    elif isinstance(message, BlocksFetched):
        sizes = _parted(message)
    elif isinstance(message, TeamMeasured):
        sizes, figures = (message.chunk_rows,), (message.row_s, message.chunk_s)
    elif isinstance(message, TraceTaken):
        sizes = (message.now_us, *itertools.chain.from_iterable(map(astuple, message.passes)))
    elif isinstance(message, (QualityMeasured, HopMeasured)):
        figures = (abs(message.kl),)  # Rounding can make a divergence of 0 negative.
    return all(0 <= size <= hygiene.MAX_BYTES for size in sizes) and all(
        0 <= figure <= hygiene.MAX_SECONDS for figure in figures
    )


def _parted(message: StageLoaded | BlocksFetched) -> tuple[int, int, int]:
    """The fetched bytes, those of them that devices sent, and the rest."""
    from_peers_bytes = message.from_peers_bytes
    return message.fetched_bytes, from_peers_bytes, message.fetched_bytes - from_peers_bytes


async def _tell(member: Member, message: Message) -> None:
    """Send a message. A lost connection is found by whoever receives from it."""
    with contextlib.suppress(WireError):
        await member.connection.send(message)
