"""Reports to the service manager by the protocol of sd_notify(3), and asks where state is kept.

Container engines have no such protocol. For them, SHOAL_ALIVE_FILE names a file to touch.

Only the loop that does the work may call ``alive``. A thread of its own would keep a hung process
alive.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, MutableMapping
from pathlib import Path

from wire.text import clean_text

PINGS_PER_TIMEOUT = 4
"""Watchdog messages per timeout of the manager. Some may come late."""

TOUCH_INTERVAL_S = 5.0
"""The interval at which the file is touched, for a checker of its age."""

MAX_STATUS_CHARACTERS = 200


def default_state_dir(service: str) -> Path:
    """Return where a service keeps its files: STATE_DIRECTORY under systemd, else XDG's place."""
    given = os.environ.get("STATE_DIRECTORY")
    if given:
        return Path(given.split(":")[0])
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "shoal" / service


class ServiceManager:
    """The manager that started this process. Without an address, there is none to tell."""

    def __init__(
        self,
        address: str | None = None,
        watchdog_s: float | None = None,
        alive_file: Path | None = None,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """``address`` is a datagram socket: a path or ``@name``. ``watchdog_s`` is its timeout."""
        self._address = address
        self._watchdog = watchdog_s is not None
        self._alive_file = alive_file
        self._interval_s = None if alive_file is None else TOUCH_INTERVAL_S
        if watchdog_s is not None:
            self._interval_s = watchdog_s / PINGS_PER_TIMEOUT
        self._clock_s = clock_s
        self._pinged_s = float("-inf")
        self._status = ""

    @classmethod
    def from_environment(cls, environment: MutableMapping[str, str] = os.environ) -> ServiceManager:
        """Take the manager out of the environment, because child processes are not the service."""
        address = environment.pop("NOTIFY_SOCKET", None)
        name = environment.pop("SHOAL_ALIVE_FILE", "")
        alive_file = Path(name) if name else None
        microseconds = environment.pop("WATCHDOG_USEC", "")
        meant = environment.pop("WATCHDOG_PID", str(os.getpid()))
        if not microseconds.isdigit() or int(microseconds) == 0 or meant != str(os.getpid()):
            return cls(address, alive_file=alive_file)
        return cls(address, int(microseconds) * 1e-6, alive_file)

    def ready(self) -> None:
        """Say that the process serves, or searches for a coordinator."""
        self._send("READY=1")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def status(self, text: str) -> None:
        """Send one line for ``systemctl status`` if it differs from the last one."""
        line = clean_text(text[:MAX_STATUS_CHARACTERS])
        if line != self._status:
            self._status = line
            self._send(f"STATUS={line}")

    def alive(self) -> None:
        """Reset the watchdog. Every turn of a loop may call this."""
        if self._interval_s is None:
            return
        now_s = self._clock_s()
        if now_s - self._pinged_s >= self._interval_s:
            self._pinged_s = now_s
            if self._watchdog:
                self._send("WATCHDOG=1")
            if self._alive_file is not None:
                with contextlib.suppress(OSError):
                    self._alive_file.touch()

    def _send(self, text: str) -> None:
        if self._address is None:
            return
        path = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        # A manager that is gone or busy is no reason to stop serving.
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock,
        ):
            sock.settimeout(1.0)
            sock.sendto(text.encode(), path)
