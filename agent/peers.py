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
from calibration.disturbance import Patience, spread_of, steady
from wire import limits
from wire.auth import Token
from wire.conditions import Conditions
from wire.connection import Connection, Listener
from wire.errors import AuthFailed, ConnectFailed, ProtocolError, WireError
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

LARGE_FRAMES = 4
"""Of these the best one counts, and the two in the middle tell how far they differ."""

_SMALL = bytes(64)

PROBE_PAUSE_S = 0.002
"""Pause before a probe: about what a stage waits for its turn, long enough for threads to sleep."""


def connect_peer(
    device: str, expected: str, endpoints: Sequence[Endpoint], *, token: Token | None = None
) -> Connection:
    """Connect to the agent ``expected`` at the first of its addresses that is really it.

    Raises ConnectFailed naming every address that was tried.
    """
    failures: list[str] = []
    for endpoint in endpoints:
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
        except AuthFailed as error:
            log.warning("connection refused: %s", error)
        except WireError:
            pass  # The peer's own side, or the coordinator, reports a loss that matters.
        finally:
            connection.close()
            with self._lock:
                self._connections.discard(connection)


def measure_link(connection: Connection) -> LinkFigures:
    """As ``measure_link_steadily``, the figures alone."""
    return measure_link_steadily(connection)[0]


def measure_link_steadily(connection: Connection) -> tuple[LinkFigures, Conditions]:
    """Round trips of small frames, the rate of large ones, and what else went on here meanwhile.

    Small frames are sent after a pause, as a stage's are: the peer's thread sleeps until they come,
    and waking it is part of what a hop costs. Bandwidth is what is left of a large frame's round
    trip without the small one's; frames grow until one takes long enough to time, so that a slow
    radio link is not held up for seconds. Measured a second time where other programs used the
    processor, or where large frames differed.
    """
    connection.set_receive_timeout(limits.SEND_TIMEOUT_S)
    probe = _Probe(connection)
    for _ in range(5):
        probe.round_trip_s(_SMALL)
    # What the kernel does is the link's own work.
    return steady(probe.figures, Patience(), lambda figures: figures.rtt_s, kernel=False)


class _Probe:
    """Counts the pings of one connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._number = 0

    def round_trip_s(self, payload: bytes) -> float:
        """Seconds until the peer has answered a ping with this payload."""
        self._number += 1
        started = time.perf_counter()
        self._connection.send(ProbePing(self._number), payload)
        answer, _ = self._connection.receive()
        elapsed = time.perf_counter() - started
        if answer != ProbePong(self._number):
            raise ProtocolError(f"{self._connection.peer} answered a probe wrongly")
        return elapsed

    def figures(self) -> tuple[LinkFigures, float]:
        """The link's figures, and the spread of the large frames."""
        times_s = []
        for _ in range(21):
            time.sleep(PROBE_PAUSE_S)
            times_s.append(self.round_trip_s(_SMALL))
        rtt_s, rtt_p90_s = summary_s(times_s)
        size = 64 << 10
        while self.round_trip_s(bytes(size)) < rtt_s + 0.02 and size < 4 << 20:
            size *= 4
        payload = bytes(size)
        large_s = [self.round_trip_s(payload) for _ in range(LARGE_FRAMES)]
        rate = size / max(min(large_s) - rtt_s, 1e-6)
        return LinkFigures(rtt_s, rtt_p90_s, rate), spread_of(large_s)
