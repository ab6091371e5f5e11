"""What a service manager is told: the words of `systemctl status`, from real processes."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.system.cluster import START_TIMEOUT_S, TINY_OPT, Cluster

COUNTED = "STATUS=cluster 'shoal': "


class Manager:
    """A service manager's end of sd_notify(3)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.settimeout(START_TIMEOUT_S)
        self.heard: list[str] = []

    def hear(self, line: str) -> None:
        """Wait until a process has said this line."""
        while line not in self.heard:
            try:
                self.heard.append(self.socket.recv(4096).decode())
            except TimeoutError:
                pytest.fail(f"{line!r} was not said, only {self.heard}")
        self.heard.remove(line)


@pytest.fixture
def managed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Manager]]:
    """Makes the manager of the processes that start from then on."""
    managers: list[Manager] = []

    def manage(name: str) -> Manager:
        manager = Manager(tmp_path / f"{name}.notify")
        managers.append(manager)
        monkeypatch.setenv("NOTIFY_SOCKET", str(manager.path))
        return manager

    yield manage
    for manager in managers:
        manager.socket.close()


def test_the_status_of_a_unit_tells_what_is_served(
    cluster: Cluster, managed: Callable[[str], Manager]
) -> None:
    manager = managed("coordinator")
    cluster.start_coordinator("--no-mdns", "--recovery-wait=600")
    manager.hear("READY=1")
    manager.hear(f"{COUNTED}0 agents, no model")

    agents = managed("agent")
    agent = cluster.start_agent("a1")
    agents.hear("READY=1")
    manager.hear(f"{COUNTED}1 agent, no model")
    cluster.load(TINY_OPT, "--bits=8")
    manager.hear(f"{COUNTED}1 agent, tiny-opt")

    cluster.kill("a1")
    agent.wait()
    manager.hear(f"{COUNTED}0 agents, tiny-opt, recovering")
    cluster.start_agent("a1")
    manager.hear(f"{COUNTED}1 agent, tiny-opt")
    cluster.run("unload")
    manager.hear(f"{COUNTED}1 agent, no model")

    for name, told in (("a1", agents), ("coordinator", manager)):
        cluster.processes[name].terminate()
        told.hear("STOPPING=1")
        assert cluster.processes[name].wait(START_TIMEOUT_S) == 0
