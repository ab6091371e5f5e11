"""The open connections to other devices, which end when the coordinator revokes a device."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

from wire.claim import Fingerprint
from wire.connection import Connection
from wire.errors import AuthFailed

NOT_KNOWN = "the device that was called does not know this one: it has not joined, or was revoked"
REVOKED = "the coordinator does not know this device any more: it was revoked"

Knows = Callable[[str, Fingerprint], bool]
"""Whether a device with this id and key may be connected."""


class Contacts:
    """All connections of one agent to and from known devices. Any thread may call.

    A connection belongs to whoever uses it. This holds no closed one.
    """

    def __init__(self, knows: Knows) -> None:
        self._knows = knows
        self._lock = threading.Lock()
        self._open: weakref.WeakKeyDictionary[Connection, tuple[str, Fingerprint]] = (
            weakref.WeakKeyDictionary()
        )

    def add(self, connection: Connection, device: str, fingerprint: Fingerprint) -> None:
        """Note a connection. Raises AuthFailed if its device was revoked meanwhile.

        ``cut`` may run at the same moment. So the device is looked up after it was noted.
        """
        with self._lock:
            self._open[connection] = device, fingerprint
        if not self._knows(device, fingerprint):
            raise AuthFailed(REVOKED, NOT_KNOWN)

    def cut(self) -> None:
        """End the connections of devices that are not known any more."""
        with self._lock:
            found = list(self._open.items())
        for connection, (device, fingerprint) in found:
            if not self._knows(device, fingerprint):
                connection.cut()
