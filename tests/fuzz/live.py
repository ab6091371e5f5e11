"""Running processes under hostile bytes: the control port and an agent's data port."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.fuzz.frames import Frames
from tests.machines import identity_of
from tests.system.cluster import TINY_OPT, Cluster
from tests.system.members import Member
from wire.codec import encode
from wire.connection import Connection
from wire.errors import WireError
from wire.introduction import COORDINATOR, Caller, Purpose
from wire.invite import read_invite
from wire.messages import AgentHello, BlocksHello, Endpoint, Message, PeerHello
from wire.tls import TlsTransport, own_client_context

AGENTS = ("one", "two")
PROMPT = "The lamp is in the attic. Where is the lamp?"
FRAMES_OF_ONE = 200
"""The most frames of one connection."""

ALLOWED_BYTES = 64 << 20
"""How much the memory of a process may grow under hostile bytes."""


class Live:
    """A loaded model on two agents, and a member that misbehaves on their connections."""

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self._cluster = cluster
        self._frames = Frames(seed)
        cluster.start_coordinator()
        where = f"--coordinator=127.0.0.1:{cluster.control_port}"
        for name in AGENTS:
            cluster.start_agent(name, where, "--memory=4500000")
        cluster.wait_for_agents(*AGENTS)
        cluster.load(TINY_OPT, "--bits=8", "--max-weight-error=none")
        self._member = Member(cluster, "mallory")
        device = next(
            item["device"]
            for item in cluster.get("/shoal/v1/devices")["devices"]
            if item["name"] == AGENTS[0]
        )
        self._device = device
        invite = read_invite(cluster.token())
        assert invite is not None
        self._coordinator = invite.coordinator
        self._control = Endpoint("127.0.0.1", cluster.control_port)
        self._data = Endpoint("127.0.0.1", self._data_port(AGENTS[0]))
        self._expected = self._answer()
        self._before = self._memory()
        self.frames: dict[str, int] = {}
        """Maps an attack to the number of its frames that were sent."""

    def run(self, seconds: float) -> None:
        """Attack, and then check that all processes work as before."""
        attacks: tuple[tuple[str, Callable[[], int]], ...] = (
            ("control port, no TLS", lambda: self._without_tls(self._control)),
            ("data port, no TLS", lambda: self._without_tls(self._data)),
            ("control port, not introduced", lambda: self._not_introduced(COORDINATOR)),
            ("data port, not introduced", lambda: self._not_introduced(self._device)),
            ("control port, a member", lambda: self._as_member("control", AgentHello)),
            ("files, a member", lambda: self._as_member("blocks", BlocksHello)),
            ("data port, a member", self._as_peer),
        )
        deadline_s = time.monotonic() + seconds
        while time.monotonic() < deadline_s:
            for name, attack in attacks:
                self.frames[name] = self.frames.get(name, 0) + attack()
            for name, process in self._cluster.processes.items():
                assert process.poll() is None, f"{name} has ended"
        assert self._answer() == self._expected, "another answer"
        for name, size in self._memory().items():
            grown = size - self._before[name]
            assert grown < ALLOWED_BYTES, f"{name} has grown by {grown >> 20} MiB"

    def _without_tls(self, endpoint: Endpoint) -> int:
        with contextlib.suppress(OSError), _socket(endpoint) as sock:
            sock.sendall(self._frames.any())
        return 1

    def _not_introduced(self, device: str) -> int:
        """TLS with the right answerer, and then anything but an introduction."""
        is_coordinator = device == COORDINATOR
        fingerprint = self._coordinator if is_coordinator else self._member.to(device).answerer
        with contextlib.suppress(WireError, OSError):
            connection = Connection.connect(
                self._control if is_coordinator else self._data,
                transport=lambda sock: TlsTransport(sock, own_client_context(), fingerprint),
            )
            with connection:
                connection._transport.send(self._frames.any())
                connection.set_receive_timeout(0.05)
                connection.receive()
        return 1

    def _as_member(self, purpose: Purpose, hello: type[Message]) -> int:
        """A machine that has joined says a hello, damaged or not, and then anything."""
        caller = Caller(
            identity_of(self._member.device),
            self._coordinator,
            purpose,
            self._member.device,
            COORDINATOR,
        )
        with (
            contextlib.suppress(WireError, OSError),
            Connection.connect(self._control, caller=caller) as connection,
        ):
            return self._say(connection, self._frames.any(hello))
        return 0

    def _as_peer(self) -> int:
        with contextlib.suppress(WireError, OSError):
            caller = self._member.to(self._device)
            with Connection.connect(self._data, caller=caller) as connection:
                hello = encode(PeerHello(self._member.device, self._device))
                return self._say(connection, hello)
        return 0

    def _say(self, connection: Connection, hello: bytes) -> int:
        """Send frames until the other side has had enough. The number that was sent."""
        sent = 0
        with contextlib.suppress(OSError, WireError):
            connection._transport.send(hello)
            while sent < FRAMES_OF_ONE:
                sent += 1
                connection._transport.send(self._frames.any())
        return sent

    def _answer(self) -> str:
        answer: dict[str, Any] = httpx.post(
            f"{self._cluster.url}/v1/completions",
            json={"prompt": PROMPT, "temperature": 0, "max_tokens": 20},
            timeout=60,
            trust_env=False,
        ).json()
        return str(answer["choices"][0]["text"])

    def _memory(self) -> dict[str, int]:
        return {
            name: psutil.Process(process.pid).memory_info().rss
            for name, process in self._cluster.processes.items()
        }

    def _data_port(self, name: str) -> int:
        process = psutil.Process(self._cluster.processes[name].pid)
        return next(
            item.laddr.port
            for item in process.net_connections("tcp4")
            if item.status == psutil.CONN_LISTEN
        )


@contextlib.contextmanager
def _socket(endpoint: Endpoint) -> Iterator[socket.socket]:
    with socket.create_connection((endpoint.host, endpoint.port), timeout=5) as sock:
        yield sock


@contextlib.contextmanager
def living(directory: Path, seed: int) -> Iterator[Live]:
    """A shoal in ``directory`` to attack. At the end, no log may have a traceback."""
    cluster = Cluster(directory)
    try:
        yield Live(cluster, seed)
    finally:
        cluster.stop()
