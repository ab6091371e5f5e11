"""Follows the memory that stages may take, as other programs end and begin.

At the start an agent tells the free memory. Another program may end later. Then the coordinator
should hear of it, because a better plan may fit now. Memory that comes and goes is left alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable

STEP = 0.1
"""A change of the limit is told from this share of it on."""

STEADY_S = 60.0
"""Memory counts as free once it has been free for so long."""

SHARE = 0.9
"""The share of memory that has become free that stages may take. Programs grow again."""


class FreeMemory:
    """The limit of one agent. One thread at a time uses it."""

    def __init__(
        self,
        start_bytes: int,
        most_bytes: int | None,
        available: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``start_bytes`` is the limit at the start, ``most_bytes`` the one that the user gave.

        available: returns the free bytes of the machine. Its first figure belongs to the start.
        """
        self._start_bytes = start_bytes
        self._most_bytes = most_bytes
        self._available = available
        self._clock = clock
        self._stages: tuple[int, ...] = ()
        self._idle_bytes = self._base_bytes = available()
        """The free bytes if other programs were as at the start: without stages, and with them."""
        self._more_bytes = 0
        """The bytes that others have given back since then. Negative if they took more."""
        self._granted_bytes = 0
        """The part of it that stages may take."""
        self._least_bytes = 0
        self._since_s: float | None = None
        """Since when at least ``_least_bytes`` more were free."""

    def look(self, stages: tuple[int, ...]) -> int:
        """Return the limit now. ``stages`` has the loaded epochs, and nothing is being loaded.

        What stages take and give back is not other programs'. So a look after a change of stages
        only notes what is free beside them.
        """
        available_bytes = self._available()
        if not stages:
            self._base_bytes = self._idle_bytes
        elif stages != self._stages:
            self._base_bytes = available_bytes - self._more_bytes
        self._stages = stages
        self._more_bytes = available_bytes - self._base_bytes
        usable_bytes = int(SHARE * self._more_bytes)
        step_bytes = STEP * (self._start_bytes + self._granted_bytes)
        if usable_bytes < self._granted_bytes - step_bytes:
            self._granted_bytes = max(usable_bytes, 0)
        if usable_bytes < self._granted_bytes + step_bytes:
            self._since_s = None
        elif self._since_s is None:
            self._since_s, self._least_bytes = self._clock(), usable_bytes
        else:
            self._least_bytes = min(self._least_bytes, usable_bytes)
            if self._clock() - self._since_s >= STEADY_S:
                self._granted_bytes, self._since_s = self._least_bytes, None
        limit_bytes = self._start_bytes + self._granted_bytes
        return limit_bytes if self._most_bytes is None else min(limit_bytes, self._most_bytes)
