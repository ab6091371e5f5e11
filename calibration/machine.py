"""The machine's processor, cores and memory, as far as a container may use them."""

from __future__ import annotations

import hashlib
import math
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

import psutil

_NO_LIMIT_BYTES = 1 << 60
"""Version 1 of control groups writes "no limit" as a number near 2^63."""


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


def memory_bytes(root: Path = Path("/")) -> tuple[int, int]:
    """Return (free, total) bytes for this process: the machine's, or less in a container.

    Page cache that can be dropped counts as free.
    """
    values: dict[str, int] = {}
    for line in read_lines(root / "proc/meminfo"):
        found = re.fullmatch(r"(\w+):\s+(\d+) kB", line.strip())
        if found:
            values[found[1]] = int(found[2]) * 1024
    available, total = values.get("MemAvailable"), values.get("MemTotal")
    if available is None or total is None:
        memory = psutil.virtual_memory()
        available, total = int(memory.available), int(memory.total)
    for group in cgroups(root, "memory"):
        limit = _number(group / "memory.max")
        used = _number(group / "memory.current")
        droppable = "inactive_file"
        if limit is None:
            limit = _number(group / "memory.limit_in_bytes")
            used = _number(group / "memory.usage_in_bytes")
            droppable = "total_inactive_file"
        if limit is None or limit >= _NO_LIMIT_BYTES:
            continue
        for line in read_lines(group / "memory.stat"):
            name, _, value = line.strip().partition(" ")
            if name == droppable and value.isdigit():
                used = max((used or 0) - int(value), 0)
        total = min(total, limit)
        available = min(available, max(limit - (used or 0), 0))
    return available, total


def cgroups(root: Path, controller: str) -> Iterator[Path]:
    """Yield this process's control group directories (versions 1 and 2), each with its parents.

    Inside a container the names may be the host's, while the mount shows the container's own group
    at its top. Directories that do not exist read as groups without limits.
    """
    for line in read_lines(root / "proc/self/cgroup"):
        _, controllers, name = (*line.strip().split(":", 2), "", "")[:3]
        if controllers == "":
            mount = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            mount = root / "sys/fs/cgroup" / controllers
            if not mount.is_dir():
                mount = root / "sys/fs/cgroup" / controller
        else:
            continue
        path = Path(name.lstrip("/"))
        for group in (path, *path.parents):
            yield mount / group


def read_lines(path: Path) -> list[str]:
    """Return the lines of a kernel file, or none if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    """Return the number in a one-line file, or None without a file or without a limit ("max")."""
    text = "".join(read_lines(path)).strip()
    return int(text) if text.isdigit() else None
