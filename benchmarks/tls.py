"""The cost of TLS, and whether it lasts: hops of tokens, blocks of weights, hours both ways.

    python -m benchmarks.tls hop                  # round trips between two processes
    python -m benchmarks.tls blocks --core 0      # blocks from asyncio to a thread, on one core
    python -m benchmarks.tls soak --minutes 30    # each end sends and receives at once

The rounds of what is compared are interleaved, so that both suffer alike from other programs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import platform
import random
import resource
import socket
import ssl
import statistics
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection as Pipe
from pathlib import Path

from wire.async_connection import AsyncConnection, serve
from wire.connection import Connection
from wire.identity import Identity, own_identity
from wire.introduction import COORDINATOR, Answerer, Caller
from wire.messages import Endpoint, Heartbeat, ProbePing
from wire.tls import TlsTransport, client_context, server_context
from wire.transport import TcpTransport, Transport

KINDS = ("plain", "TLS", "ChaCha20")
BLOCK_BYTES = 256 << 10
BLOCKS = 1000
SIZES = (1, 20, 4096, 16384, 20_000, 262_144)
BURST_S = 0.02


def transport(kind: str, sock: socket.socket, identity: Identity, *, answers: bool) -> Transport:
    if kind == "plain":
        return TcpTransport(sock)
    if answers:
        return TlsTransport(sock, server_context(identity))
    context = client_context(has_aes=False if kind == "ChaCha20" else None)
    return TlsTransport(sock, context, identity.fingerprint)


def receive(end: Transport, view: memoryview) -> None:
    got = 0
    while got < len(view):
        count = end.receive_into(view[got:], True)
        if count == 0:
            raise ConnectionError("the other end has closed")
        got += count or 0


def echo(told: Pipe, directory: str, size: int) -> None:
    """Answer each kind's messages with their like, in a process of its own."""
    identity = own_identity(Path(directory) / "identity.pem")

    def loop(kind: str, sock: socket.socket) -> None:
        end, view = transport(kind, sock, identity, answers=True), memoryview(bytearray(size))
        with contextlib.suppress(OSError):
            while True:
                receive(end, view)
                end.send(view)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        told.send(listening.getsockname()[1])
        threads = []
        for kind in KINDS:
            threads.append(threading.Thread(target=loop, args=(kind, listening.accept()[0])))
            threads[-1].start()
    for thread in threads:
        thread.join()


def hop(options: argparse.Namespace, directory: str) -> None:
    """Print microseconds of one way, half of a round trip, for messages of some sizes."""
    identity = own_identity(Path(directory) / "identity.pem")
    for size, count in ((4096, 1000), (262_144, 60)):
        with beside(echo, directory, size) as port:
            ends = {
                kind: transport(
                    kind, socket.create_connection(("127.0.0.1", port)), identity, answers=False
                )
                for kind in KINDS
            }
            payload, view = bytes(size), memoryview(bytearray(size))
            times_us: dict[str, list[float]] = {kind: [] for kind in KINDS}
            for _ in range(options.rounds):
                for kind, end in ends.items():
                    started_s = time.perf_counter()
                    for _ in range(count):
                        end.send(payload)
                        receive(end, view)
                    spent_s = time.perf_counter() - started_s
                    times_us[kind].append(spent_s / count / 2 * 1e6)
            for end in ends.values():
                end.close()
        show(f"{size:>7} bytes", {k: statistics.median(v) for k, v in times_us.items()}, "us a hop")


def offer(told: Pipe, directory: str, encrypts: bool) -> None:
    """Send blocks to whoever asks, as the coordinator does."""
    identity = own_identity(Path(directory) / "identity.pem")
    payload = os.urandom(BLOCK_BYTES)

    async def handle(connection: AsyncConnection) -> None:
        while True:
            await connection.receive()
            for number in range(BLOCKS):
                await connection.send(ProbePing(number), payload)

    async def run() -> None:
        answerer = Answerer(identity, COORDINATOR, frozenset(("blocks",)), lambda claim: None)
        _, port = await serve("127.0.0.1", 0, handle, answerer=answerer if encrypts else None)
        told.send(port)
        await asyncio.Event().wait()

    asyncio.run(run())


def blocks(options: argparse.Namespace, directory: str) -> None:
    """Print megabytes of blocks a second."""
    if options.core is not None:
        os.sched_setaffinity(0, {options.core})
    identity = own_identity(Path(directory) / "identity.pem")
    caller = Caller(identity, identity.fingerprint, "blocks", "device", COORDINATOR)
    rates: dict[str, list[float]] = {"plain": [], "TLS": []}
    with (
        beside(offer, directory, False) as plain_port,
        beside(offer, directory, True) as tls_port,
        Connection.connect(Endpoint("127.0.0.1", plain_port)) as plain,
        Connection.connect(Endpoint("127.0.0.1", tls_port), caller=caller) as encrypted,
    ):
        for _ in range(options.rounds):
            for kind, connection in (("plain", plain), ("TLS", encrypted)):
                started_s = time.perf_counter()
                connection.send(Heartbeat(1))
                for _ in range(BLOCKS):
                    connection.receive()
                rates[kind].append(BLOCKS * BLOCK_BYTES / (time.perf_counter() - started_s) / 1e6)
    show("blocks", {kind: statistics.median(values) for kind, values in rates.items()}, "MB/s")


def soak(options: argparse.Namespace, directory: str) -> None:
    """Let both ends send and receive at once, and compare what was sent with what came."""
    identity = own_identity(Path(directory) / "identity.pem")
    end_s = time.monotonic() + options.minutes * 60
    near, far = connected(identity)
    sums: dict[str, tuple[int, int]] = {}
    data = random.Random(1).randbytes(1 << 20)

    def send(end: Transport, way: str) -> None:
        chosen = random.Random(way)
        count = check = 0
        burst_s = time.monotonic()
        while time.monotonic() < end_s:
            size = chosen.choice(SIZES)
            begin = chosen.randrange(len(data) - size)
            piece = data[begin : begin + size]
            end.send(piece[:20], piece[20:])
            count, check = count + size, zlib.crc32(piece, check)
            if time.monotonic() - burst_s > BURST_S:
                time.sleep(BURST_S * (1 / options.load - 1))
                burst_s = time.monotonic()
        end.finish_sending()
        sums[f"{way} sent"] = count, check

    def take(end: Transport, way: str) -> None:
        view = memoryview(bytearray(70_000))
        count = check = 0
        while (got := end.receive_into(view, False)) != 0:
            if got is not None:
                count, check = count + got, zlib.crc32(view[:got], check)
        sums[f"{way} got"] = count, check

    jobs = [(send, near, "a"), (send, far, "b"), (take, far, "a"), (take, near, "b")]
    threads = [threading.Thread(target=job, args=(end, way)) for job, end, way in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(options.minutes * 60 + 120)
    if any(thread.is_alive() for thread in threads):
        os._exit(1)  # A deadlock, which no exception would end.
    if any(sums[f"{way} sent"] != sums[f"{way} got"] for way in "ab"):
        sys.exit("other bytes came than were sent")
    gigabytes = sum(sums[f"{way} got"][0] for way in "ab") / 1e9
    used_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(
        f"Python {platform.python_version()}, {ssl.OPENSSL_VERSION}: {options.minutes:g} minutes, "
        f"{gigabytes:.1f} GB both ways, all equal; at most {used_mib} MiB of memory"
    )


def connected(identity: Identity) -> tuple[Transport, Transport]:
    """Both ends of a TLS connection, open, in this process."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        sock = socket.create_connection(listening.getsockname(), timeout=20)
        far = transport("TLS", listening.accept()[0], identity, answers=True)
    first = threading.Thread(target=receive, args=(far, memoryview(bytearray(1))))
    first.start()
    near = transport("TLS", sock, identity, answers=False)
    near.send(b"!")
    first.join()
    return near, far


@contextlib.contextmanager
def beside(target: Callable[..., None], *arguments: object) -> Iterator[int]:
    """Run ``target`` in a process of its own. Yields the port that it tells."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=target, args=(there, *arguments), daemon=True)
    process.start()
    try:
        yield int(here.recv())
    finally:
        process.terminate()
        process.join()


def show(what: str, values: dict[str, float], unit: str) -> None:
    said = ", ".join(f"{kind} {value:.1f}" for kind, value in values.items())
    print(f"{what}: {said} {unit}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    for name in ("hop", "blocks"):
        action = actions.add_parser(name)
        action.add_argument("--rounds", type=int, default=9)
        if name == "blocks":
            action.add_argument("--core", type=int, help="run both processes on this core")
    soaking = actions.add_parser("soak")
    soaking.add_argument("--minutes", type=float, default=30.0)
    soaking.add_argument("--load", type=float, default=1.0, help="the share of the time to send")
    options = parser.parse_args()
    run = {"hop": hop, "blocks": blocks, "soak": soak}[options.action]
    with tempfile.TemporaryDirectory(prefix="shoal-tls-") as directory:
        run(options, directory)


if __name__ == "__main__":
    main()
