"""Control groups of hosts, on machines with version 1, version 2, or a mixture.

Each host has a group that tracks its processes, to freeze and kill them. The CPU quota and the
memory limit have groups of their own if another hierarchy has the controller. Under version 1 they
are below this process's own groups, and so share its limits. Under version 2 they are at the root,
because a group with processes cannot have limited children.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

MIN_QUOTA_US = 1000
"""The least CPU time per period that the kernel accepts."""

PERIOD_US = 5000
"""Shorter than the usual 100 ms, because a stage computes in bursts.

A burst would fit into the quota of a long period, and the host would not be slow at all.
"""

_CONTROLLERS = ("cpu", "memory")
_END_S = 5.0


class GroupError(Exception):
    """This machine's control groups cannot do this. The text is one line for the user."""


class Groups:
    """The groups of one testbed, all below directories named ``name``."""

    def __init__(self, name: str, root: Path = Path("/")) -> None:
        """Find the hierarchies in /proc and /sys below ``root``. Raises GroupError."""
        self._name = name
        self._parents, self._unified = _hierarchies(root)
        """Maps a controller, or "track", to parent directories. New groups go into the first."""
        if "track" not in self._parents:
            raise GroupError("no control groups (version 2, or the freezer) are mounted here")

    def create(self, host: str, *, cpu: bool, memory: bool) -> None:
        """Make the groups of ``host``. Raises GroupError if a wanted limit is impossible."""
        wanted = [name for name, want in (("cpu", cpu), ("memory", memory)) if want]
        for controller in wanted:
            if controller not in self._parents:
                raise GroupError(f"this machine has no control group for {controller} limits")
        try:
            for directory in self.directories(host):
                directory.mkdir(parents=True, exist_ok=True)
            for controller in wanted:
                if self._parents[controller][0] == self._unified:
                    for group in (self._unified, self._unified / self._name):
                        _write(group / "cgroup.subtree_control", f"+{controller}")
        except OSError as error:
            raise GroupError(
                f"cannot make control groups: {error.filename}: {error.strerror}"
            ) from error

    def directories(self, host: str) -> list[Path]:
        """The directories of the groups that contain the processes of ``host``."""
        parents = dict.fromkeys(parents[0] for parents in self._parents.values())
        return [parent / self._name / host for parent in parents]

    def limit_cpu(self, host: str, percent: float | None) -> None:
        """Limit ``host`` to a percentage of one core from now on. None removes the limit."""
        group = self._group("cpu", host)
        period_us, quota_us = cpu_quota(percent)
        if (group / "cpu.max").exists():
            _write(group / "cpu.max", f"{quota_us or 'max'} {period_us}")
        else:
            # The kernel checks each write, so the quota goes first and comes back after the period.
            _write(group / "cpu.cfs_quota_us", "-1")
            _write(group / "cpu.cfs_period_us", str(period_us))
            _write(group / "cpu.cfs_quota_us", str(quota_us or -1))

    def limit_memory(self, host: str, limit_bytes: int) -> None:
        """Limit the memory of ``host``. The kernel kills above it; page cache does not count."""
        group = self._group("memory", host)
        if (group / "memory.max").exists():
            _write(group / "memory.max", str(limit_bytes))
            if (group / "memory.swap.max").exists():
                _write(group / "memory.swap.max", "0")
        else:
            _write(group / "memory.limit_in_bytes", str(limit_bytes))

    def freeze(self, host: str, frozen: bool) -> None:
        """Stop every process on ``host`` where it is, or let it go on."""
        group = self._group("track", host)
        if (group / "cgroup.freeze").exists():
            _write(group / "cgroup.freeze", str(int(frozen)))
        else:
            _write(group / "freezer.state", "FROZEN" if frozen else "THAWED")

    def processes(self, host: str) -> set[int]:
        """The processes on ``host``."""
        return _processes(self.directories(host))

    def kill(self, host: str) -> None:
        """End every process on ``host``, even a frozen one, and return when they are gone."""
        _kill(self.directories(host), host)

    def remove(self) -> None:
        """Kill everything on all hosts, and remove all groups of this name. Idempotent."""
        tops = [
            parent / self._name
            for parents in self._parents.values()
            for parent in parents
            if (parent / self._name).is_dir()
        ]
        hosts = {group.name for top in tops for group in top.iterdir() if group.is_dir()}
        for host in sorted(hosts):
            groups = [top / host for top in tops if (top / host).is_dir()]
            _kill(groups, host)
            _remove(groups)
        _remove(tops)

    def _group(self, controller: str, host: str) -> Path:
        if controller not in self._parents:
            raise GroupError(f"this machine has no control group for {controller} limits")
        return self._parents[controller][0] / self._name / host


def cpu_quota(percent: float | None) -> tuple[int, int | None]:
    """Return (period, quota) in microseconds for a percentage of one core; None means no quota."""
    if percent is None:
        return PERIOD_US, None
    if not 0.1 <= percent <= 100_000:
        raise GroupError(f"a CPU share of {percent:g} %: must be between 0.1 and 100000")
    period_us = max(PERIOD_US, round(MIN_QUOTA_US * 100 / percent))
    return period_us, max(MIN_QUOTA_US, round(period_us * percent / 100))


def _hierarchies(root: Path) -> tuple[dict[str, list[Path]], Path | None]:
    """Return the directories of each controller, and the mount point of version 2."""
    own: dict[str, str] = {}
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own |= dict.fromkeys(controllers.split(","), path)
    parents: dict[str, list[Path]] = {}
    unified = None
    for line in (root / "proc/mounts").read_text().splitlines():
        _, mounted, kind, options = line.split()[:4]
        mount = root / mounted.lstrip("/")
        if kind == "cgroup2":
            unified = mount
        elif kind == "cgroup":
            for controller in (*_CONTROLLERS, "freezer"):
                if controller in options.split(","):
                    group = Path(own.get(controller, "/").lstrip("/"))
                    parents[controller] = [mount / part for part in (group, *group.parents)]
    freezer = parents.pop("freezer", None)
    if unified is not None:
        parents["track"] = [unified]
        for controller in (unified / "cgroup.controllers").read_text().split():
            if controller in _CONTROLLERS:
                parents[controller] = [unified]
    elif freezer is not None:
        parents["track"] = freezer
    return parents, unified


def _processes(groups: Iterable[Path]) -> set[int]:
    found: set[int] = set()
    for group in groups:
        with contextlib.suppress(OSError):  # The group and its processes are gone.
            found |= set(map(int, (group / "cgroup.procs").read_text().split()))
    return found


def _kill(groups: list[Path], host: str) -> None:
    for _ in _until_s(_END_S):
        processes = _processes(groups)
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        # A frozen process dies only after it is thawed, so thawing must follow whatever happens.
        for group in groups:
            for name, value in (("cgroup.freeze", "0"), ("freezer.state", "THAWED")):
                if (group / name).exists():
                    _write(group / name, value)
        if not processes:
            return
    raise GroupError(f"{host}: processes do not end: {sorted(_processes(groups))}")


def _remove(groups: Iterable[Path]) -> None:
    for group in groups:
        for _ in _until_s(_END_S):
            try:
                group.rmdir()
            except FileNotFoundError:
                break
            except OSError:  # The kernel is still removing its last process.
                continue
            break
        else:
            raise GroupError(f"control group {group} cannot be removed")


def _until_s(seconds: float) -> Iterator[None]:
    """Yield repeatedly for that long, because control groups offer no event to wait for."""
    deadline_s = time.monotonic() + seconds
    yield
    while time.monotonic() < deadline_s:
        time.sleep(0.01)
        yield


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise GroupError(f"cannot write {text!r} to {path}: {error.strerror}") from error
