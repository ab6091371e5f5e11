"""The state of the whole shoal as one JSON value, and the stream that follows it.

``/shoal/v1/state`` answers the value. The page and ``shoal top`` follow it as server-sent events:
the first event has every part, a later event has only the parts that changed. The parts are built
while somebody watches, at most once in TICK_S for all watchers together.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import statistics
import time
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import asdict
from typing import Any, Literal, TypedDict

from api.admin import model_view
from coordinator.config import CoordinatorConfig
from coordinator.errors import AgentLost
from coordinator.loading.models import Models
from coordinator.loading.paces import counts_of
from coordinator.loading.state import Present, deployment_of
from coordinator.loading.turns import Turns
from coordinator.roster.members import Member, Roster
from coordinator.roster.noise import device_noise
from coordinator.serving.requests import InFlight, Requests
from coordinator.story import Story
from wire.messages import PROTOCOL_VERSION, Message
from wire.versions import shoal_version

TICK_S = 0.5
"""The pause between two events of a stream."""

QUIET_S = 4.0
"""A stream without news for so long sends a comment, so that its watcher knows that it lives."""

MOST_WATCHERS = 32
"""The most streams at once. Others must find room among MOST_REQUESTS."""

MOST_LOST = 64
LOST_FOR_S = 900.0
"""A lost device is shown for so long, so that somebody who comes back sees what happened."""

ROUND_TRIPS = 9
"""A single round trip of an idle link may be long, because a device slept."""

SHOWN_EVENTS = 60
SHOWN_ENDED = 12

MEMORY_STEP_BYTES = 1 << 20
"""Free memory is rounded to this, since it changes a little with each heartbeat."""


class ShoalPart(TypedDict):
    """The shoal itself, which changes only when its coordinator starts again."""

    cluster: str
    version: str
    protocol: int
    control_port: int
    needs_token: bool
    started_s: float
    """When this coordinator started, in seconds since 1970."""


class DevicePart(TypedDict):
    """A device that is here, or was lost not long ago."""

    name: str
    state: Literal["here", "lost"]
    reason: str
    """Why it was lost; empty while it is here."""
    since_s: float
    """When it joined or was lost, in seconds since 1970."""
    version: str
    address: str
    machine: str
    processor: str
    cores: int
    threads: int
    backend: str
    backend_version: str
    wireless: bool
    memory_limit_bytes: int
    """The memory that a stage may take."""
    memory_total_bytes: int
    memory_available_bytes: int
    storage_bytes: int
    load: float | None
    """The used share of its processor, by all programs. None: not measured yet."""
    celsius: float | None
    """The temperature of its hottest part. None: not known."""
    noise: str
    """Why its figures may be wrong; empty if nothing speaks against them."""


class LinkPart(TypedDict):
    """A link as last measured, or the reason why it fails."""

    source: str
    target: str
    rtt_s: float | None
    bytes_per_s: float | None
    failure: str


class OperationPart(TypedDict):
    """The operation that runs now, such as a load."""

    what: str
    """The coordinator's own operation in words; empty for one that a user asked for."""
    steps: list[dict[str, Any]]
    """The last step of each part, newest last."""


class State(TypedDict):
    """The whole shoal, as its page shows it."""

    shoal: ShoalPart
    devices: list[DevicePart]
    links: list[LinkPart]
    models: list[dict[str, Any]]
    """As in /shoal/v1/ps, the model that answers first. Each stage also has ``hop_s``.

    It is half of the median of the last round trips to the next stage's device. None: none was
    measured.
    """
    operation: OperationPart | None
    requests: list[dict[str, Any]]
    """Requests in flight, oldest first, then the last ones that ended, newest first."""
    events: list[dict[str, Any]]
    """The last events, oldest first."""


class StateFeed:
    """Builds the state, and streams it to any number of watchers up to MOST_WATCHERS."""

    def __init__(
        self,
        config: CoordinatorConfig,
        roster: Roster,
        models: Models,
        turns: Turns,
        requests: Requests,
        story: Story,
    ) -> None:
        self._config = config
        self._roster = roster
        self._models = models
        self._turns = turns
        self._requests = requests
        self._story = story
        self._started_s = time.monotonic()
        self._lost: OrderedDict[str, tuple[float, DevicePart]] = OrderedDict()
        """The lost devices by id, each with when by the monotonic clock. The last one is last."""
        self.watchers = 0
        """The streams that are open."""
        self._trips_us: dict[int, list[deque[int]]] = {}
        """The last different round trips behind each stage, by epoch."""
        self._closed = asyncio.Event()
        self._built_s = -math.inf
        self._parts: dict[str, str] = {}
        self.control_port = config.control_port
        """The port where agents join; the server sets it once it is known."""
        roster.subscribe(self._on_event, self._on_lost)

    def close(self) -> None:
        """End all streams, because the coordinator stops."""
        self._closed.set()

    def state(self) -> State:
        """Build the state as it is now."""
        return {
            "shoal": {
                "cluster": self._config.cluster,
                "version": shoal_version(),
                "protocol": PROTOCOL_VERSION,
                "control_port": self.control_port,
                "needs_token": not self._config.insecure,
                "started_s": round(time.time() - time.monotonic() + self._started_s),
            },
            "devices": self._devices(),
            "links": self._links(),
            "models": [self._model(state) for _, state in self._models.present()],
            "operation": self._operation(),
            "requests": [
                *map(_request, self._requests.in_flight),
                *map(_request, self._requests.ended[:SHOWN_ENDED]),
            ],
            "events": [asdict(event) for event in self._story.after()[-SHOWN_EVENTS:]],
        }

    @property
    def has_room(self) -> bool:
        """Whether another stream may begin."""
        return self.watchers < MOST_WATCHERS

    async def stream(
        self, may_follow: Callable[[], bool] = lambda: True
    ) -> AsyncGenerator[str, None]:
        """Yield server-sent events until the coordinator stops, or ``may_follow`` says no."""
        self.watchers += 1
        try:
            sent: dict[str, str] = {}
            said_s = time.monotonic()
            while not self._closed.is_set() and may_follow():
                parts = self._current()
                news = [name for name, text in parts.items() if sent.get(name) != text]
                sent, now_s = parts, time.monotonic()
                if news:
                    fields = ",".join(f'"{name}":{parts[name]}' for name in news)
                    yield f"data: {{{fields}}}\n\n"
                    said_s = now_s
                elif now_s - said_s >= QUIET_S:
                    yield ": nothing new\n\n"
                    said_s = now_s
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._closed.wait(), TICK_S)
        finally:
            self.watchers -= 1

    def _current(self) -> dict[str, str]:
        """Return the state as JSON texts by part, not older than half of TICK_S."""
        now_s = time.monotonic()
        if now_s - self._built_s > TICK_S / 2:
            self._parts = {name: json.dumps(part) for name, part in self.state().items()}
            self._built_s = now_s
        return self._parts

    # ---- parts ----------------------------------------------------------------------------------

    def _model(self, state: Present) -> dict[str, Any]:
        """Describe a model, with the measured hops of its ring."""
        view, deployment = model_view(state), deployment_of(state)
        if deployment is None:
            return view
        epoch, leads = deployment.epoch, deployment.leads
        trips_us = self._trips_us.get(epoch) or [deque(maxlen=ROUND_TRIPS) for _ in leads]
        present = {
            one.epoch for _, state in self._models.present() if (one := deployment_of(state))
        }
        self._trips_us = {
            known: trips for known, trips in self._trips_us.items() if known in present
        } | {epoch: trips_us}
        for stage, lead, known in zip(view["stages"], leads, trips_us, strict=True):
            counts = counts_of(deployment, lead)
            if counts and counts.round_trip_us and counts.round_trip_us not in known:
                known.append(counts.round_trip_us)
            stage["hop_s"] = statistics.median(known) / 2e6 if known else None
        return view

    def _devices(self) -> list[DevicePart]:
        """The members by name, then the lost devices, newest first."""
        links, now_s = self._roster.links(), time.time()
        here: list[DevicePart] = []
        for member in self._roster.members:
            self._lost.pop(member.device, None)
            part, noise = _device(member), device_noise(member, links)
            part["since_s"] = round(now_s - member.connected_s)
            part["noise"] = noise["text"] if noise else ""
            here.append(part)
        lost: list[DevicePart] = []
        for device, (lost_s, part) in list(self._lost.items()):
            ago_s = time.monotonic() - lost_s
            if ago_s > LOST_FOR_S:
                del self._lost[device]
            else:
                part["since_s"] = round(now_s - ago_s)
                lost.insert(0, part)
        return here + lost

    def _links(self) -> list[LinkPart]:
        working: list[LinkPart] = [
            {
                "source": link.source,
                "target": link.target,
                "rtt_s": link.rtt_s,
                "bytes_per_s": link.bytes_per_s,
                "failure": "",
            }
            for link in self._roster.links()
        ]
        failed: list[LinkPart] = [
            {
                "source": link.source,
                "target": link.target,
                "rtt_s": None,
                "bytes_per_s": None,
                "failure": failure.reason,
            }
            for link, failure in self._roster.failed_links()
        ]
        return working + failed

    def _operation(self) -> OperationPart | None:
        if not self._turns.is_taken:
            return None
        return {
            "what": self._turns.unasked_for,
            "steps": [asdict(step) for step in self._turns.steps],
        }

    def _on_event(self, member: Member, message: Message) -> None:
        """Messages of agents say nothing that the roster does not keep."""

    def _on_lost(self, member: Member, error: AgentLost) -> None:
        part = _device(member)
        part["state"], part["reason"] = "lost", error.cause
        self._lost.pop(member.device, None)
        self._lost[member.device] = time.monotonic(), part
        while len(self._lost) > MOST_LOST:
            self._lost.popitem(last=False)


def _device(member: Member) -> DevicePart:
    """Describe a member as if it were here, without doubts about its figures."""
    profile = member.profile
    available = member.memory_available_bytes // MEMORY_STEP_BYTES * MEMORY_STEP_BYTES
    return {
        "name": member.name,
        "state": "here",
        "reason": "",
        "since_s": 0.0,
        "version": member.version,
        "address": member.connection.peer_host,
        "machine": profile.machine,
        "processor": profile.processor,
        "cores": profile.cores,
        "threads": profile.threads,
        "backend": profile.backend,
        "backend_version": profile.backend_version,
        "wireless": profile.wireless,
        "memory_limit_bytes": profile.memory_bytes,
        "memory_total_bytes": profile.memory_total_bytes,
        "memory_available_bytes": available,
        "storage_bytes": profile.storage_bytes,
        "load": round(member.load, 2) if member.memory_available_bytes else None,
        "celsius": None if member.celsius is None else round(member.celsius),
        "noise": "",
    }


def _request(request: InFlight) -> dict[str, Any]:
    """Describe a request. Its age is left out, which would change while nothing happens."""
    values = request.to_dict()
    if request.ended_s is None:
        del values["age_s"]
    return values
