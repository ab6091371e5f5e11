"""Checks on the prefix of a frame that decide whether the rest of the frame is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from wire import limits
from wire.codec import Prefix
from wire.errors import ProtocolError
from wire.messages import Message

Admit = Callable[[Prefix], None]
"""Raises ProtocolError or AuthFailed if this frame may not come."""


def hello(largest_bytes: Mapping[type[Message], int]) -> Admit:
    """Admit one of these kinds as first message, each with its largest header."""

    def admit(prefix: Prefix) -> None:
        if prefix.header_bytes > largest_bytes.get(prefix.kind, -1) or prefix.payload_bytes:
            raise ProtocolError(
                f"it began with {prefix.kind.__name__} of {prefix.header_bytes} bytes"
            )

    return admit


def report(prefix: Prefix) -> None:
    """Admit an agent's message to the coordinator, which waits while Python decodes it."""
    if prefix.header_bytes > limits.MAX_REPORT_BYTES:
        raise ProtocolError(
            f"{prefix.kind.__name__} has {prefix.header_bytes} bytes, over the limit"
        )
