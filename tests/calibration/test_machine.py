"""Readings of /proc and /sys, against trees of files as other machines have them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from calibration.machine import hardware_id, processor_name, usable_cores, usable_threads
from tests.model.test_memory import machine


def test_this_machine_has_plausible_values() -> None:
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
