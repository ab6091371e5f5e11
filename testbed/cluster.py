"""Shoal on a testbed: a coordinator on one host and agents on others, started as a user would."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from testbed.bed import PACKAGES, Testbed, TestbedError
from testbed.lab import AgentSettings
from testbed.network import HUB

HTTP_PORT = 7421
_POLL_S = 0.1
_START_S = 180.0
"""Python and its libraries take seconds of a core to start. A host may have a tenth of one."""


class Cluster:
    """The shoal processes of one testbed. They outlive this object; ``testbed.bed.down`` ends them.

    Every method raises TestbedError.
    """

    def __init__(self, bed: Testbed, state_dir: Path) -> None:
        """Keep the files and logs of the agents and the coordinator in ``state_dir``."""
        self.bed = bed
        self._state_dir = state_dir

    @property
    def _token(self) -> Path:
        """The file of the token by which agents join. The coordinator makes it."""
        return self._state_dir / "token"

    def start_coordinator(self, *options: str) -> None:
        """Start it and wait until it listens. ``options`` are those of `shoal coordinator`.

        Models stay where they are, unless an option says --rebalance=auto.
        """
        said, saying = os.pipe()
        with os.fdopen(said, "rb") as event:
            try:
                process = self._start(
                    HUB,
                    [
                        *("coordinator", "--json", f"--http=127.0.0.1:{HTTP_PORT}"),
                        *(f"--state-dir={self._state_dir / HUB}", "--create-token"),
                        *(f"--token-file={self._token}", "--rebalance=off", *options),
                    ],
                    saying,
                )
            finally:
                os.close(saying)
            if not event.readline():
                process.wait()
                raise TestbedError(f"the coordinator did not start: {self.last_line(HUB)}")

    def start_agent(self, host: str, settings: AgentSettings | None = None, *options: str) -> None:
        """Start the agent of a host. ``options`` are further ones of `shoal agent`."""
        given = []
        if settings is not None:
            given = [f"--memory={settings.memory_bytes}", f"--storage={settings.storage_bytes}"]
            if settings.backend is not None:
                given.append(f"--backend={settings.backend}")
        self._start(
            host,
            [
                *("agent", f"--name={host}", "--threads=1", *given),
                *(f"--state-dir={self._state_dir / host}", f"--token-file={self._token}"),
                *options,
            ],
            subprocess.DEVNULL,
        )

    def wait_for_agents(
        self, hosts: Sequence[str], on_joined: Callable[[int], None] = lambda joined: None
    ) -> None:
        """Wait until the agents of these hosts have joined, and report how many have."""
        deadline_s = time.monotonic() + _START_S
        missing = set(hosts)
        while missing:
            joined = {device["name"] for device in self.get("/shoal/v1/devices")["devices"]}
            missing = set(hosts) - joined
            on_joined(len(hosts) - len(missing))
            for host in missing:
                if not self.bed.processes(host):
                    raise TestbedError(f"the agent on {host} ended: {self.last_line(host)}")
            if missing and time.monotonic() > deadline_s:
                raise TestbedError(
                    f"after {_START_S:.0f} s these have not joined: {', '.join(sorted(missing))};"
                    f" {min(missing)} says: {self.last_line(min(missing))}"
                )
            time.sleep(_POLL_S)

    def get(self, path: str) -> Any:
        """The JSON at ``path`` of the coordinator's API."""

        def ask() -> Any:
            url = f"http://127.0.0.1:{HTTP_PORT}{path}"
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)

        try:
            return self.bed.inside(HUB, ask)
        except (OSError, ValueError) as error:
            raise TestbedError(f"the coordinator does not answer: {error}") from error

    def open_door(self, port: int | None = None) -> str:
        """Make the API reachable from this machine, on loopback, and return its URL.

        ``port`` None means HTTP_PORT if it is free, or any other port.
        """
        listener = _listen([HTTP_PORT, 0] if port is None else [port])
        with listener:
            command = [sys.executable, "-m", "testbed.forward", str(listener.fileno())]
            self.bed.popen(
                HUB,
                [*command, str(HTTP_PORT)],
                descriptors=[listener.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                env=_environment(),
            )
            return f"http://127.0.0.1:{listener.getsockname()[1]}"

    def log(self, host: str) -> Path:
        """The log of the process on a host."""
        return self._state_dir / f"{host}.log"

    def last_line(self, host: str) -> str:
        """The last line of a host's log."""
        lines = self.log(host).read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "nothing"

    def _start(self, host: str, arguments: list[str], stdout: int) -> subprocess.Popen[Any]:
        self._state_dir.mkdir(parents=True, exist_ok=True)
        with self.log(host).open("a") as log:
            return self.bed.popen(
                host,
                [sys.executable, "-m", "cli", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=log,
                start_new_session=True,
                env=_environment(),
            )


def _listen(ports: Sequence[int]) -> socket.socket:
    for port in ports:
        try:
            return socket.create_server(("127.0.0.1", port))
        except OSError as error:
            reason = error.strerror
    raise TestbedError(f"port {ports[-1]} of this machine: {reason}: choose another one")


def _environment() -> dict[str, str]:
    """The environment in which processes run the same shoal as this one, installed or not."""
    # Proxies belong to the network outside the testbed.
    kept = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    return {**kept, "PYTHONPATH": str(PACKAGES)}
