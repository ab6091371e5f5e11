"""The sum of a team's partial rows at each cut, over the connections to the other members.

Every member adds decoded rows in the order of members, and its own rows as the others decode them.
So all members hold equal rows, bit by bit. wire.sums says which rows go to whom.
"""

from __future__ import annotations

import numpy as np

from agent.mesh import Mesh
from backends.base import Array
from wire.activations import HopBits, decode_rows, encode_rows, payload_bytes
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
        # Memory for as many rows as there have been at once: the payload, the sum, and the rows of
        # one member. New memory of this size would be mapped, zeroed and given back at each sum.
        self._payload = memoryview(bytearray())
        self._total = self._rows = np.empty((0, hidden), np.float32)

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
        count = len(partial)
        self._reserve(count)
        payload = encode_rows(partial, self._bits, self._payload)
        self._send(payload, 0, count)
        return payload

    def collect(self, own: memoryview, count: int) -> Array:
        """Add up the rows whose own payload was sent, and those of all others."""
        total = self._add(0, own, self._total[:count])
        self._cut += 1
        return total

    def _in_two_steps(self, partial: Array) -> Array:
        """Add up one span of the rows here. Get the sums of the other spans from the others."""
        mesh, count = self._mesh, len(partial)
        members = len(mesh.devices)
        self._reserve(count)
        spans = [span(count, members, member) for member in range(members)]
        for other in mesh.others:
            begin, end = spans[other]
            payload = encode_rows(partial[begin:end], self._bits, self._payload)
            mesh.send(other, encode(self._part(begin, end - begin), len(payload)), payload)
        begin, end = spans[mesh.index]
        payload = encode_rows(partial[begin:end], self._bits, self._payload)
        own = self._add(begin, payload, np.empty((end - begin, self._hidden), np.float32))
        payload = encode_rows(own, self._bits, self._payload)
        self._send(payload, begin, end - begin)
        total = self._total[:count]
        for member, (begin, end) in enumerate(spans):
            source = payload if member == mesh.index else self._received(member, begin, end - begin)
            self._decode(member, source, total[begin:end])
        self._cut += 1
        return total

    def _reserve(self, count: int) -> None:
        """Have memory for so many rows."""
        if len(self._total) < count:
            shape = (count, self._hidden)
            self._total, self._rows = np.empty(shape, np.float32), np.empty(shape, np.float32)
            self._payload = memoryview(bytearray(payload_bytes(count, self._hidden, self._bits)))

    def _send(self, payload: memoryview, first_row: int, count: int) -> None:
        """Send the same rows to all other members."""
        frame = encode(self._part(first_row, count), len(payload))
        for other in self._mesh.others:
            self._mesh.send(other, frame, payload)

    def _add(self, first_row: int, own: memoryview, total: Array) -> Array:
        """Write the sum of the same rows of all members, in their order, to ``total``."""
        count = len(total)
        for member in range(len(self._mesh.devices)):
            mine = member == self._mesh.index
            payload = own if mine else self._received(member, first_row, count)
            if member == 0:
                self._decode(member, payload, total)
            else:
                total += self._decode(member, payload, self._rows[:count])
        return total

    def _received(self, member: int, first_row: int, count: int) -> memoryview:
        """Return the payload of these rows from another member."""
        message, payload = self._mesh.receive(member)
        expected = self._part(first_row, count)
        if message != expected:
            raise self._wrong(member, f"it sent {message} in place of {expected}")
        return payload

    def _decode(self, member: int, payload: memoryview, out: Array) -> Array:
        try:
            return decode_rows(payload, len(out), self._hidden, self._bits, out)
        except ProtocolError as error:
            raise self._wrong(member, str(error)) from error

    def _wrong(self, member: int, what: str) -> Exception:
        return self._mesh.lose(self._mesh.devices[member], f"a message out of place: {what}")

    def _part(self, first_row: int, count: int) -> TeamPart:
        mesh = self._mesh
        return TeamPart(mesh.epoch, mesh.number, self._cut, first_row, count, self._bits)
