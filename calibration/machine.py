"""The machine's processor and cores, as far as a container may use them."""

from __future__ import annotations

import hashlib
import math
import os
import platform
from pathlib import Path

import psutil

from model.memory import cgroups, read_lines


def hardware_id(root: Path = Path("/")) -> str:
    """Name the hardware that times depend on: processor, machine type and cores (or a share)."""
    return f"{processor_name(root)}, {platform.machine()}, {usable_share(root):.4g} cores"


def processor_name(root: Path = Path("/")) -> str:
    """Name the processor (x86), or the board (ARM, whose kernel names no processor)."""
    fields: dict[str, str] = {}
    for line in read_lines(root / "proc/cpuinfo"):
        label, _, value = line.partition(":")
        fields.setdefault(label.strip(), value.strip())
    for label in ("model name", "Model", "Hardware", "cpu model", "uarch"):
        if fields.get(label):
            return fields[label]
    board = "".join(read_lines(root / "proc/device-tree/model")).strip("\0 ")
    return board or platform.processor() or "unknown processor"


def kernel_id() -> str:
    """Return an id of the running machine, equal in all its containers. Empty if unknown.

    It comes from the kernel's boot id. Two machines never share that, but copied disks share a
    machine id. It is hashed, because other machines see it.
    """
    boot = "".join(read_lines(Path("/proc/sys/kernel/random/boot_id"))).strip()
    return hashlib.sha256(f"shoal {boot}".encode()).hexdigest()[:16] if boot else ""


def is_wireless(address: str) -> bool:
    """Whether this address of ours belongs to a radio's interface."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(item.address.partition("%")[0] == address for item in addresses):
            interface = Path("/sys/class/net") / name
            return (interface / "wireless").exists() or (interface / "phy80211").exists()
    return False


def usable_cores(root: Path = Path("/")) -> int:
    """Return the logical cores for this process, by its affinity and its container's CPU quota."""
    return max(1, math.ceil(usable_share(root)))


def usable_share(root: Path = Path("/")) -> float:
    """Return ``usable_cores`` as a fraction: less than 1 for a part of a core."""
    cores = float(len(os.sched_getaffinity(0)))
    for group in cgroups(root, "cpu"):
        words = " ".join(read_lines(group / "cpu.max")).split()
        if not words:
            words = [
                *read_lines(group / "cpu.cfs_quota_us")[:1],
                *read_lines(group / "cpu.cfs_period_us")[:1],
            ]
        if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[1]):
            cores = min(cores, int(words[0]) / int(words[1]))
    return cores


def usable_threads() -> int:
    """Return the threads for compute: one per physical core, whose threads share multipliers."""
    return min(usable_cores(), psutil.cpu_count(logical=False) or usable_cores())
