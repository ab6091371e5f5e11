"""The connections of one member to all others of its team, served by the thread that computes.

A hand-over between threads would cost more than the call. So the computing thread sends and
receives itself, and polls. It never waits for room to send without also receiving. Otherwise two
members with large frames could wait for each other for ever.

Each connection carries the frames of one pass after the other, in a fixed order. A member that
leaves a pass early tells all others (TeamFailed), so that nobody waits for it, and everybody drops
what is still to come of that pass. If a connection is lost, the team has ended. Its other
connections stay open until they are closed here. A member that closed them would look lost, too.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from agent.run_delay import run_delay_s
from backends.base import BackendError
from wire import limits
from wire.codec import Prefix, encode
from wire.connection import Connection
from wire.errors import ConnectionLost, ProtocolError, WireError
from wire.framing import NO_PAYLOAD, Frame
from wire.hygiene import clean_text
from wire.messages import TeamFailed, TeamLogits, TeamPart, TeamPass, TeamTrial

TeamMessage = TeamPass | TeamPart | TeamLogits | TeamFailed | TeamTrial

SPIN_S = 100e-6
"""How long a member looks for a message before it sleeps. Waking up takes about half as long.

A member whose messages usually take longer sleeps at once: looking would only use the processor.
"""

_WAITS = 8
"""The usual wait is a moving average over about this many waits."""

SILENCE_S = limits.LIVENESS_S
"""A member that others wait for is lost after this silence."""

SLICE_S = 0.25
"""The most of a silence that one wait counts. This process may itself have been suspended.

After such a time this device lets its other stages compute. A member answers in milliseconds, or
works beside other programs.
"""

MAX_WAITING = 4
"""The messages of one member that are read before they are needed. A member is never further ahead
than its next pass."""

MAX_DROPPED = 4
"""The messages of one member, for each pass, that may be dropped because their pass is over.

A pass that fails leaves three at most: partial rows, a sum, and TeamFailed.
"""

MAX_HEADER_BYTES = 8 << 10
"""The largest header of a message in a team: a pass of 64 rows has 1 KiB, a reason 4 KiB."""


class TeamLost(ConnectionLost):
    """The team has ended: a member is gone, silent, or sends what it may not send."""

    def __init__(self, device: str, reason: str) -> None:
        super().__init__(f"a member of the team is lost: {reason}")
        self.device = device
        self.reason = reason


class TeamStopped(ConnectionLost):
    """This member has stopped, because its stage is unloaded or damaged."""


class PassFailed(BackendError):
    """Another member could not run the pass. The team goes on with the next one."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"another device of its team failed: {reason}")


@dataclass(slots=True, eq=False)
class _Peer:
    device: str
    connection: Connection
    fd: int
    unsent: deque[memoryview] = field(default_factory=deque)
    waiting: deque[Frame] = field(default_factory=deque)
    """Messages that were read while the thread waited for something else."""
    dropped: int = 0
    """The messages of passes that were over."""
    watched: int = select.POLLIN
    """The events that the thread polls for."""


class Mesh:
    """Sends to and receives from the other members, for one thread at a time.

    ``send``, ``flush`` and ``receive`` raise TeamLost and TeamStopped. After TeamLost, they raise
    it again. ``receive`` also raises PassFailed.
    """

    def __init__(
        self,
        epoch: int,
        devices: Sequence[str],
        index: int,
        largest_bytes: int,
        *,
        silence_s: float = SILENCE_S,
    ) -> None:
        """``devices`` are the ids of all members, of which this one has ``index``.

        largest_bytes: the largest payload that a member may send.
        """
        self.epoch = epoch
        self.devices = tuple(devices)
        self.index = index
        self.others = tuple(other for other in range(len(devices)) if other != index)
        self.number = 0
        """The number of the current pass, or of the last one."""
        self.lost: TeamLost | None = None
        self.on_silence: Callable[[], None] = lambda: None
        """Is called when a member that this thread waits for in a pass has been silent for SLICE_S,
        and then again and again."""
        self._largest_bytes = largest_bytes
        self._silence_s = silence_s
        self._peers: dict[int, _Peer] = {}
        self._by_fd: dict[int, _Peer] = {}
        self._lock = threading.Lock()
        """Guards the connections while members connect, and when they are closed."""
        self._complete = threading.Event()
        self._stopped = False
        self.waited_s = 0.0
        """How long the thread has waited for other members so far.

        The time for which it could go on and got no processor does not count.
        """
        self._usual_wait_s = 0.0
        self._left = 0
        """The newest pass that this member has told the others to be over for it."""
        self._poll = select.poll()
        self._wake_fd = -1
        """Wakes the thread that polls. It exists once all members are connected."""

    # ---- connecting and ending ------------------------------------------------------------------

    def add(self, device: str, connection: Connection) -> bool:
        """Own the connection to a member. True once all others are connected.

        Until then, a newer connection to the same member replaces an older one. Raises
        ProtocolError if the device is no other member, or the team is complete or stopped.
        """
        if device not in self.devices or self.devices[self.index] == device:
            raise ProtocolError(f"{connection.peer} is not another member of the team")
        with self._lock:
            if self._complete.is_set() or self._stopped:
                raise ProtocolError("the team is complete or has ended")
            connection.admit = self._admit
            index = self.devices.index(device)
            old = self._peers.pop(index, None)
            if old is not None:
                old.connection.close()
            self._peers[index] = _Peer(device, connection, connection.fileno())
            if len(self._peers) < len(self.others):
                return False
            self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._poll.register(self._wake_fd, select.POLLIN)
            for peer in self._peers.values():
                self._by_fd[peer.fd] = peer
                self._poll.register(peer.fd, peer.watched)
            self._complete.set()
            return True

    @property
    def works(self) -> bool:
        """Whether it is not stopped, and no member is lost."""
        return not self._stopped and self.lost is None

    def stop(self) -> None:
        """End the current pass with TeamStopped, and allow no other. The connections stay open."""
        with self._lock:
            self._stopped = True
            if self._wake_fd >= 0:
                os.eventfd_write(self._wake_fd, 1)

    def close(self) -> None:
        """Close all connections. Call it after ``stop``, when no thread uses the mesh."""
        self.stop()
        with self._lock:
            for peer in self._peers.values():
                peer.connection.close()
            if self._wake_fd >= 0:
                os.close(self._wake_fd)
                self._wake_fd = -1

    # ---- passes ---------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise TeamStopped, TeamLost or BackendError if no pass can go on."""
        if self._stopped:
            raise TeamStopped("the stage is being unloaded")
        if self.lost is not None:
            raise TeamLost(self.lost.device, self.lost.reason)
        if not self._complete.is_set():
            raise BackendError("the members of the team are not connected yet")

    def leave(self, reason: str, device: str = "", *, lost: bool = False) -> None:
        """Tell all others, once, that this member has left the current pass and why.

        ``device`` is the member that failed. By default it is this one.
        """
        if self._left >= self.number and not lost:
            return
        self._left = self.number
        device = device or self.devices[self.index]
        self.tell(TeamFailed(self.epoch, self.number, device, clean_text(reason), lost))

    def lose(self, device: str, reason: str) -> TeamLost:
        """End the team because a member is lost, tell the others, and return the error."""
        if self.lost is None:
            self.lost = TeamLost(device, reason)
            self.leave(reason, device, lost=True)
        return self.lost

    def tell(self, message: TeamFailed) -> None:
        """Send to all others what can be sent. A lost connection is found by the next receive."""
        frame = encode(message)
        for peer in self._peers.values():
            try:
                self._send(peer, frame, NO_PAYLOAD)
            except WireError:
                continue

    def send(self, index: int, frame: bytes, payload: memoryview = NO_PAYLOAD) -> None:
        """Send an encoded frame to a member. What does not fit now leaves in later calls.

        The payload may be changed afterwards.
        """
        peer = self._peers[index]
        try:
            self._send(peer, frame, payload)
        except WireError as error:
            raise self.lose(peer.device, str(error)) from error

    def flush(self) -> None:
        """Return when everything has been handed to the kernel."""
        for peer in self._peers.values():
            if peer.unsent:
                self._wait(peer, self._silence_s, for_message=False)

    def receive(self, index: int, *, at_rest: bool = False) -> Frame:
        """Return the next message of a member, and drop those of passes that are over.

        at_rest: no pass is under way, so the member may be silent for ever.
        """
        peer = self._peers[index]
        current = self.number + 1 if at_rest else self.number
        while peer.dropped <= MAX_DROPPED * (self.number + 1):
            message, payload = self._next(peer, None if at_rest else self._silence_s)
            if not isinstance(message, TeamMessage) or message.epoch != self.epoch:
                raise self.lose(peer.device, f"{peer.connection.peer} sent a message out of place")
            if type(message) is TeamFailed:
                self._heed(peer, message, current)
            elif message.number >= current:
                return message, payload
            peer.dropped += 1
        raise self.lose(peer.device, f"{peer.connection.peer} repeats passes that are over")

    def _heed(self, peer: _Peer, message: TeamFailed, current: int) -> None:
        """Leave the pass that another member has left, or the team if it has ended."""
        reason = clean_text(message.reason)
        if message.lost:
            known = message.device in self.devices and message.device != self.devices[self.index]
            raise self.lose(message.device if known else peer.device, reason)
        if message.number == current <= self.number:
            self.leave(reason, message.device)
            raise PassFailed(reason)
        if message.number >= current:
            raise self.lose(peer.device, f"{peer.connection.peer} left a pass before it began")

    # ---- sending and receiving ------------------------------------------------------------------

    def _next(self, peer: _Peer, silence_s: float | None) -> Frame:
        if peer.waiting:
            frame = peer.waiting.popleft()
            self._watch(peer)
            return frame
        self.check()
        try:
            received = peer.connection.receive_now()
        except WireError as error:
            raise self.lose(peer.device, str(error)) from error
        if received is not None:
            return received
        self._wait(peer, silence_s, for_message=True)
        return peer.waiting.popleft()

    def _wait(self, peer: _Peer, silence_s: float | None, *, for_message: bool) -> None:
        """Serve all connections until this one has a message, or has nothing left to send."""
        poll = self._poll.poll
        events = poll(0)
        began_s = time.perf_counter()
        if for_message and not peer.unsent and self._usual_wait_s <= SPIN_S:
            while not events and time.perf_counter() < began_s + SPIN_S:
                events = poll(0)
        self.waited_s += time.perf_counter() - began_s
        left_s = silence_s
        while True:
            for fd, event in events:
                if fd == self._wake_fd:
                    raise TeamStopped("the stage is being unloaded")
                self._serve(self._by_fd[fd], event)
                if fd == peer.fd:
                    left_s = silence_s
            if peer.waiting if for_message else not peer.unsent:
                waited_s = min(time.perf_counter() - began_s, 4 * SPIN_S)
                self._usual_wait_s += (waited_s - self._usual_wait_s) / _WAITS
                return
            if left_s is None:
                events = self._sleep(None)
                continue
            if left_s <= 0:
                silence = f"{peer.connection.peer} said nothing for {silence_s:g} s"
                raise self.lose(peer.device, silence)
            started_s = time.monotonic()
            events = self._sleep(1e3 * min(left_s, SLICE_S))
            if not events:
                self.on_silence()
            left_s -= min(time.monotonic() - started_s, SLICE_S)

    def _sleep(self, timeout_ms: float | None) -> list[tuple[int, int]]:
        """Poll. A member that is kept from its processor sleeps on after a message has come."""
        began_s, delayed_s = time.perf_counter(), run_delay_s()
        events = self._poll.poll(timeout_ms)
        delayed_s = run_delay_s() - delayed_s
        self.waited_s += max(time.perf_counter() - began_s - delayed_s, 0.0)
        return events

    def _serve(self, peer: _Peer, event: int) -> None:
        """Send and receive what one connection can take and has."""
        try:
            if event & select.POLLOUT:
                self._send_rest(peer)
            if event & ~select.POLLOUT:
                if len(peer.waiting) < MAX_WAITING:
                    frame = peer.connection.receive_now()
                    if frame is not None:
                        peer.waiting.append(frame)
                elif event & (select.POLLHUP | select.POLLERR):
                    raise ConnectionLost(f"{peer.connection.peer} closed the connection")
        except WireError as error:
            raise self.lose(peer.device, str(error)) from error
        self._watch(peer)

    def _send(self, peer: _Peer, frame: bytes, payload: memoryview) -> None:
        sent = 0 if peer.unsent else peer.connection.send_now(frame, payload)
        if sent < len(frame):
            peer.unsent.append(memoryview(frame)[sent:])
        sent = max(sent - len(frame), 0)
        if sent < len(payload):
            peer.unsent.append(memoryview(bytes(payload[sent:])))
        if peer.unsent:
            self._watch(peer)

    def _send_rest(self, peer: _Peer) -> None:
        while peer.unsent:
            sent = peer.connection.send_now(peer.unsent[0])
            if sent < len(peer.unsent[0]):
                peer.unsent[0] = peer.unsent[0][sent:]
                return
            peer.unsent.popleft()

    def _watch(self, peer: _Peer) -> None:
        """Poll a connection for what it lacks: room to send, and messages up to MAX_WAITING."""
        wanted = select.POLLIN if len(peer.waiting) < MAX_WAITING else 0
        if peer.unsent:
            wanted |= select.POLLOUT
        if wanted != peer.watched:
            peer.watched = wanted
            self._poll.modify(peer.fd, wanted)

    def _admit(self, prefix: Prefix) -> None:
        """Admit a message of a team before its header is read. Raises ProtocolError."""
        if (
            not issubclass(prefix.kind, TeamMessage)
            or prefix.header_bytes > MAX_HEADER_BYTES
            or prefix.payload_bytes > self._largest_bytes
        ):
            raise ProtocolError(
                f"it sent {prefix.kind.__name__} of {prefix.payload_bytes} bytes in a team"
            )
