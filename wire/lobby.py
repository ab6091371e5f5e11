"""Connections that have not said who they are. Their number is bounded, the oldest one yields."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from wire.rare_log import RareLog

log = logging.getLogger(__name__)
rare_log = RareLog(log)

MOST = 64
"""Real peers are here for milliseconds, so 64 at once are strangers.

All lobbies of one process together stay far below the usual 1024 descriptors.
"""

MOST_OF_ONE = 32
"""The seats of one address, so that other addresses always find some."""


class Lobby:
    """Seats for connections that may be closed when more come.

    If no seat is left, the oldest guest of the address with the most guests is closed. A guest that
    leaves in time can no longer be closed. Any thread may call.
    """

    def __init__(self, port: str, most: int = MOST, most_of_one: int = MOST_OF_ONE) -> None:
        """``port`` names the port in log lines."""
        self._port = port
        self._most = most
        self._most_of_one = most_of_one
        self._lock = threading.Lock()
        self._guests: dict[str, dict[object, Callable[[], None]]] = {}
        """Maps an address to its guests, oldest first, and to the function that closes each."""
        self._hosts: dict[object, str] = {}

    def __len__(self) -> int:
        return len(self._hosts)

    def enter(self, guest: object, host: str, close: Callable[[], None]) -> None:
        """Take a guest in. ``close`` of another guest may be called at once, by this thread."""
        leaving: Callable[[], None] | None = None
        with self._lock:
            crowded = self._crowded(host)
            if crowded is not None:
                oldest, leaving = next(iter(self._guests[crowded].items()))
                self._remove(oldest)
            self._guests.setdefault(host, {})[guest] = close
            self._hosts[guest] = host
        if leaving is not None:
            rare_log.warning(
                self._port,
                "%s: too many connections wait; closing the oldest one of %s",
                self._port,
                crowded,
            )
            leaving()

    def leave(self, guest: object) -> bool:
        """Give up the seat. False if the guest was closed or has left."""
        with self._lock:
            return self._remove(guest)

    def _crowded(self, host: str) -> str | None:
        """Return the address whose oldest guest must go for ``host``, or None if there is room.

        The caller holds the lock.
        """
        if len(self._guests.get(host, ())) >= self._most_of_one:
            return host
        if len(self._hosts) < self._most:
            return None
        return max(self._guests, key=lambda address: len(self._guests[address]))

    def _remove(self, guest: object) -> bool:
        """Remove a guest. The caller holds the lock."""
        host = self._hosts.pop(guest, None)
        if host is None:
            return False
        guests = self._guests[host]
        del guests[guest]
        if not guests:
            del self._guests[host]
        return True
