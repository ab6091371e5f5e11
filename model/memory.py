"""The memory that this process can take, and the kernel's files that say so."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import psutil

_NO_LIMIT_BYTES = 1 << 60
"""Version 1 of control groups writes "no limit" as a number near 2^63."""


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
