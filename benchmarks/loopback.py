"""A coordinator and some agents on the loopback interface, for benchmarks that need no links."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

from benchmarks import soak


class Shoal(soak.Shoal):
    """A coordinator and some agents on the loopback interface."""

    def start_all(self, count: int, threads: int) -> list[str]:
        """Start the processes, and return the names of the agents once they have joined."""
        coordinator = self._spawn(
            "coordinator", "coordinator", "--json", "--no-mdns", "--bind=127.0.0.1", "--port=0",
            "--http=127.0.0.1:0", f"--state-dir={self.directory}/coordinator", "--rebalance=off",
            "--log-level=warning", "--create-token", f"--token-file={self.directory}/token",
        )  # fmt: skip
        ready = json.loads(coordinator.stdout.readline() if coordinator.stdout else "")
        self.url, self.control_port = ready["http"], ready["control_port"]
        names = [f"host-{number}" for number in range(1, count + 1)]
        for name in names:
            self._spawn(
                name, "agent", f"--name={name}", "--bind=127.0.0.1", f"--threads={threads}",
                f"--coordinator=127.0.0.1:{self.control_port}",
                f"--state-dir={self.directory}/{name}", f"--measurements-dir={self.directory}",
                f"--token-file={self.directory}/token",
            )  # fmt: skip
        while len(self.get("/shoal/v1/devices")["devices"]) < count:
            time.sleep(0.2)  # Joining tells no event here.
        return names

    def put(self, model: Path, *options: str) -> None:
        """Load a model."""
        subprocess.run(  # noqa: S603 - our own command
            [*soak.SHOAL, "load", str(model), *options, f"--url={self.url}"],
            check=True,
            cwd=soak.ROOT,
            stdout=subprocess.DEVNULL,
        )
