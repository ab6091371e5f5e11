"""A connection runs over another transport than TCP: TLS is one small class."""

from __future__ import annotations

import asyncio
import contextlib
import select
import shutil
import socket
import ssl
import subprocess
import threading
from pathlib import Path

import pytest

from wire import limits
from wire.async_connection import AsyncConnection
from wire.connection import Connection, Listener
from wire.errors import ConnectFailed, ConnectionLost
from wire.messages import Endpoint, Heartbeat, ProbePing
from wire.transport import Buffer, OnWait, TcpTransport, Transport, peer_name

PAYLOAD = bytes(range(256)) * 4096
ANSWER_S = 60.0


class TlsTransport(Transport):
    """TLS over TCP: an SSLSocket has no sendmsg and no MSG_WAITALL, and one thread uses it at a
    time."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, is_server: bool) -> None:
        self.peer = peer_name(sock)
        self.local_host = str(sock.getsockname()[0])
        self._socket = context.wrap_socket(
            sock, server_side=is_server, do_handshake_on_connect=False
        )
        self._socket.settimeout(0)
        self._lock = threading.Lock()
        self._timeout_s: float | None = None

    def send(self, head: Buffer, payload: Buffer = b"", on_wait: OnWait | None = None) -> None:
        for buffer in (head, payload):
            view = memoryview(buffer)
            while view:
                with self._lock:
                    try:
                        view = view[self._socket.send(view) :]
                        continue
                    except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
                        want = error
                self._wait(want, ANSWER_S)

    def receive_into(self, view: memoryview, whole: bool) -> int:
        while True:
            with self._lock:
                try:
                    return self._socket.recv_into(view)
                except ssl.SSLWantReadError as error:
                    want: ssl.SSLError = error
            self._wait(want, self._timeout_s)

    def _wait(self, want: ssl.SSLError, timeout_s: float | None) -> None:
        reads = [self._socket] if isinstance(want, ssl.SSLWantReadError) else []
        writes = [] if reads else [self._socket]
        if not any(select.select(reads, writes, [], timeout_s)):
            raise TimeoutError

    def set_receive_timeout(self, seconds: float | None) -> None:
        self._timeout_s = seconds

    def finish_sending(self) -> None:
        pass  # Closing says so.

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Of the server and of the client: a self-signed certificate, made here."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    directory: Path = tmp_path_factory.mktemp("tls")
    key, certificate = directory / "key.pem", directory / "certificate.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    names = ["-subj", "/CN=shoal", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command.split(), *names, *files], check=True, capture_output=True)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.load_verify_locations(certificate)
    return server, client


def test_threads_talk_over_tls(contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    server, client = contexts
    listener = Listener(
        "127.0.0.1",
        0,
        transport=lambda sock: TlsTransport(sock, server, is_server=True),
    )
    outcomes: list[str] = []

    def answer() -> None:
        while (connection := listener.accept()) is not None:
            with connection:
                try:
                    while True:
                        message, payload = connection.receive()
                        connection.send(message, payload)
                except ConnectionLost as error:
                    outcomes.append(type(error).__name__)

    def call() -> Connection:
        return Connection.connect(
            Endpoint("127.0.0.1", listener.port),
            transport=lambda sock: TlsTransport(sock, client, is_server=False),
        )

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        with call() as connection:
            connection.send(Heartbeat(1))
            assert connection.receive()[0] == Heartbeat(1)
            connection.send(ProbePing(2), PAYLOAD)
            message, payload = connection.receive()
            assert (message, bytes(payload)) == (ProbePing(2), PAYLOAD)
            connection.set_receive_timeout(0.05)
            with pytest.raises(ConnectionLost, match="no answer in time"):
                connection.receive()
    finally:
        listener.close()
        thread.join(ANSWER_S)
    assert outcomes == ["ConnectionLost"]


def test_a_thread_and_asyncio_talk_over_tls(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    server, client = contexts

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = AsyncConnection(reader, writer)
        message, payload = await connection.receive(ANSWER_S)
        await connection.send(message, payload)
        with pytest.raises(ConnectionLost, match="closed the connection"):
            await connection.receive(ANSWER_S)

    def ask(port: int) -> None:
        with Connection.connect(
            Endpoint("127.0.0.1", port),
            transport=lambda sock: TlsTransport(sock, client, is_server=False),
        ) as connection:
            connection.send(ProbePing(2), PAYLOAD)
            message, payload = connection.receive()
            assert (message, bytes(payload)) == (ProbePing(2), PAYLOAD)

    async def main() -> None:
        listening = await asyncio.start_server(echo, "127.0.0.1", 0, ssl=server)
        async with listening:
            await asyncio.to_thread(ask, listening.sockets[0].getsockname()[1])

    asyncio.run(main())


def test_a_transport_that_cannot_be_made_is_a_failed_connection() -> None:
    def refuse(sock: socket.socket) -> TcpTransport:
        sock.close()
        raise ssl.SSLError("no common version")

    listener = Listener("127.0.0.1", 0)
    with pytest.raises(ConnectFailed, match="cannot connect"):
        Connection.connect(Endpoint("127.0.0.1", listener.port), transport=refuse)
    listener.close()


def test_a_closed_socket_waits_for_no_acknowledgement() -> None:
    """Its counts are read by another thread, which does not know that it was just closed."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = socket.create_connection(server.getsockname())
    with here:
        transport = TcpTransport(here)
        assert transport.unacknowledged_bytes() == 0
        here.close()
        assert transport.unacknowledged_bytes() == 0


def test_a_peer_that_reads_now_and_then_does_not_hold_a_sender(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is never silent for long, and takes a frame slower than any link."""
    monkeypatch.setattr(limits, "SEND_TIMEOUT_S", 1.0)
    monkeypatch.setattr(limits, "LEAST_BYTES_PER_S", 64 << 20, raising=False)
    size, ended, left = 16 << 20, threading.Event(), 16 << 20
    with socket.create_server(("127.0.0.1", 0)) as server:
        reader = socket.create_connection(server.getsockname())
        sender = TcpTransport(server.accept()[0])

    def read() -> None:
        nonlocal left
        while left > 0 and not ended.wait(0.1):
            left -= len(reader.recv(128 << 10))

    thread = threading.Thread(target=read)
    thread.start()
    try:
        with pytest.raises((TimeoutError, BlockingIOError)):  # The kernel says the second one.
            sender.send(b"head", bytes(size))
    finally:
        ended.set()
        thread.join()
        sender.close()
        reader.close()
    assert left > 0
