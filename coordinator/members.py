"""Who is in the shoal: one Member per joined agent, alive as long as its heartbeats come."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from coordinator.errors import AgentFailed, AgentLost, NoAgents
from model.errors import ModelError
from model.spec import ModelSpec
from wire import limits
from wire.connection import AsyncConnection
from wire.errors import ProtocolError, WireError
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
    StageLoaded,
    TokenSampled,
)
from wire.profile import BlockTiming, DeviceProfile, LinkProfile

log = logging.getLogger(__name__)

MAX_MEMBERS = 256
"""More devices than anyone has on a shelf; a flood of joins stops here."""

MAX_FIGURES = 16
"""More than a profile has."""

SIGN_OF_LIFE_S = 2 * limits.HEARTBEAT_S
"""A living agent has sent a heartbeat by then."""

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
    """A joined agent. ``name`` is unique among the members."""

    device: str
    name: str
    version: str
    endpoints: tuple[Endpoint, ...]
    profile: DeviceProfile
    connection: AsyncConnection
    joined_s: float
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

    async def _cancel(self, number: int) -> None:
        with contextlib.suppress(AgentLost):
            await self.send(CancelRequest(number))

    def take_figures(self, profile: DeviceProfile) -> None:
        """Take the measured figures of ``profile``, and nothing else. Raises AgentFailed."""
        rates = profile.memory_read_bytes_per_s, profile.disk_write_bytes_per_s
        if min(rates) <= 0 or profile.call_s < 0 or len(profile.conditions) > MAX_FIGURES:
            raise AgentFailed(self.name, "reported an impossible figure")
        self.profile = replace(
            self.profile,
            memory_read_bytes_per_s=rates[0],
            disk_write_bytes_per_s=rates[1],
            call_s=profile.call_s or self.profile.call_s,
            conditions=profile.conditions,
        )

    def take_better(self, changed: FiguresChanged) -> None:
        """Take what it has measured again; times only of what it was asked for before.

        Raises AgentFailed.
        """
        self.take_figures(changed.profile)
        if not all(map(is_possible, changed.timings)):
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
        for pending in self._pending.values():
            if not pending.answer.done():
                pending.answer.set_exception(error)


class Roster:
    """All members, and what was measured between them."""

    def __init__(
        self,
        cluster: str,
        on_event: Callable[[Member, Message], None],
        on_lost: Callable[[Member, AgentLost], None],
    ) -> None:
        """``on_event`` gets what agents say of their own accord (tokens, failures)."""
        self._cluster = cluster
        self._on_event = on_event
        self._on_lost = on_lost
        self._members: dict[str, Member] = {}
        self._links: dict[tuple[str, str], LinkProfile] = {}
        self._closed = False
        self.changed = asyncio.Event()
        """Set whenever somebody joins or is lost; whoever waits clears it first."""

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
        """The link as last measured between these two; None if it was not."""
        return self._links.get((source.device, target.device))

    def links(self) -> tuple[LinkProfile, ...]:
        """Every measured link between living members, by name."""
        return tuple(
            link
            for source in self.members
            for target in self.members
            if (link := self.link(source, target)) is not None
        )

    def set_link(
        self, source: Member, target: Member, measured: LinkMeasured | LinkChanged
    ) -> None:
        """Take a link as the source measured it. Raises AgentFailed for an impossible one."""
        figures = measured.rtt_s, measured.bytes_per_s, measured.rtt_p90_s
        if not (all(map(math.isfinite, figures)) and min(figures[:2]) > 0 and figures[2] >= 0):
            raise AgentFailed(source.name, "reported an impossible link")
        self._links[source.device, target.device] = LinkProfile(
            source.name,
            target.name,
            measured.rtt_s,
            measured.bytes_per_s,
            measured.rtt_p90_s,
            measured.conditions if isinstance(measured, LinkMeasured) else None,
        )

    async def serve(self, hello: AgentHello, connection: AsyncConnection) -> None:
        """Be the coordinator's side of an agent's control connection, until it ends."""
        refusal = self._refusal(hello)
        if refusal is not None:
            await connection.send(JoinRefused(refusal))
            return
        previous = self._members.get(hello.device)
        if previous is not None:
            if await self._is_alive(previous):
                log.warning("%s has the device id of %s", connection.peer, previous.name)
                await connection.send(
                    JoinRefused(
                        f"{previous.name} at {previous.connection.peer_host} has the same device id"
                        " and is alive; was its disk copied? Delete the file device-id in this"
                        " agent's state directory and start it again"
                    )
                )
                return
            self._lose(previous, AgentLost(previous.name, "it joined again"))
        member = Member(
            device=hello.device,
            name=self._unique_name(hello.name),
            version=hello.version,
            endpoints=hello.endpoints,
            profile=hello.profile,
            connection=connection,
            joined_s=time.time(),
        )
        self._members[member.device] = member
        heartbeat = asyncio.create_task(self._beat(member))
        try:
            await connection.send(CoordinatorWelcome(self._cluster, member.name))
            log.info("%s joined from %s", member.name, connection.peer)
            self.changed.set()
            while True:
                message, _ = await connection.receive(limits.LIVENESS_S)
                self._receive(member, message)
        except WireError as error:
            self._lose(member, AgentLost(member.name, str(error)))
        finally:
            heartbeat.cancel()
            self._lose(member, AgentLost(member.name, "its connection ended"))

    async def _is_alive(self, member: Member) -> bool:
        """True where the member says something within SIGN_OF_LIFE_S, which a dead one cannot.

        One that lost its power or its network and joins again has left a connection behind that
        does not look closed.
        """
        member.heard.clear()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(member.heard.wait(), SIGN_OF_LIFE_S)
        return self._members.get(member.device) is member and member.heard.is_set()

    def close(self) -> None:
        """Drop every member, and take no more."""
        self._closed = True
        for member in self.members:
            self._lose(member, AgentLost(member.name, "the coordinator stops"))

    def _receive(self, member: Member, message: Message) -> None:
        member.heard.set()
        if isinstance(message, Heartbeat):
            member.memory_available_bytes = message.memory_available_bytes
        elif isinstance(message, _ANSWERS):
            member.resolve(message.request, message)
        elif isinstance(message, LinkChanged):
            target = self._members.get(message.device)
            if target is None or target is member:
                return  # Lost meanwhile.
            try:
                self.set_link(member, target, message)
            except AgentFailed as error:
                raise ProtocolError(str(error)) from error
        elif isinstance(message, FiguresChanged):
            try:
                member.take_better(message)
            except AgentFailed as error:
                raise ProtocolError(str(error)) from error
        elif isinstance(message, (TokenSampled, SequenceFailed, PeerLost)):
            self._on_event(member, message)
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
        self._links = {
            pair: link for pair, link in self._links.items() if member.device not in pair
        }
        if not self._closed:
            log.warning("%s", error)
        member.fail(error)
        member.connection.close()
        self._on_lost(member, error)
        self.changed.set()

    def _refusal(self, hello: AgentHello) -> str | None:
        if self._closed:
            return "the coordinator stops"
        if len(self._members) >= MAX_MEMBERS and hello.device not in self._members:
            return f"the cluster is full ({MAX_MEMBERS} agents)"
        if not hello.device or len(hello.device) > 64 or not 0 < len(hello.name) <= 63:
            return "device id or name is empty or too long"
        if len(hello.profile.arithmetic) > 64 or len(hello.profile.makes) > 64:
            return "the profile names more than there is"
        if not hello.name.isprintable() or not 0 < len(hello.endpoints) <= 64:
            return "the name is not printable, or there are no addresses"
        return None

    def _unique_name(self, wanted: str) -> str:
        taken = {member.name for member in self._members.values()}
        if wanted not in taken:
            return wanted
        return next(
            name for number in itertools.count(2) if (name := f"{wanted}-{number}") not in taken
        )


def is_possible(timing: BlockTiming) -> bool:
    """Whether a device can have measured this."""
    return min(timing.decode_s, timing.prefill_s_per_token) > 0
