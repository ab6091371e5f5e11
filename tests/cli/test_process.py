"""How a command's process ends."""

from __future__ import annotations

import os
import subprocess
import sys

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
