"""Lets one operation run at a time. Users wait for operations of the coordinator itself."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

from coordinator.errors import Busy
from coordinator.roster.measurements import OnStep, Step


async def _nothing() -> None:
    """Have nothing to await."""


class Turns:
    """Gives one operation at a time the devices, and passes its progress on."""

    def __init__(self) -> None:
        self.settle: Callable[[], Awaitable[None]] = _nothing
        """Is awaited at the end of an operation, before anybody hears how it ended."""
        self._lock = asyncio.Lock()
        self._unasked = ""
        """The coordinator's own operation in words, or empty."""
        self._waiting = 0
        self._on_step: OnStep | None = None
        self._steps: dict[tuple[str, str], Step] = {}

    @property
    def is_taken(self) -> bool:
        return self._lock.locked()

    @property
    def is_awaited(self) -> bool:
        """Whether another operation waits for the running one."""
        return self._waiting > 0

    @property
    def unasked_for(self) -> str:
        """The coordinator's own operation in words, or empty if a user's or none runs."""
        return self._unasked

    @property
    def progress(self) -> str:
        """The newest step in words, such as "fetch 40%", or empty. It names no device."""
        if not self._steps:
            return ""
        step = next(reversed(self._steps.values()))
        return f"{step.phase} {step.done / step.total:.0%}" if step.total else step.phase

    @property
    def steps(self) -> tuple[Step, ...]:
        """The last step of each part of the running operation, newest last."""
        return tuple(self._steps.values())

    @contextlib.asynccontextmanager
    async def asked(self, on_step: OnStep) -> AsyncIterator[None]:
        """Run a user's operation. Raises Busy during the operation of another user."""
        self.require_free()
        if self._unasked:
            on_step(Step("wait", self._unasked, 0, 0, ""))
        async with self._turn():
            self._on_step = on_step
            try:
                async with self._settling():
                    yield
            finally:
                self._on_step = None
                self._steps.clear()

    @contextlib.asynccontextmanager
    async def unasked(self, what: str) -> AsyncIterator[None]:
        """Run an operation of the coordinator itself. Waiting users read ``what`` it is."""
        async with self._turn():
            self._unasked = what
            try:
                async with self._settling():
                    yield
            finally:
                self._unasked = ""
                self._steps.clear()

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        self._waiting += 1
        try:
            await self._lock.acquire()
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._lock.release()

    @contextlib.asynccontextmanager
    async def _settling(self) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await self.settle()

    def require_free(self) -> None:
        """Raise Busy during an operation of a user."""
        if self._lock.locked() and not self._unasked:
            raise Busy(
                "another plan, load, unload or measurement is under way: wait for it, or stop it"
            )

    def report(self, step: Step) -> None:
        """Report progress to the user whose operation runs, and to everybody who looks."""
        part = step.phase, step.label if step.unit == "bytes" else ""
        self._steps.pop(part, None)
        self._steps[part] = step
        if self._on_step is not None:
            self._on_step(step)
