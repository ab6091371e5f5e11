"""The cost of a hop compared with raw TCP, and Python's share of a decode step.

    make bench-hop
    python benchmarks/hop.py --rounds 20 --json
    python benchmarks/hop.py --share

Latency: a hidden vector goes to another process and back. It goes through wire.connection, or as
    the same bytes through a bare socket. Half of the round trip counts. It is measured back to
    back, where no process sleeps. It is also measured after a pause of 2 ms, as between two steps
    of a stage, where the other process must be woken. "least" is the minimum in Python: numbers are
    packed and unpacked, the payload is copied, and nothing is checked.

Throughput: prompt chunks of 256 rows go one way, until the last one is confirmed. All ways take
    turns in each round.

The network is loopback, and with root also an emulated LAN of two hosts (testbed/) with 1 Gbit/s
and 0.2 ms round trip.

--share measures the thread that receives a row, runs a stage that only reads memory, and sends the
next row. It counts the time outside the stage and outside calls of the socket.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import socket
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from agent.links import Link as PeerLink
from agent.links import Measuring, summary_s
from agent.relay import Relay
from backends.base import Array, Stage, Tokens
from model.spec import LayerSpec, ModelSpec
from testbed.bed import Testbed, TestbedError
from testbed.network import Host, Link, Network
from wire.activations import DEFAULT_HOP_BITS, payload_bytes
from wire.codec import encode
from wire.connection import Connection, Listener
from wire.errors import WireError
from wire.identity import own_identity
from wire.messages import (
    Activation,
    Heartbeat,
    Message,
    Sampling,
    StartSequence,
    TokenSampled,
)
from wire.tls import TlsTransport, client_context, server_context
from wire.transport import TcpTransport

HIDDEN = 2048
ROW_BYTES = 4096
CHUNK_ROWS = 256
CHUNKS = 24
"""The chunks of a throughput measurement: 24 MiB."""

BACK_TO_BACK = 500
PAUSED = 100
PAUSE_S = 0.002
ROUND_TRIP_S = 0.2e-3
BYTES_PER_S = 125e6
SHARE_STEPS = 500

ROW = Activation(1, 7, 0, 300, 1, 16, True)
CHUNK = Activation(1, 7, 0, 256, CHUNK_ROWS, 16, False)
CHUNK_BYTES = payload_bytes(CHUNK_ROWS, HIDDEN, 16)
IDENTITY = Path(tempfile.gettempdir()) / f"shoal-hop-{os.getpid()}.pem"
FIELDS = struct.Struct("<4s5I2BI")


# ---- the two ways to the other process ---------------------------------------------------------


class Raw:
    """Sends the bytes of a frame through a bare socket."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = sock
        self._row = memoryview(bytearray(len(encode(ROW, ROW_BYTES)) + ROW_BYTES))
        self._chunk = memoryview(bytearray(len(encode(CHUNK, CHUNK_BYTES)) + CHUNK_BYTES))

    def send_row(self) -> None:
        self._socket.sendall(self._row)

    def receive_row(self) -> None:
        self._receive(self._row)

    def send_chunk(self) -> None:
        self._socket.sendall(self._chunk)

    def receive_chunk(self) -> None:
        self._receive(self._chunk)

    def confirm(self) -> None:
        self._socket.sendall(b"\0")

    def confirmed(self) -> None:
        self._receive(memoryview(bytearray(1)))

    def _receive(self, view: memoryview) -> None:
        filled = 0
        while filled < len(view):
            count = self._socket.recv_into(view[filled:])
            if not count:
                raise EOFError
            filled += count

    def close(self) -> None:
        self._socket.close()


class Framed(Raw):
    """The least that Python can do for a frame: a few numbers, nothing checked, no lock."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self._payload = bytes(ROW_BYTES)
        self._row = memoryview(bytearray(FIELDS.size + ROW_BYTES))

    def send_row(self) -> None:
        fields = FIELDS.pack(b"SHOL", 1, 7, 0, 300, 1, 16, 1, ROW_BYTES)
        self._socket.sendmsg((fields, self._payload))

    def receive_row(self) -> None:
        self._receive(self._row)
        _, epoch, sequence, slot, position, rows, bits, last, _ = FIELDS.unpack_from(self._row)
        Activation(epoch, sequence, slot, position, rows, bits, bool(last))
        bytearray(self._row[FIELDS.size :])


class Shoal:
    """Sends the same as a frame of the data plane."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._row, self._chunk = bytes(ROW_BYTES), bytes(CHUNK_BYTES)

    def send_row(self) -> None:
        self._connection.send(ROW, self._row)

    def receive_row(self) -> None:
        self._connection.receive()

    def send_chunk(self) -> None:
        self._connection.send(CHUNK, self._chunk)

    receive_chunk = receive_row

    def confirm(self) -> None:
        self._connection.send(Heartbeat())

    confirmed = receive_row

    def close(self) -> None:
        self._connection.close()


def encrypted(sock: socket.socket, *, answers: bool) -> Shoal:
    """Encrypt, as every connection does unless --insecure is said."""
    identity = own_identity(IDENTITY)
    if answers:
        return Shoal(Connection(TlsTransport(sock, server_context(identity))))
    return Shoal(Connection(TlsTransport(sock, client_context(), identity.fingerprint)))


Way = Raw | Shoal
WAYS: dict[str, Callable[[socket.socket, bool], Way]] = {
    "raw": lambda sock, answers: Raw(sock),
    "framed": lambda sock, answers: Framed(sock),
    "shoal": lambda sock, answers: Shoal(Connection(TcpTransport(sock))),
    "tls": lambda sock, answers: encrypted(sock, answers=answers),
}


@dataclass(frozen=True, slots=True)
class Place:
    """The place of both ends: how to make sockets there, and the address of the far one."""

    name: str
    address: str
    near: Callable[[Callable[[], Any]], Any]
    far: Callable[[Callable[[], Any]], Any]


@contextlib.contextmanager
def pair(place: Place, kind: str, serve: Callable[[Way], None]) -> Iterator[Way]:
    """Yield the near end of a connection. Another process serves the far end."""
    listener = place.far(lambda: socket.create_server((place.address, 0)))
    port = listener.getsockname()[1]
    child = os.fork()
    if child == 0:
        with contextlib.suppress(OSError, EOFError, WireError):
            sock, _ = listener.accept()
            serve(WAYS[kind](sock, True))
        os._exit(0)
    listener.close()
    sock = place.near(lambda: socket.create_connection((place.address, port)))
    way = WAYS[kind](sock, False)
    try:
        yield way
    finally:
        way.close()
        os.waitpid(child, 0)


def echo_rows(way: Way) -> None:
    while True:
        way.receive_row()
        way.send_row()


def take_chunks(way: Way) -> None:
    while True:
        for _ in range(CHUNKS):
            way.receive_chunk()
        way.confirm()


def one_way_s(way: Way, count: int, pause_s: float) -> list[float]:
    times_s = []
    for _ in range(count):
        if pause_s:
            time.sleep(pause_s)
        started_s = time.perf_counter()
        way.send_row()
        way.receive_row()
        times_s.append((time.perf_counter() - started_s) / 2)
    return times_s


def rate(way: Way) -> float:
    started_s = time.perf_counter()
    for _ in range(CHUNKS):
        way.send_chunk()
    way.confirmed()
    return CHUNKS * CHUNK_BYTES / (time.perf_counter() - started_s)


def compare(place: Place, rounds: int, console: Console) -> dict[str, Any]:
    """Measure latency and throughput of all ways at one place."""
    times_s: dict[tuple[str, str], list[float]] = {}
    rates: dict[str, list[float]] = {kind: [] for kind in WAYS}
    with contextlib.ExitStack() as stack:
        rows = {kind: stack.enter_context(pair(place, kind, echo_rows)) for kind in rates}
        chunks = {kind: stack.enter_context(pair(place, kind, take_chunks)) for kind in rates}
        for kind in rates:
            one_way_s(rows[kind], 50, 0)
            rate(chunks[kind])
        for turn in track(range(rounds), place.name, console=console, transient=True):
            order = list(rates) if turn % 2 else list(reversed(rates))
            for kind in order:
                for mode, count, pause_s in (("busy", BACK_TO_BACK, 0), ("paced", PAUSED, PAUSE_S)):
                    measured = one_way_s(rows[kind], count, pause_s)
                    times_s.setdefault((mode, kind), []).extend(measured)
                rates[kind].append(rate(chunks[kind]))
    result: dict[str, Any] = {"place": place.name}
    for mode in ("busy", "paced"):
        for figure, percent in (("median", 50), ("p99", 99)):
            result[f"{mode}_{figure}_us"] = {
                kind: float(np.percentile(times_s[mode, kind], percent)) * 1e6 for kind in WAYS
            }
    result["mb_per_s"] = {kind: statistics.median(rates[kind]) / 1e6 for kind in WAYS}
    for figures in (value for value in result.values() if isinstance(value, dict)):
        figures["ratio"] = figures["shoal"] / figures["raw"]
    return result


def places(stack: contextlib.ExitStack) -> Iterator[Place]:
    yield Place("loopback", "127.0.0.1", lambda call: call(), lambda call: call())
    lan = Network({"near": Host(), "far": Host()}, default=Link(ROUND_TRIP_S / 2, BYTES_PER_S))
    try:
        bed = stack.enter_context(Testbed(lan, "hop"))
    except TestbedError as error:
        print(f"no emulated LAN: {error}", file=sys.stderr)
        return
    yield Place(
        "LAN",
        lan.address("far"),
        lambda call: bed.inside("near", call),
        lambda call: bed.inside("far", call),
    )


# ---- Python's share of a step -------------------------------------------------------------------


class Clock:
    """Adds up the time outside the relay's own code."""

    def __init__(self) -> None:
        self.outside_s = 0.0


class ClockedSocket(socket.socket):
    """A socket that records the time of its calls."""

    clock: Clock

    def recv_into(self, *arguments: Any) -> int:
        started_s = time.perf_counter()
        try:
            return super().recv_into(*arguments)
        finally:
            self.clock.outside_s += time.perf_counter() - started_s

    def sendmsg(self, *arguments: Any) -> int:
        started_s = time.perf_counter()
        try:
            return super().sendmsg(*arguments)
        finally:
            self.clock.outside_s += time.perf_counter() - started_s


class ReadingStage(Stage):
    """Returns the same rows or logits each time, after it has read a stage's worth of memory.

    The read removes Python's own data from the caches, as weights do.
    """

    def __init__(self, clock: Clock, output: Array, weights: Array) -> None:
        self._clock, self._output, self._weights = clock, output, weights

    def forward(
        self, slot: int, position: int, inputs: Array | Tokens, *, logits: int = 1
    ) -> Array:
        started_s = time.perf_counter()
        if len(self._weights):
            self._weights.max()
        self._clock.outside_s += time.perf_counter() - started_s
        return self._output

    @property
    def memory_bytes(self) -> int:
        return 0

    def close(self) -> None:
        pass


def spec(vocab: int) -> ModelSpec:
    """Return four blocks of a Llama-1B's width: embedding, two layers, head."""
    layer = LayerSpec(
        hidden=HIDDEN,
        heads=32,
        kv_heads=8,
        head_dim=64,
        ffn=8192,
        norm="rmsnorm",
        norm_eps=1e-5,
        norm_position="pre",
        activation="silu",
        gated=True,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
    )
    return ModelSpec(
        vocab=vocab,
        hidden=HIDDEN,
        embed_dim=HIDDEN,
        max_context=1 << 17,
        layers=(layer, layer),
        learned_positions=0,
        position_offset=0,
        final_norm=True,
        tied_head=False,
        bos_token=None,
        eos_tokens=(),
    )


def clocked_pair(clock: Clock) -> tuple[Connection, Connection]:
    """Return a connection's near end, whose calls are timed, and its far end."""
    listener = Listener("127.0.0.1", 0)
    sock = socket.create_connection(("127.0.0.1", listener.port))
    near = ClockedSocket(fileno=sock.detach())
    near.clock = clock
    far = listener.accept()
    listener.close()
    if far is None:
        raise OSError("no connection")
    return Connection(TcpTransport(near)), far


def share(role: str, steps: int, vocab: int, weights_mib: int) -> list[float]:
    """Return Python's seconds in each step of a first, middle or last stage, in order."""
    clock = Clock()
    model = spec(vocab)
    blocks = {"first": range(2), "middle": range(1, 2), "last": range(2, 4)}[role]
    random = np.random.default_rng(0)
    width = vocab if role == "last" else HIDDEN
    output = random.standard_normal((1, width)).astype(np.float32)
    here, before = clocked_pair(clock)
    onwards, after = clocked_pair(clock)
    relay = Relay(
        ReadingStage(clock, output, np.zeros(weights_mib << 18, np.float32)),
        model,
        blocks,
        epoch=1,
        slots=1,
        context_tokens=steps + 10,
        hop_bits=DEFAULT_HOP_BITS,
        report=lambda message: None,
    )
    relay.connect(onwards, PeerLink("next"), Measuring())
    sampling = Sampling(steps + 10, ())
    payload = bytes(payload_bytes(1, HIDDEN, DEFAULT_HOP_BITS))[:-4] + np.float32(1).tobytes()

    def message(step: int) -> Message:
        if role == "first":
            return TokenSampled(1, 7, step, 5, "")
        return Activation(1, 7, 0, step, 1, DEFAULT_HOP_BITS, True)

    relay.start(StartSequence(1, 7, 0, (5,), sampling))
    if role == "first":
        after.receive()
    times_s = []
    for step in range(steps):
        before.send(message(step), b"" if role == "first" else payload)
        clock.outside_s = 0.0
        started_s = time.perf_counter()
        relay.deliver(*here.receive())
        times_s.append(time.perf_counter() - started_s - clock.outside_s)
        after.receive()
    relay.close()
    for connection in (here, before, onwards, after):
        connection.close()
    return times_s


# ---- the command --------------------------------------------------------------------------------


def show_shares(options: argparse.Namespace) -> None:
    rows = []
    for role in ("first", "middle", "last"):
        times_s = share(role, options.steps, options.vocab, options.weights)[options.steps // 10 :]
        median_s, p90_s = summary_s(times_s)
        p99_s = float(np.percentile(times_s, 99))
        rows.append(
            {
                "stage": role,
                "median_us": median_s * 1e6,
                "p90_us": p90_s * 1e6,
                "p99_us": p99_s * 1e6,
            }
        )
    if options.json:
        print(json.dumps({"machine": platform.machine(), "rows": rows}))
        return
    table = Table(title="Python's share of a decode step, µs")
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, str) else f"{cell:.1f}" for cell in row.values()))
    Console().print(table)


def show_comparison(options: argparse.Namespace) -> None:
    with contextlib.ExitStack() as stack:
        console = Console(stderr=True)
        results = [compare(place, options.rounds, console) for place in places(stack)]
    if options.json:
        print(json.dumps({"machine": platform.machine(), "rows": results}))
        return
    table = Table(title=f"{options.rounds} interleaved rounds, {ROW_BYTES} bytes one way")
    table.add_column("")
    for name in ("raw TCP", "least", "hop", "ratio", "hop in TLS"):
        table.add_column(name, justify="right")
    labels: Sequence[tuple[str, str]] = (
        ("busy_median_us", "back to back, median µs"),
        ("busy_p99_us", "back to back, p99 µs"),
        ("paced_median_us", "after 2 ms, median µs"),
        ("paced_p99_us", "after 2 ms, p99 µs"),
        ("mb_per_s", f"chunks of {CHUNK_ROWS} rows, MB/s"),
    )
    for result in results:
        for key, label in labels:
            figures = result[key]
            table.add_row(
                f"{result['place']}: {label}",
                f"{figures['raw']:.1f}",
                f"{figures['framed']:.1f}",
                f"{figures['shoal']:.1f}",
                f"{figures['ratio']:.2f}",
                f"{figures['tls']:.1f}",
            )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="What a hop costs beside raw TCP, and what Python takes of a decode step.",
        epilog="example: python benchmarks/hop.py --rounds 20 --json",
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--share", action="store_true", help="Python's share of a decode step")
    parser.add_argument("--steps", type=int, default=SHARE_STEPS, help="of --share")
    parser.add_argument("--vocab", type=int, default=32000, help="of --share's last stage")
    parser.add_argument("--weights", type=int, default=64, help="MiB that --share's stage reads")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.share:
        show_shares(options)
        return
    try:
        own_identity(IDENTITY)  # Before the processes fork, so that all have the same.
        show_comparison(options)
    finally:
        IDENTITY.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
