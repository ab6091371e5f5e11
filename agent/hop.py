"""Sends rows to the next device of the ring, and measures the link meanwhile.

A token's row leaves in the thread that computed it: a hand-over would cost more than the call.
Prompt chunks go through a short queue with a thread of its own. So the stage computes the next
chunk while the last one is on the wire, and other sequences' tokens pass them.

The next device answers only pings on this connection. One ping follows each chunk: its answer says
when the chunk has arrived. When nothing else is sent, a ping now and then measures the round trip.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from agent.links import Link, Measuring
from wire.connection import Connection
from wire.errors import ConnectionLost, WireError
from wire.framing import NO_PAYLOAD
from wire.messages import (
    Activation,
    LinkChanged,
    Message,
    ProbePing,
    ProbePong,
    TextRows,
    TokenSampled,
)

QUEUED_CHUNKS = 2
"""The chunks that wait to be sent. A stage that is further ahead waits for the link."""

PING_S = 2.0
"""The time between two pings while nothing is sent."""

ANSWER_S = 10.0
"""A ping that is not answered for this long is forgotten."""

TIMED_BYTES = 32 << 10
"""Smaller frames take too short a time to measure."""


_Sent = Activation | TokenSampled | TextRows


def _sequence(message: _Sent) -> int | None:
    """Return the message's sequence. A pass of whole texts has none."""
    return None if isinstance(message, TextRows) else message.sequence


@dataclass(frozen=True, slots=True)
class _Ping:
    number: int
    started_s: float
    """The start of the frame before the ping, or of the ping itself if there is none."""
    size_bytes: int
    """The size of that frame. 0 if its time says nothing about the link."""


@dataclass(slots=True)
class HopCounts:
    """Counts of what was sent so far, and the newest round trip (0: unknown)."""

    frames: int = 0
    sent_bytes: int = 0
    sending_s: float = 0.0
    round_trip_s: float = 0.0

    def add(self, payload: memoryview, sending_s: float) -> None:
        self.frames += 1
        self.sent_bytes += len(payload)
        self.sending_s += sending_s


class Hop:
    """Sends to the next device until it is closed or lost."""

    def __init__(
        self,
        connection: Connection,
        link: Link,
        measuring: Measuring,
        *,
        on_lost: Callable[[str], None],
        on_news: Callable[[LinkChanged], None],
        on_room: Callable[[], None] = lambda: None,
        on_wait: Callable[[], None] = lambda: None,
    ) -> None:
        """``on_lost`` gets the reason once, and never after ``close``.

        ``on_room`` is called after each chunk that was sent. Any thread of this process may make
        these calls. ``on_wait`` is called before a thread waits for the next device.
        """
        self._connection = connection
        self._link = link
        self._measuring = measuring
        self._on_lost = on_lost
        self._on_news = on_news
        self._on_room = on_room
        self._on_wait = on_wait
        self._changed = threading.Condition()
        """Guards the following fields."""
        self._waiting: deque[tuple[_Sent, memoryview]] = deque()
        """The first one is being sent."""
        self._passing = 0
        """The number of small messages that go before the next chunk."""
        self._pings: deque[_Ping] = deque()
        """Pings without an answer yet."""
        self._number = 0
        self._answered_s = 0.0
        """The time of the newest answer."""
        self._unseen = True
        """Whether a large frame without a ping behind it may be on its way."""
        self._sent_s = float("-inf")
        """The time when anything but a ping was sent last. Written without the lock."""
        self._over = False
        self._small, self._chunks = HopCounts(), HopCounts()
        """Each is written by one thread at a time."""
        for target in (self._receive, self._send_chunks):
            threading.Thread(target=target, name="hop", daemon=True).start()

    @property
    def has_room(self) -> bool:
        """Whether a chunk can be sent without waiting for one before it."""
        return len(self._waiting) < QUEUED_CHUNKS

    @property
    def is_sending(self) -> bool:
        """Whether anything waits to be sent, or is not acknowledged by the next machine."""
        return bool(self._waiting) or self._connection.unacknowledged_bytes > 0

    def send(self, message: _Sent, payload: memoryview = NO_PAYLOAD) -> None:
        """Send a token's row and its guesses now; queue a chunk and later rows of its sequence.

        A chunk waits for room in the queue. Raises WireError once the hop is lost.
        """
        small = isinstance(message, TokenSampled) or (
            isinstance(message, Activation) and (message.rows == 1 or bool(message.drafts))
        )
        if small and not self._waiting:  # The common case takes no lock.
            self._send_now(message, payload)
            return
        with self._changed:
            passing = small and all(
                _sequence(message) != _sequence(waiting) for waiting, _ in self._waiting
            )
            if passing:
                self._passing += 1
            else:
                if not (self._over or small or self.has_room):
                    self._on_wait()
                    self._changed.wait_for(lambda: self._over or self.has_room)
                if self._over:
                    raise ConnectionLost(f"{self._connection.peer}: the hop is closed")
                self._waiting.append((message, payload))
                self._changed.notify_all()
        if passing:
            try:
                self._send_now(message, payload)
            finally:
                with self._changed:
                    self._passing -= 1
                    self._changed.notify_all()

    def counts(self) -> HopCounts:
        """Return what was sent so far. Bytes are those of rows, without headers."""
        small, chunks = self._small, self._chunks
        return HopCounts(
            small.frames + chunks.frames,
            small.sent_bytes + chunks.sent_bytes,
            small.sending_s + chunks.sending_s,
            self._link.rtt_s or 0.0,
        )

    def close(self) -> None:
        """Close at once, and drop all waiting frames."""
        self._end(None)

    def _send_now(self, message: _Sent, payload: memoryview) -> None:
        started_s = time.monotonic()
        try:
            self._connection.send(message, payload, self._on_wait)
        except WireError as error:
            self._end(str(error))
            raise
        self._sent_s = time.monotonic()
        self._small.add(payload, self._sent_s - started_s)

    # ---- the sending thread ---------------------------------------------------------------------

    def _send_chunks(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(
                        lambda: self._over or (self._waiting and not self._passing), PING_S
                    )
                    if self._over:
                        return
                    chunk = self._waiting[0] if self._waiting else None
                if chunk is None:
                    self._ping_if_idle()
                    continue
                started_s = time.monotonic()
                # After a pause the window has shrunk, and the time would mostly show how it grows.
                warm = started_s - self._sent_s < PING_S
                self._connection.send(*chunk, self._on_wait)
                self._sent_s = time.monotonic()
                self._chunks.add(chunk[1], self._sent_s - started_s)
                size_bytes = len(chunk[1])
                if size_bytes >= TIMED_BYTES:
                    timed = warm and not self._unseen
                    self._unseen = not self._send_ping(started_s, size_bytes if timed else 0)
                with self._changed:
                    if self._over:
                        return
                    self._waiting.popleft()
                    self._changed.notify_all()
                self._on_room()
        except WireError as error:
            self._end(str(error))

    def _ping_if_idle(self) -> None:
        now_s = time.monotonic()
        with self._changed:
            if self._pings and now_s - self._pings[0].started_s > ANSWER_S:
                self._forget_pings()
        if not self._pings and now_s - self._sent_s >= PING_S / 2:
            self._send_ping(time.monotonic(), 0)

    def _send_ping(self, started_s: float, size_bytes: int) -> bool:
        """Send a ping, unless another measurement runs on this device."""
        with self._changed:
            if self._over or not (self._pings or self._measuring.try_begin(self._give_up)):
                return False
            self._number += 1
            ping = _Ping(self._number, started_s, size_bytes)
            self._pings.append(ping)
        self._connection.send(ProbePing(ping.number), NO_PAYLOAD, self._on_wait)
        return True

    def _give_up(self) -> None:
        """Give up measuring, because a requested measurement must not wait for answers."""
        with self._changed:
            self._forget_pings()

    def _forget_pings(self) -> None:
        """Forget all pings. The caller holds the lock."""
        if self._pings:
            self._pings.clear()
            self._unseen = True
            self._measuring.end()

    # ---- the receiving thread -------------------------------------------------------------------

    def _receive(self) -> None:
        try:
            while True:
                message, _ = self._connection.receive()
                self._on_answer(message, time.monotonic())
        except WireError as error:
            self._end(str(error))

    def _on_answer(self, message: Message, now_s: float) -> None:
        with self._changed:
            if not self._pings or message != ProbePong(self._pings[0].number):
                return  # The ping was forgotten, and answers come in order.
            ping = self._pings.popleft()
            if not self._pings:
                self._measuring.end()
            before_s, self._answered_s = self._answered_s, now_s
            idle = self._sent_s < ping.started_s
        rtt_s = self._link.rtt_s
        if idle:
            self._link.add_rtt(now_s - ping.started_s)
        elif ping.size_bytes and rtt_s is not None:
            # The frame left when it was sent, or after the one before it.
            self._link.add_transfer(ping.size_bytes, now_s - max(ping.started_s + rtt_s, before_s))
        news = self._link.news()
        if news is not None:
            self._on_news(news)

    def _end(self, lost: str | None) -> None:
        with self._changed:
            over, self._over = self._over, True
            self._forget_pings()
            self._waiting.clear()
            self._changed.notify_all()
        self._connection.close()
        if lost is not None and not over:
            self._on_lost(lost)
