"""Tells which user of this machine a loopback connection comes from."""

from __future__ import annotations

import contextlib
import ipaddress
import struct
from collections.abc import Iterator
from pathlib import Path

TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
"""The kernel's tables of connections: proc_pid_net(5)."""

LOCAL, REMOTE, STATE, USER = 1, 2, 3, 7
"""Columns of a table."""

ESTABLISHED = "01"
"""A connection that its process has closed is shown as root's."""

End = tuple[str, int]
"""The host and port of one end of a connection."""


def user_of(client: End, server: End) -> int | None:
    """Return the user id of the process whose socket is ``client``, connected to ``server``.

    None if the kernel shows no such open connection, as of another machine or network namespace.
    """
    wanted = _plain(client), _plain(server)
    return next((user for *ends, user in _connections() if tuple(ends) == wanted), None)


def _connections() -> Iterator[tuple[End, End, int]]:
    for table in TABLES:
        with contextlib.suppress(OSError, ValueError, IndexError):
            for line in table.read_text().splitlines()[1:]:
                columns = line.split()
                if columns[STATE] != ESTABLISHED:
                    continue
                yield _end(columns[LOCAL]), _end(columns[REMOTE]), int(columns[USER])


def _end(text: str) -> End:
    """Read ``ADDRESS:PORT``. The address is in words of 32 bits, each in the machine's order."""
    words, _, port = text.partition(":")
    packed = b"".join(
        struct.pack("=I", int(words[at : at + 8], 16)) for at in range(0, len(words), 8)
    )
    return _plain((str(ipaddress.ip_address(packed)), int(port, 16)))


def _plain(end: End) -> End:
    """An end with the IPv4 address where IPv6 wraps one."""
    address = ipaddress.ip_address(end[0])
    return str(getattr(address, "ipv4_mapped", None) or address), end[1]
