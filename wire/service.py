"""What a service manager is told, by the protocol of sd_notify(3): ready, how it goes, alive.

``alive`` is for the loop whose progress proves that the process does its work; a thread that only
pings would keep a hung process alive.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, MutableMapping

PINGS_PER_TIMEOUT = 4
"""Watchdog messages in the time after which the manager would end us: some may come late."""

MAX_STATUS_CHARACTERS = 200


class ServiceManager:
    """Who started this process and wants to hear of it; without an address, nobody."""

    def __init__(
        self,
        address: str | None = None,
        watchdog_s: float | None = None,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """address: a datagram socket, a path or ``@name``. watchdog_s: silence it bears."""
        self._address = address
        self._interval_s = None if watchdog_s is None else watchdog_s / PINGS_PER_TIMEOUT
        self._clock_s = clock_s
        self._pinged_s = float("-inf")
        self._status = ""

    @classmethod
    def from_environment(cls, environment: MutableMapping[str, str] = os.environ) -> ServiceManager:
        """The manager that the environment names. Takes the names out of it: children are not the
        service."""
        address = environment.pop("NOTIFY_SOCKET", None)
        microseconds = environment.pop("WATCHDOG_USEC", "")
        meant = environment.pop("WATCHDOG_PID", str(os.getpid()))
        if not microseconds.isdigit() or int(microseconds) == 0 or meant != str(os.getpid()):
            return cls(address)
        return cls(address, int(microseconds) * 1e-6)

    def ready(self) -> None:
        """It serves, or searches whom to serve."""
        self._send("READY=1")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def status(self, text: str) -> None:
        """One line for ``systemctl status``; sent when it differs from the last one."""
        line = "".join(c if c.isprintable() else " " for c in text)[:MAX_STATUS_CHARACTERS]
        if line != self._status:
            self._status = line
            self._send(f"STATUS={line}")

    def alive(self) -> None:
        """Reset the watchdog; cheap enough for every turn of a loop."""
        if self._interval_s is None:
            return
        now_s = self._clock_s()
        if now_s - self._pinged_s >= self._interval_s:
            self._pinged_s = now_s
            self._send("WATCHDOG=1")

    def _send(self, text: str) -> None:
        if self._address is None:
            return
        path = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        # A manager that is gone, or busy, is no reason to stop serving.
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock,
        ):
            sock.settimeout(1.0)
            sock.sendto(text.encode(), path)
