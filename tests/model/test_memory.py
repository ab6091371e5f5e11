"""The memory of a process, against trees of files as other machines and containers have them."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.memory import memory_bytes

GIB = 1 << 30
MEMINFO = "MemTotal:        8388608 kB\nMemFree: 1 kB\nMemAvailable:    4194304 kB\n"


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, content in ({"proc/meminfo": MEMINFO} | files).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def test_this_machine_has_plausible_values() -> None:
    available_bytes, total_bytes = memory_bytes()
    assert 0 < available_bytes <= total_bytes


def test_memory_without_a_container_is_the_machines(tmp_path: Path) -> None:
    root = machine(
        tmp_path, {"proc/self/cgroup": "0::/user.slice\n", "sys/fs/cgroup/memory.max": "max\n"}
    )
    assert memory_bytes(root) == (4 * GIB, 8 * GIB)


@pytest.mark.parametrize("name", ["/", "/made/by/the/host", "/a/b"])
def test_version_2_limits_count_wherever_they_are_set(tmp_path: Path, name: str) -> None:
    root = machine(
        tmp_path,
        {
            "proc/self/cgroup": f"0::{name}\n",
            "sys/fs/cgroup/memory.max": f"{2 * GIB}\n",
            "sys/fs/cgroup/memory.current": f"{GIB}\n",
            "sys/fs/cgroup/memory.stat": f"anon 5\ninactive_file {GIB // 2}\n",
            "sys/fs/cgroup/a/memory.max": "max\n",
        },
    )
    assert memory_bytes(root) == (GIB + GIB // 2, 2 * GIB)


def test_the_tightest_of_nested_groups_wins(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/memory.max": f"{GIB}\n",
            "sys/fs/cgroup/a/memory.current": f"{2 * GIB}\n",
            "sys/fs/cgroup/a/b/memory.max": f"{3 * GIB}\n",
            "sys/fs/cgroup/a/b/memory.current": "0\n",
        },
    )
    assert memory_bytes(root) == (0, GIB)


def test_version_1_limits_count(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/x\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2**63 - 4096}\n",
            "sys/fs/cgroup/memory/x/memory.limit_in_bytes": f"{GIB}\n",
            "sys/fs/cgroup/memory/x/memory.usage_in_bytes": f"{GIB // 2}\n",
            "sys/fs/cgroup/memory/x/memory.stat": f"total_inactive_file {GIB // 4}\n",
        },
    )
    assert memory_bytes(root) == (GIB - GIB // 4, GIB)
