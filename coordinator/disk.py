"""Work on the small files of the state directory, off the event loop.

A slow SD card takes seconds to sync. Heartbeats and streams must not stand still meanwhile. So one
thread does all such work, in order. Of a file that waits to be written only the newest content
counts.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from model.durable import replace_text

Failed = Callable[[OSError], None]
Result = TypeVar("Result")


def fault(error: Exception) -> str:
    """Say in words what is wrong with a kept file whose reading raised ``error``."""
    if isinstance(error, OSError):
        return (error.strerror or str(error)).lower()
    if isinstance(error, KeyError):
        return f"it has no {error.args[0]}"
    if isinstance(error, (TypeError, AttributeError)):
        return "it is of another form"
    # ``read_json`` has Python's words about the text.
    is_text = isinstance(error.__cause__, (ValueError, RecursionError))
    return "it is empty or damaged" if is_text else str(error)


def put_aside(path: Path) -> str:
    """Rename a file that cannot be used, so that nothing in it is lost. Returns what was done."""
    aside = path.with_suffix(".damaged")
    try:
        path.replace(aside)
    except OSError as error:
        return f"it cannot be renamed ({(error.strerror or str(error)).lower()})"
    return f"it is kept as {aside.name}"


class Disk:
    """One thread for files. Whoever tells others what a file says awaits ``flush`` before."""

    def __init__(self) -> None:
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="state files")
        """The thread. It has done all earlier work before what it is given now."""
        self._lock = threading.Lock()
        self._newest: dict[Path, tuple[str | None, Failed]] = {}
        """The contents that wait to be written, by file."""
        self._closed = False

    def replace(self, path: Path, text: str | None, failed: Failed) -> None:
        """Write a file whole, soon. None removes it. ``failed`` is called in the thread.

        The event loop calls this.
        """
        with self._lock:
            waits = path in self._newest
            self._newest[path] = text, failed
        if self._closed:
            self._write(path)
        elif not waits:
            self.executor.submit(self._write, path)

    async def run(self, work: Callable[[], Result]) -> Result:
        """Return the result of ``work``, which the thread does. Raises its errors."""
        if self._closed:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self.executor, work)

    async def flush(self) -> None:
        """Return once everything is written that was given before, or has failed."""
        await self.run(lambda: None)

    def close(self) -> None:
        """Write what waits, and end the thread. Later work is done at once."""
        self._closed = True
        self.executor.shutdown()

    def _write(self, path: Path) -> None:
        with self._lock:
            text, failed = self._newest.pop(path)
        write(path, text, failed)


def write(path: Path, text: str | None, failed: Failed) -> None:
    """Write a file whole, and return when it is on the disk. None removes it."""
    try:
        if text is None:
            path.unlink(missing_ok=True)
        else:
            replace_text(path, text)
    except OSError as error:
        failed(error)
