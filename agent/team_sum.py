"""The sum of a team's partial rows at each cut, over the connections to the other members.

Every member adds decoded rows in the order of members, and its own rows as the others decode them.
So all members hold equal rows, bit by bit. wire.sums says which rows go to whom.
"""

from __future__ import annotations

import numpy as np

from agent.mesh import Mesh
from backends.base import Array
from wire.activations import HopBits, decode_rows, encode_rows
from wire.codec import encode
from wire.errors import ProtocolError
from wire.messages import TeamPart
from wire.sums import is_direct, span


class TeamSum:
    """Adds up the partial rows float32 [n, hidden] of a pass. See backends.base.TeamSum.

    Raises TeamLost, TeamStopped, PassFailed, and BackendError while members are missing.
    """

    def __init__(self, mesh: Mesh, hidden: int, bits: HopBits) -> None:
        self._mesh = mesh
        self._hidden = hidden
        self._bits = bits
        self._number = 0
        self._cut = 0

    def __call__(self, partial: Array) -> Array:
        mesh = self._mesh
        if mesh.number != self._number:
            self._number, self._cut = mesh.number, 0
        mesh.check()
        count = len(partial)
        if is_direct(len(mesh.devices), count, self._hidden, self._bits):
            total = self.collect(self.send(partial), count)
        else:
            total = self._in_two_steps(partial)
        mesh.flush()
        return total

    def send(self, partial: Array) -> memoryview:
        """Send partial rows to all other members, and return their payload."""
        mesh, count = self._mesh, len(partial)
        payload = encode_rows(partial, self._bits)
        frame = encode(self._part(0, count), len(payload))
        for other in mesh.others:
            mesh.send(other, frame, payload)
        return payload

    def collect(self, own: memoryview, count: int) -> Array:
        """Add up the rows whose own payload was sent, and those of all others."""
        total = self._added(0, count, own)
        self._cut += 1
        return total

    def _in_two_steps(self, partial: Array) -> Array:
        """Add up one span of the rows here. Get the sums of the other spans from the others."""
        mesh, count = self._mesh, len(partial)
        members = len(mesh.devices)
        spans = [span(count, members, member) for member in range(members)]
        for other in mesh.others:
            begin, end = spans[other]
            payload = encode_rows(partial[begin:end], self._bits)
            mesh.send(other, encode(self._part(begin, end - begin), len(payload)), payload)
        begin, end = spans[mesh.index]
        own = self._added(begin, end - begin, encode_rows(partial[begin:end], self._bits))
        payload = encode_rows(own, self._bits)
        frame = encode(self._part(begin, end - begin), len(payload))
        for other in mesh.others:
            mesh.send(other, frame, payload)
        total = np.empty((count, self._hidden), np.float32)
        for member, (begin, end) in enumerate(spans):
            source = payload if member == mesh.index else self._received(member, begin, end - begin)
            total[begin:end] = self._decoded(member, source, end - begin)
        self._cut += 1
        return total

    def _added(self, first_row: int, count: int, own: memoryview) -> Array:
        """Receive the same rows of all others, and add up all in the order of members."""
        parts = [
            self._decoded(
                member,
                own if member == self._mesh.index else self._received(member, first_row, count),
                count,
            )
            for member in range(len(self._mesh.devices))
        ]
        total: Array = parts[0] + parts[1]
        for part in parts[2:]:
            total += part
        return total

    def _received(self, member: int, first_row: int, count: int) -> memoryview:
        """Return the payload of these rows from another member."""
        message, payload = self._mesh.receive(member)
        expected = self._part(first_row, count)
        if message != expected:
            raise self._wrong(member, f"it sent {message} in place of {expected}")
        return payload

    def _decoded(self, member: int, payload: memoryview, count: int) -> Array:
        try:
            return decode_rows(payload, count, self._hidden, self._bits)
        except ProtocolError as error:
            raise self._wrong(member, str(error)) from error

    def _wrong(self, member: int, what: str) -> Exception:
        return self._mesh.lose(self._mesh.devices[member], f"a message out of place: {what}")

    def _part(self, first_row: int, count: int) -> TeamPart:
        mesh = self._mesh
        return TeamPart(mesh.epoch, mesh.number, self._cut, first_row, count, self._bits)
