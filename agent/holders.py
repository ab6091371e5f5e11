"""Other devices as sources of files, nearest first, as the coordinator names them.

Each file is known by its hash. So a device that sends other bytes is caught, and left.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from agent.blocks import ArrivedDamaged
from wire.connection import Connection
from wire.errors import WireError
from wire.messages import FileRef, Holder

log = logging.getLogger(__name__)

SILENCE_S = 5.0
"""The longest time for a chunk of a device. One that is slower is left: 50 KB/s."""

Connect = Callable[[Holder], Connection]
"""Connects to another device. Raises WireError."""


class Download(Protocol):
    """Fetches a file. Raises WireError, ArrivedDamaged.

    patience_s: the longest time for each FILE_CHUNK_BYTES. None: any.
    """

    def __call__(self, connection: Connection, *, patience_s: float | None) -> None: ...


class Holders:
    """The devices that have files which one request wants. Use as a context."""

    def __init__(self, connect: Connect) -> None:
        self._connect = connect
        self._holders: list[Holder] = []
        self._connections: dict[str, Connection] = {}
        self.came_bytes = 0
        """The bytes of whole files that came from devices."""

    def __enter__(self) -> Holders:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._connections.values():
            connection.close()

    def take(self, holders: Sequence[Holder]) -> None:
        """Take the coordinator's answer: who has which files, the nearest first."""
        self._holders = list(holders)

    def obtain(self, ref: FileRef, download: Download) -> bool:
        """Have ``download`` fetch a file from the nearest device that has it.

        Returns False if none has it, or all of them failed. Those are not asked again. Errors of
        ``download`` that do not concern the device go through.
        """
        for holder in self._of(ref):
            try:
                download(self._connected(holder), patience_s=SILENCE_S)
            except (WireError, ArrivedDamaged) as error:
                log.warning("%s is not fetched from device %s: %s", ref, holder.device, error)
                self._leave(holder)
            else:
                self.came_bytes += ref.size_bytes
                return True
        return False

    def _of(self, ref: FileRef) -> Iterator[Holder]:
        return (holder for holder in list(self._holders) if ref.sha256 in holder.sha256s)

    def _connected(self, holder: Holder) -> Connection:
        connection = self._connections.get(holder.device)
        if connection is None:
            connection = self._connections[holder.device] = self._connect(holder)
            connection.limit_message(SILENCE_S)
        return connection

    def _leave(self, holder: Holder) -> None:
        self._holders.remove(holder)
        connection = self._connections.pop(holder.device, None)
        if connection is not None:
            connection.close()
