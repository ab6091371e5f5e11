"""Finds this machine's Edge TPUs, and tests whether its libedgetpu works with one.

Devices are found in sysfs, without any library. A libedgetpu that was built for another runtime
loads without complaint, but kills the process at the first product. So a child tries it first.

Sources: libedgetpu's udev rules (USB ids); the gasket driver (/dev/apex_*).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from backends.base import BackendError
from backends.edgetpu_runtime import Runtime, Target

USB_IDS = {
    ("1a6e", "089a"): "no firmware yet, libedgetpu brings it",
    ("18d1", "9302"): "ready",
}
"""Vendor and product, before and after the first use since the device was plugged in."""

LIBRARY = "libedgetpu.so.1"
LIBRARY_VARIABLE = "SHOAL_LIBEDGETPU"
DEVICE_VARIABLE = "SHOAL_EDGETPU_DEVICE"

CHECK_TIMEOUT_S = 60.0
"""Loading the firmware into a USB device takes seconds."""

_USB2_MBIT_PER_S = 480


@dataclass(frozen=True, slots=True)
class EdgeTpu:
    """One chip. ``device`` is its name in libedgetpu, and ``note`` is for people."""

    device: str
    note: str

    def __str__(self) -> str:
        return f"{self.device} ({self.note})"


def find_devices(root: Path = Path("/")) -> tuple[EdgeTpu, ...]:
    """Find the Edge TPUs of this machine, USB first. /sys and /dev are below ``root``."""
    devices: list[EdgeTpu] = []
    for path in sorted((root / "sys/bus/usb/devices").glob("*")):
        state = USB_IDS.get((_word(path / "idVendor"), _word(path / "idProduct")))
        if state is None:
            continue
        speed = _word(path / "speed")
        if speed.isdigit():
            slow = int(speed) <= _USB2_MBIT_PER_S
            state += f", {speed} Mbit/s" + (": USB 2, use a blue port" if slow else "")
        devices.append(EdgeTpu(f"usb:{len(devices)}", f"{path.name}, {state}"))
    nodes = sorted((root / "dev").glob("apex_*"))
    return (*devices, *(EdgeTpu(f"pci:{at}", f"/dev/{p.name}") for at, p in enumerate(nodes)))


def choose_target(root: Path = Path("/")) -> Target:
    """Return the device that SHOAL_EDGETPU_DEVICE names, or the first one. Raises BackendError."""
    devices = find_devices(root)
    if not devices:
        raise BackendError("no Edge TPU on USB (1a6e:089a, 18d1:9302) nor as /dev/apex_*")
    wanted = os.environ.get(DEVICE_VARIABLE, devices[0].device)
    if wanted not in [device.device for device in devices]:
        known = ", ".join(map(str, devices))
        raise BackendError(f"{DEVICE_VARIABLE}={wanted} is not there: found {known}")
    return Target(wanted, os.environ.get(LIBRARY_VARIABLE, LIBRARY))


def check_in_child(
    runtime: Runtime, target: Target, files: Sequence[Path] = (), timeout_s: float = CHECK_TIMEOUT_S
) -> None:
    """Have a child process open the device and, given (compiled, plain, ...) files, run products.

    Plain files run on the CPU. The results of both files of a pair must agree within one code.
    Raises BackendError with the child's message or its signal, and advice.
    """
    packages = str(Path(__file__).parents[1])
    paths = [packages, *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "backends.edgetpu_check", target.library, target.device]
    try:
        done = subprocess.run(  # noqa: S603 - our own module
            [*command, *map(str, files)],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise BackendError(
            f"Edge TPU {target.device} did not answer within {timeout_s:g} s: unplug it, plug it"
            " in again, and check its power supply"
        ) from error
    if done.returncode == 0:
        return
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise BackendError(
            f"{target.library} crashed ({name}) with {runtime}: it was built for another version;"
            " docs/hardware.md says which go together"
        )
    said = done.stdout or done.stderr or "the check ended without a message"
    raise BackendError(said.strip().splitlines()[-1][:400])


def _word(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
