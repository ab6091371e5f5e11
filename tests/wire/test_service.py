"""Datagrams to the service manager, as in sd_notify(3), on a real socket."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from wire.service import MAX_STATUS_CHARACTERS, ServiceManager


class Listener:
    """The manager's end."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.socket.setblocking(False)

    def heard(self) -> list[str]:
        lines = []
        while True:
            try:
                lines.append(self.socket.recv(4096).decode())
            except BlockingIOError:
                return lines


@pytest.fixture(params=["path", "abstract"])
def listener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Listener]:
    address = str(tmp_path / "notify") if request.param == "path" else f"@shoal-{os.getpid()}"
    listener = Listener(address)
    yield listener
    listener.socket.close()


def test_it_is_told_what_happens_and_no_status_twice(listener: Listener) -> None:
    service = ServiceManager(listener.address)
    service.ready()
    service.status("joined\nREADY=1")
    service.status("joined\nREADY=1")
    service.status("x" * 10_000)
    service.alive()  # No watchdog was asked for.
    service.stopping()
    ready, joined, long, stopping = listener.heard()
    assert (ready, joined, stopping) == ("READY=1", "STATUS=joined READY=1", "STOPPING=1")
    assert long == "STATUS=" + "x" * MAX_STATUS_CHARACTERS


def test_the_watchdog_is_fed_a_few_times_in_its_patience(listener: Listener) -> None:
    now_s = 100.0
    service = ServiceManager(listener.address, watchdog_s=20.0, clock_s=lambda: now_s)
    for _ in range(200):  # Twenty seconds of a loop that turns ten times in each.
        service.alive()
        now_s += 0.1
    assert listener.heard() == ["WATCHDOG=1"] * 4


def test_a_container_engine_sees_a_file_grow_young(tmp_path: Path) -> None:
    path = tmp_path / "alive"
    now_s = 0.0
    service = ServiceManager.from_environment({"SHOAL_ALIVE_FILE": str(path)})
    service._clock_s = lambda: now_s
    service.alive()
    os.utime(path, (0, 0))
    service.alive()
    assert path.stat().st_mtime == 0  # Too soon to be worth a write.
    now_s = 6.0
    service.alive()
    assert path.stat().st_mtime > 0


def test_the_environment_is_read_once_and_not_inherited() -> None:
    environment = {
        "NOTIFY_SOCKET": "/nowhere",
        "WATCHDOG_USEC": "30000000",
        "WATCHDOG_PID": str(os.getpid()),
        "HOME": "/root",
    }
    service = ServiceManager.from_environment(environment)
    assert environment == {"HOME": "/root"}
    assert service._interval_s == 7.5
    service.ready()  # Nobody listens there, which hurts nobody.


@pytest.mark.parametrize(
    "watchdog", [{"WATCHDOG_USEC": "junk"}, {"WATCHDOG_USEC": "1", "WATCHDOG_PID": "1"}, {}]
)
def test_a_watchdog_that_is_not_ours_is_left_alone(watchdog: dict[str, str]) -> None:
    assert ServiceManager.from_environment(dict(watchdog))._interval_s is None
