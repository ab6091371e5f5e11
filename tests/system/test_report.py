"""What a system test shows when it fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.system.cluster import ROOT

FAILING = """
from tests.system.cluster import wait_for

def test_that_fails(cluster):
    cluster.start_coordinator()
    cluster.start_agent("pi-1")
    wait_for(lambda: "joined cluster 'shoal'" in cluster.log("pi-1"), 60, "the agent's line")
    cluster.kill("pi-1")
    assert not cluster.processes["pi-1"].wait()
"""


def test_a_failure_shows_the_logs_of_its_processes(tmp_path: Path) -> None:
    (tmp_path / "test_failing.py").write_text(FAILING)
    completed = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"),
            *("-p", "tests.system.conftest", f"--config-file={ROOT / 'pyproject.toml'}"),
            str(tmp_path / "test_failing.py"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 1, completed.stdout + completed.stderr
    assert "log of coordinator (call)" in completed.stdout
    assert "log of pi-1 (call)" in completed.stdout
    assert "joined cluster 'shoal'" in completed.stdout
