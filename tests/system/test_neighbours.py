"""Hostile neighbours of running processes: silent, flooding, or forging."""

from __future__ import annotations

import http.client
import os
import resource
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest

from agent.peers import connect_peer
from tests.system.cluster import COMMAND, TINY_OPT, Cluster, wait_for
from tests.system.members import Member
from wire.codec import encode
from wire.connection import Connection
from wire.errors import WireError
from wire.messages import (
    Activation,
    Endpoint,
    PeerHello,
    PeerWelcome,
    RequestFailed,
    TokenSampled,
)

TASKS_MAX = 512
"""Of the services' units."""
DESCRIPTORS = 1024
"""What a shell gives a process."""
PIDS = Path("/sys/fs/cgroup/pids")
ANSWER_S = 60.0


@pytest.fixture(autouse=True)
def many_descriptors() -> Iterator[None]:
    """For this process, which is all of the neighbours."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4096:
        pytest.skip("needs 4096 file descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def silent(stack: ExitStack, port: int, count: int, beginning: bytes = b"") -> None:
    """Connections that stay open on this side, whatever the other one does."""
    for _ in range(count):
        sock = stack.enter_context(socket.socket())
        sock.settimeout(ANSWER_S)
        with suppress(OSError):
            sock.connect(("127.0.0.1", port))
            sock.sendall(beginning)


def data_port(process: psutil.Process) -> int:
    """Where an agent listens for others."""
    return int(
        next(
            connection.laddr.port
            for connection in process.net_connections("tcp4")
            if connection.status == psutil.CONN_LISTEN
        )
    )


# ---- an agent ----------------------------------------------------------------------------------


@contextmanager
def task_limit(pid: int) -> Iterator[Path]:
    """A control group with a limit on tasks, as systemd makes one, around a process; its file."""
    group = PIDS / f"shoal-test-{os.getpid()}-{pid}"
    try:
        group.mkdir()
    except OSError:
        pytest.skip("needs a pids control group")
    try:
        limit = group / "pids.max"
        limit.write_text(str(TASKS_MAX))
        (group / "cgroup.procs").write_text(str(pid))
        yield limit
    finally:
        for task in (group / "cgroup.procs").read_text().split():
            with suppress(ProcessLookupError):
                (PIDS / "cgroup.procs").write_text(task)
        wait_for(lambda: not (group / "cgroup.procs").read_text(), ANSWER_S, "an empty group")
        group.rmdir()


def test_an_agent_hears_its_peers_whatever_strangers_open(cluster: Cluster) -> None:
    """As many silent connections as would take all its threads, and then no thread at all."""
    cluster.start_coordinator()
    agent = psutil.Process(cluster.start_agent("pi-1").pid)
    cluster.wait_for_agents("pi-1")
    device = cluster.get("/shoal/v1/devices")["devices"][0]["device"]
    endpoint = Endpoint("127.0.0.1", data_port(agent))
    other, known = Member(cluster, "other"), Member(cluster, "member")

    def connected(by: Member) -> Connection:
        return connect_peer(by.device, device, [endpoint], caller=by.to(device))

    def answers() -> bool:
        with suppress(WireError), connected(other):
            return True
        return False

    with ExitStack() as stack, task_limit(agent.pid) as limit:
        member = stack.enter_context(connected(known))
        silent(stack, endpoint.port, 700)
        wait_for(answers, ANSWER_S, "a peer that is answered")
        assert agent.num_threads() < 200
        # The limit falls below what it has: no thread can start.
        limit.write_text("1")
        silent(stack, endpoint.port, 40)
        wait_for(
            lambda: "cannot serve a connection" in cluster.log("pi-1"),
            ANSWER_S,
            "a line of its log",
        )
        limit.write_text(str(TASKS_MAX))
        wait_for(answers, ANSWER_S, "a peer that is answered")
        member.send(PeerHello("no", "probe"))  # It was never closed for others: only now.
        member.set_receive_timeout(ANSWER_S)
        with pytest.raises(WireError):
            member.receive()
    lines = cluster.log("pi-1").splitlines()
    assert sum("cannot serve a connection" in line for line in lines) == 1
    assert len(lines) < 15, lines


# ---- a coordinator -----------------------------------------------------------------------------


class SmallCluster(Cluster):
    """Its processes have as many descriptors as a shell gives them, and may not have more."""

    def command(self, name: str) -> list[str]:
        return ["prlimit", f"--nofile={DESCRIPTORS}:{DESCRIPTORS}", *COMMAND]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[SmallCluster]:
    cluster = SmallCluster(tmp_path)
    yield cluster
    cluster.stop()


def test_a_coordinator_serves_whatever_strangers_open(small: SmallCluster) -> None:
    small.start_coordinator()
    small.start_agent("pi-1")
    small.wait_for_agents("pi-1")
    http_port = httpx.URL(small.url).port
    assert http_port is not None
    with ExitStack() as stack:
        silent(stack, http_port, 750)
        silent(stack, http_port, 750, b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX")
        assert small.names() == ["pi-1"]
        silent(stack, small.control_port, 1500)
        # Four who say at once that they have 4 MiB to say.
        large = encode(RequestFailed(1, "x" * 4_000_000))
        silent(stack, small.control_port, 4, large[: 1 << 20])
        small.start_agent("pi-2")
        small.wait_for_agents("pi-1", "pi-2")
        assert small.get("/v1/models")["data"] == []
    lines = small.log("coordinator").splitlines()
    assert len(lines) < 15, lines
    assert not any("pi-1" in line for line in lines), lines


@pytest.mark.parametrize("path", ["/shoal/v1/devices", "/v1/models", "/shoal/v1/ps"])
def test_a_page_with_a_name_of_its_own_for_this_machine_learns_nothing(
    cluster: Cluster, path: str
) -> None:
    cluster.start_coordinator("--no-mdns", "--http-host=shoal.lan,other.lan", "--http-host=third")
    port = httpx.URL(cluster.url).port

    def status(host: str) -> int:
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_S)
        client.request("GET", path, headers={"Host": host})
        answer = client.getresponse()
        answer.read()
        client.close()
        return answer.status

    assert status("evil.example") == 403
    for host in ("shoal.lan", "other.lan:80", "third", f"localhost:{port}"):
        assert status(host) == 200


# ---- a member that is not of the ring -----------------------------------------------------------


def test_a_member_outside_the_ring_changes_no_answer(cluster: Cluster) -> None:
    """It has joined, and sends tokens and rows to every stage as if it were the one before."""
    cluster.start_coordinator()
    names = ("pi-1", "pi-2")
    for name in names:
        cluster.start_agent(name)
    cluster.wait_for_agents(*names)
    loaded = cluster.load(
        TINY_OPT, "--bits=16", "--max-weight-error=none", "--pin=embedding:pi-1", "--pin=head:pi-2"
    )
    assert [stage["device"] for stage in loaded["plan"]["stages"]] == list(names)
    devices = {
        device["name"]: device["device"] for device in cluster.get("/shoal/v1/devices")["devices"]
    }
    prompt = "The lamp is in the attic. Where is the lamp?"

    def ask() -> str:
        answer = httpx.post(
            f"{cluster.url}/v1/completions",
            json={"prompt": prompt, "temperature": 0, "max_tokens": 40},
            timeout=ANSWER_S,
            trust_env=False,
        )
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])

    expected = ask()
    over = threading.Event()
    stranger = Member(cluster)

    def attack(name: str, claimed: str) -> None:
        """Say all that a neighbour in the ring could, over and over."""
        port = data_port(psutil.Process(cluster.processes[name].pid))
        while not over.is_set():
            with (
                suppress(WireError),
                Connection.connect(
                    Endpoint("127.0.0.1", port), caller=stranger.to(devices[name])
                ) as peer,
            ):
                peer.send(PeerHello(claimed, devices[name]))
                peer.set_receive_timeout(ANSWER_S)
                assert peer.receive()[0] == PeerWelcome(devices[name])
                for number in range(1, 20):
                    for epoch in (1, 2, 3):
                        peer.send(TokenSampled(epoch, number, 1, 7, ""))
                        peer.send(Activation(epoch, number, 0, 5, 1, 16, True), bytes(4))
                        peer.send(Activation(epoch, 1 << 62, 0, 0, 1, 16, True), bytes(4))

    threads = [
        threading.Thread(target=attack, args=(name, claimed))
        for name, claimed in (
            ("pi-1", stranger.device),
            ("pi-2", stranger.device),
            ("pi-2", devices["pi-1"]),
        )
    ]
    for thread in threads:
        thread.start()
    try:
        for _ in range(6):
            assert ask() == expected
    finally:
        over.set()
        for thread in threads:
            thread.join(ANSWER_S)
    for name in names:
        lines = cluster.log(name).splitlines()
        told = ("is not the previous device", "has introduced itself as another device")
        assert sum(any(text in line for text in told) for line in lines) == 1, lines


def test_a_coordinator_out_of_descriptors_says_so_once(small: SmallCluster) -> None:
    """What it cannot accept waits; what it has goes on."""
    small.start_coordinator()
    coordinator = psutil.Process(small.processes["coordinator"].pid)
    held = coordinator.num_fds()
    coordinator.rlimit(psutil.RLIMIT_NOFILE, (held, DESCRIPTORS))
    with ExitStack() as stack:
        silent(stack, small.control_port, 20)
        wait_for(
            lambda: "cannot accept connections" in small.log("coordinator"),
            ANSWER_S,
            "a line of its log",
        )
        coordinator.rlimit(psutil.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
        small.start_agent("pi-1")
        small.wait_for_agents("pi-1")
    assert small.log("coordinator").count("cannot accept connections") == 1
