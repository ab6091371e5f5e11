"""Signals that wake any number of watchers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


class Signal:
    """Tells every watcher that something changed.

    Each watcher has an event of its own, which only that watcher clears.
    """

    def __init__(self) -> None:
        self._events: set[asyncio.Event] = set()

    @contextmanager
    def watch(self) -> Iterator[asyncio.Event]:
        """An event that each later ``fire`` sets, until the watcher leaves."""
        event = asyncio.Event()
        self._events.add(event)
        try:
            yield event
        finally:
            self._events.discard(event)

    def fire(self) -> None:
        """Wake every watcher."""
        for event in self._events:
            event.set()
