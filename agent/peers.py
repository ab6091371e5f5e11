"""Accepts other agents, and connects to them.

Both ends prove that they are the devices that the plan means before any tensor moves. An address
may be stale, or belong to another agent on the same machine.
"""

from __future__ import annotations

import hmac
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.contacts import Contacts
from agent.links import LinkFigures, summary_s
from agent.team import Team
from calibration.disturbance import Patience, spread_of, steady
from wire import limits
from wire.addresses import own_last
from wire.chunks import file_chunks
from wire.codec import Prefix
from wire.conditions import Conditions
from wire.connection import Connection, Listener
from wire.errors import AuthFailed, ConnectFailed, ProtocolError, VersionMismatch, WireError
from wire.hygiene import clean
from wire.introduction import Caller
from wire.lobby import Lobby
from wire.messages import (
    Activation,
    BlockChunk,
    Endpoint,
    FetchBlock,
    JoinRefused,
    Message,
    PeerHello,
    PeerWelcome,
    ProbePing,
    ProbePong,
    RequestFailed,
    TextRows,
    TokenSampled,
)
from wire.rare_log import RareLog

log = logging.getLogger(__name__)

Deliver = Callable[[Message, memoryview], None]
"""Takes a message of the data plane, with its payload."""

HELLO_TIMEOUT_S = 5.0

PROBE_IDLE_S = 30.0
"""A peer that measures the link, or fetches files, sends its next request much sooner than this."""

MOST_FETCHING = 8
"""The number of peers that may fetch files at once."""

NOT_HERE = "the file is not here"

MOST_PROBING = 16
"""The number of peers that may measure their link at once. The coordinator asks for few."""

THREAD_PAUSE_S = 0.1
"""The pause of the accepting thread if no thread can be started for a connection."""

NOT_PREVIOUS = "the sender is not the previous device of the ring there: load the model again"
NOT_MEMBER = "the sender is not an earlier member of the team there: load the model again"
LARGE_FRAMES = 4
"""The number of large frames. The best one counts, and the middle two show the spread."""

MAX_ROWS_HEADER_BYTES = 64 << 10
"""The largest header of rows. Those of a pass of 512 texts have 5 KiB."""

_SMALL = bytes(64)

PROBE_PAUSE_S = 0.002
"""The pause before a probe, about as long as a stage waits. Threads fall asleep in it."""


def connect_peer(
    device: str,
    expected: str,
    endpoints: Sequence[Endpoint],
    *,
    caller: Caller | None = None,
    contacts: Contacts | None = None,
    hop_key: bytes = b"",
    team_key: bytes = b"",
) -> Connection:
    """Connect to the agent ``expected`` at the first of its addresses that is really it.

    ``hop_key`` admits rows to its stage, and ``team_key`` admits to its team. Without a key, only
    the link can be measured. Addresses of this machine come last, because the other machine may
    have the same ones. ``contacts`` notes the connection. Raises ConnectFailed, which names every
    address that was tried.
    """
    failures: list[str] = []
    for endpoint in own_last(endpoints):
        try:
            connection = Connection.connect(endpoint, caller=caller)
            connection.admit = _admit_answer
            try:
                if caller is not None and contacts is not None:
                    contacts.add(connection, expected, caller.answerer)
                connection.set_receive_timeout(HELLO_TIMEOUT_S)
                connection.limit_message(HELLO_TIMEOUT_S)
                connection.send(PeerHello(device, expected, hop_key, team_key))
                answer = clean(connection.receive()[0])
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
            connection.limit_message(None)
            connection.set_receive_timeout(None)
            return connection
    raise ConnectFailed("; ".join(failures) or "the peer has no address")


@dataclass(frozen=True, slots=True)
class Entrance:
    """Admits only the previous device of the ring to this device's stage."""

    previous: str
    """The device id of the previous device."""
    hop_key: bytes
    """The key that the coordinator gave only to that device. Empty admits nobody."""
    deliver: Deliver

    def admits(self, hello: PeerHello) -> bool:
        return (
            bool(self.hop_key)
            and hello.device == self.previous
            and hmac.compare_digest(hello.hop_key, self.hop_key)
        )


class PeerServer:
    """Accepts other agents: answers link probes, and lets previous devices send to the stages.

    A connection's hello decides what it may send, for as long as it lasts.
    """

    def __init__(self, device: str, listener: Listener, contacts: Contacts | None = None) -> None:
        """``contacts`` notes the callers that have introduced themselves."""
        self.entrances: tuple[Entrance, ...] = ()
        """Admit peers to the loaded stages. Any thread may set it."""
        self.teams: tuple[Team, ...] = ()
        """Admit members of the teams of loaded stages. Any thread may set it."""
        self.files: Callable[[str], Path | None] = lambda sha256: None
        """Finds a file that other devices may fetch, by its hash. Set before ``start``."""
        self._device = device
        self._listener = listener
        self._contacts = contacts
        self._connections: set[Connection] = set()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._probing = Lobby(f"port {listener.port}, link probes", MOST_PROBING, MOST_PROBING // 2)
        self._fetching = Lobby(f"port {listener.port}, files", MOST_FETCHING, MOST_FETCHING)
        self._rare_log = RareLog(log)

    def start(self) -> None:
        thread = threading.Thread(target=self._accept, name="peers", daemon=True)
        thread.start()
        self._threads.append(thread)

    def close(self) -> None:
        """Stop accepting, drop every peer, and return when the threads have ended."""
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
                self._connections.add(connection)
                try:
                    thread.start()
                except (RuntimeError, MemoryError) as error:  # The process is out of threads.
                    self._connections.discard(connection)
                    failure = error
                else:
                    self._threads = [item for item in self._threads if item.is_alive()]
                    self._threads.append(thread)
                    continue
            connection.close()
            self._rare_log.warning("thread", "cannot serve a connection: %s", failure)
            time.sleep(THREAD_PAUSE_S)

    def _serve(self, connection: Connection) -> None:
        is_given_away = False
        try:
            hello = connection.receive_hello({PeerHello: limits.MAX_HELLO_BYTES})
            if isinstance(hello, PeerHello) and hello.expected == self._device:
                _require_introduced(hello, connection)
                claim = connection.claim
                if claim is not None and self._contacts is not None:
                    self._contacts.add(connection, claim.device, claim.fingerprint)
                if hello.team_key:
                    self._join_team(hello, connection)
                    is_given_away = True
                else:
                    self._welcome(hello, connection)
        except AuthFailed as error:
            cause = error.refusal or "refused"
            self._rare_log.warning(cause, "connection refused: %s", error)
        except VersionMismatch as error:
            self._rare_log.warning("version", "connection refused: %s", error)
        except ProtocolError as error:
            self._rare_log.warning("protocol", "%s: %s", connection.peer, error)
        except WireError:
            pass  # The peer, or the coordinator, reports a loss that matters.
        finally:
            if not is_given_away:
                connection.close()
            self._probing.leave(connection)
            self._fetching.leave(connection)
            with self._lock:
                self._connections.discard(connection)

    def _welcome(self, hello: PeerHello, connection: Connection) -> None:
        """Serve a peer whose hello names this device. Raises WireError once the connection ends."""
        if not hello.hop_key:
            self._probing.enter(connection, connection.peer_host, connection.close)
            connection.admit = _admit_any
            connection.set_receive_timeout(PROBE_IDLE_S)
            connection.send(PeerWelcome(self._device))
            while True:
                self._answer(connection)
        entrance = next((one for one in self.entrances if one.admits(hello)), None)
        if entrance is None:
            connection.send(JoinRefused(NOT_PREVIOUS))
            raise ProtocolError("it is not the previous device of this stage's ring")
        connection.admit = _admit_rows
        connection.set_receive_timeout(None)
        connection.send(PeerWelcome(self._device))
        while True:
            self._answer(connection, entrance.deliver)

    def _join_team(self, hello: PeerHello, connection: Connection) -> None:
        """Give the connection to the team, which closes it. Raises WireError."""
        team = next((one for one in self.teams if one.admits(hello)), None)
        if team is None:
            connection.send(JoinRefused(NOT_MEMBER))
            raise ProtocolError("it is not an earlier member of this stage's team")
        # The peer's next step may need this member at work, so the welcome comes last.
        team.add(hello.device, connection)
        connection.send(PeerWelcome(self._device))

    def _answer(self, connection: Connection, deliver: Deliver | None = None) -> None:
        """Handle one message that ``admit`` has let in. Raises WireError."""
        message, payload = connection.receive()
        if isinstance(message, ProbePing):
            connection.send(ProbePong(message.number))
        elif isinstance(message, FetchBlock):
            if self._probing.leave(connection):
                self._fetching.enter(connection, connection.peer_host, connection.close)
            self._send_file(message, connection)
        elif deliver is not None:
            deliver(message, payload)

    def _send_file(self, request: FetchBlock, connection: Connection) -> None:
        """Send a file from the cache. Raises WireError, ConnectFailed if it goes meanwhile."""
        path = self.files(request.sha256)
        if path is None:
            connection.send(RequestFailed(0, NOT_HERE))
            return
        try:
            for chunk, payload in file_chunks(path, request.offset, request.end):
                connection.send(chunk, payload)
        except OSError as error:  # It made room for another one just now, or cannot be read.
            raise ConnectFailed(f"{path.name} cannot be sent: {error}") from error


def _require_introduced(hello: PeerHello, connection: Connection) -> None:
    """Raise ProtocolError if the caller has introduced itself as another device."""
    if connection.claim is not None and connection.claim.device != hello.device:
        raise ProtocolError("it has introduced itself as another device")


def _admit_any(prefix: Prefix) -> None:
    """Admit the messages that any device of the shoal may send. Raises ProtocolError."""
    _require_small(prefix, limits.MAX_HELLO_BYTES)
    if prefix.kind is FetchBlock and prefix.payload_bytes == 0:
        return
    if prefix.kind is not ProbePing or prefix.payload_bytes > limits.MAX_PROBE_BYTES:
        raise ProtocolError(f"it sent {prefix.kind.__name__} but is not the previous device")


def _admit_rows(prefix: Prefix) -> None:
    """Admit the messages of the previous device of the ring. Raises ProtocolError."""
    _require_small(prefix, MAX_ROWS_HEADER_BYTES)
    if prefix.kind not in (Activation, TokenSampled, TextRows, ProbePing):
        raise ProtocolError(f"it sent {prefix.kind.__name__} to a stage")


def _admit_answer(prefix: Prefix) -> None:
    """Admit what a device answers to a connection from here. Raises ProtocolError."""
    _require_small(prefix, limits.MAX_HELLO_BYTES)
    if prefix.kind not in (PeerWelcome, JoinRefused, ProbePong, BlockChunk, RequestFailed):
        raise ProtocolError(f"it answered with {prefix.kind.__name__}")


def _require_small(prefix: Prefix, most_bytes: int) -> None:
    """Raise ProtocolError for a large header, which Python would decode while the stage waits."""
    if prefix.header_bytes > most_bytes:
        raise ProtocolError(f"it sent {prefix.kind.__name__} with {prefix.header_bytes} bytes")


def measure_link(connection: Connection) -> tuple[LinkFigures, Conditions]:
    """Measure round trips of small frames and the rate of large ones, and note disturbance.

    Each small frame is sent after a pause, as a stage's are. So it includes the time to wake the
    peer's thread, which is part of a hop's cost. Bandwidth comes from a large frame's round trip
    minus a small one's. Frames grow only until one takes long enough to time, so that a slow radio
    link is not blocked for seconds. The measurement is repeated if other programs used the
    processor, or if large frames differed.
    """
    connection.set_receive_timeout(limits.SEND_TIMEOUT_S)
    probe = _Probe(connection)
    for _ in range(5):
        probe.round_trip_s(_SMALL)
    # The kernel's work is part of the link.
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
        """Return the link's figures and the spread of the large frames."""
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
