"""Streams of bytes between two machines: the interface that wire.connection needs, and TCP.

Another transport (wire.tls, memory) is one subclass of Transport. AsyncConnection needs none. It
takes a StreamReader and a StreamWriter.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import socket
import ssl
import struct
import termios
import time
from abc import ABC, abstractmethod
from collections.abc import Callable

from wire import limits
from wire.errors import ConnectFailed

Buffer = bytes | bytearray | memoryview
"""Raw bytes. A memoryview must have items of one byte."""

DONT_WAIT = int(socket.MSG_DONTWAIT)

OnWait = Callable[[], object]
"""Is called before a sender waits for its peer, once or more."""

BACKLOG = 1024
"""Connections that wait in the kernel to be accepted. Later callers retry after a second."""


class Transport(ABC):
    """One end of a stream. One thread may receive while another one sends.

    All methods but ``close`` raise OSError if the stream is broken.
    """

    peer: str
    """``host:port`` of the other end, for messages."""
    local_host: str
    """Our own address as the peer sees it."""

    @abstractmethod
    def send(self, head: Buffer, payload: Buffer = b"", on_wait: OnWait | None = None) -> None:
        """Send both, one after the other.

        Raises TimeoutError if the peer takes nothing for SEND_TIMEOUT_S.
        """

    @abstractmethod
    def receive_into(self, view: memoryview, whole: bool) -> int | None:
        """Receive at least one byte, and return the number. 0 is the end of the stream.

        None means that something arrived which is not yet text. So slow bytes do not extend the
        caller's deadline. ``whole`` means that the caller awaits all of ``view``, so the transport
        may wait for it.
        Raises TimeoutError or BlockingIOError after the receive timeout.
        """

    def unacknowledged_bytes(self) -> int:
        """Return the bytes that the other machine has not acknowledged, or 0 if unknown."""
        return 0

    # Streams that a thread can poll have the next three methods.

    def fileno(self) -> int:
        """Return the descriptor that ``poll`` takes."""
        raise OSError(errno.EOPNOTSUPP, "this transport cannot be polled")

    def send_now(self, head: Buffer, payload: Buffer = b"") -> int:
        """Send as much of both as fits without waiting, and return the number of bytes."""
        raise OSError(errno.EOPNOTSUPP, "this transport cannot be polled")

    def receive_now(self, view: memoryview) -> int | None:
        """Receive what is there. None if nothing is. 0 is the end of the stream."""
        raise OSError(errno.EOPNOTSUPP, "this transport cannot be polled")

    @abstractmethod
    def set_receive_timeout(self, seconds: float | None) -> None:
        """Limit the silence that ``receive_into`` accepts. None is no limit."""

    @abstractmethod
    def finish_sending(self) -> None:
        """Tell the peer that nothing more comes. Receiving goes on."""

    def cut(self) -> None:
        """End the stream and wake threads that are blocked in a call. Its user closes it later."""
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Close at once and wake a thread that is blocked in a call. Idempotent."""


class TcpTransport(Transport):
    """A TCP socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self.peer = peer_name(sock)
        self.local_host = str(sock.getsockname()[0])
        tune(sock)
        sock.settimeout(None)
        _set_timeout(sock, socket.SO_SNDTIMEO, limits.SEND_TIMEOUT_S)

    def send(self, head: Buffer, payload: Buffer = b"", on_wait: OnWait | None = None) -> None:
        try:
            sent = self._socket.sendmsg((head, payload) if len(payload) else (head,), (), DONT_WAIT)
        except BlockingIOError:
            sent = 0
        if sent < len(head) + len(payload):
            if on_wait is not None:
                on_wait()
            self._send_steadily(head[sent:])
            self._send_steadily(memoryview(payload)[max(sent - len(head), 0) :])

    def _send_steadily(self, data: Buffer, on_wait: OnWait | None = None) -> None:
        """Send all of it. Raises TimeoutError if the peer takes it slower than anybody would.

        The kernel's limit is for silence alone, and a peer may read a byte now and then.
        """
        try:
            sent = self._socket.send(data, DONT_WAIT)
        except BlockingIOError:
            sent = 0
        if sent == len(data):
            return
        rest = memoryview(data)[sent:]
        if on_wait is not None:
            on_wait()
        limit_s = limits.SEND_TIMEOUT_S + len(rest) / limits.LEAST_BYTES_PER_S
        deadline_s = time.monotonic() + limit_s
        while rest:
            rest = rest[self._socket.send(rest) :]
            if rest and time.monotonic() > deadline_s:
                raise TimeoutError

    def receive_into(self, view: memoryview, whole: bool) -> int | None:
        return self._socket.recv_into(view, 0, socket.MSG_WAITALL if whole else 0)

    def fileno(self) -> int:
        return self._socket.fileno()

    def unacknowledged_bytes(self) -> int:
        size = bytearray(struct.calcsize("i"))
        try:
            fcntl.ioctl(self._socket, termios.TIOCOUTQ, size)
        except (OSError, ValueError):  # It is closed. Then it has no descriptor.
            return 0
        (count,) = struct.unpack("i", size)
        return int(count)

    def send_now(self, head: Buffer, payload: Buffer = b"") -> int:
        parts = (head, payload) if len(payload) else (head,)
        try:
            return self._socket.sendmsg(parts, (), DONT_WAIT)
        except BlockingIOError:
            return 0

    def receive_now(self, view: memoryview) -> int | None:
        try:
            return self._socket.recv_into(view, 0, DONT_WAIT)
        except BlockingIOError:
            return None

    def set_receive_timeout(self, seconds: float | None) -> None:
        _set_timeout(self._socket, socket.SO_RCVTIMEO, seconds or 0.0)

    def finish_sending(self) -> None:
        self._socket.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.cut()
        self._socket.close()


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises ConnectFailed with advice if the address is taken."""
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

    A peer that stops reading is dropped after ``stall_s``, too.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # Acknowledging at once opens the sender's window before the first prompt.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    # Otherwise TCP retransmits to a dead peer for a quarter of an hour.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(stall_s * 1000))


def _set_timeout(sock: socket.socket, option: int, seconds: float) -> None:
    """Set SO_SNDTIMEO or SO_RCVTIMEO. Unlike ``settimeout``, they differ per direction."""
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
    """Describe an operating system error in words that a user can use."""
    if isinstance(error, (TimeoutError, BlockingIOError)):
        return "no answer in time"
    if isinstance(error, (socket.gaierror, UnicodeError)):
        return "unknown host"
    if isinstance(error, ssl.SSLError):
        why: str = getattr(error, "reason", None) or "no reason given"
        return f"it breaks TLS: {why.lower().replace('_', ' ')}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error) or type(error).__name__
