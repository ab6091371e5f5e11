"""A shoal on emulated hosts whose devices, links and coordinator can be made to fail.

benchmarks.chaos and benchmarks.fault_matrix use it. It needs root.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.random_model import Shape
from cli.argument_types import CONTROL_PORT
from cli.client import Client
from testbed.bed import Testbed, TestbedError
from testbed.cluster import Cluster
from testbed.lab import AgentSettings
from testbed.network import HUB

HOSTS = ("ash", "birch", "cedar", "dogwood")
SHAPE = Shape(hidden=256, ffn=704, layers=8, heads=8)
AGENT = AgentSettings(memory_bytes=36 << 20, storage_bytes=1 << 30)
"""With so little memory the model needs two hosts."""

DAMAGED_FILES = 6
DAMAGED_BYTES = 40
"""Damaged bytes in each file."""

FILL_BYTES = 1 << 20


class FaultyShoal:
    """A coordinator and four agents on emulated hosts."""

    def __init__(self, bed: Testbed, directory: Path, request: Mapping[str, Any]) -> None:
        """Start everything. ``request`` is the load, besides the model in ``directory``."""
        self.bed = bed
        self.state = directory / "hosts"
        self._request = {
            "model": str(directory / "model"),
            "bits": [32],
            "hop_bits": [32],
            "max_weight_error": None,
            **request,
        }
        self.cluster = Cluster(bed, self.state)
        self.cluster.start_coordinator()
        self.url = self.cluster.open_door(0)
        for name in HOSTS:
            self.cluster.start_agent(name, AGENT)
            self.cluster.wait_for_agents([name])

    def load(self, on_step: Any = lambda step: None) -> dict[str, Any]:
        """Place the model, and return the answer. Raises CommandFailed."""
        with Client(self.url) as client:
            return client.operate("/shoal/v1/load", self._request, on_step)

    def stages(self) -> list[str]:
        """Return the devices of the model's stages now, or nothing if it does not answer."""
        try:
            model = self.cluster.get("/shoal/v1/ps")["model"]
        except TestbedError:
            return []
        if model is None or model["state"] != "ready":
            return []
        return [stage["device"] for stage in model["plan"]["stages"]]

    def kinds(self) -> list[str]:
        """Return the kinds of the events in the coordinator's story."""
        return [event["kind"] for event in self.cluster.get("/shoal/v1/events")["events"]]

    def settle(self, patience_s: float, hosts: tuple[str, ...] = HOSTS) -> bool:
        """Wait until just these agents are there, and return whether they are."""
        deadline_s = time.monotonic() + patience_s
        while time.monotonic() < deadline_s:
            try:
                devices = self.cluster.get("/shoal/v1/devices")["devices"]
            except TestbedError:
                devices = []
            if {device["name"] for device in devices} == set(hosts):
                return True
            time.sleep(0.2)  # Joining tells no event here.
        return False

    def tracebacks(self) -> list[str]:
        """Return the logs that hold a traceback or an internal error."""
        found = []
        for name in (HUB, *HOSTS):
            text = self.cluster.log(name).read_text(errors="replace")
            for sign in ("Traceback", "internal error"):
                if sign in text:
                    found.append(f"{name}: {sign}: {text[text.index(sign) :][:2000]}")
        return found

    # ---- faults ---------------------------------------------------------------------------------

    def end(self, host: str) -> None:
        """Kill all processes of a host, and wait until they are gone."""
        for process in self.bed.processes(host):
            os.kill(process, signal.SIGKILL)
        while self.bed.processes(host):
            time.sleep(0.05)  # They are no children of this process.

    def start_agent(self, host: str) -> None:
        """Start the agent of a host."""
        self.cluster.start_agent(host, AGENT)

    def start_coordinator(self) -> None:
        """Start the coordinator again, with its API at the same place."""
        self.cluster.start_coordinator()
        self.cluster.open_door(int(self.url.rpartition(":")[2]))

    def end_connections(self, host: str) -> None:
        """End the connections between a host's agent and the coordinator, at both ends."""
        where = ["dst", self.bed.network.address(host), "sport", "=", f":{CONTROL_PORT}"]
        command = self.bed.command(HUB, ["ss", "-K", *where])
        subprocess.run(command, check=True, capture_output=True)  # noqa: S603 - our own command

    def damage(self, host: str, chance: random.Random) -> int:
        """Damage some files in the cache of a host that is down, and return their number."""
        files = self.cached(host)
        chosen = chance.sample(files, min(len(files), DAMAGED_FILES))
        for path in chosen:
            data = bytearray(path.read_bytes())
            for _ in range(DAMAGED_BYTES if data else 0):
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            path.write_bytes(data)
        return len(chosen)

    def cached(self, host: str) -> list[Path]:
        """Return the files in the cache of a host."""
        return sorted(path for path in (self.state / host / "blocks").rglob("*") if path.is_file())

    def fill_disk(self, host: str) -> None:
        """Leave no room on the disk of a host, which must be a file system of its own."""
        with (self.state / host / "fill").open("ab", buffering=0) as file:
            try:
                while file.write(bytes(FILL_BYTES)) == FILL_BYTES:
                    pass
            except OSError:  # It is full.
                pass

    def free_disk(self, host: str) -> None:
        """Undo ``fill_disk``."""
        (self.state / host / "fill").unlink(missing_ok=True)
