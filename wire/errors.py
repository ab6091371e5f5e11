"""Errors of a connection between two processes.

    WireError
    ├── ProtocolError           the peer sent something this protocol does not allow
    │   └── VersionMismatch     ... because it speaks another version
    ├── AuthFailed              the peer has not proved who it is, or is not known
    ├── ConnectionLost          the peer is gone (closed, reset, or silent for too long)
    └── ConnectFailed           nobody answered at the address
        └── NoTls               ... in TLS

Connections and wire.codec raise them. The owner of the connection drops the peer,
retries, or reports the device as lost.

``NeedsPerson`` marks errors at the start of an agent or a coordinator, which may have other bases.
"""

from __future__ import annotations


class NeedsPerson(Exception):
    """A start failed, and will fail again until a person mends what the message names."""


class WireError(Exception):
    """A connection cannot go on."""


class ProtocolError(WireError):
    """The peer broke the protocol, so the connection must be dropped."""


class VersionMismatch(ProtocolError):
    """The peer speaks another protocol version. It began with ``code`` and a header."""

    def __init__(
        self, ours: int, theirs: int, code: int = 0, header_bytes: int = 0, story: str = ""
    ) -> None:
        """``story`` is one line that describes both sides."""
        super().__init__(
            story
            or f"peer speaks protocol version {theirs}, this is version {ours}: "
            "install the same shoal version on all machines"
        )
        self.ours = ours
        self.theirs = theirs
        self.code = code
        self.header_bytes = header_bytes


class AuthFailed(WireError):
    """The peer may not come in, or is another one. ``refusal`` is the text for the peer."""

    def __init__(self, reason: str, refusal: str | None = None) -> None:
        super().__init__(reason)
        self.refusal = refusal


class ConnectionLost(WireError):
    """The peer closed the connection, reset it, or said nothing for too long."""


class ConnectFailed(WireError):
    """No connection could be made."""


class NoTls(ConnectFailed):
    """The peer at the address does not speak TLS. An older shoal does not."""
