"""How members of a team add up their partial rows, as numbers. The messages are TeamPart.

Directly: each member sends its partial rows to all others, and adds up all of them. In two steps:
member m gets everybody's partial rows of its span, adds them up, and sends the sum to all others.
Two steps need fewer bytes, but a second message. All add in the order of members, so all hold equal
rows.
"""

from __future__ import annotations

from wire.activations import HopBits, payload_bytes

MESSAGE_BYTES = 24 << 10
"""The bytes that cost as much as one more message. A gigabit link carries them in 0.2 ms."""


def is_direct(members: int, rows: int, hidden: int, bits: HopBits) -> bool:
    """Whether ``rows`` partial rows are exchanged directly. Two members always do so."""
    whole = (members - 1) * payload_bytes(rows, hidden, bits)
    return rows < members or whole - whole * 2 // members <= MESSAGE_BYTES


def span(rows: int, members: int, index: int) -> tuple[int, int]:
    """Return the half-open range of rows that a member adds up. They differ by one row at most."""
    return rows * index // members, rows * (index + 1) // members


def traffic(members: int, rows: int, hidden: int, bits: HopBits) -> tuple[int, int]:
    """Return a sum's messages that follow one another, and the payload bytes a member sends."""
    whole = (members - 1) * payload_bytes(rows, hidden, bits)
    return (1, whole) if is_direct(members, rows, hidden, bits) else (2, -(-whole * 2 // members))
