"""A cluster on a testbed: agents on hosts of their names, all finding each other by mDNS."""

from __future__ import annotations

import functools
import os
import subprocess
from pathlib import Path
from typing import Any

from testbed.bed import Testbed, TestbedError
from testbed.network import Host, Network
from tests.system.cluster import COMMAND, Cluster, Process, last_json, wait_for

TCP_LISTEN = 10


def bed_of(*hosts: str) -> Testbed:
    """A testbed of this test run with unlimited hosts and links."""
    return Testbed(Network(dict.fromkeys(hosts, Host())), f"system-{os.getpid()}")


class NetworkCluster(Cluster):
    """A coordinator on one host of a testbed, and agents on others."""

    def __init__(
        self, directory: Path, bed: Testbed, host: str = "hub", name: str = "shoal"
    ) -> None:
        """``host`` is the coordinator's; ``name`` is the cluster's."""
        super().__init__(directory)
        self.bed = bed
        self.host = host
        self.name = name
        self.address = bed.network.address(host)

    def command(self, name: str) -> list[str]:
        return self.bed.command(self.host if name == "coordinator" else name, COMMAND)

    def start_coordinator(self, *options: str) -> None:
        super().start_coordinator("--bind=0.0.0.0", f"--cluster={self.name}", *options)

    def start_agent(self, name: str, *options: str) -> Process:
        return super().start_agent(name, "--bind=0.0.0.0", f"--cluster={self.name}", *options)

    def get(self, path: str) -> Any:
        return self.bed.inside(self.host, lambda: super(NetworkCluster, self).get(path))

    def load(self, model: Path, *options: str) -> Any:
        return last_json(self.run("load", str(model), "--json", *options))

    def remove_addresses(self, host: str) -> None:
        """Leave the host with its loopback interface alone."""
        self._ip(host, "address", "flush", "dev", "eth0")

    def add_address(self, host: str, address: str) -> None:
        self._ip(host, "address", "add", f"{address}/24", "dev", "eth0")

    def add_bridge(self, host: str, name: str, address: str) -> None:
        """A bridge of the host alone, as container engines make one."""
        self._ip(host, "link", "add", name, "type", "bridge")
        self._ip(host, "address", "add", f"{address}/16", "dev", name)
        self._ip(host, "link", "set", name, "up")

    def received_bytes(self, host: str) -> int:
        """What has arrived at the host so far."""
        table = self.bed.inside(host, Path("/proc/thread-self/net/dev").read_text)
        line = next(line for line in table.splitlines() if line.strip().startswith("eth0:"))
        return int(line.split()[1])

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

    def _ip(self, host: str, *arguments: str) -> None:
        subprocess.run(self.bed.command(host, ["ip", *arguments]), check=True)


@functools.cache
def unavailable() -> str | None:
    """Why there can be no testbeds here; None where there can."""
    try:
        with bed_of("probe") as bed:
            bed.inside("probe", lambda: None)
    except (TestbedError, OSError) as error:
        return str(error)
    return None
