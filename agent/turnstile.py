"""Lets one stage of this device compute at a time, so that the stages of several models share it.

Two passes at once would fight for the same cores, or for the same accelerator. Who waits gets its
turn by start-time fair queuing. Each stage has a virtual time, which grows by the seconds of its
passes divided by its weight. The waiting stage with the least virtual time is next. A stage that
was idle begins at the virtual time of the running pass. So it gains nothing by having waited.

A long pass pauses between its layers, while a stage with less virtual time and much shorter passes
waits. Each part of a pass counts as a turn, so nobody gets more time by that. Passes of about one
length do not interrupt each other: both would end later for it, and none earlier.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

SHORTER = 2.0
"""A pass is interrupted by those that take at most its own time divided by this."""


class Ticket:
    """A stage's place at the turnstile."""

    __slots__ = ("due_s", "last_s", "ready", "so_far_s", "weight")

    def __init__(self, weight: float = 1.0) -> None:
        """A stage with twice the weight gets twice the time while both want all of it."""
        self.weight = weight
        self.due_s = 0.0
        """The virtual time at which its next pass starts."""
        self.last_s = 0.0
        """The seconds of its last pass."""
        self.so_far_s = 0.0
        """The seconds that its current pass has computed."""
        self.ready = threading.Event()

    def is_short_beside(self, other: Ticket) -> bool:
        """Whether its passes are so short that they may interrupt the current one of ``other``."""
        return self.last_s * SHORTER <= max(other.last_s, other.so_far_s)


class Turnstile:
    """Shared by all stages of a device. Each stage has one pass at a time at most."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        """Guards the following fields."""
        self._running: Ticket | None = None
        self._is_held = False
        """Whether the place is kept for the next pass of ``_running``, which has left."""
        self._waiting: list[Ticket] = []
        self._paused: list[Ticket] = []
        """The stages that wait in the middle of a pass. Each has interrupted the one before it."""
        self._now_s = 0.0
        """The virtual time: that at which the running pass, or the last one, has started."""
        self._started_s = 0.0

    @property
    def is_taken(self) -> bool:
        """Whether a pass would have to wait now."""
        return self._running is not None

    @property
    def is_wanted(self) -> bool:
        """Whether a stage waits."""
        return bool(self._waiting)

    def enter(self, ticket: Ticket) -> None:
        """Wait until the stage may compute. Whoever enters must leave."""
        with self._lock:
            ticket.due_s = max(ticket.due_s, self._now_s)
            if self._running is None or (self._is_held and self._running is ticket):
                self._begin(ticket)
                return
            ticket.ready.clear()
            self._waiting.append(ticket)
        ticket.ready.wait()

    def leave(self, ticket: Ticket, *, returns: bool = False) -> None:
        """Let the next stage compute, unless this one has given way meanwhile.

        returns: the stage enters again at once, or cedes. If it has the least virtual time, its
        place is kept. Otherwise two stages would always alternate, whatever their passes take.
        """
        with self._lock:
            if self._running is not ticket:
                return
            self._charge(ticket)
            ticket.last_s, ticket.so_far_s = ticket.so_far_s, 0.0
            following = self._following()
            if returns and following is not None and ticket.due_s < following.due_s:
                self._is_held = True
            else:
                self._free()

    def pause(self, ticket: Ticket) -> float:
        """Let stages with shorter passes compute in the middle of a pass, if they are due first.

        Return the seconds for which the pass has waited.
        """
        if not self._waiting:  # This is asked between any two layers.
            return 0.0
        with self._lock:
            if self._running is not ticket:  # It has given way, and has no place to offer.
                return 0.0
            self._charge(ticket)
            self._paused.append(ticket)
            following = self._following()
            if following is None or following.due_s >= ticket.due_s:
                self._paused.pop()
                return 0.0
            ticket.ready.clear()
            self._waiting.append(ticket)
            self._free()
            began_s = self._started_s
        ticket.ready.wait()
        return self._clock() - began_s

    def give_way(self, ticket: Ticket) -> None:
        """Let the next stage compute in the middle of a pass that waits for another device.

        The pass does not enter again: it goes on beside those of other stages.
        """
        if self._running is ticket and self._waiting:
            self.leave(ticket)

    def cede(self, ticket: Ticket) -> None:
        """Give up the place that was kept, if it was."""
        if not self._is_held:  # This is asked often.
            return
        with self._lock:
            if self._is_held and self._running is ticket:
                self._free()

    def _charge(self, ticket: Ticket) -> None:
        """Add to the time of the running stage what it has computed since it was asked last."""
        now_s = self._clock()
        ticket.so_far_s += now_s - self._started_s
        ticket.due_s += (now_s - self._started_s) / ticket.weight
        self._started_s = now_s

    def _following(self) -> Ticket | None:
        """Return the waiting stage that is next: that with the least virtual time.

        While a pass is paused, it is that one or one that may interrupt it. So a pass is never
        interrupted by one of its own length, which waits beside a short one.
        """
        among = self._waiting
        if self._paused:
            paused = self._paused[-1]
            among = [one for one in among if one is paused or one.is_short_beside(paused)]
        return min(among, key=lambda one: one.due_s, default=None)

    def _free(self) -> None:
        """Let the next stage begin, if one waits."""
        self._running, self._is_held = None, False
        following = self._following()
        if following is not None:
            self._waiting.remove(following)
            if following in self._paused:
                self._paused.remove(following)
            self._begin(following)
            following.ready.set()

    def _begin(self, ticket: Ticket) -> None:
        self._running, self._is_held = ticket, False
        self._now_s = ticket.due_s
        self._started_s = self._clock()
