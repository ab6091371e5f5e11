"""Connections between two processes: the adapter between wire.framing and blocking streams.

Agents use it, with one thread for each connection. wire.async_connection awaits. Both drive a
wire.framing.Framer, so they speak the same protocol and raise the same errors.

With a Caller and an Answerer, TLS and then the handshake of wire.introduction come first. It all
runs in ``Connection.connect``, in the first ``receive`` of an accepted connection, and in
``async_connection.serve``. No other code knows about it. Without them, nothing is encrypted, and
anybody is let in.

An accepted connection sits in a lobby until ``receive_hello`` returns, and may be closed there.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from types import TracebackType
from typing import TypeVar

from wire import admission, introduction, limits
from wire.admission import Admit
from wire.claim import Claim
from wire.codec import encode, encode_as
from wire.errors import ConnectFailed, ConnectionLost, VersionMismatch, WireError
from wire.framing import BUFFER_BYTES, Frame, Framer
from wire.handshake import Handshake
from wire.introduction import Answerer, Caller
from wire.lobby import Lobby
from wire.messages import AgentHello, Endpoint, JoinRefused, Message
from wire.rare_log import RareLog
from wire.tls import TlsTransport, own_client_context, server_context
from wire.transport import (
    Buffer,
    OnWait,
    TcpTransport,
    Transport,
    bind,
    reason,
)
from wire.versions import OLDEST, hello_of_oldest

log = logging.getLogger(__name__)

Result = TypeVar("Result")

MakeTransport = Callable[[socket.socket], Transport]
"""Makes a transport from a connected socket."""

REFUSAL_S = 0.5
REFUSAL_READS = 16
"""How often to read from a refused peer that may still be sending its first message."""

MAX_TOLD = 256
"""The number of peers of other versions that are logged. More would only fill the log."""

ACCEPT_PAUSE_S = 0.1
"""The pause of a listener that has no memory or file descriptor for the next connection."""


class Connection:
    """A blocking framed connection. Many threads may call ``send``, and one may call ``receive``.

    Both raise ConnectionLost if the peer is gone, and ProtocolError if it misbehaves. After either
    error the connection is closed.
    """

    def __init__(
        self,
        transport: Transport,
        handshake: Handshake | None = None,
        lobby: Lobby | None = None,
    ) -> None:
        """Own a transport. ``handshake`` must succeed before ``receive`` returns anything.

        The connection sits in ``lobby`` until ``receive_hello`` returns.
        """
        self.peer = transport.peer
        self.peer_host = self.peer.rpartition(":")[0]
        self.local_host = transport.local_host
        """Our own address as this peer sees it."""
        self._transport = transport
        self._framer = Framer(transport.peer, handshake)
        self._lobby = lobby
        self._opened_s = time.monotonic()
        self._deadline_s: float | None = None
        self._timeout_s: float | None = None
        self._message_s: float | None = None
        self._is_refusing = False
        self._send_lock = threading.Lock()

    @staticmethod
    def connect(
        endpoint: Endpoint,
        timeout_s: float = limits.CONNECT_TIMEOUT_S,
        *,
        caller: Caller | None = None,
        transport: MakeTransport = TcpTransport,
    ) -> Connection:
        """Connect to an address.

        With a Caller, the connection is encrypted, and the peer must be the expected answerer.
        Raises ConnectFailed, AuthFailed.
        """
        handshake: Handshake | None = None
        if caller is not None:
            handshake = introduction.call(caller)
            context, fingerprint = own_client_context(), caller.answerer
            transport = partial(TlsTransport, context=context, fingerprint=fingerprint)
        try:
            sock = socket.create_connection((endpoint.host, endpoint.port), timeout=timeout_s)
            connection = Connection(transport(sock), handshake)
        except (OSError, OverflowError, ValueError) as error:
            # A malformed host name raises UnicodeError, and an impossible port OverflowError.
            raise ConnectFailed(
                f"cannot connect to {endpoint.host}:{endpoint.port}: {reason(error)}"
            ) from error
        connection._prove()
        return connection

    @property
    def admit(self) -> Admit | None:
        """The check on the next frame. None admits every frame."""
        return self._framer.admit

    @admit.setter
    def admit(self, admit: Admit | None) -> None:
        self._framer.admit = admit

    @property
    def claim(self) -> Claim | None:
        """The proofs of an accepted connection's caller, once there are any. None without TLS."""
        return self._framer.claim

    def set_receive_timeout(self, seconds: float | None) -> None:
        """Let ``receive`` raise ConnectionLost after this much silence. None waits for ever.

        Raises ConnectionLost if another thread has closed the connection meanwhile.
        """
        self._timeout_s = seconds
        try:
            self._transport.set_receive_timeout(seconds)
        except OSError as error:
            raise ConnectionLost(f"{self.peer}: {reason(error)}") from error

    def limit_message(self, seconds: float | None) -> None:
        """Let each ``receive`` last so long at most, however steadily bytes drip. None: for ever.

        ``set_receive_timeout`` limits only the silence between two bytes.
        """
        self._message_s = seconds

    def send(self, message: Message, payload: Buffer = b"", on_wait: OnWait | None = None) -> None:
        """Send one frame. Header and payload leave in one call.

        ``on_wait`` is called before it waits for the peer. If another thread waits for it just
        then, that one's is called, so all senders of a connection must give the same.
        """
        head = encode(message, len(payload))
        lock = self._send_lock
        if on_wait is not None and lock.locked():
            on_wait()
        try:
            with lock:
                self._transport.send(head, payload, on_wait)
        except OSError as error:
            self.close()
            raise ConnectionLost(f"{self.peer}: {reason(error)}") from error

    def receive(self) -> tuple[Message, memoryview]:
        """Return the next message and its payload, which the caller may keep. It may be empty.

        Raises AuthFailed if the peer has not proved who it is, or may not come in.
        """
        if self._framer.is_proving:
            self._prove()
        if self._message_s is None:
            return self._until(self._framer.next_frame)
        self._deadline_s = time.monotonic() + self._message_s
        frame = self._until(self._framer.next_frame)
        self._deadline_s = None
        return frame

    # A thread that serves several connections polls them, and uses the next three methods.

    def fileno(self) -> int:
        """Return the descriptor that ``poll`` takes."""
        return self._transport.fileno()

    def send_now(self, frame: Buffer, payload: Buffer = b"") -> int:
        """Send as much of an encoded frame as fits without waiting; return the number of bytes.

        The rest must be sent before anything else.
        """
        try:
            with self._send_lock:
                return self._transport.send_now(frame, payload)
        except OSError as error:
            self.close()
            raise ConnectionLost(f"{self.peer}: {reason(error)}") from error

    def receive_now(self) -> Frame | None:
        """Do the same as ``receive``, but return None if the message has not arrived whole.

        The handshake must be over.
        """
        framer = self._framer
        try:
            while (frame := framer.next_frame()) is None:
                count = self._transport.receive_now(framer.space()[0])
                if count is None:
                    return None
                framer.received(count)
        except OSError as error:
            self._part()
            raise framer.lost(f": {reason(error)}") from error
        except BaseException:  # Half a message cannot be continued.
            self._part()
            raise
        return frame

    def receive_hello(self, largest_bytes: Mapping[type[Message], int]) -> Message:
        """Return an accepted peer's first message: one of these kinds, with its largest header.

        The peer has HELLO_TIMEOUT_S from the moment it was accepted. Raises WireError.
        """
        self._prove()
        self._deadline_s = self._opened_s + limits.HELLO_TIMEOUT_S
        admit, self.admit = self.admit, admission.hello(largest_bytes)
        message, _ = self._until(self._framer.next_frame)
        self.admit = admit
        self._deadline_s = None
        self.set_receive_timeout(self._timeout_s)
        if self._lobby is not None and not self._lobby.leave(self):
            raise ConnectionLost(f"{self.peer} was closed to make room for others")
        return message

    def cut(self) -> None:
        """End the stream under a user in another thread, which sees a loss and closes it.

        The descriptor stays until then, because that thread may poll it.
        """
        self._transport.cut()

    def close(self) -> None:
        """Close at once and wake a thread that is blocked in ``receive``. Idempotent."""
        if self._lobby is not None:
            self._lobby.leave(self)
        self._transport.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def unacknowledged_bytes(self) -> int:
        """The sent bytes that the other machine has not acknowledged, or 0 if unknown."""
        return self._transport.unacknowledged_bytes()

    def _prove(self) -> None:
        """Complete the handshake within HANDSHAKE_TIMEOUT_S. Raises WireError."""
        if self._framer.is_proving:
            self._deadline_s = time.monotonic() + limits.HANDSHAKE_TIMEOUT_S
            self._until(self._framer.prove)
            self._deadline_s = None
            self.set_receive_timeout(self._timeout_s)

    def _until(self, step: Callable[[], Result | None]) -> Result:
        """Receive bytes until ``step`` returns something. Closes the connection at any error."""
        framer = self._framer
        try:
            while (result := step()) is None:
                if framer.outgoing:
                    self._flush()
                if framer.is_refusing and not self._is_refusing:
                    self._is_refusing = True
                    self._deadline_s = time.monotonic() + REFUSAL_S
                if self._deadline_s is not None:
                    self._limit(self._deadline_s)
                count = self._transport.receive_into(*framer.space())
                if count is not None:
                    framer.received(count)
            if framer.outgoing:
                self._flush()
        except OSError as error:
            lost = framer.lost(f": {reason(error)}")
            self._part()
            raise lost from error
        except BaseException:  # Refused or interrupted: half a message cannot be continued.
            self._part()
            raise
        return result

    def _limit(self, deadline_s: float) -> None:
        """Let the next receive end at the deadline."""
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            is_named = self._message_s is not None and not self._framer.is_proving
            raise self._framer.lost(
                " sent a message too slowly" if is_named else " took too long to say who it is"
            )
        self._transport.set_receive_timeout(max(left_s, 1e-3))

    def _flush(self) -> None:
        with self._send_lock:
            self._transport.send(self._framer.take_outgoing())

    def _part(self) -> None:
        """Send what the peer must still be told, and close."""
        if self._framer.outgoing:
            with contextlib.suppress(OSError):
                self._flush()
                # The kernel resets a connection that is closed with unread bytes. The last words
                # would be lost.
                self._transport.finish_sending()
                self._transport.set_receive_timeout(REFUSAL_S)
                scrap = memoryview(bytearray(BUFFER_BYTES))
                for _ in range(REFUSAL_READS):
                    if self._transport.receive_into(scrap, False) == 0:
                        break
        self.close()


class Listener:
    """A listening TCP socket that yields Connections.

    With an Answerer, they are encrypted, and callers must introduce themselves.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        answerer: Answerer | None = None,
        transport: MakeTransport = TcpTransport,
    ) -> None:
        """Bind. Port 0 takes a free one. Raises ConnectFailed if the address is taken."""
        if answerer is not None:
            transport = partial(TlsTransport, context=server_context(answerer.identity))
        self._handshake = answering(answerer)
        self._transport = transport
        self._socket = bind(host, port)
        self.host: str = self._socket.getsockname()[0]
        self.port: int = self._socket.getsockname()[1]
        self._lobby = Lobby(f"port {self.port}")
        self._closed = False
        self._rare_log = RareLog(log)

    def accept(self) -> Connection | None:
        """Return the next connection, which has not proved anything yet, or None once closed.

        A broken connection, or a lack of memory or file descriptors, does not end the loop.
        """
        while not self._closed:
            try:
                sock, address = self._socket.accept()
            except OSError as error:
                if not self._closed and error.errno != errno.ECONNABORTED:
                    why = reason(error)
                    self._rare_log.warning("accept", "cannot accept a connection: %s", why)
                    time.sleep(ACCEPT_PAUSE_S)
                continue
            try:
                connection = Connection(self._transport(sock), self._handshake(), self._lobby)
            except OSError:  # The peer has left already.
                sock.close()
                continue
            self._lobby.enter(connection, str(address[0]), connection.close)
            return connection
        return None

    def close(self) -> None:
        self._closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def answering(answerer: Answerer | None) -> Callable[[], Handshake | None]:
    """Return what makes the handshake of each accepted connection."""
    if answerer is None:
        return lambda: None
    return partial(introduction.answer, answerer)


def protocol_of_silent(endpoint: Endpoint) -> int | None:
    """Return the protocol of a peer that closes in silence, or None if it stays unknown.

    Only protocol OLDEST closes in silence, so the peer is asked in that protocol. It is told
    nothing about this machine.
    """
    with contextlib.suppress(WireError, OSError):
        connection = Connection.connect(endpoint)
        try:
            connection.set_receive_timeout(limits.CONNECT_TIMEOUT_S)
            connection._transport.send(encode_as(OLDEST, AgentHello, hello_of_oldest()))
            answer, _ = connection.receive()
        except VersionMismatch as error:
            return error.theirs
        finally:
            connection.close()
        return OLDEST if isinstance(answer, JoinRefused) else None
    return None
