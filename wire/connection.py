"""One framed connection between two processes: the only module that touches stream sockets.

``Connection`` blocks (agents: a thread owns each connection), ``AsyncConnection`` awaits (the
coordinator). Both speak wire.codec; a secure transport belongs under ``open_socket``/``Listener``
and ``open_async``/``serve`` here, and nowhere else.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import struct
import threading
import time
from collections.abc import Awaitable, Callable
from types import TracebackType

import numpy as np

from wire import limits
from wire.codec import PREFIX, decode_header, decode_prefix, encode
from wire.errors import ConnectFailed, ConnectionLost
from wire.messages import Endpoint, Message

Buffer = bytes | bytearray | memoryview
"""Raw bytes; a memoryview must be one of bytes."""

NO_PAYLOAD = memoryview(b"")

BUFFER_BYTES = 16 << 10
"""Received in one call where they are there: a token's whole frame. Of a larger payload so
much at most is copied, the rest comes straight into memory of its own."""

ACCEPT_PAUSE_S = 0.1
"""Pause of a listener that has no file descriptor left for the next connection."""


class Connection:
    """A blocking framed connection. ``send`` may be called by many threads, ``receive`` by one.

    Both raise ConnectionLost when the peer is gone and ProtocolError when it misbehaves; after
    either, the connection is closed.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._send_lock = threading.Lock()
        # What has been received and not taken yet: [begin, end).
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        self._begin = self._end = 0
        self.peer = peer_name(sock)
        tune(sock)
        sock.settimeout(None)
        set_timeout(sock, socket.SO_SNDTIMEO, limits.SEND_TIMEOUT_S)

    @staticmethod
    def connect(endpoint: Endpoint, timeout_s: float = limits.CONNECT_TIMEOUT_S) -> Connection:
        """Connect to an address. Raises ConnectFailed."""
        try:
            return Connection(
                socket.create_connection((endpoint.host, endpoint.port), timeout=timeout_s)
            )
        except (OSError, OverflowError, ValueError) as error:
            # A host name that is none raises UnicodeError, a port that is none OverflowError.
            raise ConnectFailed(
                f"cannot connect to {endpoint.host}:{endpoint.port}: {reason(error)}"
            ) from error

    @property
    def local_host(self) -> str:
        """Our own address as this peer sees it."""
        return str(self._socket.getsockname()[0])

    def set_receive_timeout(self, seconds: float | None) -> None:
        """Let ``receive`` raise ConnectionLost after this much silence; None waits for ever."""
        set_timeout(self._socket, socket.SO_RCVTIMEO, seconds or 0.0)

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
        """The next message and its payload (empty if none); the payload is the caller's to keep."""
        try:
            if self._end - self._begin < PREFIX.size:
                self._fill(PREFIX.size, inside=False)
            kind, header_bytes, payload_bytes = decode_prefix(self._take(PREFIX.size))
            message = decode_header(kind, self._take(header_bytes))
            payload = self._take_own(payload_bytes) if payload_bytes else NO_PAYLOAD
        except OSError as error:
            self.close()
            raise ConnectionLost(f"{self.peer}: {reason(error)}") from error
        except BaseException:
            self.close()
            raise
        return message, payload

    def close(self) -> None:
        """Close at once and wake a thread that is blocked in ``receive``. Idempotent."""
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
        count = self._socket.recv_into(view, 0, flags)
        if count == 0:
            where = " in the middle of a message" if inside else ""
            raise ConnectionLost(f"{self.peer} closed the connection{where}")
        return count


class Listener:
    """A listening TCP socket that yields Connections."""

    def __init__(self, host: str, port: int) -> None:
        """Bind. Port 0 takes a free one. Raises ConnectFailed where the address is taken."""
        self._socket = bind(host, port)
        self.port: int = self._socket.getsockname()[1]

    def accept(self) -> Connection | None:
        """The next connection; None once the listener is closed."""
        while True:
            try:
                sock, _ = self._socket.accept()
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    time.sleep(ACCEPT_PAUSE_S)
                    continue
                if error.errno == errno.ECONNABORTED:
                    continue
                return None
            return Connection(sock)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class AsyncConnection:
    """The awaiting counterpart of Connection, with the same errors."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._send_lock = asyncio.Lock()
        sock: socket.socket = writer.get_extra_info("socket")
        self.peer = peer_name(sock)
        # A peer that is gone again before it was accepted has no address.
        self.peer_host: str = (writer.get_extra_info("peername") or ("",))[0]
        tune(sock)

    async def send(self, message: Message, payload: Buffer = b"") -> None:
        """Send one frame."""
        head = encode(message, len(payload))
        try:
            async with self._send_lock:
                self._writer.write(head)
                if len(payload):
                    self._writer.write(payload)
                await asyncio.wait_for(self._writer.drain(), limits.SEND_TIMEOUT_S)
        except (OSError, asyncio.TimeoutError) as error:
            self.close()
            raise ConnectionLost(f"{self.peer}: {reason(error)}") from error

    async def receive(self, timeout_s: float | None = None) -> tuple[Message, bytes]:
        """The next message and its payload; ConnectionLost after ``timeout_s`` of silence."""
        try:
            return await asyncio.wait_for(self._receive(), timeout_s)
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
        self._writer.close()

    async def _receive(self) -> tuple[Message, bytes]:
        prefix = decode_prefix(await self._reader.readexactly(PREFIX.size))
        header = await self._reader.readexactly(prefix.header_bytes)
        message = decode_header(prefix.kind, header)
        payload = b""
        if prefix.payload_bytes:
            payload = await self._reader.readexactly(prefix.payload_bytes)
        return message, payload


async def serve(
    host: str, port: int, handle: Callable[[AsyncConnection], Awaitable[None]]
) -> tuple[asyncio.Server, int]:
    """Accept AsyncConnections on an address; returns the server and its port.

    Raises ConnectFailed where the address is taken.
    """

    async def on_connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = AsyncConnection(reader, writer)
        try:
            await handle(connection)
        except asyncio.CancelledError:
            pass  # The event loop ends: asyncio would report it as an error of this task.
        finally:
            connection.close()

    listening = bind(host, port)
    server = await asyncio.start_server(on_connect, sock=listening)
    return server, int(listening.getsockname()[1])


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConnectFailed with what to do where the address is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=64)
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


def reason(error: BaseException) -> str:
    """An operating system error in words a user can use."""
    if isinstance(error, (TimeoutError, asyncio.TimeoutError, BlockingIOError)):
        return "no answer in time"
    if isinstance(error, (socket.gaierror, UnicodeError)):
        return "unknown host"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error) or type(error).__name__
