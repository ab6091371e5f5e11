"""The data plane's doors: accepting peers, and connecting to one.

Both ends prove that they are who the plan means before any tensor moves: an address may be stale,
or, with several agents on one machine, somebody else's.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from agent.links import LinkFigures, summary_s
from wire import limits
from wire.addresses import own_last
from wire.auth import Token
from wire.connection import Connection, Listener
from wire.errors import AuthFailed, ConnectFailed, ProtocolError, VersionMismatch, WireError
from wire.messages import (
    Endpoint,
    JoinRefused,
    Message,
    PeerHello,
    PeerWelcome,
    ProbePing,
    ProbePong,
)

log = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 5.0

PROBE_PAUSE_S = 0.002
"""Pause before a probe: about what a stage waits for its turn, long enough for threads to sleep."""


def connect_peer(
    device: str, expected: str, endpoints: Sequence[Endpoint], *, token: Token | None = None
) -> Connection:
    """Connect to the agent ``expected`` at the first of its addresses that is really it.

    Addresses that this machine has itself come last: another one may have them too. Raises
    ConnectFailed naming every address that was tried.
    """
    failures: list[str] = []
    for endpoint in own_last(endpoints):
        try:
            connection = Connection.connect(endpoint, token=token)
            try:
                connection.set_receive_timeout(HELLO_TIMEOUT_S)
                connection.send(PeerHello(device, expected))
                answer, _ = connection.receive()
                if isinstance(answer, JoinRefused):
                    raise AuthFailed(f"{connection.peer} refused: {answer.reason}")
                if answer != PeerWelcome(expected):
                    raise ProtocolError(f"{connection.peer} is another device")
            except WireError:
                connection.close()
                raise
        except WireError as error:
            failures.append(str(error))
        else:
            connection.set_receive_timeout(None)
            return connection
    raise ConnectFailed("; ".join(failures) or "the peer has no address")


class PeerServer:
    """Accepts other agents: answers probes itself, hands the rest to ``deliver``."""

    def __init__(
        self,
        device: str,
        listener: Listener,
        deliver: Callable[[Message, memoryview], None],
    ) -> None:
        self._device = device
        self._listener = listener
        self._deliver = deliver
        self._connections: set[Connection] = set()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        thread = threading.Thread(target=self._accept, name="peers", daemon=True)
        self._threads.append(thread)
        thread.start()

    def close(self) -> None:
        """Stop accepting and drop every peer; returns when the threads have ended."""
        self._listener.close()
        with self._lock:
            connections, threads = list(self._connections), list(self._threads)
        for connection in connections:
            connection.close()
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(timeout=5)

    def _accept(self) -> None:
        while (connection := self._listener.accept()) is not None:
            thread = threading.Thread(
                target=self._serve, args=(connection,), name="peer", daemon=True
            )
            with self._lock:
                self._threads = [item for item in self._threads if item.is_alive()]
                self._threads.append(thread)
                self._connections.add(connection)
            thread.start()

    def _serve(self, connection: Connection) -> None:
        try:
            connection.set_receive_timeout(HELLO_TIMEOUT_S)
            hello, _ = connection.receive()
            if not isinstance(hello, PeerHello) or hello.expected != self._device:
                return
            connection.send(PeerWelcome(self._device))
            connection.set_receive_timeout(None)
            while True:
                message, payload = connection.receive()
                if isinstance(message, ProbePing):
                    connection.send(ProbePong(message.number))
                else:
                    self._deliver(message, payload)
        except (AuthFailed, VersionMismatch) as error:
            log.warning("connection refused: %s", error)
        except WireError:
            pass  # The peer's own side, or the coordinator, reports a loss that matters.
        finally:
            connection.close()
            with self._lock:
                self._connections.discard(connection)


def measure_link(connection: Connection) -> LinkFigures:
    """Round trips of small frames, and the rate of large ones.

    Small frames are sent after a pause, as a stage's are: the peer's thread sleeps until they come,
    and waking it is part of what a hop costs. Bandwidth is what is left of a large frame's round
    trip without the small one's; frames grow until one takes long enough to time, so that a slow
    radio link is not held up for seconds.
    """
    connection.set_receive_timeout(limits.SEND_TIMEOUT_S)
    number = 0

    def round_trip_s(payload: bytes) -> float:
        nonlocal number
        number += 1
        started = time.perf_counter()
        connection.send(ProbePing(number), payload)
        answer, _ = connection.receive()
        elapsed = time.perf_counter() - started
        if answer != ProbePong(number):
            raise ProtocolError(f"{connection.peer} answered a probe wrongly")
        return elapsed

    small = bytes(64)
    for _ in range(5):
        round_trip_s(small)
    times_s = []
    for _ in range(21):
        time.sleep(PROBE_PAUSE_S)
        times_s.append(round_trip_s(small))
    rtt_s, rtt_p90_s = summary_s(times_s)
    size = 64 << 10
    while round_trip_s(bytes(size)) < rtt_s + 0.02 and size < 4 << 20:
        size *= 4
    payload = bytes(size)
    best_s = min(round_trip_s(payload) for _ in range(3))
    return LinkFigures(rtt_s, rtt_p90_s, size / max(best_s - rtt_s, 1e-6))
