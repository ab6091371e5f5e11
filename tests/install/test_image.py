"""The container images: built, started and asked, by buildah and podman, without a registry.

The base is the Debian tree that the service tests use; wheels come from the prepared folder. So
what is tested is the Dockerfile and the program in the image, not Docker and not python:3.12-slim.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.install.conftest import prepared
from tests.system.cluster import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.netns, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "tiny-opt" / "model"
QUESTION = "The lamp is in the attic. The meter in the cellar reads 42. Where is the lamp?"
NETWORK = "shoal-image-test"
BASE = "localhost/shoal-test-base"
PIP_CONF = "[global]\nno-index = true\nfind-links = /wheels\n"
HEALTH_FILE = "/run/shoal/alive"


class Engine:
    """Images and containers in a folder of this test, which no other container engine sees."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._environment = {
            **os.environ,
            "STORAGE_DRIVER": "vfs",
            "BUILDAH_ISOLATION": "chroot",
            "XDG_RUNTIME_DIR": str(folder),
        }
        self._places = [f"--root={folder / 'storage'}", f"--runroot={folder / 'run'}"]

    def buildah(self, *arguments: str) -> str:
        return self._run(["buildah", *self._places, *arguments])

    def podman(self, *arguments: str) -> str:
        # No service manager here keeps health checks or control groups for it.
        fixed = ["--runtime=runc", "--cgroup-manager=cgroupfs", "--events-backend=file"]
        return self._run(["podman", *self._places, *fixed, *arguments])

    def _run(self, command: list[str]) -> str:
        completed = subprocess.run(
            command, cwd=ROOT, env=self._environment, capture_output=True, text=True, check=False
        )
        assert completed.returncode == 0, f"{command}: {completed.stdout}{completed.stderr}"
        return completed.stdout


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine that has built both images."""
    tree, wheels = prepared("systemd"), prepared("wheels")
    missing = [name for name in ("buildah", "podman", "runc") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} missing: apt-get install buildah podman runc")
    folder = tmp_path_factory.mktemp("images")
    engine = Engine(folder)
    (folder / "pip.conf").write_text(PIP_CONF)
    try:
        build(engine, tree, wheels, folder / "pip.conf")
        yield engine
    finally:
        engine.podman("rm", "--all", "--force")
        # Its own storage holds files of other users and mount points.
        engine.buildah("rm", "--all")
        engine.buildah("rmi", "--all", "--force")
        shutil.rmtree(folder / "storage", ignore_errors=True)


def build(engine: Engine, tree: Path, wheels: Path, pip_conf: Path) -> None:
    container = engine.buildah("from", "scratch").strip()
    engine.buildah("copy", "--quiet", container, str(tree), "/")
    engine.buildah("commit", "--quiet", container, BASE)
    engine.buildah("rm", container)
    for target in ("agent", "coordinator"):
        engine.buildah(
            *("bud", "--pull-never", "--layers", "--format=docker"),
            *("--file=deploy/Dockerfile", "--ignorefile=deploy/Dockerfile.dockerignore"),
            *(f"--build-arg=BASE={BASE}", f"--target={target}", f"--tag=shoal-{target}"),
            *(f"--volume={wheels}:/wheels:ro", f"--volume={pip_conf}:/etc/pip.conf:ro"),
            ".",
        )


@pytest.fixture
def network() -> Iterator[None]:
    """A network namespace with nothing but loopback."""
    subprocess.run(["ip", "netns", "add", NETWORK], check=True)
    try:
        subprocess.run(["ip", "-n", NETWORK, "link", "set", "lo", "up"], check=True)
        yield
    finally:
        subprocess.run(["ip", "netns", "del", NETWORK], check=True)


def start(engine: Engine, name: str, image: str, *arguments: str, token: str = "") -> None:
    """As deploy/kubernetes starts it: no rights, nothing writable but its state."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    engine.podman(
        *("run", "--detach", "--pull=never", f"--name={name}", "--no-healthcheck"),
        *(f"--network=ns:/run/netns/{NETWORK}", "--read-only", "--cap-drop=all"),
        *("--security-opt=no-new-privileges", f"--ulimit=nofile={files}:{files}"),
        *("--ulimit=nproc=4096:4096", f"--volume={MODEL}:/model:ro"),
        *([f"--env=SHOAL_TOKEN={token}"] if token else []),
        *(image, *arguments),
    )


def inside(engine: Engine, name: str, *command: str) -> str:
    return engine.podman("exec", name, *command)


def states(engine: Engine) -> dict[str, tuple[str, int]]:
    """(state, exit code) of every container."""
    listed: list[dict[str, Any]] = json.loads(engine.podman("ps", "--all", "--format=json"))
    return {item["Names"][0]: (item["State"], item["ExitCode"]) for item in listed}


def test_a_coordinator_and_two_agents_answer_and_stop(engine: Engine, network: None) -> None:
    start(engine, "coordinator", "shoal-coordinator", "--no-mdns", "--http=127.0.0.1:7421")
    # The command's first line is that nobody answers yet.
    wait_for(lambda: "API at" in engine.podman("logs", "coordinator"), 60, "the coordinator")
    create = ("shoal", "token", "create", "--uses=2", "--json")
    token = json.loads(inside(engine, "coordinator", *create))["token"]
    agents = ("left", "right")
    for name in agents:
        given = (f"--name={name}", "--coordinator=127.0.0.1:7420", "--memory=5M", "--storage=100M")
        start(engine, name, "shoal-agent", *given, "--threads=1", token=token)

    def joined() -> bool:
        assert all(state == "running" for state, _ in states(engine).values()), states(engine)
        shown = json.loads(inside(engine, "coordinator", "shoal", "devices", "--json"))
        return {device["name"] for device in shown["devices"]} == set(agents)

    wait_for(joined, 60, "two agents")
    loaded = json.loads(
        inside(engine, "coordinator", "shoal", "load", "/model", "--bits=8", "--json")
    )
    assert {stage["device"] for stage in loaded["plan"]["stages"]} == set(agents)
    assert "in the attic" in inside(engine, "coordinator", "shoal", "run", "model", QUESTION)
    for name in ("coordinator", *agents):
        assert inside(engine, name, "id", "-u").strip() == "7420"
        # What HEALTHCHECK looks at.
        assert inside(engine, name, "stat", "-c", "%n", HEALTH_FILE).strip() == HEALTH_FILE
    engine.podman("stop", "--time=20", *agents, "coordinator")
    assert states(engine) == dict.fromkeys(("coordinator", *agents), ("exited", 0))
