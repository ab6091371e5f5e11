"""The type of handshakes for the framer that runs them, and frames before their end.

wire.introduction has the handshake of encrypted connections. Connections of a shoal that was
started with --insecure have none.
"""

from __future__ import annotations

from collections.abc import Generator

from wire import limits
from wire.claim import Claim
from wire.codec import Prefix
from wire.errors import AuthFailed, ProtocolError
from wire.messages import AuthAnswer, AuthChallenge, Introduction, JoinRefused, Message

NEEDED = (
    "this shoal encrypts its connections: start the agent without --insecure, with a token that "
    "`shoal token create` makes where the coordinator runs"
)
CAME_PLAIN = "it does not introduce itself: it runs with --insecure, or another version of shoal"

Handshake = Generator[Message | None, Message | None, Claim | None]
"""Yields a message to send, or None to receive one. Returns once the peer has proved itself.

An answerer returns what its caller has proved. Raises AuthFailed, whose refusal the driver must
send.
"""


def admit(prefix: Prefix) -> None:
    """Refuse a message that is not part of a handshake. Raises AuthFailed, ProtocolError."""
    if prefix.kind not in (AuthChallenge, AuthAnswer, Introduction, JoinRefused):
        raise AuthFailed(CAME_PLAIN, NEEDED)
    if prefix.header_bytes > limits.MAX_HANDSHAKE_BYTES:
        raise ProtocolError(f"its handshake has {prefix.header_bytes} bytes, over the limit")


def refuse() -> Handshake:
    """Tell whoever comes without TLS that it is needed."""
    yield None
    raise AuthFailed(CAME_PLAIN, NEEDED)
