"""Two devices that ask for one name: each stays itself, whatever was restarted in between."""

from __future__ import annotations

import json
import signal
from pathlib import Path

from tests.system.cluster import TINY_OPT, Cluster, last_json, wait_for

PINS = ("--bits=16", "--pin=embedding:pi", "--pin=head:pi-2")


def start(cluster: Cluster, directory: str, name: str = "pi") -> None:
    cluster.spawn(
        directory,
        "agent",
        f"--name={name}",
        "--bind=127.0.0.1",
        "--threads=1",
        f"--state-dir={cluster.directory / directory}",
        f"--coordinator=127.0.0.1:{cluster.control_port}",
        f"--token-file={cluster.token()}",
        *cluster.measurements(),
    )


def restart(cluster: Cluster) -> None:
    """The coordinator again, where it was, and nobody else."""
    for process in cluster.processes.values():
        process.send_signal(signal.SIGKILL)
        process.wait(60)
        if process.stdout is not None:
            process.stdout.close()
    cluster.start_coordinator("--no-mdns", f"--port={cluster.control_port}")


def test_names_pins_and_plans_mean_the_same_devices_after_all_restarts(
    cluster: Cluster, tmp_path: Path
) -> None:
    def ids() -> dict[str, str]:
        devices = cluster.get("/shoal/v1/devices")["devices"]
        return {device["name"]: device["device"] for device in devices}

    def running_on() -> list[str]:
        loaded = cluster.get("/shoal/v1/ps")["model"]
        if loaded is None or loaded["state"] != "ready":
            return []
        return [ids()[stage["device"]] for stage in loaded["plan"]["stages"]]

    cluster.start_coordinator()
    start(cluster, "first")
    cluster.wait_for_agents("pi")
    start(cluster, "second")
    cluster.wait_for_agents("pi", "pi-2")
    meant = ids()
    saved = tmp_path / "plan.json"
    assert cluster.run("plan", str(TINY_OPT), *PINS, f"--save={saved}").returncode == 0
    assert json.loads(saved.read_text())["devices"] == meant
    cluster.load(TINY_OPT, *PINS)
    loaded = running_on()
    assert loaded == [meant["pi"], meant["pi-2"]]

    restart(cluster)
    start(cluster, "second")
    cluster.wait_for_agents("pi-2")
    start(cluster, "first")
    cluster.wait_for_agents("pi", "pi-2")
    assert ids() == meant
    wait_for(lambda: running_on() == loaded, 60, "the model where it was")

    # The plan still means the device that was called pi when it is called something else.
    assert cluster.run("unload").returncode == 0
    for name in ("first", "second"):
        cluster.processes[name].terminate()
        cluster.processes[name].wait(60)
    start(cluster, "first", "nano")
    start(cluster, "second")
    cluster.wait_for_agents("nano", "pi-2")
    again = last_json(cluster.run("load", str(TINY_OPT), "--bits=16", f"--plan={saved}", "--json"))
    assert [stage["device"] for stage in again["plan"]["stages"]] == ["nano", "pi-2"]
    # An id says which device as well as its name does.
    pin = f"--pin=head:{meant['pi']}"
    moved = cluster.load(TINY_OPT, "--bits=16", pin, "--exclude=pi-2")
    assert [stage["device"] for stage in moved["plan"]["stages"]] == ["nano"]
    failed = cluster.run("load", str(TINY_OPT), "--pin=head:pi")
    assert "no device is called 'pi'; devices here now: nano, pi-2" in failed.stderr
