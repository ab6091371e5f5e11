"""Recognizes the board and its accelerators from the kernel's files.

Sources: the device tree's ``model`` (Raspberry Pi, Jetson), DMI (PCs), sysfs of USB and PCI. The
Coral's USB ids are 1a6e:089a before its firmware is loaded and 18d1:9302 after; on PCIe 1ac1:089a.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_CORAL_USB = {("1a6e", "089a"), ("18d1", "9302")}
_CORAL_PCI = ("0x1ac1", "0x089a")
_SUPERSPEED_MBIT_S = 5000


@dataclass(frozen=True, slots=True)
class Coral:
    """An Edge TPU. ``place`` is its name on the bus. ``slow`` means USB below 5 Gbit/s."""

    bus: str
    place: str
    slow: bool


def board_model(root: Path = Path("/")) -> str:
    """The board's name, such as ``Raspberry Pi 5 Model B Rev 1.0``, or a PC's maker and product."""
    for name in ("proc/device-tree/model", "sys/firmware/devicetree/base/model"):
        model = read_text(root / name)
        if model:
            return model
    names = [read_text(root / "sys/class/dmi/id" / name) for name in ("sys_vendor", "product_name")]
    return " ".join(name for name in names if name)


def is_jetson(root: Path = Path("/")) -> bool:
    return (root / "etc/nv_tegra_release").exists() or "Jetson" in board_model(root)


def has_nvidia_driver(root: Path = Path("/")) -> bool:
    """Whether a PC has loaded NVIDIA's driver."""
    return not is_jetson(root) and (root / "proc/driver/nvidia/version").exists()


def corals(root: Path = Path("/")) -> list[Coral]:
    """The Edge TPUs that are plugged in, even if their library is missing."""
    found = []
    for device in sorted(root.glob("sys/bus/usb/devices/*")):
        if (read_text(device / "idVendor"), read_text(device / "idProduct")) in _CORAL_USB:
            speed = read_text(device / "speed")
            slow = speed.isdigit() and int(speed) < _SUPERSPEED_MBIT_S
            found.append(Coral("USB", device.name, slow))
    for device in sorted(root.glob("sys/bus/pci/devices/*")):
        if (read_text(device / "vendor"), read_text(device / "device")) == _CORAL_PCI:
            found.append(Coral("PCIe", device.name, False))
    return found


def read_text(path: Path) -> str:
    """The stripped text of a kernel's file, or "" if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0 \n\t")
    except OSError:
        return ""
