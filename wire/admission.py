"""What may come next on a connection, decided by the prefix of a frame: nothing else is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from wire import limits
from wire.codec import Prefix
from wire.errors import ProtocolError
from wire.messages import AuthChallenge, Message

Admit = Callable[[Prefix], None]
"""Raises ProtocolError or AuthFailed at a frame that may not come."""


def hello(largest_bytes: Mapping[type[Message], int]) -> Admit:
    """Lets a first message come: one of these kinds, each with its largest header.

    A challenge comes as well, from a peer with a token where there is none: it is to be told.
    """
    allowed = {**largest_bytes, AuthChallenge: limits.MAX_HANDSHAKE_BYTES}

    def admit(prefix: Prefix) -> None:
        if prefix.header_bytes > allowed.get(prefix.kind, -1) or prefix.payload_bytes:
            raise ProtocolError(
                f"it began with {prefix.kind.__name__} of {prefix.header_bytes} bytes"
            )

    return admit


def report(prefix: Prefix) -> None:
    """Lets come what an agent says to the coordinator, which waits while Python decodes it."""
    if prefix.header_bytes > limits.MAX_REPORT_BYTES:
        raise ProtocolError(f"{prefix.kind.__name__} has {prefix.header_bytes} bytes")
