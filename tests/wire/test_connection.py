from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from wire.async_connection import AsyncConnection, serve
from wire.codec import encode
from wire.connection import Connection, Listener
from wire.errors import ConnectFailed, ConnectionLost, ProtocolError
from wire.framing import BUFFER_BYTES
from wire.messages import (
    Activation,
    Endpoint,
    Heartbeat,
    Message,
    ProbePing,
    ProbePong,
    RequestFailed,
)

ACTIVATION = Activation(1, 2, 0, 3, 4, 32, True)


@pytest.fixture
def pair() -> Iterator[tuple[Connection, Connection]]:
    """Two ends of one loopback connection."""
    listener = Listener("127.0.0.1", 0)
    here = Connection.connect(Endpoint("127.0.0.1", listener.port))
    there = listener.accept()
    assert there is not None
    yield here, there
    here.close()
    there.close()
    listener.close()


@pytest.fixture
def raw() -> Iterator[tuple[socket.socket, Connection]]:
    """A bare socket that can send anything, and the connection that receives it."""
    listener = Listener("127.0.0.1", 0)
    sender = socket.create_connection(("127.0.0.1", listener.port))
    receiver = listener.accept()
    assert receiver is not None
    yield sender, receiver
    sender.close()
    receiver.close()
    listener.close()


def test_messages_and_payloads_arrive_in_order(pair: tuple[Connection, Connection]) -> None:
    here, there = pair
    payload = bytes(range(256)) * 4096

    def send() -> None:
        here.send(ACTIVATION, payload)
        here.send(Heartbeat(7))

    thread = threading.Thread(target=send)
    thread.start()
    message, received = there.receive()
    assert message == ACTIVATION
    assert bytes(received) == payload
    assert there.receive() == (Heartbeat(7), memoryview(b""))
    thread.join()


def test_a_sender_is_told_before_it_waits(pair: tuple[Connection, Connection]) -> None:
    here, there = pair
    waits = threading.Event()
    here.send(Heartbeat(7), b"", waits.set)
    assert not waits.is_set()
    payload = bytes(32 << 20)  # More than two sockets hold.
    thread = threading.Thread(target=here.send, args=(ACTIVATION, payload, waits.set))
    thread.start()
    assert waits.wait(20)
    there.receive()
    assert there.receive() == (ACTIVATION, memoryview(payload))
    thread.join()


@pytest.mark.parametrize("seed", range(4))
def test_frames_of_all_sizes_arrive_however_the_stream_is_cut(
    raw: tuple[socket.socket, Connection], seed: int
) -> None:
    sender, receiver = raw
    random = np.random.default_rng(seed)
    sizes = [0, 1, BUFFER_BYTES - 64, BUFFER_BYTES, BUFFER_BYTES + 1, 3 * BUFFER_BYTES, 200_000]
    frames: list[tuple[Message, bytes]] = []
    for number, size in enumerate(random.choice(sizes, 40).tolist()):
        if size:
            frames.append((ProbePing(number), random.bytes(size)))
        else:
            # A header of any length, larger than the buffer included.
            text = "x" * int(random.choice([0, 40, BUFFER_BYTES - 40, 2 * BUFFER_BYTES]))
            frames.append((RequestFailed(number, text), b""))
    stream = b"".join(encode(message, len(data)) + data for message, data in frames)

    def send() -> None:
        begin = 0
        while begin < len(stream):
            end = begin + int(random.choice([1, 19, 21, 4096, 50_000]))
            sender.sendall(stream[begin:end])
            begin = end

    thread = threading.Thread(target=send)
    thread.start()
    for message, data in frames:
        got, payload = receiver.receive()
        assert got == message
        assert bytes(payload) == data
    thread.join()


def test_many_threads_may_send(pair: tuple[Connection, Connection]) -> None:
    here, there = pair
    threads = [
        threading.Thread(target=here.send, args=(ProbePing(number), bytes([number]) * 100_000))
        for number in range(16)
    ]
    for thread in threads:
        thread.start()
    numbers = set()
    for _ in threads:
        message, payload = there.receive()
        assert isinstance(message, ProbePing)
        assert bytes(payload) == bytes([message.number]) * 100_000
        numbers.add(message.number)
    assert numbers == set(range(16))
    for thread in threads:
        thread.join()


def test_every_truncation_is_told_from_an_orderly_end(
    raw: tuple[socket.socket, Connection],
) -> None:
    frame = encode(ACTIVATION, 8) + b"payload!"
    for cut in range(1, len(frame)):
        listener = Listener("127.0.0.1", 0)
        with socket.create_connection(("127.0.0.1", listener.port)) as sender:
            receiver = listener.accept()
            assert receiver is not None
            sender.sendall(frame[:cut])
        with pytest.raises(ConnectionLost, match="in the middle of a message"):
            receiver.receive()
        listener.close()
    sender, receiver = raw
    sender.sendall(frame)
    sender.close()
    assert receiver.receive()[0] == ACTIVATION
    with pytest.raises(ConnectionLost, match=r"closed the connection$"):
        receiver.receive()


def test_a_connection_closed_by_another_thread_is_lost_not_broken(
    pair: tuple[Connection, Connection],
) -> None:
    here, _ = pair
    here.close()
    with pytest.raises(ConnectionLost):
        here.set_receive_timeout(None)


def test_a_peer_that_breaks_the_protocol_is_dropped(
    raw: tuple[socket.socket, Connection],
) -> None:
    sender, receiver = raw
    sender.sendall(b"GET / HTTP/1.1\r\nHost: example\r\n\r\n")
    with pytest.raises(ProtocolError, match="does not speak"):
        receiver.receive()
    assert sender.recv(1) == b""


def test_silence_ends_a_connection_with_a_receive_timeout(
    pair: tuple[Connection, Connection],
) -> None:
    here, _ = pair
    here.set_receive_timeout(0.05)
    with pytest.raises(ConnectionLost, match="no answer in time"):
        here.receive()


def test_close_wakes_a_thread_that_receives(pair: tuple[Connection, Connection]) -> None:
    here, _ = pair
    lost = threading.Event()

    def receive() -> None:
        with pytest.raises(ConnectionLost):
            here.receive()
        lost.set()

    thread = threading.Thread(target=receive)
    thread.start()
    here.close()
    assert lost.wait(60)
    thread.join()


def test_nobody_listens_and_address_taken() -> None:
    listener = Listener("127.0.0.1", 0)
    with pytest.raises(ConnectFailed, match="choose another port"):
        Listener("127.0.0.1", listener.port)
    listener.close()
    assert listener.accept() is None
    with pytest.raises(ConnectFailed, match="connection refused"):
        Connection.connect(Endpoint("127.0.0.1", listener.port))
    with pytest.raises(ConnectFailed, match="unknown host"):
        Connection.connect(Endpoint("no such host.invalid", 1))


def test_blocking_and_async_ends_speak_the_same_protocol() -> None:
    async def main() -> None:
        async def answer(connection: AsyncConnection) -> None:
            message, payload = await connection.receive(5)
            assert isinstance(message, ProbePing)
            assert payload == b"x" * 100_000
            await connection.send(ProbePong(message.number))
            with pytest.raises(ConnectionLost, match=r"was silent for 0\.05 s"):
                await connection.receive(0.05)

        server, port = await serve("127.0.0.1", 0, answer)
        async with server:
            await asyncio.to_thread(ask, port)

    def ask(port: int) -> None:
        with Connection.connect(Endpoint("127.0.0.1", port)) as connection:
            connection.send(ProbePing(5), b"x" * 100_000)
            assert connection.receive()[0] == ProbePong(5)
            with pytest.raises(ConnectionLost):
                connection.receive()

    asyncio.run(main())
