"""Keeps the last events of a coordinator with their times, for post-mortems."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from coordinator.watching import Signal

MOST_EVENTS = 400
"""About 100 KB of text; older events are forgotten."""


@dataclass(frozen=True, slots=True)
class StoryEvent:
    """One thing that happened."""

    number: int
    """Counts from 1 and is never reused by this coordinator process."""
    time_s: float
    """Seconds since 1970, by the wall clock."""
    monotonic_s: float
    """Seconds of the monotonic clock, for differences. The wall clock may be set meanwhile."""
    kind: str
    """One word, such as ``joined`` or ``served``."""
    subject: str
    """The model, device or link that it happened to."""
    text: str
    """Details in words; may be empty."""


class Story:
    """A bounded list of events. ``changed`` fires with each new one."""

    def __init__(self) -> None:
        self._events: deque[StoryEvent] = deque(maxlen=MOST_EVENTS)
        self._number = 0
        self.changed = Signal()

    def tell(self, kind: str, subject: str, text: str = "") -> None:
        """Add an event that happened now."""
        self._number += 1
        self._events.append(
            StoryEvent(self._number, time.time(), time.monotonic(), kind, subject, text)
        )
        self.changed.fire()

    def after(self, number: int = 0) -> tuple[StoryEvent, ...]:
        """The kept events with a larger number, oldest first."""
        return tuple(event for event in self._events if event.number > number)
