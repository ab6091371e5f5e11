"""Lets one operation run at a time. Users wait for operations of the coordinator itself."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from coordinator.errors import Busy
from coordinator.roster.measurements import OnStep, Step


class Turns:
    """Gives one operation at a time the devices, and passes its progress on."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._unasked = ""
        """The coordinator's own operation in words, or empty."""
        self._on_step: OnStep | None = None

    @property
    def is_taken(self) -> bool:
        return self._lock.locked()

    @contextlib.asynccontextmanager
    async def asked(self, on_step: OnStep) -> AsyncIterator[None]:
        """Run a user's operation. Raises Busy during the operation of another user."""
        self.require_free()
        if self._unasked:
            on_step(Step("wait", self._unasked, 0, 0, ""))
        async with self._lock:
            self._on_step = on_step
            try:
                yield
            finally:
                self._on_step = None

    @contextlib.asynccontextmanager
    async def unasked(self, what: str) -> AsyncIterator[None]:
        """Run an operation of the coordinator itself. Waiting users read ``what`` it is."""
        async with self._lock:
            self._unasked = what
            try:
                yield
            finally:
                self._unasked = ""

    def require_free(self) -> None:
        """Raise Busy during an operation of a user."""
        if self._lock.locked() and not self._unasked:
            raise Busy(
                "another plan, load, unload or measurement is under way: wait for it, or stop it"
            )

    def report(self, step: Step) -> None:
        """Report progress to the user whose operation runs."""
        if self._on_step is not None:
            self._on_step(step)
