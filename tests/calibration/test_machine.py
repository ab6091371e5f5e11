"""Readings of /proc and /sys, against trees of files as other machines have them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from calibration.machine import (
    hardware_id,
    memory_bytes,
    processor_name,
    usable_cores,
    usable_threads,
)

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
    assert 1 <= usable_threads() <= usable_cores() <= len(os.sched_getaffinity(0))
    assert processor_name()


@pytest.mark.parametrize(
    ("files", "name"),
    [
        ({"proc/cpuinfo": "processor\t: 0\nmodel name\t: AMD EPYC\nmodel\t: 1\n"}, "AMD EPYC"),
        (
            {"proc/cpuinfo": "processor\t: 0\nCPU part\t: 0xd08\n\nModel\t\t: Raspberry Pi 4\n"},
            "Raspberry Pi 4",
        ),
        (
            {
                "proc/cpuinfo": "processor\t: 0\nCPU part\t: 0xd42\n",
                "proc/device-tree/model": "NVIDIA Orin Nano\0",
            },
            "NVIDIA Orin Nano",
        ),
    ],
)
def test_processor_names(tmp_path: Path, files: dict[str, str], name: str) -> None:
    assert processor_name(machine(tmp_path, files)) == name


def test_times_of_another_share_of_the_processor_are_not_taken_for_this_ones(
    tmp_path: Path,
) -> None:
    found = set()
    for quota in (10000, 40000):
        files = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": f"{quota} 100000\n"}
        found.add(hardware_id(machine(tmp_path, files)))
    assert len(found) == 2
    assert any("0.4 cores" in name for name in found)


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


@pytest.mark.parametrize(
    "files",
    [
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"},
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "100000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
    ],
)
def test_a_quota_of_processor_time_counts(tmp_path: Path, files: dict[str, str]) -> None:
    assert usable_cores(machine(tmp_path, files)) == 1


@pytest.mark.parametrize("quota", ["max 100000\n", "-1\n", "junk", ""])
def test_no_quota_leaves_all_cores(tmp_path: Path, quota: str) -> None:
    root = machine(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": quota})
    assert usable_cores(root) == len(os.sched_getaffinity(0))
