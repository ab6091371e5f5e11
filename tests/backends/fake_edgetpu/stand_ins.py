"""A chip, its library and its compiler, made up for one test."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from backends.base import BackendUnavailable
from backends.edgetpu import TfliteCpuBackend

FAKES = Path(__file__).parent


def build_library(directory: Path) -> Path:
    """The fake libedgetpu; skips the test where it cannot be built or nothing can load it."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc to build the fake libedgetpu with")
    try:
        TfliteCpuBackend.probe()
    except BackendUnavailable as unavailable:
        pytest.skip(unavailable.reason)
    path = directory / "libedgetpu.so.1"
    flags = ["-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["gcc", *flags, "-o", path, FAKES / "libedgetpu.c", "-lm"], check=True)
    return path


def write_compiler(directory: Path) -> Path:
    """The fake edgetpu_compiler, in a directory for PATH; each compilation is a line in `calls`."""
    directory.mkdir()
    script = directory / "edgetpu_compiler"
    script.write_text(
        "#!/bin/sh\n"
        f'[ "$1" = --version ] || echo "$@" >> {directory / "calls"}\n'
        f'exec {sys.executable} {FAKES}/edgetpu_compiler.py "$@"\n'
    )
    script.chmod(0o755)
    return directory


def usb_device(root: Path, name: str, vendor: str, product: str, speed: str | None = None) -> None:
    """A device on USB below a made-up /sys."""
    device = root / "sys/bus/usb/devices" / name
    device.mkdir(parents=True)
    (device / "idVendor").write_text(vendor + "\n")
    (device / "idProduct").write_text(product + "\n")
    if speed is not None:
        (device / "speed").write_text(speed + "\n")
