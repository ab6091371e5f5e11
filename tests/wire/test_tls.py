"""TLS on a socket: both directions at once, polled, slow, hostile."""

from __future__ import annotations

import random
import select
import socket
import ssl
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from wire.codec import PREFIX, encode
from wire.errors import AuthFailed, ProtocolError
from wire.identity import Identity, own_identity
from wire.messages import Heartbeat
from wire.tls import (
    TlsChannel,
    TlsTransport,
    client_context,
    processor_has_aes,
    server_context,
)

ANSWER_S = 60.0
TEXT = random.Random(1).randbytes(1 << 20)


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return own_identity(tmp_path_factory.mktemp("tls") / "identity.pem")


def pair(
    identity: Identity, *, caller_has_aes: bool = True, answerer_has_aes: bool = True
) -> tuple[TlsTransport, TlsTransport]:
    """Caller and answerer, connected, with the handshake over."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        near = socket.create_connection(listening.getsockname(), timeout=ANSWER_S)
        far, _ = listening.accept()
    answerer = TlsTransport(far, server_context(identity, has_aes=answerer_has_aes))
    answerer.set_receive_timeout(ANSWER_S)
    first = bytearray(1)

    def answer() -> None:
        while answerer.receive_into(memoryview(first), False) is None:
            pass

    thread = threading.Thread(target=answer)
    thread.start()
    context = client_context(has_aes=caller_has_aes)
    caller = TlsTransport(near, context, identity.fingerprint)
    caller.set_receive_timeout(ANSWER_S)
    caller.send(b"!")
    thread.join(ANSWER_S)
    assert first == b"!"
    return caller, answerer


@pytest.fixture
def ends(identity: Identity) -> Iterator[tuple[TlsTransport, TlsTransport]]:
    made = pair(identity)
    yield made
    for end in made:
        end.close()


def received(end: TlsTransport, count: int) -> bytes:
    """The next ``count`` bytes of text."""
    data = memoryview(bytearray(count))
    got = 0
    while got < count:
        more = end.receive_into(data[got:], True)
        assert more != 0, "the stream ended"
        got += more or 0
    return bytes(data)


@pytest.mark.parametrize("sizes", [(1, 0), (20, 4096), (20, 16384), (30, 300_000), (0, 65536)])
def test_frames_arrive_as_they_were_sent(
    ends: tuple[TlsTransport, TlsTransport], sizes: tuple[int, int]
) -> None:
    head, payload = TEXT[: sizes[0]], TEXT[: sizes[1]]
    for sender, receiver in (ends, ends[::-1]):
        thread = threading.Thread(target=sender.send, args=(head, payload))
        thread.start()
        assert received(receiver, sum(sizes)) == head + payload
        thread.join(ANSWER_S)


def test_a_sender_is_told_before_it_waits(ends: tuple[TlsTransport, TlsTransport]) -> None:
    sender, receiver = ends
    waits = threading.Event()
    sender.send(b"head", TEXT[:4096], waits.set)
    assert not waits.is_set()
    payload = TEXT * 32  # More than two sockets hold.
    thread = threading.Thread(target=sender.send, args=(b"head", payload, waits.set))
    thread.start()
    assert waits.wait(ANSWER_S)
    assert (
        received(receiver, 2 * 4 + 4096 + len(payload)) == b"head" + TEXT[:4096] + b"head" + payload
    )
    thread.join(ANSWER_S)


def test_both_directions_at_once(ends: tuple[TlsTransport, TlsTransport]) -> None:
    """Each end has a sending and a receiving thread, as the daemons have."""
    total = 4 * len(TEXT)
    failures: list[BaseException] = []

    def send(end: TlsTransport, seed: int) -> None:
        sizes = random.Random(seed)
        stream = memoryview(TEXT * 4)
        while stream:
            size = sizes.choice((1, 20, 4096, 20_000, 300_000))
            end.send(stream[:size])
            stream = stream[size:]

    def receive(end: TlsTransport) -> None:
        try:
            assert received(end, total) == TEXT * 4
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=send, args=(end, seed)) for seed, end in enumerate(ends)]
    threads += [threading.Thread(target=receive, args=(end,)) for end in ends]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(ANSWER_S)
    assert failures == []


def test_a_thread_that_polls_sends_and_receives_everything(
    ends: tuple[TlsTransport, TlsTransport],
) -> None:
    """The kernel takes only part of what is sent at once, and a poll knows only the kernel."""
    sender, receiver = ends
    sizes = random.Random(3)
    head = memoryview(b"")
    payload = memoryview(b"")
    rest = memoryview(TEXT * 4)
    arrived = bytearray()
    scrap = memoryview(bytearray(16384))
    deadline_s = time.monotonic() + ANSWER_S
    while len(arrived) < 4 * len(TEXT):
        assert time.monotonic() < deadline_s
        if not head and not payload and rest:
            size = sizes.choice((1, 4096, 30_000, 900_000))
            head, payload, rest = rest[:20], rest[20 : 20 + size], rest[20 + size :]
        # The rest of head and payload is given again, one after the other, as a mesh does.
        if head:
            both = sender.send_now(head, payload)
            head, payload = head[both:], payload[max(both - len(head), 0) :]
        elif payload:
            payload = payload[sender.send_now(payload) :]
        while (count := receiver.receive_now(scrap)) is not None:
            assert count
            arrived += scrap[:count]
            if sizes.random() < 0.3:
                break
        else:
            if not head and not payload and not rest and len(arrived) < 4 * len(TEXT):
                select.select([receiver], [], [], 1)
    assert arrived == TEXT * 4


def test_nothing_arrived_stays_where_a_poll_does_not_see_it(
    ends: tuple[TlsTransport, TlsTransport],
) -> None:
    sender, receiver = ends
    for size in (1, 20, 5000):
        sender.send(TEXT[:size])
    assert select.select([receiver], [], [], ANSWER_S)[0]
    view = memoryview(bytearray(64))
    total = 0
    deadline_s = time.monotonic() + ANSWER_S
    while total < 5021 and time.monotonic() < deadline_s:
        total += receiver.receive_now(view) or 0
    assert total == 5021
    assert receiver.receive_now(view) is None


def test_the_end_of_the_stream_is_the_end(ends: tuple[TlsTransport, TlsTransport]) -> None:
    sender, receiver = ends
    sender.send(b"last words")
    sender.finish_sending()
    assert received(receiver, 10) == b"last words"
    assert receiver.receive_into(memoryview(bytearray(9)), False) == 0
    receiver.send(b"the other direction goes on")
    assert received(sender, 27) == b"the other direction goes on"


def test_closing_wakes_a_thread_that_receives(ends: tuple[TlsTransport, TlsTransport]) -> None:
    _, receiver = ends
    outcome: list[object] = []

    def wait() -> None:
        try:
            outcome.append(receiver.receive_into(memoryview(bytearray(9)), False))
        except OSError as error:
            outcome.append(type(error))

    thread = threading.Thread(target=wait)
    thread.start()
    receiver.close()
    thread.join(ANSWER_S)
    assert len(outcome) == 1


def test_silence_ends_as_set(ends: tuple[TlsTransport, TlsTransport]) -> None:
    ends[0].set_receive_timeout(0.01)
    with pytest.raises((TimeoutError, BlockingIOError)):
        ends[0].receive_into(memoryview(bytearray(9)), False)


def versions_of(ends: tuple[TlsTransport, TlsTransport]) -> set[tuple[str | None, str]]:
    found = set()
    for end in ends:
        cipher = end._channel._tls.cipher()
        assert cipher is not None
        found.add((end._channel._tls.version(), cipher[0]))
        end.close()
    return found


@pytest.mark.parametrize(("caller", "answerer"), [(True, False), (False, True), (False, False)])
def test_a_device_without_instructions_for_aes_gets_chacha20(
    identity: Identity, caller: bool, answerer: bool
) -> None:
    ends = pair(identity, caller_has_aes=caller, answerer_has_aes=answerer)
    assert versions_of(ends) == {("TLSv1.2", "ECDHE-ECDSA-CHACHA20-POLY1305")}


def test_all_others_get_tls_1_3(identity: Identity) -> None:
    ((version, suite),) = versions_of(pair(identity))
    assert version == "TLSv1.3"
    assert suite.startswith("TLS_")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("flags\t\t: fpu aes sse2\n", True),
        ("flags\t\t: fpu sse2\n", False),
        ("Features\t: fp asimd evtstrm crc32 cpuid\n", False),
        ("Features\t: fp asimd aes pmull\n", True),
        ("Features\t: fp aes\n\nFeatures\t: fp\n", False),
        ("model name: unknown\n", True),
    ],
)
def test_the_processor_is_asked_for_aes(tmp_path: Path, text: str, found: bool) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(text)
    assert processor_has_aes.__wrapped__(path) is found


def test_older_versions_and_weak_suites_are_refused(identity: Identity) -> None:
    for change in ("version", "suite"):
        context = client_context()
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        if change == "suite":
            context.set_ciphers("ECDHE-ECDSA-AES128-GCM-SHA256")
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                context.minimum_version = ssl.TLSVersion.TLSv1_1
                context.maximum_version = ssl.TLSVersion.TLSv1_1
        caller = TlsChannel(context, "answerer", is_server=False)
        answerer = TlsChannel(server_context(identity), "caller", is_server=True)
        with pytest.raises(ssl.SSLError):  # noqa: PT012 - either end may raise first
            caller.shake()
            answerer.feed(caller.take())
            answerer.shake()


def test_a_machine_with_another_fingerprint_is_left(identity: Identity) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        near = socket.create_connection(listening.getsockname(), timeout=ANSWER_S)
        far, _ = listening.accept()
    answerer = TlsTransport(far, server_context(identity))
    answerer.set_receive_timeout(ANSWER_S)
    got: list[int | None] = []

    def answer() -> None:
        while not got or got[-1] is None:
            got.append(answerer.receive_into(memoryview(bytearray(9)), False))

    thread = threading.Thread(target=answer)
    thread.start()
    with pytest.raises(AuthFailed, match="nothing was told"):
        TlsTransport(near, client_context(), bytes(32))
    thread.join(ANSWER_S)
    assert got[-1] == 0
    answerer.close()


def test_bytes_that_are_no_tls_are_refused(identity: Identity) -> None:
    channel = TlsChannel(server_context(identity), "caller", is_server=True)
    frame = encode(Heartbeat(1))
    for number in range(PREFIX.size - 1):
        channel.feed(frame[number : number + 1])
    assert channel.take() == b""
    with pytest.raises(AuthFailed, match="does not introduce itself"):
        channel.feed(frame[PREFIX.size - 1 : PREFIX.size])
    assert b"shoal token create" in channel.take()
    with pytest.raises(OSError, match="not over"):
        TlsChannel(server_context(identity), "caller", is_server=True).seal(b"text")


def test_mutated_bytes_never_reach_anybody(identity: Identity) -> None:
    """Whatever arrives, the answerer raises OSError or ProtocolError, or waits."""
    random_ = random.Random(7)
    context = server_context(identity)
    view = memoryview(bytearray(100))
    for _ in range(300):
        caller = TlsChannel(client_context(), "answerer", is_server=False)
        caller.shake()
        hello = bytearray(caller.take())
        for _ in range(random_.randint(1, 5)):
            hello[random_.randrange(1, len(hello))] = random_.randrange(256)
        answerer = TlsChannel(context, "caller", is_server=True)
        try:
            answerer.feed(hello)
            assert answerer.read_into(view) is None
        except (OSError, ProtocolError):
            continue
