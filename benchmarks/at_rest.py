"""The load of an agent and its coordinator while there are no requests.

    make bench-rest
    make bench-rest ARGS='--seconds 60 --json'

Both run in a network namespace of their own (`unshare --net`), so its loopback interface carries
only their traffic. The report has the share of a core, the resident memory, and bytes a second in
both directions together, headers included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
SHOAL = (sys.executable, "-m", "cli")
SETTLE_S = 10.0
"""Long enough for the agent to join and for the search by mDNS to end."""


def main() -> None:
    parser = argparse.ArgumentParser(description="An agent and its coordinator at rest.")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    # A new namespace has its loopback interface down.
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)  # noqa: S607 - in the PATH
    with tempfile.TemporaryDirectory() as directory:
        coordinator = start(
            "coordinator", "--json", "--no-mdns", "--bind=127.0.0.1", "--port=0",
            "--http=127.0.0.1:0", f"--state-dir={directory}/coordinator",
            "--create-token", f"--token-file={directory}/token",
        )  # fmt: skip
        ready = coordinator.stdout.readline() if coordinator.stdout else ""
        port = json.loads(ready)["control_port"]
        agent = start(
            "agent", "--bind=127.0.0.1", f"--coordinator=127.0.0.1:{port}",
            f"--state-dir={directory}/agent", f"--token-file={directory}/token",
        )  # fmt: skip
        try:
            time.sleep(SETTLE_S)
            answer = measure({"agent": agent.pid, "coordinator": coordinator.pid}, options.seconds)
        finally:
            for process in (agent, coordinator):
                process.terminate()
                process.communicate()
    if options.json:
        sys.stdout.write(json.dumps(answer) + "\n")
        return
    for name, value in answer.items():
        sys.stdout.write(f"{name:<24} {value:.3f}\n")


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(  # noqa: S603 - our own command
        [*SHOAL, *arguments], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )


def measure(pids: dict[str, int], seconds: float) -> dict[str, float]:
    """Measure CPU shares in percent of a core, resident megabytes, and bytes/s on loopback."""
    processes = {name: psutil.Process(pid) for name, pid in pids.items()}
    cpu_s = {name: sum(process.cpu_times()[:2]) for name, process in processes.items()}
    sent = psutil.net_io_counters(pernic=True)["lo"].bytes_sent
    started_s = time.monotonic()
    time.sleep(seconds)
    elapsed_s = time.monotonic() - started_s
    answer = {"seconds": elapsed_s}
    for name, process in processes.items():
        used_s = sum(process.cpu_times()[:2]) - cpu_s[name]
        answer[f"{name}_cpu_percent"] = 100 * used_s / elapsed_s
        answer[f"{name}_resident_mb"] = process.memory_info().rss / 1e6
    exchanged = psutil.net_io_counters(pernic=True)["lo"].bytes_sent - sent
    answer["bytes_per_s"] = exchanged / elapsed_s
    return answer


if __name__ == "__main__":
    main()
