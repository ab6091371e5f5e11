"""Control groups, against trees of files as other machines have them."""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed.cgroups import GroupError, Groups, cpu_quota


@pytest.mark.parametrize(
    ("percent", "expected"),
    [(None, (5000, None)), (40, (5000, 2000)), (200, (5000, 10000)), (10, (10000, 1000))],
)
def test_quotas_keep_the_period_short(
    percent: float | None, expected: tuple[int, int | None]
) -> None:
    assert cpu_quota(percent) == expected


@pytest.mark.parametrize("percent", [0.0, -1.0, float("nan")])
def test_an_impossible_share_is_refused(percent: float) -> None:
    with pytest.raises(GroupError, match="CPU share"):
        cpu_quota(percent)


def machine(root: Path, own: str, mounts: str) -> Path:
    for name, text in (("proc/self/cgroup", own), ("proc/mounts", mounts)):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_version_2_limits_by_its_own_files(tmp_path: Path) -> None:
    top = tmp_path / "sys/fs/cgroup"
    group = top / "bed" / "a"
    group.mkdir(parents=True)
    (top / "cgroup.controllers").write_text("cpu memory io")
    for name in ("cpu.max", "memory.max", "memory.swap.max", "cgroup.freeze"):
        (group / name).touch()
    machine(tmp_path, "0::/user.slice\n", "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n")
    groups = Groups("bed", tmp_path)
    groups.create("a", cpu=True, memory=True)
    groups.limit_cpu("a", 40)
    groups.limit_memory("a", 1 << 30)
    groups.freeze("a", True)
    assert groups.directories("a") == [group]
    assert (group / "cpu.max").read_text() == "2000 5000"
    assert (group / "memory.max").read_text() == str(1 << 30)
    assert (group / "memory.swap.max").read_text() == "0"
    assert (group / "cgroup.freeze").read_text() == "1"
    assert (top / "bed" / "cgroup.subtree_control").read_text() == "+memory"


def test_version_1_groups_are_below_this_process(tmp_path: Path) -> None:
    own, mounts = "", ""
    for number, name in enumerate(("cpu", "memory", "freezer")):
        (tmp_path / "sys/fs/cgroup" / name / "mine").mkdir(parents=True)
        own += f"{number}:{name}:/mine\n"
        mounts += f"cgroup /sys/fs/cgroup/{name} cgroup rw,{name} 0 0\n"
    groups = Groups("bed", machine(tmp_path, own, mounts))
    groups.create("a", cpu=True, memory=True)
    groups.limit_cpu("a", 40)
    groups.limit_memory("a", 1 << 30)
    groups.freeze("a", True)
    cpu, memory, freezer = (
        tmp_path / "sys/fs/cgroup" / name / "mine/bed/a" for name in ("cpu", "memory", "freezer")
    )
    assert sorted(groups.directories("a")) == sorted([cpu, memory, freezer])
    assert (cpu / "cpu.cfs_period_us").read_text() == "5000"
    assert (cpu / "cpu.cfs_quota_us").read_text() == "2000"
    assert (memory / "memory.limit_in_bytes").read_text() == str(1 << 30)
    assert (freezer / "freezer.state").read_text() == "FROZEN"


def test_what_the_machine_lacks_is_named(tmp_path: Path) -> None:
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cgroup.controllers").write_text("")
    mounts = "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n"
    groups = Groups("bed", machine(tmp_path, "0::/\n", mounts))
    groups.create("a", cpu=False, memory=False)
    with pytest.raises(GroupError, match="no control group for cpu"):
        groups.create("b", cpu=True, memory=False)
    with pytest.raises(GroupError, match="no control groups"):
        Groups("bed", machine(tmp_path, "", ""))
