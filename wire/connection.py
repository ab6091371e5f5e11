"""One framed connection between two processes: the only module that touches stream sockets.

``Connection`` blocks (agents: a thread owns each connection), ``AsyncConnection`` awaits (the
coordinator). Both speak wire.codec. Where there is a token, the handshake of wire.auth comes before
anything else: in ``Connection.connect``, in the first ``receive`` of what a Listener accepted, and
in ``serve``. Nothing else in the program knows of it.

What was accepted sits in a lobby until ``receive_hello`` returns, and may be closed there.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import secrets
import socket
import struct
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import NoReturn

import numpy as np

from wire import admission, auth, limits
from wire.admission import Admit
from wire.auth import Handshake, Token
from wire.codec import (
    PREFIX,
    decode_header,
    decode_prefix,
    encode,
    encode_as,
    encode_refusal,
)
from wire.errors import AuthFailed, ConnectFailed, ConnectionLost, VersionMismatch, WireError
from wire.lobby import Lobby
from wire.messages import AgentHello, AuthChallenge, Endpoint, JoinRefused, Message
from wire.patience import within
from wire.rare_log import RareLog
from wire.versions import OLDEST, Stranger, hello_of_oldest

log = logging.getLogger(__name__)

Buffer = bytes | bytearray | memoryview
"""Raw bytes; a memoryview must be one of bytes."""

NO_PAYLOAD = memoryview(b"")

BUFFER_BYTES = 16 << 10
"""Received in one call where they are there: a token's whole frame. Of a larger payload so
much at most is copied, the rest comes straight into memory of its own."""

REFUSAL_S = 0.5
REFUSAL_READS = 16
"""Patience with a peer that is refused, and may still be sending its first message."""

MAX_TOLD = 256
"""Peers of other versions that are logged: more would only fill the log."""

ACCEPT_PAUSE_S = 0.1
"""Pause of a listener that has no memory or file descriptor left for the next connection."""

ACCEPT_AT_ONCE = 64
"""Connections that asyncio accepts before anything else has its turn."""

BACKLOG = 1024
"""Connections that wait in the kernel to be accepted: beyond them, a caller tries again after a
second."""


class Connection:
    """A blocking framed connection. ``send`` may be called by many threads, ``receive`` by one.

    Both raise ConnectionLost when the peer is gone and ProtocolError when it misbehaves; after
    either, the connection is closed.
    """

    def __init__(
        self,
        sock: socket.socket,
        handshake: Handshake | None = None,
        lobby: Lobby | None = None,
    ) -> None:
        """``handshake``: what the other end must pass before ``receive`` returns anything.
        ``lobby``: where the connection sits until ``receive_hello`` returns.
        """
        self.admit: Admit | None = None
        """What may come next; None: anything."""
        self._socket = sock
        self._handshake = handshake
        self._lobby = lobby
        self._opened_s = time.monotonic()
        self._deadline_s: float | None = None
        self._timeout_s: float | None = None
        self._send_lock = threading.Lock()
        # What has been received and not taken yet: [begin, end).
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        self._begin = self._end = 0
        self.peer = peer_name(sock)
        self.peer_host = self.peer.rpartition(":")[0]
        tune(sock)
        sock.settimeout(None)
        set_timeout(sock, socket.SO_SNDTIMEO, limits.SEND_TIMEOUT_S)

    @staticmethod
    def connect(
        endpoint: Endpoint,
        timeout_s: float = limits.CONNECT_TIMEOUT_S,
        *,
        token: Token | None = None,
    ) -> Connection:
        """Connect to an address; with a token, to somebody who knows it.

        Raises ConnectFailed, AuthFailed.
        """
        try:
            connection = Connection(
                socket.create_connection((endpoint.host, endpoint.port), timeout=timeout_s)
            )
        except (OSError, OverflowError, ValueError) as error:
            # A host name that is none raises UnicodeError, a port that is none OverflowError.
            raise ConnectFailed(
                f"cannot connect to {endpoint.host}:{endpoint.port}: {reason(error)}"
            ) from error
        if token is not None:
            connection._pass(auth.call(token))
        return connection

    @property
    def local_host(self) -> str:
        """Our own address as this peer sees it."""
        return str(self._socket.getsockname()[0])

    def set_receive_timeout(self, seconds: float | None) -> None:
        """Let ``receive`` raise ConnectionLost after this much silence; None waits for ever.

        Raises ConnectionLost where another thread has closed the connection meanwhile.
        """
        self._timeout_s = seconds
        try:
            set_timeout(self._socket, socket.SO_RCVTIMEO, seconds or 0.0)
        except OSError as error:
            raise ConnectionLost(f"{self.peer}: {reason(error)}") from error

    def send(self, message: Message, payload: Buffer = b"") -> None:
        """Send one frame: header and payload leave in one call."""
        body_bytes = len(payload)
        head = encode(message, body_bytes)
        try:
            with self._send_lock:
                sent = self._socket.sendmsg((head, payload) if body_bytes else (head,))
                if sent < len(head) + body_bytes:
                    self._socket.sendall(head[sent:])
                    self._socket.sendall(memoryview(payload)[max(sent - len(head), 0) :])
        except OSError as error:
            self.close()
            raise ConnectionLost(f"{self.peer}: {reason(error)}") from error

    def receive(self) -> tuple[Message, memoryview]:
        """The next message and its payload (empty if none); the payload is the caller's to keep.

        Raises AuthFailed where the other end has not proved to know the token.
        """
        if self._handshake is not None:
            handshake, self._handshake = self._handshake, None
            self._pass(handshake)
        message, payload = self._receive(self.admit)
        if type(message) is AuthChallenge:
            self._refuse(AuthFailed(auth.CAME_WITH, auth.UNWANTED))
        return message, payload

    def receive_hello(self, largest_bytes: Mapping[type[Message], int]) -> Message:
        """The first message of a peer that was accepted: one of these kinds, each with its largest
        header.

        The peer has HELLO_TIMEOUT_S from the moment it was accepted. Raises WireError.
        """
        if self._handshake is not None:
            handshake, self._handshake = self._handshake, None
            self._pass(handshake)
        self._deadline_s = self._opened_s + limits.HELLO_TIMEOUT_S
        message, _ = self._receive(admission.hello(largest_bytes))
        if type(message) is AuthChallenge:
            self._refuse(AuthFailed(auth.CAME_WITH, auth.UNWANTED))
        self._deadline_s = None
        self.set_receive_timeout(self._timeout_s)
        if self._lobby is not None and not self._lobby.leave(self):
            raise ConnectionLost(f"{self.peer} made room for others")
        return message

    def close(self) -> None:
        """Close at once and wake a thread that is blocked in ``receive``. Idempotent."""
        if self._lobby is not None:
            self._lobby.leave(self)
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _pass(self, handshake: Handshake) -> None:
        """Go through a handshake within HANDSHAKE_TIMEOUT_S. Raises WireError."""
        self._deadline_s = time.monotonic() + limits.HANDSHAKE_TIMEOUT_S
        incoming: Message | None = None
        try:
            while True:
                outgoing = handshake.send(incoming)
                incoming = None
                if outgoing is None:
                    incoming, _ = self._receive(admit=auth.admit)
                else:
                    self.send(outgoing)
        except StopIteration:
            self._deadline_s = None
            self.set_receive_timeout(self._timeout_s)
        except AuthFailed as error:
            self._refuse(error)

    def _refuse(self, error: AuthFailed) -> NoReturn:
        """Tell the other end why, close, and raise the error with its name."""
        with contextlib.suppress(WireError, OSError):
            if error.refusal is not None:
                self.send(JoinRefused(error.refusal))
                self._drain()
        self.close()
        raise AuthFailed(f"{self.peer}: {error}", error.refusal) from error

    def _receive(self, admit: Admit | None = None) -> tuple[Message, memoryview]:
        """``admit`` may raise at what a prefix announces."""
        try:
            if self._end - self._begin < PREFIX.size:
                self._fill(PREFIX.size, inside=False)
            prefix = decode_prefix(self._take(PREFIX.size))
            if admit is not None:
                admit(prefix)
            kind, header_bytes, payload_bytes = prefix
            message = decode_header(kind, self._take(header_bytes))
            payload = self._take_own(payload_bytes) if payload_bytes else NO_PAYLOAD
        except AuthFailed:
            raise  # The other end is still to be told.
        except VersionMismatch as error:
            raise self._refuse_version(error) from error
        except OSError as error:
            self.close()
            raise ConnectionLost(f"{self.peer}: {reason(error)}") from error
        except BaseException:
            self.close()
            raise
        return message, payload

    def _refuse_version(self, error: VersionMismatch) -> VersionMismatch:
        """Tell the other end, close; the error with all that is known."""
        header = b""
        with contextlib.suppress(WireError, OSError):
            self._deadline_s = time.monotonic() + REFUSAL_S
            if error.header_bytes <= BUFFER_BYTES:
                header = bytes(self._take(error.header_bytes))
        stranger = Stranger.of(host_of(self.peer), error.theirs, error.code, header)
        with contextlib.suppress(OSError):
            self._socket.sendall(encode_refusal(stranger.refusal(), error.theirs))
            self._drain()
        self.close()
        return VersionMismatch(error.ours, error.theirs, story=stranger.story())

    def _drain(self) -> None:
        """Read what still comes: closed with something unread, the connection would be reset, and
        what was said last be lost."""
        self._socket.shutdown(socket.SHUT_WR)
        set_timeout(self._socket, socket.SO_RCVTIMEO, REFUSAL_S)
        for _ in range(REFUSAL_READS):
            if not self._socket.recv_into(self._buffer):
                break

    def _fill(self, count: int, *, inside: bool = True) -> None:
        """Have at least ``count`` bytes in the buffer, which must be able to hold them."""
        if self._begin == self._end:
            self._begin = self._end = 0
        elif self._begin + count > len(self._buffer):
            rest = self._buffer[self._begin : self._end].tobytes()
            self._buffer[: len(rest)] = rest
            self._begin, self._end = 0, len(rest)
        while self._end - self._begin < count:
            self._end += self._receive_into(
                self._buffer[self._end :], inside=inside or self._end > self._begin
            )

    def _take(self, count: int) -> memoryview:
        """The next ``count`` bytes, valid until more are asked for."""
        if self._end - self._begin < count:
            if count > len(self._buffer):
                return self._take_own(count)
            self._fill(count)
        begin = self._begin
        self._begin = end = begin + count
        return self._buffer[begin:end]

    def _take_own(self, count: int) -> memoryview:
        """The next ``count`` bytes in memory of their own, aligned for any number."""
        begin = self._begin
        filled = self._end - begin
        if filled >= count:
            self._begin = end = begin + count
            return memoryview(bytearray(self._buffer[begin:end]))
        data: memoryview = np.empty(count, np.uint8).data
        data[:filled] = self._buffer[begin : self._end]
        self._begin = self._end = 0
        while filled < count:
            filled += self._receive_into(data[filled:], socket.MSG_WAITALL)
        return data

    def _receive_into(self, view: memoryview, flags: int = 0, *, inside: bool = True) -> int:
        if self._deadline_s is not None:
            left_s = self._deadline_s - time.monotonic()
            if left_s <= 0:
                raise ConnectionLost(f"{self.peer} took too long to say who it is")
            set_timeout(self._socket, socket.SO_RCVTIMEO, max(left_s, 1e-3))
        count = self._socket.recv_into(view, 0, flags)
        if count == 0:
            where = " in the middle of a message" if inside else ""
            raise ConnectionLost(f"{self.peer} closed the connection{where}")
        return count


class Listener:
    """A listening TCP socket that yields Connections; with a token, of those who know it."""

    def __init__(self, host: str, port: int, *, token: Token | None = None) -> None:
        """Bind. Port 0 takes a free one. Raises ConnectFailed where the address is taken."""
        self._token = token
        self._socket = bind(host, port)
        self.host: str = self._socket.getsockname()[0]
        self.port: int = self._socket.getsockname()[1]
        self._lobby = Lobby(f"port {self.port}")
        self._closed = False
        self._rare_log = RareLog(log)

    def accept(self) -> Connection | None:
        """The next connection, which has not proved anything yet; None once closed.

        Goes on whatever one connection, or a lack of memory or file descriptors, does to it.
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
                handshake = None if self._token is None else auth.answer(self._token)
                connection = Connection(sock, handshake, self._lobby)
            except OSError:  # The peer is gone again.
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


class AsyncConnection:
    """The awaiting counterpart of Connection, with the same errors."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        lobby: Lobby | None = None,
    ) -> None:
        """As ``Connection``."""
        self.admit: Admit | None = None
        """What may come next; None: anything."""
        self._reader = reader
        self._writer = writer
        self._lobby = lobby
        self._opened_s = time.monotonic()
        self._send_lock = asyncio.Lock()
        sock: socket.socket = writer.get_extra_info("socket")
        self.peer = peer_name(sock)
        # A peer that is gone again before it was accepted has no address.
        self.peer_host: str = (writer.get_extra_info("peername") or ("",))[0]
        self.local_host: str = (writer.get_extra_info("sockname") or ("",))[0]
        """Our own address as this peer sees it."""
        tune(sock)

    async def send(self, message: Message, payload: Buffer = b"") -> None:
        """Send one frame."""
        head = encode(message, len(payload))
        try:
            async with self._send_lock:
                self._writer.write(head)
                if len(payload):
                    self._writer.write(payload)
                await within(self._writer.drain(), limits.SEND_TIMEOUT_S)
        except (OSError, asyncio.TimeoutError) as error:
            self.close()
            raise ConnectionLost(f"{self.peer}: {reason(error)}") from error

    async def receive(self, timeout_s: float | None = None) -> tuple[Message, bytes]:
        """The next message and its payload; ConnectionLost after ``timeout_s`` of silence."""
        message, payload = await self._receive_within(timeout_s, self.admit)
        if type(message) is AuthChallenge:
            await self._refuse(AuthFailed(auth.CAME_WITH, auth.UNWANTED))
        return message, payload

    async def receive_hello(self, largest_bytes: Mapping[type[Message], int]) -> Message:
        """As ``Connection.receive_hello``."""
        left_s = max(self._opened_s + limits.HELLO_TIMEOUT_S - time.monotonic(), 0.0)
        message, _ = await self._receive_within(left_s, admission.hello(largest_bytes))
        if type(message) is AuthChallenge:
            await self._refuse(AuthFailed(auth.CAME_WITH, auth.UNWANTED))
        if self._lobby is not None and not self._lobby.leave(self):
            raise ConnectionLost(f"{self.peer} made room for others")
        return message

    async def prove(self, handshake: Handshake) -> None:
        """Go through a handshake within HANDSHAKE_TIMEOUT_S. Raises AuthFailed, WireError."""
        deadline_s = time.monotonic() + limits.HANDSHAKE_TIMEOUT_S
        incoming: Message | None = None
        try:
            while True:
                outgoing = handshake.send(incoming)
                incoming = None
                if outgoing is None:
                    left_s = max(deadline_s - time.monotonic(), 0.0)
                    incoming, _ = await self._receive_within(left_s, auth.admit)
                else:
                    await self.send(outgoing)
        except StopIteration:
            pass
        except AuthFailed as error:
            await self._refuse(error)

    async def _refuse(self, error: AuthFailed) -> NoReturn:
        with contextlib.suppress(WireError, OSError, asyncio.TimeoutError):
            if error.refusal is not None:
                await self.send(JoinRefused(error.refusal))
                await self._drain()
        self.close()
        raise AuthFailed(f"{self.peer}: {error}", error.refusal) from error

    async def _refuse_version(self, error: VersionMismatch) -> VersionMismatch:
        header = b""
        with contextlib.suppress(OSError, asyncio.TimeoutError, asyncio.IncompleteReadError):
            if error.header_bytes <= BUFFER_BYTES:
                reading = self._reader.readexactly(error.header_bytes)
                header = await asyncio.wait_for(reading, REFUSAL_S)
        stranger = Stranger.of(self.peer_host, error.theirs, error.code, header)
        with contextlib.suppress(OSError, asyncio.TimeoutError):
            self._writer.write(encode_refusal(stranger.refusal(), error.theirs))
            await self._drain()
        self.close()
        return VersionMismatch(error.ours, error.theirs, story=stranger.story())

    async def _drain(self) -> None:
        self._writer.write_eof()
        for _ in range(REFUSAL_READS):
            if not await asyncio.wait_for(self._reader.read(BUFFER_BYTES), REFUSAL_S):
                break

    async def _receive_within(
        self, timeout_s: float | None, admit: Admit | None = None
    ) -> tuple[Message, bytes]:
        try:
            return await within(self._receive(admit), timeout_s)
        except AuthFailed:
            raise  # The other end is still to be told.
        except VersionMismatch as error:
            raise await self._refuse_version(error) from error
        except asyncio.TimeoutError as error:
            self.close()
            raise ConnectionLost(f"{self.peer} was silent for {timeout_s:g} s") from error
        except asyncio.IncompleteReadError as error:
            self.close()
            where = " in the middle of a message" if error.partial else ""
            raise ConnectionLost(f"{self.peer} closed the connection{where}") from error
        except OSError as error:
            self.close()
            raise ConnectionLost(f"{self.peer}: {reason(error)}") from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close at once. Idempotent."""
        if self._lobby is not None:
            self._lobby.leave(self)
        self._writer.close()

    async def _receive(self, admit: Admit | None) -> tuple[Message, bytes]:
        prefix = decode_prefix(await self._reader.readexactly(PREFIX.size))
        if admit is not None:
            admit(prefix)
        header = await self._reader.readexactly(prefix.header_bytes)
        message = decode_header(prefix.kind, header)
        payload = b""
        if prefix.payload_bytes:
            payload = await self._reader.readexactly(prefix.payload_bytes)
        return message, payload


async def serve(
    host: str,
    port: int,
    handle: Callable[[AsyncConnection], Awaitable[None]],
    *,
    token: Token | None = None,
) -> tuple[asyncio.Server, int]:
    """Accept AsyncConnections on an address; returns the server and its port.

    With a token, only those who know it get to ``handle``; who does not is logged. A peer of
    another version is logged once, not at each of its attempts. Raises ConnectFailed where the
    address is taken.
    """
    listening = bind(host, port)
    bound_port = int(listening.getsockname()[1])
    lobby = Lobby(f"port {bound_port}")
    rare_log = RareLog(log)
    told: set[str] = set()

    async def on_connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = AsyncConnection(reader, writer, lobby)
        lobby.enter(connection, connection.peer_host, connection.close)
        try:
            if token is not None:
                await connection.prove(auth.answer(token))
            await handle(connection)
        except VersionMismatch as error:
            if str(error) not in told and len(told) < MAX_TOLD:
                told.add(str(error))
                log.warning("connection refused: %s", error)
        except AuthFailed as error:
            rare_log.warning(error.refusal or "refused", "connection refused: %s", error)
        except WireError as error:
            log.info("connection dropped: %s", error)
        except asyncio.CancelledError:
            pass  # The event loop ends: asyncio would report it as an error of this task.
        finally:
            connection.close()

    server = await asyncio.start_server(on_connect, sock=listening, backlog=ACCEPT_AT_ONCE)
    listening.listen(BACKLOG)
    return server, bound_port


def protocol_of_silent(endpoint: Endpoint, token: Token | None) -> int | None:
    """The protocol of a peer that closes without a word at what we say; None if it stays unknown.

    Only protocol OLDEST does so: it is asked in its own words. Where it has a token, it hears why.
    """
    kind: type[Message] = AgentHello
    values: list[object] = hello_of_oldest()
    if token is not None:
        kind, values = (
            AuthChallenge,
            [auth.HANDSHAKE_VERSION, secrets.token_bytes(auth.NONCE_BYTES)],
        )
    with contextlib.suppress(WireError, OSError):
        connection = Connection.connect(endpoint)
        try:
            connection.set_receive_timeout(limits.CONNECT_TIMEOUT_S)
            connection._socket.sendall(encode_as(OLDEST, kind, values))
            answer, _ = connection.receive()
        except VersionMismatch as error:
            return error.theirs
        finally:
            connection.close()
        return OLDEST if isinstance(answer, JoinRefused) else None
    return None


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConnectFailed with what to do where the address is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        advice = ": choose another port" if error.errno == errno.EADDRINUSE else ""
        raise ConnectFailed(f"cannot listen on {host}:{port}: {reason(error)}{advice}") from error
    except OverflowError as error:
        raise ConnectFailed(f"cannot listen on {host}:{port}: not a port number") from error
    except (TypeError, ValueError) as error:
        raise ConnectFailed(f"cannot listen on {host}:{port}: not a host name") from error


def tune(sock: socket.socket, stall_s: float = limits.LIVENESS_S) -> None:
    """Send small frames at once, and notice a peer that vanished without closing.

    A peer that reads nothing of what waits for it is dropped after ``stall_s``, too.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # Acknowledge at once to begin with, so that the sender's window opens before the first prompt.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    # Without it, unacknowledged data to a dead peer is retransmitted for a quarter of an hour.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(stall_s * 1000))


def set_timeout(sock: socket.socket, option: int, seconds: float) -> None:
    """Set SO_SNDTIMEO or SO_RCVTIMEO: unlike ``settimeout`` they differ per direction."""
    whole = int(seconds)
    sock.setsockopt(
        socket.SOL_SOCKET, option, struct.pack("@ll", whole, int((seconds - whole) * 1e6))
    )


def peer_name(sock: socket.socket) -> str:
    """``host:port`` of the other end, for messages."""
    try:
        address = sock.getpeername()
    except OSError:
        return "peer"
    return f"{address[0]}:{address[1]}"


def host_of(peer: str) -> str:
    """The host of ``host:port``."""
    return peer.rpartition(":")[0] or peer


def reason(error: BaseException) -> str:
    """An operating system error in words a user can use."""
    if isinstance(error, (TimeoutError, asyncio.TimeoutError, BlockingIOError)):
        return "no answer in time"
    if isinstance(error, (socket.gaierror, UnicodeError)):
        return "unknown host"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error) or type(error).__name__
