"""How a command's process ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.cluster import ROOT

BUSY = """
import sys, threading, time
import numpy as np
from onnx import TensorProto
import cli.main
from backends import onnx_session
from backends.onnx_graph import Graph
from backends.onnx_matrix import ByteMatrix
from cli.__main__ import run

graph = Graph()
rows = graph.input("hidden", TensorProto.FLOAT, (1, 4, 64))
matrix = ByteMatrix(np.ones((64, 64), np.int8), np.ones(64, np.float32))
graph.output(graph.linear(rows, matrix), "output", TensorProto.FLOAT, (1, 4, 64))
session = onnx_session.new_session(graph, 1)
running = threading.Barrier(4)

def compute():
    running.wait()
    while True:
        session.run(["output"], {"hidden": np.ones((1, 4, 64), np.float32)})

def main():
    for _ in range(3):
        threading.Thread(target=compute, daemon=True).start()
    running.wait()
    print("stopped")
    return 7

cli.main.main = main
sys.exit(run())
"""


def test_a_process_that_still_computes_ends_with_the_commands_code() -> None:
    """Python's own end aborts it: a service that is asked to stop would have failed."""
    pytest.importorskip("onnxruntime")
    completed = subprocess.run(
        [sys.executable, "-c", BUSY], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert (completed.returncode, completed.stdout, completed.stderr) == (7, "stopped\n", "")


@pytest.mark.parametrize(("own", "expected"), [({}, "4"), ({"OPENBLAS_THREAD_TIMEOUT": "9"}, "9")])
def test_numpys_threads_do_not_spin_unless_they_are_told_to(
    own: dict[str, str], expected: str
) -> None:
    code = (
        "import os, sys, cli.main\n"
        "from cli.__main__ import run\n"
        "assert 'numpy' not in sys.modules\n"
        "cli.main.main = lambda: print(os.environ['OPENBLAS_THREAD_TIMEOUT'])\n"
        "run()"
    )
    environment = {**os.environ, **own}
    shown = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment, cwd=ROOT, timeout=60
    )
    assert shown.stdout.decode().strip() == expected


def test_a_command_waits_for_its_threads() -> None:
    code = (
        "import threading, cli.main\n"
        "from cli.__main__ import run\n"
        "go = threading.Event()\n"
        "def late():\n"
        "    go.wait()\n"
        "    threading.main_thread().join()\n"
        "    print('late')\n"
        "def main():\n"
        "    threading.Thread(target=late).start()\n"
        "    go.set()\n"
        "    return 0\n"
        "cli.main.main = main\n"
        "run()"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT, timeout=60
    )
    assert shown.stdout == "late\n"


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_command_ends_with_its_code_where_a_stream_was_closed(closed: str) -> None:
    code = "import sys, cli.main as m; from cli.__main__ import run; m.main = lambda: 5; run()"
    ended = subprocess.run(
        ["/bin/sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (5, "", "")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
@pytest.mark.parametrize("command", ["--version", "models --json", "models", "--help"])
def test_commands_work_where_a_stream_was_closed(closed: str, command: str) -> None:
    ended = subprocess.run(
        ["/bin/sh", "-c", f'exec "$0" -m cli {command} {closed}', sys.executable],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert bool(ended.stdout) == (closed == "2>&-")


def test_the_collector_runs_while_a_command_does_and_leaves_modules_alone() -> None:
    code = (
        "import gc, cli.commands.keys\n"
        "from cli.__main__ import run\n"
        "def shown(options, screen):\n"
        "    print(gc.isenabled(), gc.get_freeze_count() > 10_000)\n"
        "cli.commands.keys.run_key = shown\n"
        "run()"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code, "key", "list"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert shown.stdout == "True True\n"


@pytest.mark.parametrize(
    ("library", "source"),
    [
        ("tokenizers", "raise ImportError('libgone.so.1: cannot open shared object file')"),
        (
            "numpy",
            "try:\n"
            "    raise ImportError('libgone.so.1: cannot open shared object file')\n"
            "except ImportError as error:\n"
            "    raise ImportError('\\n\\nPLEASE READ THIS\\n\\n') from error\n",
        ),
    ],
)
def test_a_library_that_does_not_load_is_named(tmp_path: Path, library: str, source: str) -> None:
    (tmp_path / f"{library}.py").write_text(source)
    lab = ROOT / "examples" / "labs" / "mixed-32.yaml"
    plan = ["plan", str(ROOT / "tests" / "fixtures" / "llama"), f"--devices={lab}"]
    for arguments in (["coordinator", f"--state-dir={tmp_path}"], plan):
        command = [sys.executable, "-m", "cli", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
        assert done.returncode == 4
        (line,) = done.stderr.splitlines()
        assert f"{library} does not load (libgone.so.1: cannot open shared object file)" in line
        assert line.endswith(f"-m pip install --force-reinstall {library}`")
