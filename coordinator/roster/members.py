"""Who is in the shoal: one Member per joined agent, alive as long as its heartbeats come."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from coordinator.errors import AgentFailed, AgentLost, NoAgents
from coordinator.roster.links import Failure, Links
from coordinator.roster.names import NameBook
from coordinator.story import Story
from coordinator.watching import Signal
from model.errors import ModelError
from model.spec import ModelSpec
from planning.problem import NoLink
from wire import hygiene, limits
from wire.addresses import is_loopback, is_shared
from wire.connection import AsyncConnection
from wire.errors import ProtocolError, WireError
from wire.hygiene import are_plausible, clean, implausible_profile, is_plausible, is_plausible_link
from wire.messages import (
    AgentHello,
    BlocksFound,
    CancelRequest,
    CoordinatorWelcome,
    DeviceMeasured,
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
    PeerLost,
    Progress,
    QualityMeasured,
    RequestFailed,
    SequenceFailed,
    StageDamaged,
    StageLoaded,
    TokenSampled,
)
from wire.profile import BlockTiming, DeviceProfile, LinkProfile
from wire.rare_log import RareLog

log = logging.getLogger(__name__)

MAX_MEMBERS = 256
"""More devices than anyone has on a shelf; a flood of joins stops here."""

MOST_LINES = 30
"""Lines a minute about members that are lost: without a token, anybody may join and leave."""
SIGN_OF_LIFE_S = 2 * limits.HEARTBEAT_S
"""A living agent has sent a heartbeat by then."""

LAST_WORDS_S = 0.25
"""What a device said before it died has arrived by then."""

LIFE_CHECKS = 4
"""The wait for a sign of life is cut in so many: a coordinator that stood still loses one."""

_ANSWERS = (
    ModelMeasured,
    DeviceMeasured,
    LinkMeasured,
    QualityMeasured,
    HopMeasured,
    BlocksFound,
    FilesMade,
    StageLoaded,
    Done,
    Progress,
    RequestFailed,
)

Answer = TypeVar("Answer", bound=Message)
OnProgress = Callable[[Progress], None]
OnResult = Callable[[QualityMeasured | HopMeasured], None]


@dataclass(frozen=True, slots=True)
class _Pending:
    """A request that waits for its answer, and who is told what comes before that."""

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
    """Differs between two processes of one device; empty where the agent does not say."""
    attempt: int = 0
    """Grows with each connection of one run."""
    port: int = 0
    """Where it listens on every address that it has; 0: only at ``endpoints``."""
    advertised: tuple[Endpoint, ...] = ()
    """Where its user says that others reach it."""
    memory_available_bytes: int = 0
    lost: AgentLost | None = None
    timings: dict[ModelSpec, dict[int, list[BlockTiming]]] = field(default_factory=dict)
    """What it measured of each model so far, by bits."""
    heard: asyncio.Event = field(default_factory=asyncio.Event)
    """Set by whatever it says; whoever waits clears it first."""
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    _pending: dict[int, _Pending] = field(default_factory=dict)
    _cancelling: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def is_asked(self) -> bool:
        """Whether it has a request to carry out."""
        return bool(self._pending)

    @property
    def is_here(self) -> bool:
        """Whether it runs on the coordinator's machine."""
        host = self.connection.peer_host
        return is_loopback(host) or host == self.connection.local_host

    def endpoints_for(self, source: Member) -> tuple[Endpoint, ...]:
        """Where ``source`` may reach it, the likeliest first.

        To what the agent announces comes the address that this coordinator sees: that of the
        connection, or the coordinator's own where the agent is on its machine. Loopback is only
        for an agent on the same machine.
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
        """For how long it has been a member."""
        return time.monotonic() - self.joined_s

    async def request(
        self,
        build: Callable[[int], Message],
        expect: type[Answer],
        on_progress: OnProgress | None = None,
        on_result: OnResult | None = None,
    ) -> Answer:
        """Send ``build(request number)`` and wait for the answer; parts of it go to ``on_result``.

        Waits as long as heartbeats come: measuring and loading take their time. Raises AgentFailed,
        AgentLost.
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
            # Or it would be busy, for minutes maybe, with what nobody waits for.
            task = asyncio.ensure_future(self._cancel(number))
            self._cancelling.add(task)
            task.add_done_callback(self._cancelling.discard)
            raise
        finally:
            self._pending.pop(number, None)
            if future.done() and not future.cancelled():
                future.exception()  # Lost while sending: asyncio complains of what nobody looks at.
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
        """Wait until it says something, or is lost; whether it lives.

        Its connections to other devices may be over although it does.
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
        """Take the measured figures of ``profile``, and nothing else. Raises AgentFailed."""
        wrong = implausible_profile(profile)
        if wrong is not None:
            raise AgentFailed(self.name, f"reported {wrong}")
        self.profile = replace(
            self.profile,
            memory_read_bytes_per_s=profile.memory_read_bytes_per_s,
            disk_write_bytes_per_s=profile.disk_write_bytes_per_s,
            call_s=profile.call_s or self.profile.call_s,
            relay_s=profile.relay_s,
            conditions=profile.conditions,
        )

    def take_better(self, changed: FiguresChanged) -> None:
        """Take what it has measured again; times only of what it was asked for before.

        Raises AgentFailed.
        """
        self.take_figures(changed.profile)
        if not all(map(is_plausible, changed.timings)):
            raise AgentFailed(self.name, "reported an impossible time")
        if not changed.spec:
            return
        try:
            known = self.timings.get(ModelSpec.from_dict(changed.spec), {})
        except ModelError as error:
            raise AgentFailed(self.name, f"reported times of no model: {error}") from error
        better = {(item.kind, item.variant, item.bits): item for item in changed.timings}
        for width, timings in known.items():
            known[width] = [
                better.get((item.kind, item.variant, item.bits), item) for item in timings
            ]

    def resolve(self, number: int, answer: Message) -> None:
        """Hand an answer, a part of it or progress to whoever asked; late ones are dropped."""
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
        """Mark as lost and fail every request that waits."""
        self.lost = error
        self.heard.set()  # Nothing more will be: whoever waits must see it.
        for pending in self._pending.values():
            if not pending.answer.done():
                pending.answer.set_exception(error)


OnEvent = Callable[[Member, Message], None]
OnLost = Callable[[Member, AgentLost], None]


class Roster:
    """All members, and what was measured between them."""

    def __init__(
        self, cluster: str, names: NameBook | None = None, story: Story | None = None
    ) -> None:
        """Without ``names``, devices are named anew by each roster."""
        self.names = names or NameBook()
        self._cluster = cluster
        self._story = story or Story()
        self._subscribers: list[tuple[OnEvent, OnLost]] = []
        self._members: dict[str, Member] = {}
        self._links = Links()
        self._closed = False
        self._rare_log = RareLog(log, most=MOST_LINES)
        self.changed = Signal()
        """Fires when a device joins or is lost, and when a link works again."""

    def subscribe(self, on_event: OnEvent, on_lost: OnLost) -> None:
        """Tell of what agents say of their own accord (tokens, failures), and of lost members.

        ``on_event`` raises ProtocolError for what no working agent says.
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
        """Living members, at least one. Raises NoAgents."""
        if not self._members:
            raise NoAgents(
                "no agent has joined: start `shoal agent` on each device; where multicast is "
                "blocked, with --coordinator HOST:PORT"
            )
        return self.members

    def link(self, source: Member, target: Member) -> LinkProfile | None:
        """The link as last measured between these two; None if it was not, or has failed."""
        return self._links.get((source.device, target.device))

    def link_failure(self, source: Member, target: Member) -> Failure | None:
        """Why the link between these two does not work; None where it does, or was not tried."""
        return self._links.failure((source.device, target.device))

    def fail_link(self, source: Member, target: Member, reason: str, *, used: bool = False) -> None:
        """Plan without a link until it has been measured again.

        ``used``: it failed in use, which makes the way back doubtful too.
        """
        if self.find(source.device) is not source or self.find(target.device) is not target:
            return  # Lost meanwhile: of one that joins again nothing is known.
        if self._links.fail((source.device, target.device), reason, used=used):
            log.warning("no link from %s to %s: %s", source.name, target.name, reason)
            self._story.tell("link failed", f"{source.name} to {target.name}", reason)

    def links_to_measure(
        self, members: Sequence[Member], *, asked: bool = False
    ) -> list[tuple[Member, Member]]:
        """Ordered pairs of these that were not measured, or have failed and are due again.

        ``asked``: a user waits for the best plan, and not a device that was lost.
        """
        return [
            (source, target)
            for source, target in itertools.permutations(members, 2)
            if self._links.is_due((source.device, target.device), asked=asked)
        ]

    def links(self) -> tuple[LinkProfile, ...]:
        """Every measured link between living members, by name."""
        return tuple(
            link
            for source in self.members
            for target in self.members
            if (link := self.link(source, target)) is not None
        )

    def failed_links(self) -> tuple[tuple[NoLink, Failure], ...]:
        """Every link between living members that was tried and does not work, by name."""
        return tuple(
            (NoLink(source.name, target.name, failure.reason, _addresses(source, target)), failure)
            for source, target in itertools.permutations(self.members, 2)
            if (failure := self.link_failure(source, target)) is not None
        )

    def links_to_retry(self, failed_before_s: float | None = None) -> list[tuple[Member, Member]]:
        """Ordered pairs whose link has failed and is due again, or failed before that time."""
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
        """Take a link as the source measured it. Raises AgentFailed for an impossible one."""
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
        """Be the coordinator's side of an agent's control connection, until it ends."""
        refusal = self._refusal(hello)
        if refusal is not None:
            await connection.send(JoinRefused(refusal))
            return
        hello = typing.cast("AgentHello", clean(hello))
        if not await self._replaces(hello, connection):
            return
        member = Member(
            device=hello.device,
            name=self.names.assign(hello.device, hello.name, self._members.keys()),
            version=hello.version,
            endpoints=hello.endpoints,
            profile=hello.profile,
            connection=connection,
            joined_s=time.monotonic(),
            run=hello.run,
            attempt=hello.attempt,
            port=hello.port,
            advertised=hello.advertised,
        )
        self._members[member.device] = member
        heartbeat = asyncio.create_task(self._beat(member))
        try:
            await connection.send(CoordinatorWelcome(self._cluster, member.name))
            log.info("%s joined from %s", member.name, connection.peer)
            self._story.tell("joined", member.name, f"from {connection.peer}")
            self.changed.fire()
            while True:
                message, _ = await connection.receive(limits.LIVENESS_S)
                self._receive(member, clean(message))
        except ProtocolError as error:
            self._lose(member, AgentLost(member.name, str(error), broke_protocol=True))
        except WireError as error:
            self._lose(member, AgentLost(member.name, str(error)))
        finally:
            heartbeat.cancel()
            self._lose(member, AgentLost(member.name, "its connection ended"))

    async def _replaces(self, hello: AgentHello, connection: AsyncConnection) -> bool:
        """Whether the agent may join: no other one with its id is a living member.

        An agent that lost its connection may come back before the loss is seen here. Its own
        process is known by ``run``; another process of the same device must be seen to be dead.
        """
        while (previous := self._members.get(hello.device)) is not None:
            if hello.run and hello.run == previous.run:
                if hello.attempt < previous.attempt:
                    await connection.send(JoinRefused("a later connection of yours has joined"))
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
            self._lose(previous, AgentLost(previous.name, "it joined again"))
        if self._closed:  # While the old connection was watched.
            await connection.send(JoinRefused("the coordinator stops"))
        return not self._closed

    async def _is_alive(self, member: Member) -> bool:
        """True where the member says something, as a dead one cannot.

        One that lost its power or its network has left a connection behind that does not look
        closed, and maybe messages in it: they are read first, and count for nothing.
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

    def close(self) -> None:
        """Drop every member, and take no more."""
        self._closed = True
        for member in self.members:
            self._lose(member, AgentLost(member.name, "the coordinator stops"))

    def _receive(self, member: Member, message: Message) -> None:
        member.heard.set()
        if isinstance(message, Heartbeat):
            if not 0 <= message.memory_available_bytes <= hygiene.MAX_BYTES:
                raise ProtocolError(f"it has {message.memory_available_bytes} bytes of memory")
            member.memory_available_bytes = message.memory_available_bytes
        elif isinstance(message, _ANSWERS):
            if not _is_possible(message):
                raise ProtocolError(f"it sent an impossible {type(message).__name__}")
            member.resolve(message.request, message)
        elif isinstance(message, LinkChanged):
            target = self._members.get(message.device)
            if target is None or target is member or self.link(member, target) is None:
                return  # Lost meanwhile, or the link was.
            try:
                self.set_link(member, target, message)
            except AgentFailed as error:
                raise ProtocolError(str(error)) from error
        elif isinstance(message, FiguresChanged):
            try:
                member.take_better(message)
            except AgentFailed as error:
                raise ProtocolError(str(error)) from error
        elif isinstance(message, (TokenSampled, SequenceFailed, PeerLost, StageDamaged)):
            for on_event, _ in self._subscribers:
                on_event(member, message)
        else:
            raise ProtocolError(f"{member.name} sent an unexpected {type(message).__name__}")

    async def _beat(self, member: Member) -> None:
        try:
            while True:
                await asyncio.sleep(limits.HEARTBEAT_S)
                await member.send(Heartbeat())
        except AgentLost:
            pass  # The reader of the connection sees it too, and decides.

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
            return "more addresses than there can be, or no port"
        if not 0 < len(hello.endpoints) <= 64 or any(
            len(endpoint.host) > 255 or not 0 < endpoint.port < 1 << 16
            for endpoint in (*hello.endpoints, *hello.advertised)
        ):
            return "there are no addresses, too many, or some that are none"
        if self.names.is_name(hello.device, besides=hello.device):
            return f"the device id {hello.device!r} is another device's name"
        wrong = implausible_profile(hello.profile)
        return None if wrong is None else f"its profile has {wrong}"


def _addresses(source: Member, target: Member) -> tuple[str, ...]:
    """Where ``source`` looks for ``target``, as ``host:port``."""
    return tuple(f"{item.host}:{item.port}" for item in target.endpoints_for(source))


def _is_possible(message: Message) -> bool:
    """Whether an answer's figures can be true; times of blocks and links have checks of theirs."""
    sizes: tuple[int, ...] = ()
    figures: tuple[float, ...] = ()
    if isinstance(message, Progress):
        sizes = message.done, message.total
        if message.unit not in ("bytes", "steps"):
            return False
    elif isinstance(message, StageLoaded):
        sizes, figures = (message.memory_bytes, message.fetched_bytes), (message.load_s,)
    elif isinstance(message, (QualityMeasured, HopMeasured)):
        figures = (abs(message.kl),)  # Rounding takes a divergence of 0 below it.
    return all(0 <= size <= hygiene.MAX_BYTES for size in sizes) and all(
        0 <= figure <= hygiene.MAX_SECONDS for figure in figures
    )
