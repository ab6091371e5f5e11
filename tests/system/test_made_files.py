"""A Coral without a compiler gets its files from another machine of the shoal.

Chip, library and compiler are stand-ins. Coordinator, agents, sockets and files are real.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.backends.fake_edgetpu.stand_ins import build_library, usb_device, write_compiler
from tests.system.cluster import COMMAND, TINY_OPT, Cluster, last_json

QUESTION = "The lamp is in the attic. The meter in the cellar reads 42. Where is the lamp?"
PINS = "--bits=8", "--pin=layers=0-3:coral", "--exclude=maker"

AGENT = """
import sys
from pathlib import Path
from agent import daemon
from backends.edgetpu import EdgeTpuBackend
from calibration.device import profile_device
from cli.main import main
EdgeTpuBackend.root = Path(sys.argv.pop(1))
daemon.profile_at_start = profile_device  # A child would look for a real chip.
sys.exit(main(sys.argv[1:]))
"""


class CoralCluster(Cluster):
    """Where the agent `coral` has a made-up chip, and those in ``compiling`` the compiler."""

    def __init__(self, directory: Path, library: Path) -> None:
        super().__init__(directory)
        self.library = library
        self.compiled = directory / "compiled"
        self.compiler = write_compiler(directory / "bin")
        self.compiling: set[str] = set()
        usb_device(directory / "root", "2-1", "18d1", "9302", "5000")

    def command(self, name: str) -> list[str]:
        if name == "coral":
            own = f"SHOAL_LIBEDGETPU={self.library}", f"SHOAL_EDGETPU_DIR={self.compiled}"
            return ["env", *own, sys.executable, "-c", AGENT, str(self.directory / "root")]
        if name in self.compiling:
            return ["/bin/sh", "-c", f'PATH={self.compiler}:$PATH exec "$@"', "sh", *COMMAND]
        return COMMAND

    def start(self, name: str, backend: str = "onnx_cpu") -> None:
        where = f"--coordinator=127.0.0.1:{self.control_port}"
        self.start_agent(name, where, "--memory=1G", f"--backend={backend}")

    def compilations(self) -> int:
        """How often the compiler ran."""
        calls = self.compiler / "calls"
        return len(calls.read_text().splitlines()) if calls.exists() else 0

    def answers(self) -> None:
        said = last_json(self.run("run", "tiny-opt", QUESTION, "--json"))
        assert said["text"].strip() == "in the attic"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_library(tmp_path_factory.mktemp("library"))


@pytest.fixture
def corals(tmp_path: Path, library: Path) -> Iterator[CoralCluster]:
    cluster = CoralCluster(tmp_path, library)
    yield cluster
    cluster.stop()


@pytest.mark.thorough
def test_the_coordinator_compiles_once_for_a_device_that_cannot(corals: CoralCluster) -> None:
    corals.compiling.add("coordinator")
    corals.start_coordinator()
    corals.start("coral", "edgetpu")
    corals.start("pi")
    corals.wait_for_agents("coral", "pi")
    device = corals.get("/shoal/v1/devices")["devices"][0]
    assert (device["backend"], device["call_s"]) == ("edgetpu", 0)
    answer = corals.load(TINY_OPT, *PINS[:2])
    assert answer["plan"]["stages"][0]["device"] == "coral"
    corals.answers()
    # A stage of four layers, one layer alone to be timed, and two sizes of a tiny model.
    first = corals.compilations()
    assert 0 < first <= 4
    assert not corals.compiled.exists()

    # Nothing is compiled again for a device that has lost what it fetched.
    corals.run("unload")
    for path in (corals.directory / "coral" / "blocks").iterdir():
        path.unlink()
    corals.load(TINY_OPT, *PINS[:2])
    corals.answers()
    assert corals.compilations() == first


def test_an_agent_compiles_where_the_coordinator_cannot(corals: CoralCluster) -> None:
    corals.compiling.add("maker")
    corals.start_coordinator()
    corals.start("coral", "edgetpu")
    corals.start("pi")
    corals.wait_for_agents("coral", "pi")
    refused = corals.run("load", str(TINY_OPT), "--bits=8")
    assert refused.returncode != 0
    assert "not compiled for the Edge TPU (neither the coordinator nor any agent" in refused.stderr
    assert "put edgetpu_compiler on the PATH of" in refused.stderr
    assert "--exclude coral plans without it" in refused.stderr
    corals.load(TINY_OPT, "--bits=8", "--exclude=coral")
    corals.answers()
    corals.run("unload")

    corals.start("maker")
    corals.wait_for_agents("coral", "maker", "pi")
    answer = corals.load(TINY_OPT, *PINS)
    assert "maker" not in {stage["device"] for stage in answer["plan"]["stages"]}
    corals.answers()
    assert "Traceback" not in corals.log("coordinator")
