"""TLS on a stream of bytes, with certificates that are known by their fingerprints alone.

``TlsChannel`` has no socket. Bytes from the network go in, and text comes out. One lock guards it,
and nobody waits for the network while holding the lock. So one thread can receive while another one
sends, which an SSLSocket does not promise. ``TlsTransport`` gives it a socket. AsyncConnection
gives it asyncio's streams.

Only the answerer shows a certificate. The caller knows its fingerprint beforehand, and leaves an
answerer that has another one. Then the caller introduces itself inside TLS (wire.introduction).
"""

from __future__ import annotations

import hmac
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import cast

from wire import limits
from wire.claim import Fingerprint, fingerprint_of, shown
from wire.codec import MAGIC, UNENCRYPTED
from wire.errors import AuthFailed, ConnectFailed, NoTls, ProtocolError, WireError
from wire.framing import Framer
from wire.handshake import refuse
from wire.identity import Identity
from wire.transport import DONT_WAIT, Buffer, OnWait, TcpTransport

RAW_BYTES = 64 << 10
"""The most encrypted bytes that are received at once."""

PIECE_BYTES = 64 << 10
"""The most text that is encrypted at once. The other direction waits for the lock so long."""

RECORD_BYTES = 16 << 10
"""The most text of one TLS record. A frame up to this size leaves as one record."""

MAX_UNASKED_BYTES = 64 << 10
"""The most bytes that OpenSSL may owe a peer, whose key updates it answers, for instance."""

_TLS_RECORD = 0x16
"""The first byte of a TLS handshake."""

_OLD_SUITE = "ECDHE-ECDSA-CHACHA20-POLY1305"
"""The only suite of TLS 1.2 that is taken. Devices without instructions for AES ask for it.

Python cannot choose among the suites of TLS 1.3 before version 3.15.
"""

NO_TLS = "it does not answer in TLS: it is no shoal, or an older version"


def server_context(identity: Identity, *, has_aes: bool | None = None) -> ssl.SSLContext:
    """Return the context of an answerer. ``has_aes``: None looks at this processor."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(identity.path)
    # Nobody resumes a session. A ticket would be a write at a time when nobody expects one.
    context.num_tickets = 0
    _choose_suite(context, has_aes)
    return context


def client_context(*, has_aes: bool | None = None) -> ssl.SSLContext:
    """Return the context of a caller, who must check the fingerprint, as TlsTransport does."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    _choose_suite(context, has_aes)
    return context


@lru_cache(maxsize=1)
def own_client_context() -> ssl.SSLContext:
    """Return the one context of all callers of this process."""
    return client_context()


def _choose_suite(context: ssl.SSLContext, has_aes: bool | None) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_OLD_SUITE)
    if has_aes is None:
        has_aes = processor_has_aes()
    if not has_aes:
        context.maximum_version = ssl.TLSVersion.TLSv1_2


@lru_cache(maxsize=1)
def processor_has_aes(path: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor has instructions for AES. True if Linux does not say."""
    try:
        text = path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return True
    flags = [
        line.partition(":")[2].split()
        for line in text.splitlines()
        if line.partition(":")[0].strip() in ("flags", "Features")
    ]
    return all("aes" in words for words in flags) if flags else True


class TlsChannel:
    """One end of a TLS connection, without I/O. Any thread may call.

    Its methods raise OSError (ssl.SSLError is one) if the peer breaks TLS.
    """

    def __init__(self, context: ssl.SSLContext, peer: str, *, is_server: bool) -> None:
        self.is_open = False
        """Whether the handshake is over, so that text can be sent."""
        self.may_hold_text = False
        """Whether ``read_into`` may find text without new bytes. For the thread that receives."""
        self._peer = peer
        self._is_server = is_server
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=is_server)
        self._lock = threading.Lock()
        self._has_begun = not is_server
        self._stranger: Framer | None = None
        """Reads a caller without TLS, until it knows what to tell it."""

    def feed(self, data: Buffer) -> None:
        """Take bytes that have arrived. Raises WireError if the peer does not speak TLS."""
        with self._lock:
            if not self._has_begun:
                self._has_begun = True
                if data[0] != _TLS_RECORD:
                    self._stranger = Framer(self._peer, refuse())
            if self._stranger is None:
                self._incoming.write(data)
                self.may_hold_text = True
            else:
                self._hear(self._stranger, data)

    def shake(self) -> bool:
        """Go on with the handshake. True once it is over. ``take`` then has bytes to send."""
        with self._lock:
            return self._shake()

    def read_into(self, view: memoryview, arrived: Buffer = b"") -> int | None:
        """Decrypt into ``view``. Returns the number of bytes, 0 at the end, None to await more.

        ``arrived`` is fed first. It may be given once the handshake is over.
        """
        with self._lock:
            if arrived:
                self._incoming.write(arrived)
            elif not self._incoming.pending and not self._tls.pending():
                return None
            try:
                if not self.is_open and not self._shake():
                    return None
                # With a buffer, it returns a number, which the type stubs do not say.
                count = cast("int", self._tls.read(len(view), view))
            except ssl.SSLWantReadError:
                self.may_hold_text, count = False, None
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return 0
            else:  # It reads one record at a time.
                self.may_hold_text = count == len(view) or self._incoming.pending > 0
            if self._outgoing.pending > MAX_UNASKED_BYTES:
                raise ProtocolError(f"{self._peer} asks for too many new keys")
            return count

    def seal(self, data: Buffer) -> bytes:
        """Encrypt, and return the bytes that must be sent next."""
        with self._lock:
            if not self.is_open:
                raise OSError("the TLS handshake is not over")
            self._tls.write(data)
            return self._outgoing.read()

    def take(self) -> bytes:
        """Return the bytes of the handshake, or of a refusal, that must be sent now."""
        with self._lock:
            return self._outgoing.read() if self._outgoing.pending else b""

    def fingerprint(self) -> Fingerprint:
        """Return the answerer's fingerprint. The handshake must be over, at the caller's end."""
        with self._lock:
            certificate = self._tls.getpeercert(binary_form=True)
        if certificate is None:
            raise OSError("the peer has no certificate")
        return fingerprint_of(certificate)

    def _hear(self, framer: Framer, data: Buffer) -> None:
        """Refuse a caller without TLS, once it has said its version. Raises WireError."""
        rest = memoryview(data)
        try:
            while rest:
                space, _ = framer.space()
                count = min(len(space), len(rest))
                space[:count] = rest[:count]
                rest = rest[count:]
                framer.received(count)
                framer.next_frame()
        except WireError:
            self._outgoing.write(framer.take_outgoing())
            raise

    def _shake(self) -> bool:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        self.is_open = True
        return True


class TlsTransport(TcpTransport):
    """TLS over a TCP socket."""

    def __init__(
        self, sock: socket.socket, context: ssl.SSLContext, fingerprint: Fingerprint | None = None
    ) -> None:
        """Call an answerer that must have this fingerprint. None answers a caller.

        A caller's handshake happens here, within the socket's timeout. An answerer's happens in
        ``receive_into``, because accepting must not wait. Raises AuthFailed if the answerer is
        another one, ConnectFailed if it does not encrypt (NoTls if it may be an older version), and
        OSError.
        """
        timeout_s = sock.gettimeout() or limits.HANDSHAKE_TIMEOUT_S
        super().__init__(sock)
        self._channel = TlsChannel(context, self.peer, is_server=fingerprint is None)
        self._raw = memoryview(bytearray(RAW_BYTES))
        # ``send_now`` has encrypted _owed bytes of text that it has not reported as sent, because
        # the kernel has not taken all of _tail yet.
        self._tail = memoryview(b"")
        self._owed = 0
        if fingerprint is not None:
            self._call(fingerprint, time.monotonic() + timeout_s)

    def _call(self, fingerprint: Fingerprint, deadline_s: float) -> None:
        try:
            self._shake(deadline_s)
            found = self._channel.fingerprint()
            if not hmac.compare_digest(found, fingerprint):
                raise AuthFailed(
                    f"{self.peer} is another machine: its fingerprint is {shown(found)}, expected "
                    f"is {shown(fingerprint)}; nothing was told to it"
                )
        except (ssl.SSLError, ConnectionError) as error:
            self.close()
            raise NoTls(f"cannot connect to {self.peer}: {NO_TLS}") from error
        except (OSError, WireError):
            self.close()
            raise
        self.set_receive_timeout(None)

    def _shake(self, deadline_s: float) -> None:
        while not self._channel.shake():
            self._socket.sendall(self._channel.take())
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError
            self.set_receive_timeout(max(left_s, 1e-3))
            count = self._socket.recv_into(self._raw)
            if bytes(self._raw[: len(MAGIC)]) == MAGIC:
                raise ConnectFailed(f"cannot connect to {self.peer}: {UNENCRYPTED}")
            if not count:
                raise ssl.SSLEOFError("the peer closed the connection in the handshake")
            self._channel.feed(self._raw[:count])
        self._socket.sendall(self._channel.take())

    def send(self, head: Buffer, payload: Buffer = b"", on_wait: OnWait | None = None) -> None:
        if self._tail or self._owed or len(head) + len(payload) > RECORD_BYTES:
            self._send_pieces(head, payload, on_wait)
            return
        # A stage's row. It comes after a rest, when each call costs several times as much.
        sealed = self._channel.seal(b"".join((head, payload)))
        self._send_steadily(sealed, on_wait)

    def receive_into(self, view: memoryview, whole: bool) -> int | None:
        channel = self._channel
        if channel.may_hold_text:
            count = channel.read_into(view)
            if count is not None:
                return count
        received = self._socket.recv_into(self._raw)
        if received and channel.is_open:
            return channel.read_into(view, self._raw[:received])
        return self._take_in(received, view)

    def receive_now(self, view: memoryview) -> int | None:
        # Only the kernel wakes a poll. So nothing may stay here that has arrived whole.
        while (count := self._channel.read_into(view)) is None:
            try:
                received = self._socket.recv_into(self._raw, 0, DONT_WAIT)
            except BlockingIOError:
                return None
            if not received:
                return 0
            self._channel.feed(self._raw[:received])
        return count

    def send_now(self, head: Buffer, payload: Buffer = b"") -> int:
        if self._tail and not self._push():
            return 0
        sent = self._settle(len(head) + len(payload))
        for piece in _pieces(head, payload, sent):
            self._tail = memoryview(self._channel.seal(piece))
            if not self._push():
                self._owed = len(piece)
                break
            sent += len(piece)
        return sent

    def _take_in(self, received: int, view: memoryview) -> int | None:
        """Take what was received in the handshake, and answer it."""
        if not received:
            return 0
        channel = self._channel
        try:
            channel.feed(self._raw[:received])
            return channel.read_into(view)
        finally:
            if unsent := channel.take():
                self._socket.sendall(unsent)

    def _send_pieces(self, head: Buffer, payload: Buffer, on_wait: OnWait | None) -> None:
        """Do the same as ``send``, behind what ``send_now`` has left."""
        skip = 0
        if self._tail or self._owed:
            self._send_steadily(self._tail, on_wait)
            self._tail = memoryview(b"")
            skip = self._settle(len(head) + len(payload))
        for piece in _pieces(head, payload, skip):
            self._send_steadily(self._channel.seal(piece), on_wait)

    def _push(self) -> bool:
        """Send of the tail what fits without waiting. True if nothing is left."""
        try:
            sent = self._socket.send(self._tail, DONT_WAIT)
        except BlockingIOError:
            return False
        self._tail = self._tail[sent:]
        return not self._tail

    def _settle(self, given: int) -> int:
        """Return how much of the given text was encrypted and has left by now."""
        settled = min(self._owed, given)
        self._owed -= settled
        return settled


def _pieces(head: Buffer, payload: Buffer, skip: int) -> Iterator[Buffer]:
    """Cut head and payload, less ``skip`` bytes, into pieces that are encrypted at once."""
    if skip == 0 and len(head) + len(payload) <= RECORD_BYTES:
        yield b"".join((head, payload)) if len(payload) else head
        return
    for buffer in (head, payload):
        view = memoryview(buffer)[skip:]
        skip = max(skip - len(buffer), 0)
        while view:
            yield view[:PIECE_BYTES]
            view = view[PIECE_BYTES:]
