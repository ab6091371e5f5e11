"""Lets one stage of this device compute at a time, so that the stages of several models share it.

Two passes at once would fight for the same cores, or for the same accelerator. Who waits gets its
turn by start-time fair queuing. Each stage has a virtual time, which grows by the seconds of its
passes divided by its weight. The waiting stage with the least virtual time is next. A stage that
was idle begins at the virtual time of the running pass. So it gains nothing by having waited.
"""

from __future__ import annotations

import threading
import time


class Ticket:
    """A stage's place at the turnstile."""

    __slots__ = ("due_s", "ready", "weight")

    def __init__(self, weight: float = 1.0) -> None:
        """A stage with twice the weight gets twice the time while both want all of it."""
        self.weight = weight
        self.due_s = 0.0
        """The virtual time at which its next pass starts."""
        self.ready = threading.Event()


class Turnstile:
    """Shared by all stages of a device. Each stage has one pass at a time at most."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        """Guards the following fields."""
        self._running: Ticket | None = None
        self._is_held = False
        """Whether the place is kept for the next pass of ``_running``, which has left."""
        self._waiting: list[Ticket] = []
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
            ticket.due_s += (time.perf_counter() - self._started_s) / ticket.weight
            least_s = min((other.due_s for other in self._waiting), default=ticket.due_s)
            if returns and ticket.due_s < least_s:
                self._is_held = True
            else:
                self._free()

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

    def _free(self) -> None:
        """Let the waiting stage with the least virtual time begin, if there is one."""
        self._running, self._is_held = None, False
        if self._waiting:
            following = min(self._waiting, key=lambda one: one.due_s)
            self._waiting.remove(following)
            self._begin(following)
            following.ready.set()

    def _begin(self, ticket: Ticket) -> None:
        self._running, self._is_held = ticket, False
        self._now_s = ticket.due_s
        self._started_s = time.perf_counter()
