"""Bytes in, messages out: one end of a connection, without I/O.

An adapter (wire.connection, wire.async_connection) gives a Framer a transport and a clock:

    while (frame := framer.next_frame()) is None:
        send framer.take_outgoing()
        framer.received(how many bytes arrived in framer.space())

A handshake runs inside ``next_frame``. Its messages and a refusal appear in
``outgoing``. If a method raises, the adapter sends ``outgoing`` and closes the connection.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from wire import handshake as handshakes
from wire.admission import Admit
from wire.claim import Claim
from wire.codec import PREFIX, Prefix, decode_header, decode_prefix, encode, encode_refusal
from wire.errors import AuthFailed, ConnectionLost, VersionMismatch, WireError
from wire.handshake import Handshake
from wire.messages import JoinRefused, Message
from wire.versions import Stranger

NO_PAYLOAD = memoryview(b"")

BUFFER_BYTES = 16 << 10
"""The size of the receive buffer.

The whole frame of a token fits, so one call receives it. At most this much of a larger payload is
copied. The rest arrives directly in its own memory.
"""

Frame = tuple[Message, memoryview]
"""A message and its payload. The payload is empty if there is none."""


class Framer:
    """Turns received bytes into messages, and runs the handshake. One thread uses it at a time.

    Its methods raise AuthFailed, ConnectionLost and ProtocolError (VersionMismatch included).
    After an error the connection is over.
    """

    def __init__(self, peer: str, handshake: Handshake | None = None) -> None:
        """``peer`` is ``host:port``, for error texts. The peer must pass ``handshake`` first."""
        self.admit: Admit | None = None
        """Checks each prefix before more is read. None admits every frame."""
        self.outgoing: list[bytes] = []
        """Frames that the adapter must send now."""
        self.is_proving = handshake is not None
        """Whether the handshake is still running."""
        self.claim: Claim | None = None
        """The caller's proofs inside TLS."""
        self.is_refusing = False
        """Whether the peer speaks another version and its first message is still awaited."""
        self._peer = peer
        self._handshake = handshake
        self._handshake_waits = False
        # buffer[begin:end] holds received bytes that nobody has taken yet.
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        self._begin = self._end = 0
        self._wanted = PREFIX.size
        # A payload, or a header larger than the buffer, arrives in memory of its own.
        self._own: memoryview | None = None
        self._filled = 0
        self._prefix: Prefix | None = None
        self._message: Message | None = None
        self._mismatch: VersionMismatch | None = None

    def take_outgoing(self) -> bytes:
        """Return the bytes that must be sent now, and count them as sent."""
        data = b"".join(self.outgoing)
        self.outgoing.clear()
        return data

    def space(self) -> tuple[memoryview, bool]:
        """Return the memory for the next bytes, and whether all of it is awaited."""
        if self._own is not None:
            return self._own[self._filled :], True
        if self._begin == self._end:
            self._begin = self._end = 0
            return self._buffer, False
        if self._begin + self._wanted > len(self._buffer):
            rest = self._buffer[self._begin : self._end].tobytes()
            self._buffer[: len(rest)] = rest
            self._begin, self._end = 0, len(rest)
        return self._buffer[self._end :], False

    def received(self, count: int) -> None:
        """Record that ``count`` bytes have arrived in ``space``. 0 is the end of the stream.

        Raises ConnectionLost, or VersionMismatch, at the end of the stream.
        """
        if count == 0:
            inside = self._prefix is not None or self._end > self._begin
            where = " in the middle of a message" if inside else ""
            raise self.lost(f" closed the connection{where}")
        if self._own is not None:
            self._filled += count
        else:
            self._end += count

    def lost(self, how: str) -> WireError:
        """Return the error for a lost transport. Its text is the peer's name and ``how``."""
        if self._mismatch is not None:
            return self._refuse_version(self._mismatch, b"")
        return ConnectionLost(f"{self._peer}{how}")

    def prove(self) -> Literal[True] | None:
        """Continue the handshake. True once it is over, None if more bytes are needed."""
        while self._handshake is not None:
            incoming: Message | None = None
            try:
                if self._handshake_waits:
                    frame = self._next(handshakes.admit)
                    if frame is None:
                        return None
                    incoming, _ = frame
                outgoing = self._handshake.send(incoming)
            except StopIteration as ended:
                self.claim = ended.value
                self._handshake = None
                self.is_proving = False
            except AuthFailed as error:
                raise self._refuse(error) from error
            else:
                self._handshake_waits = outgoing is None
                if outgoing is not None:
                    self.outgoing.append(encode(outgoing))
        return True

    def next_frame(self) -> Frame | None:
        """Return the next message and its payload, or None if more bytes are needed.

        The caller may keep the payload.
        """
        if self.is_proving and self.prove() is None:
            return None
        try:
            return self._next(self.admit)
        except AuthFailed as error:
            raise self._refuse(error) from error

    def _next(self, admit: Admit | None) -> Frame | None:
        prefix = self._prefix
        if prefix is None:
            if self._mismatch is not None:
                self._hear_out(self._mismatch)
                return None
            if self._end - self._begin < PREFIX.size:
                self._wanted = PREFIX.size
                return None
            data = self._buffer[self._begin : self._begin + PREFIX.size]
            self._begin += PREFIX.size
            try:
                prefix = decode_prefix(data)
            except VersionMismatch as error:
                self._mismatch = error
                self.is_refusing = True
                self._hear_out(error)
                return None
            if admit is not None:
                admit(prefix)
            self._prefix = prefix
        message = self._message
        if message is None:
            header = self._take(prefix.header_bytes)
            if header is None:
                return None
            message = decode_header(prefix.kind, header)
        count = prefix.payload_bytes
        payload = self._take_own(count) if count else NO_PAYLOAD
        if payload is None:
            self._message = message
            return None
        self._prefix = self._message = None
        return message, payload

    def _take(self, count: int) -> memoryview | None:
        """Return the next ``count`` bytes, valid until ``space``, or None if some are missing."""
        if count > len(self._buffer):
            return self._take_own(count)
        begin = self._begin
        if self._end - begin < count:
            self._wanted = count
            return None
        self._begin = end = begin + count
        return self._buffer[begin:end]

    def _take_own(self, count: int) -> memoryview | None:
        """Return the next ``count`` bytes in memory of their own, aligned for any number."""
        own = self._own
        if own is None:
            begin = self._begin
            filled = min(self._end - begin, count)
            self._begin = end = begin + filled
            if filled == count:
                return memoryview(bytearray(self._buffer[begin:end]))
            own = self._own = np.empty(count, np.uint8).data
            own[:filled] = self._buffer[begin:end]
            self._filled = filled
        if self._filled < count:
            return None
        self._own = None
        return own

    def _hear_out(self, error: VersionMismatch) -> None:
        """Read who sent the first message of another version, then refuse the sender."""
        wanted = error.header_bytes if error.header_bytes <= BUFFER_BYTES else 0
        header = self._take(wanted)
        if header is not None:
            raise self._refuse_version(error, bytes(header))

    def _refuse(self, error: AuthFailed) -> AuthFailed:
        """Put the refusal into ``outgoing``, and return the error with the peer's name."""
        if error.refusal is not None:
            self.outgoing.append(encode(JoinRefused(error.refusal)))
        return AuthFailed(f"{self._peer}: {error}", error.refusal)

    def _refuse_version(self, error: VersionMismatch, header: bytes) -> VersionMismatch:
        host = self._peer.rpartition(":")[0] or self._peer
        stranger = Stranger.of(host, error.theirs, error.code, header)
        self.outgoing.append(encode_refusal(stranger.refusal(), error.theirs))
        return VersionMismatch(error.ours, error.theirs, story=stranger.story())
