"""Torch's libraries are mapped while other threads of the process go on."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# The constructor waits for a byte that only another thread of Python writes.
LIBRARY = """
#include <stdlib.h>
#include <unistd.h>
__attribute__((constructor)) static void wait_for_byte(void) {
    char byte;
    if (read(atoi(getenv("READ_FROM")), &byte, 1) != 1) abort();
}
"""

PROGRAM = """
import os, signal, sys, threading
from backends.torch_libraries import map_libraries
sys.path.insert(0, sys.argv[1])
ours, theirs = os.pipe()
os.environ["READ_FROM"] = str(ours)
signal.alarm(60)  # A thread that keeps the lock waits for ever.
threading.Timer(0.2, os.write, (theirs, b"x")).start()
map_libraries("slow_package")
assert "slow_package" not in sys.modules
print("libtorch.so" in open("/proc/self/maps").read())
"""


def test_other_threads_go_on_while_a_library_is_mapped(tmp_path: Path) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("no gcc to build a library with")
    libraries = tmp_path / "slow_package" / "lib"
    libraries.mkdir(parents=True)
    (tmp_path / "slow_package" / "__init__.py").write_text("")
    source = tmp_path / "slow.c"
    source.write_text(LIBRARY)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", libraries / "libtorch.so", source], check=True)
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_torch_finds_its_libraries_mapped() -> None:
    pytest.importorskip("torch")
    program = """
import sys
from backends.torch_libraries import map_libraries
map_libraries()
assert "torch" not in sys.modules
assert "libtorch_cpu.so" in open("/proc/self/maps").read()
import torch
print(float(torch.ones(3).sum()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "3.0\n"), done.stderr


def test_a_package_that_is_missing_is_left_to_the_import() -> None:
    from backends.torch_libraries import map_libraries

    map_libraries("no_such_package")
