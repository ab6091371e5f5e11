"""Models whose shapes native code cannot take: an error, and no process dies."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.system.cluster import ROOT, TINY_OPT, Cluster

NARROW = ROOT / "tests" / "system" / "hidden-40"
"""Norms of 160 bytes, which move what lies behind them in a file to odd addresses."""

COMMAND = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from cli.main import main
sys.exit(main())
"""
LINE = '    "onnx_cpu": "backends.onnx_cpu:OnnxCpuBackend",\n'


@pytest.fixture(scope="module")
def one(shared_cluster: Cluster) -> Cluster:
    """A coordinator and an agent."""
    shared_cluster.start_coordinator()
    shared_cluster.start_agent("pi")
    shared_cluster.wait_for_agents("pi")
    return shared_cluster


@pytest.mark.parametrize("bits", [2, 16, 32])
def test_a_narrow_model_answers(one: Cluster, bits: int) -> None:
    for _ in range(2):
        one.load(NARROW, f"--bits={bits}", "--max-weight-error=1")
        body = {"prompt": "the lamp", "max_tokens": 4}
        url = f"{one.url}/v1/completions"
        assert httpx.post(url, json=body, timeout=60, trust_env=False).status_code == 200


class DyingCluster(Cluster):
    """A shoal of a tree whose default backend dies of models as narrow as this."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, measures=True)
        self.tree = directory / "tree"
        for package in ("agent", "calibration", "cli", "coordinator", "model", "wire"):
            (self.tree / package).mkdir(parents=True)
            (self.tree / package).rmdir()
            (self.tree / package).symlink_to(ROOT / package)
        shutil.copytree(ROOT / "backends", self.tree / "backends")
        shutil.copy(ROOT / "tests" / "backends" / "dying_cpu.py", self.tree / "backends")
        registry = self.tree / "backends" / "registry.py"
        table = registry.read_text()
        assert LINE in table
        dying = LINE.replace("backends.onnx_cpu:OnnxCpuBackend", "backends.dying_cpu:DyingBackend")
        registry.write_text(table.replace(LINE, dying))

    def command(self, name: str) -> list[str]:
        return [sys.executable, "-c", COMMAND, str(self.tree)]


@pytest.fixture
def dying(tmp_path: Path) -> Iterator[DyingCluster]:
    cluster = DyingCluster(tmp_path)
    yield cluster
    cluster.stop()


def test_native_code_that_dies_is_named_and_the_agent_lives(dying: DyingCluster) -> None:
    dying.start_coordinator()
    agent = dying.start_agent("pi")
    dying.wait_for_agents("pi")
    for _ in range(2):
        refused = dying.run("load", str(NARROW), "--bits=8")
        assert refused.returncode == 1
        said = " ".join(refused.stderr.split())
        assert "pi: layer 0 at 8 bits: onnx_cpu died by SIGSEGV" in said, said
        assert "device lost" not in said
    assert agent.poll() is None
    assert dying.names() == ["pi"]
    dying.load(TINY_OPT, "--bits=8")
    assert "device lost" not in dying.log("coordinator")
