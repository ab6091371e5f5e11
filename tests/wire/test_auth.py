"""The handshake: who gets through, and what each side is told."""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from wire import auth, limits
from wire.auth import TokenError, create_token, read_token
from wire.codec import PREFIX, decode_header, encode
from wire.connection import AsyncConnection, Connection, Listener, serve
from wire.errors import AuthFailed, ConnectionLost, ProtocolError, WireError
from wire.messages import (
    AuthAnswer,
    AuthChallenge,
    AuthProof,
    Endpoint,
    Heartbeat,
    JoinRefused,
    Message,
)

TOKEN = b"0123456789abcdef0123456789abcdef"
OTHER = b"another-token-that-is-long-enough"
ANSWER_S = 10.0


class Answerer:
    """Accepts connections and answers heartbeats; what came of each is in ``outcomes``."""

    def __init__(self, token: bytes | None) -> None:
        self.listener = Listener("127.0.0.1", 0, token=token)
        self.endpoint = Endpoint("127.0.0.1", self.listener.port)
        self.outcomes: list[WireError | Message] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while (connection := self.listener.accept()) is not None:
            with connection:
                try:
                    connection.set_receive_timeout(ANSWER_S)
                    message, _ = connection.receive()
                    connection.send(message)
                    self.outcomes.append(message)
                except WireError as error:
                    self.outcomes.append(error)

    def close(self) -> None:
        self.listener.close()
        self._thread.join(ANSWER_S)

    def outcome(self) -> str:
        """What the only connection came to; the answerer is closed after."""
        self.close()
        (outcome,) = self.outcomes
        assert isinstance(outcome, AuthFailed), outcome
        return str(outcome)


@pytest.fixture
def answerer() -> Iterator[Answerer]:
    answerer = Answerer(TOKEN)
    yield answerer
    answerer.close()


def raw(answerer: Answerer) -> Connection:
    """A connection that says what it likes: it begins without a handshake."""
    connection = Connection.connect(answerer.endpoint)
    connection.set_receive_timeout(ANSWER_S)
    return connection


def converse(connection: Connection) -> None:
    connection.set_receive_timeout(ANSWER_S)
    connection.send(Heartbeat(5))
    assert connection.receive()[0] == Heartbeat(5)


@pytest.mark.parametrize("token", [TOKEN, None])
def test_equal_tokens_and_none_at_all_get_through(token: bytes | None) -> None:
    answerer = Answerer(token)
    with Connection.connect(answerer.endpoint, token=token) as connection:
        converse(connection)
    answerer.close()
    assert answerer.outcomes == [Heartbeat(5)]


def test_another_token_is_told_to_both(answerer: Answerer) -> None:
    with pytest.raises(AuthFailed, match="tokens differ"):
        Connection.connect(answerer.endpoint, token=OTHER)
    assert "tokens differ" in answerer.outcome()


def test_no_token_is_told_to_both(answerer: Answerer) -> None:
    with raw(answerer) as connection:
        connection.send(JoinRefused("x" * 100_000))  # More than anyone reads of a stranger.
    with raw(answerer) as connection:
        connection.send(Heartbeat(5))
        refusal, _ = connection.receive()
        assert isinstance(refusal, JoinRefused)
        assert "--token-file" in refusal.reason
    answerer.close()
    oversized, without = answerer.outcomes
    assert isinstance(oversized, ProtocolError)
    assert isinstance(without, AuthFailed)
    assert "without a token" in str(without)


def test_a_token_that_nobody_asks_for_is_told_to_both() -> None:
    answerer = Answerer(None)
    with pytest.raises(AuthFailed, match="no token is known there"):
        Connection.connect(answerer.endpoint, token=TOKEN)
    assert "this side has none" in answerer.outcome()


def recorded(answerer: Answerer) -> list[Message]:
    """What a caller who knows the token says."""
    handshake = auth.call(TOKEN)
    said: list[Message] = []
    with raw(answerer) as connection:
        incoming: Message | None = None
        while True:
            try:
                outgoing = handshake.send(incoming)
            except StopIteration:
                break
            incoming = None
            if outgoing is None:
                incoming, _ = connection.receive()
            else:
                said.append(outgoing)
                connection.send(outgoing)
        converse(connection)
    return said


def test_a_recorded_handshake_is_worthless(answerer: Answerer) -> None:
    challenge, proof = recorded(answerer)
    with raw(answerer) as connection:
        connection.send(challenge)
        assert isinstance(connection.receive()[0], AuthAnswer)
        connection.send(proof)
        assert isinstance(connection.receive()[0], JoinRefused)
    answerer.close()
    assert isinstance(answerer.outcomes[-1], AuthFailed)


def test_an_answerers_proof_does_not_prove_a_caller(answerer: Answerer) -> None:
    with raw(answerer) as connection:
        connection.send(AuthChallenge(1, bytes(32)))
        answer, _ = connection.receive()
        assert isinstance(answer, AuthAnswer)
        connection.send(AuthProof(answer.proof))
        assert isinstance(connection.receive()[0], JoinRefused)
    assert "tokens differ" in answerer.outcome()


def test_a_challenge_that_is_reflected_does_not_prove_an_answerer() -> None:
    listener = Listener("127.0.0.1", 0)

    def reflect() -> None:
        """Answer a challenge with itself, and with what somebody else's answer proved."""
        connection = listener.accept()
        assert connection is not None
        with connection:
            data = memoryview(bytearray(4096))
            count = connection._transport.receive_into(data, False)
            challenge = decode_header(AuthChallenge, data[PREFIX.size : count])
            assert isinstance(challenge, AuthChallenge)
            honest = auth.answer(TOKEN)
            honest.send(None)
            answer = honest.send(AuthChallenge(1, bytes(32)))
            assert isinstance(answer, AuthAnswer)
            connection.send(AuthAnswer(challenge.nonce, answer.proof))
            assert isinstance(connection.receive()[0], JoinRefused)

    thread = threading.Thread(target=reflect)
    thread.start()
    with pytest.raises(AuthFailed, match="tokens differ"):
        Connection.connect(Endpoint("127.0.0.1", listener.port), token=TOKEN)
    thread.join()
    listener.close()


@pytest.mark.parametrize(
    "message",
    [
        AuthChallenge(2, bytes(32)),
        AuthChallenge(1, b""),
        AuthChallenge(1, bytes(33)),
        AuthProof(bytes(32)),
        AuthAnswer(bytes(32), bytes(32)),
        JoinRefused("no\x1b[2J"),
    ],
    ids=str,
)
def test_a_handshake_that_begins_wrongly_is_refused(answerer: Answerer, message: Message) -> None:
    with raw(answerer) as connection:
        connection.send(message)
        assert isinstance(connection.receive()[0], JoinRefused)
    assert answerer.outcome().isprintable()


@pytest.mark.parametrize(
    "data",
    [b"GET / HTTP/1.1\r\n\r\n" * 4, bytes(64), encode(AuthChallenge(1, bytes(32)))[:-1], b"S"],
)
def test_garbage_ends_the_connection(answerer: Answerer, data: bytes) -> None:
    with socket.create_connection((answerer.endpoint.host, answerer.endpoint.port)) as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(4096):
            pass
    answerer.close()
    (outcome,) = answerer.outcomes
    assert isinstance(outcome, WireError)


def test_a_slow_loris_is_dropped_however_it_dribbles(
    answerer: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "HANDSHAKE_TIMEOUT_S", 0.3)
    frame = encode(AuthChallenge(1, bytes(32)))
    dropped = threading.Event()
    with socket.create_connection((answerer.endpoint.host, answerer.endpoint.port)) as sock:
        for byte in frame[:-1]:
            try:
                sock.sendall(bytes([byte]))
            except OSError:
                dropped.set()
                break
            dropped.wait(0.02)
    assert dropped.is_set()
    answerer.close()
    (outcome,) = answerer.outcomes
    assert isinstance(outcome, ConnectionLost)


def test_the_handshake_leaves_the_timeout_as_it_was(answerer: Answerer) -> None:
    with Connection.connect(answerer.endpoint, token=TOKEN) as connection:
        # Longer than nothing: the deadline of the handshake is gone.
        connection.set_receive_timeout(0.05)
        with pytest.raises(ConnectionLost, match="no answer in time"):
            connection.receive()


class Warnings(logging.Handler):
    """What a module warns of, for whoever waits for it."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: queue.Queue[str] = queue.Queue()

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.put(record.getMessage())


@pytest.fixture
def warned() -> Iterator[Warnings]:
    handler = Warnings()
    logging.getLogger("wire.connection").addHandler(handler)
    yield handler
    logging.getLogger("wire.connection").removeHandler(handler)


def test_the_awaiting_end_speaks_the_same_handshake(warned: Warnings) -> None:
    handled: list[Message] = []

    async def handle(connection: AsyncConnection) -> None:
        message, _ = await connection.receive(ANSWER_S)
        handled.append(message)
        await connection.send(message)

    def call(port: int) -> None:
        endpoint = Endpoint("127.0.0.1", port)
        with Connection.connect(endpoint, token=TOKEN) as connection:
            converse(connection)
        with pytest.raises(AuthFailed, match="tokens differ"):
            Connection.connect(endpoint, token=OTHER)
        assert "tokens differ" in warned.texts.get(timeout=ANSWER_S)
        with Connection.connect(endpoint) as connection:
            connection.set_receive_timeout(ANSWER_S)
            connection.send(Heartbeat(6))
            assert isinstance(connection.receive()[0], JoinRefused)
        assert "without a token" in warned.texts.get(timeout=ANSWER_S)

    async def main() -> None:
        server, port = await serve("127.0.0.1", 0, handle, token=TOKEN)
        async with server:
            await asyncio.to_thread(call, port)

    asyncio.run(main())
    assert handled == [Heartbeat(5)]


def test_an_awaiting_end_without_a_token_says_so() -> None:
    async def main() -> None:
        failures: asyncio.Queue[str] = asyncio.Queue()

        async def handle(connection: AsyncConnection) -> None:
            try:
                await connection.receive(ANSWER_S)
            except AuthFailed as error:
                failures.put_nowait(str(error))

        def call(port: int) -> None:
            with pytest.raises(AuthFailed, match="no token is known there"):
                Connection.connect(Endpoint("127.0.0.1", port), token=TOKEN)

        server, port = await serve("127.0.0.1", 0, handle)
        async with server:
            await asyncio.to_thread(call, port)
            failure = await asyncio.wait_for(failures.get(), ANSWER_S)
            assert "this side has none" in failure

    asyncio.run(main())


def test_a_token_file_is_made_once_for_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "shoal" / "token"
    create_token(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    token = read_token(path)
    assert token is not None
    assert len(token) >= 43  # 32 random bytes in base 64.
    create_token(path)
    assert read_token(path) == token
    create_token(tmp_path / "other")
    assert read_token(tmp_path / "other") != token


def test_where_a_token_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHOAL_TOKEN", raising=False)
    assert read_token(None) is None
    monkeypatch.setenv("SHOAL_TOKEN", TOKEN.decode())
    assert read_token(None) == TOKEN
    path = tmp_path / "token"
    path.write_bytes(b"  " + OTHER + b"\r\n")
    assert read_token(path) == OTHER
    for wrong in (b"", b"short", b"x" * 5000):
        path.write_bytes(wrong)
        with pytest.raises(TokenError, match="random"):
            read_token(path)
    with pytest.raises(TokenError, match="no such file"):
        read_token(tmp_path / "missing")
    with pytest.raises(TokenError, match="cannot be made"):
        create_token(Path(os.devnull) / "token")


def test_a_prefix_alone_does_not_make_anyone_read_more(answerer: Answerer) -> None:
    """A stranger's header is not even waited for."""
    with socket.create_connection((answerer.endpoint.host, answerer.endpoint.port)) as sock:
        sock.sendall(encode(Heartbeat(1))[: PREFIX.size])
        assert b"--token-file" in sock.recv(4096)
    assert answerer.outcome()
