"""An agent of a 64-bit Arm userland (Debian 12 under qemu-user) beside one of this machine.

It shows that the locked wheels install and compute the same there. It shows nothing about speed,
a board's kernel, or the rounding of its processor's own kernels.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from testbed.bed import Testbed
from tests.install.conftest import prepared
from tests.system.cluster import TINY_OPT, last_json, shoal
from tests.system.namespaces import NetworkCluster, bed_of

pytestmark = [pytest.mark.slow, pytest.mark.netns, pytest.mark.timeout(1800)]

SHOAL = "/opt/shoal/bin/shoal"
PROMPTS = (
    "The lamp is in the attic. The meter in the cellar reads 42. Where is the lamp?",
    "The key is in the kitchen. The meter in the cellar reads 17. What does the meter read?",
    "Once upon a time",
)


@pytest.fixture(scope="module")
def arm64(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A root directory with shoal installed from the lock, without a network."""
    tree, bundle, wheels = prepared("arm64"), prepared("bundle"), prepared("wheels-arm64")
    directory = tmp_path_factory.mktemp("arm64")
    upper, work, root = (directory / name for name in ("upper", "work", "root"))
    for path in (upper, work, root):
        path.mkdir()
    options = f"lowerdir={tree},upperdir={upper},workdir={work}"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(root)], check=True)
    try:
        for source, name in ((bundle, "bundle"), (wheels, "wheels")):
            (root / "mnt" / name).mkdir()
            subprocess.run(["cp", "-rL", f"{source}/.", root / "mnt" / name], check=True)
        subprocess.run(["mount", "-t", "proc", "proc", str(root / "proc")], check=True)
        pip = "/opt/shoal/bin/pip --disable-pip-version-check install --quiet --no-index"
        for script in (
            "python3 -m venv /opt/shoal",
            f"{pip} --find-links /mnt/wheels --require-hashes -r /mnt/bundle/agent.lock",
            f"{pip} --no-deps /mnt/bundle/shoal_llm-*.whl",
        ):
            subprocess.run(["chroot", str(root), "sh", "-c", script], check=True)
        yield root
    finally:
        subprocess.run(["umount", str(root / "proc")], check=False)
        subprocess.run(["umount", str(root)], check=True)


class MixedCluster(NetworkCluster):
    """The agent ``arm`` runs in the Arm tree."""

    def __init__(self, directory: Path, bed: Testbed, root: Path) -> None:
        super().__init__(directory, bed)
        self.measures = True  # Nothing outside the tree is there for its agent.
        self._root = root

    def token_in_tree(self) -> str:
        """The option with a token that the Arm tree has."""
        shutil.copy(self.token(), self._root / "token")
        return "--token-file=/token"

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        # An emulated agent measures the model's blocks before it is loaded.
        command = self.command("coordinator")
        return shoal(*arguments, f"--url={self.url}", timeout_s=900, command=command)

    def command(self, name: str) -> list[str]:
        if name == "arm":
            return self.bed.command(name, ["chroot", str(self._root), SHOAL])
        return super().command(name)


@pytest.fixture
def cluster(arm64: Path, tmp_path: Path) -> Iterator[MixedCluster]:
    with bed_of("hub", "arm", "pc", "twin") as bed:
        cluster = MixedCluster(tmp_path, bed, arm64)
        cluster.start_coordinator("--no-mdns")
        yield cluster
        cluster.stop()


def test_an_arm_agent_generates_the_same_tokens(cluster: MixedCluster) -> None:
    answers = {}
    for first in ("arm", "twin"):
        names = (first, "pc")
        for name in names:
            inside = ("--state-dir=/var/lib/arm", cluster.token_in_tree())
            cluster.start_agent(
                name,
                f"--coordinator={cluster.address}:{cluster.control_port}",
                *(inside if name == "arm" else ()),
                "--memory=6M",
            )
        cluster.wait_for_agents(*names, timeout_s=300)
        pins = ("--pin", f"embedding:{first}", "--pin", "head:pc")
        stages = cluster.load(TINY_OPT, "--bits=16", *pins)["plan"]["stages"]
        answers[first] = [stage["first"] for stage in stages], [tokens(cluster, p) for p in PROMPTS]
        assert [stage["device"] for stage in stages] == [first, "pc"]
        for name in names:
            cluster.processes[name].terminate()
            assert cluster.processes.pop(name).wait(20) == 0
        cluster.wait_for_agents()
    assert answers["arm"][1] == answers["twin"][1]
    assert all(answers["arm"][1])


def test_its_doctor_knows_what_it_is(arm64: Path) -> None:
    completed = subprocess.run(
        ["chroot", str(arm64), SHOAL, "doctor", "--json", "--coordinator=127.0.0.1:9"],
        capture_output=True,
        text=True,
        check=False,
    )
    found = last_json(completed)["checks"]
    board = next(check["text"] for check in found if check["name"] == "board")
    assert "aarch64" in board
    assert "emulated" in board
    backends = {
        check["text"].partition(":")[0]: check for check in found if check["name"] == "backend"
    }
    assert backends["onnx_cpu"]["state"] == "ok"
    # What its lock does not bring, and how to get it there.
    assert backends["torch_cpu"]["fix"] == "/opt/shoal/bin/python3 -m pip install torch"


def tokens(cluster: MixedCluster, prompt: str) -> Any:
    completed = cluster.run("run", "tiny-opt", "--chat", "--temperature=0", "--json", prompt)
    return last_json(completed)["tokens"]
