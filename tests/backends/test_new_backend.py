"""A new kind of hardware needs one new file and one line in the registry."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.cluster import ROOT, TINY_OPT, Cluster, last_json

PACKAGES = (
    *("agent", "api", "backends", "calibration", "cli", "coordinator", "model", "wire", "tests"),
)
TABLE = "BACKENDS: dict[str, str] = {\n"
LINE = '    "numpy_cpu": "backends.numpy_cpu:NumpyBackend",\n'
QUESTION = "The lamp is in the attic. The meter in the cellar reads 42. Where is the lamp?"

COMMAND = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from cli.main import main
sys.exit(main())
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this tree with the backend added, and nothing else changed."""
    copy = tmp_path_factory.mktemp("tree")
    for package in PACKAGES:
        # With __pycache__: the copies have the times of their originals, so none is compiled again.
        ignored = shutil.ignore_patterns("fixtures", "install", "system")
        shutil.copytree(ROOT / package, copy / package, ignore=ignored)
    (copy / "tests" / "fixtures").symlink_to(ROOT / "tests" / "fixtures")
    shutil.copy(ROOT / "pyproject.toml", copy)
    shutil.copy(Path(__file__).with_name("numpy_cpu.py"), copy / "backends")
    registry = copy / "backends" / "registry.py"
    table = registry.read_text()
    assert TABLE in table
    registry.write_text(table.replace(TABLE, TABLE + LINE))
    return copy


class GrownCluster(Cluster):
    """A shoal of that tree."""

    def __init__(self, directory: Path, tree: Path) -> None:
        super().__init__(directory)
        self.tree = tree

    def command(self, name: str) -> list[str]:
        return [sys.executable, "-c", COMMAND, str(self.tree)]


@pytest.fixture
def grown(tmp_path: Path, tree: Path) -> Iterator[GrownCluster]:
    cluster = GrownCluster(tmp_path, tree)
    yield cluster
    cluster.stop()


@pytest.mark.thorough
def test_it_conforms_without_a_test_of_its_own(tree: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/backends/test_conformance.py", "-knumpy_cpu"],
        cwd=tree,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout
    passed = next(word for word in ran.stdout.split() if word.isdigit())
    assert int(passed) > 100
    assert "skipped" not in ran.stdout


def test_it_serves_a_part_of_a_model(grown: GrownCluster) -> None:
    grown.start_coordinator()
    for name, backend in (("new", "numpy_cpu"), ("pi", "onnx_cpu")):
        where = f"--coordinator=127.0.0.1:{grown.control_port}"
        grown.start_agent(name, where, "--memory=1G", f"--backend={backend}")
    grown.wait_for_agents("new", "pi")
    devices = grown.get("/shoal/v1/devices")["devices"]
    assert [device["backend"] for device in devices] == ["numpy_cpu", "onnx_cpu"]
    answer = grown.load(TINY_OPT, "--bits=8", "--pin=layers=0-3:new", "--pin=layers=4-7:pi")
    assert [stage["device"] for stage in answer["plan"]["stages"]] == ["new", "pi"]
    said = last_json(grown.run("run", "tiny-opt", QUESTION, "--json"))
    assert said["text"].strip() == "in the attic"
    assert said["finish_reason"] == "stop"
