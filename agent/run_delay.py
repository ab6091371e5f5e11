"""How long a thread was ready to run, and other programs or a limit kept it from a processor."""

from __future__ import annotations

import os
import threading
from pathlib import Path

SCHEDSTAT = Path("/proc/thread-self/schedstat")
"""Nanoseconds on a processor, nanoseconds ready to run, and turns. See proc_pid_schedstat(5)."""


def run_delay_s() -> float:
    """Return the calling thread's delay so far. Always 0 where the kernel does not count it."""
    counted: Schedstat | None = getattr(_thread, "counted", None)
    if counted is None:
        counted = _thread.counted = Schedstat()
    return counted.delay_s()


_thread = threading.local()


class Schedstat:
    """The counters of the thread that opens them. A reading takes about a microsecond."""

    def __init__(self, path: Path = SCHEDSTAT) -> None:
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._fd = -1

    def __del__(self) -> None:  # A thread's own objects go when it ends.
        if self._fd >= 0:
            os.close(self._fd)

    def delay_s(self) -> float:
        """Return the seconds for which the thread was ready to run. 0: they are not counted."""
        if self._fd < 0:
            return 0.0
        fields = os.pread(self._fd, 96, 0).split()
        return int(fields[1]) * 1e-9 if len(fields) > 1 else 0.0
