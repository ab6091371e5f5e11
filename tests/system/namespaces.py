"""Hosts on one Ethernet switch: each a network namespace, and the switch is another.

Nothing is made in the network that the tests themselves run in.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import secrets
import shutil
import signal
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from tests.system.cluster import COMMAND, Cluster, wait_for

Result = TypeVar("Result")

CLONE_NEWNET = 0x40000000
TCP_LISTEN = 10


class NamespaceError(Exception):
    """A namespace or a link could not be made; the message is that of ``ip``."""


class Network:
    """A switch and its hosts, while the context is open. Hosts have addresses 10.77.0.N/24."""

    def __init__(self) -> None:
        self._prefix = f"shoal-{os.getpid()}-{secrets.token_hex(3)}"
        self._hosts: list[str] = []
        self._namespaces: list[str] = []
        self._switch = self.namespace("switch")

    def __enter__(self) -> Network:
        """Make the switch. Raises NamespaceError."""
        try:
            self._add_namespace(self._switch)
            ip("-n", self._switch, "link", "add", "bridge", "type", "bridge", "forward_delay", "0")
            ip("-n", self._switch, "link", "set", "bridge", "up")
        except NamespaceError:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every process on every host, and remove all that was made. Idempotent."""
        while self._namespaces:
            namespace = self._namespaces.pop()
            pids = subprocess.run(
                ["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False
            ).stdout
            for pid in map(int, pids.split()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, check=False)

    def add_host(self, name: str) -> str:
        """Plug a new host in; returns its address."""
        namespace = self.namespace(name)
        self._add_namespace(namespace)
        self._hosts.append(name)
        address = f"10.77.0.{len(self._hosts)}"
        port = ("-n", self._switch, "link")
        ip(*port, "add", name, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        ip(*port, "set", name, "master", "bridge", "up")
        ip("-n", namespace, "link", "set", "lo", "up")
        ip("-n", namespace, "link", "set", "eth0", "up")
        self.add_address(name, address)
        return address

    def add_address(self, host: str, address: str) -> None:
        ip("-n", self.namespace(host), "address", "add", f"{address}/24", "dev", "eth0")

    def remove_addresses(self, host: str) -> None:
        """Leave the host with its loopback interface alone."""
        ip("-n", self.namespace(host), "address", "flush", "dev", "eth0")

    def namespace(self, host: str) -> str:
        return f"{self._prefix}-{host}"

    def command(self, host: str) -> list[str]:
        """What to put before a command line to run it on ``host``."""
        return ["ip", "netns", "exec", self.namespace(host)]

    def inside(self, host: str, call: Callable[[], Result]) -> Result:
        """Call with the network of ``host``: sockets belong to where they are made."""
        path = Path("/run/netns") / self.namespace(host)

        def enter_and_call() -> Result:
            libc = ctypes.CDLL(None, use_errno=True)
            with path.open() as file:
                if libc.setns(file.fileno(), CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), f"cannot enter {path}")
            return call()

        with ThreadPoolExecutor(max_workers=1) as thread:
            return thread.submit(enter_and_call).result()

    def pull_cable(self, host: str) -> None:
        """Let the host lose its carrier."""
        ip("-n", self._switch, "link", "set", host, "down")

    def plug_cable(self, host: str) -> None:
        ip("-n", self._switch, "link", "set", host, "up")

    def block_multicast(self) -> None:
        """Forward no multicast between hosts from now on, as some access points do."""
        for host in self._hosts:
            port = ("-n", self._switch, "link", "set", host, "type", "bridge_slave")
            ip(*port, "mcast_flood", "off")

    def received_bytes(self, host: str) -> int:
        """What has arrived at the host so far."""
        shown = ip("-n", self.namespace(host), "-json", "-statistics", "link", "show", "eth0")
        return int(json.loads(shown)[0]["stats64"]["rx"]["bytes"])

    def _add_namespace(self, namespace: str) -> None:
        self._namespaces.append(namespace)
        ip("netns", "add", namespace)


class NetworkCluster(Cluster):
    """A cluster on a network: agents on hosts of their names, all finding each other by mDNS."""

    def __init__(
        self, directory: Path, network: Network, host: str = "hub", name: str = "shoal"
    ) -> None:
        """``host`` is the coordinator's, made with the cluster; ``name`` is the cluster's."""
        super().__init__(directory)
        self.network = network
        self.host = host
        self.name = name
        self.address = network.add_host(host)

    def command(self, name: str) -> list[str]:
        host = self.host if name == "coordinator" else name
        return [*self.network.command(host), *COMMAND]

    def start_coordinator(self, *options: str) -> None:
        super().start_coordinator("--bind=0.0.0.0", f"--cluster={self.name}", *options)

    def start_agent(self, name: str, *options: str) -> subprocess.Popen[str]:
        return super().start_agent(name, "--bind=0.0.0.0", f"--cluster={self.name}", *options)

    def get(self, path: str) -> Any:
        return self.network.inside(self.host, lambda: super(NetworkCluster, self).get(path))

    def lose_coordinator(self) -> None:
        """Kill the coordinator, so that it takes leave of nobody."""
        self.kill("coordinator")
        process = self.processes.pop("coordinator")
        process.wait()
        assert process.stdout is not None
        process.stdout.close()

    def wait_for_line(self, name: str, text: str, timeout_s: float, times: int = 1) -> None:
        """Wait until the process has said ``text`` so often."""
        wait_for(lambda: self.log(name).count(text) >= times, timeout_s, f"{name}: {text!r}")

    def has_started(self, name: str) -> bool:
        """True once an agent listens for others, which is when it begins to search."""
        table = Path(f"/proc/{self.processes[name].pid}/net/tcp").read_text()
        return f" {TCP_LISTEN:02X} " in table


def ip(*arguments: str) -> str:
    """Run ``ip``. Raises NamespaceError."""
    completed = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if completed.returncode:
        raise NamespaceError(f"ip {' '.join(arguments)}: {completed.stderr.strip()}")
    return completed.stdout


@functools.cache
def unavailable() -> str | None:
    """Why there can be no networks here; None where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "there is no `ip` (iproute2)"
    try:
        with Network() as network:
            network.add_host("probe")
            network.inside("probe", lambda: None)
    except (NamespaceError, OSError) as error:
        return f"network namespaces do not work: {error}"
    return None
