"""Connections that have not said yet who they are: how many may wait, and which one goes first."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from wire.rare_log import RareLog

log = logging.getLogger(__name__)
rare_log = RareLog(log)

MOST = 64
"""Real peers are here for milliseconds, so that many at once are strangers. All lobbies of one
process together stay far below the usual 1024 descriptors."""

MOST_OF_ONE = 32
"""Of one address: the others' seats stay free."""


class Lobby:
    """Seats for connections that may be closed when more come.

    Where no seat is left, the oldest guest of the address with the most guests is closed. A guest
    that leaves in time cannot be closed any more. Any thread may call.
    """

    def __init__(self, port: str, most: int = MOST, most_of_one: int = MOST_OF_ONE) -> None:
        """``port`` says in log lines which one it is."""
        self._port = port
        self._most = most
        self._most_of_one = most_of_one
        self._lock = threading.Lock()
        self._guests: dict[str, dict[object, Callable[[], None]]] = {}
        """By address, oldest first: the guest and how it is closed."""
        self._hosts: dict[object, str] = {}

    def __len__(self) -> int:
        return len(self._hosts)

    def enter(self, guest: object, host: str, close: Callable[[], None]) -> None:
        """Take a guest in. ``close`` may be called at once for another one, by this thread."""
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
        """Give up the seat; False where there is none, because the guest was closed or has left."""
        with self._lock:
            return self._remove(guest)

    def _crowded(self, host: str) -> str | None:
        """The address whose oldest guest makes room for one of ``host``; None: there is room.

        The caller holds the lock.
        """
        if len(self._guests.get(host, ())) >= self._most_of_one:
            return host
        if len(self._hosts) < self._most:
            return None
        return max(self._guests, key=lambda address: len(self._guests[address]))

    def _remove(self, guest: object) -> bool:
        """The caller holds the lock."""
        host = self._hosts.pop(guest, None)
        if host is None:
            return False
        guests = self._guests[host]
        del guests[guest]
        if not guests:
            del self._guests[host]
        return True
