"""Control groups of hosts, on machines with version 1, version 2, or some controllers of each.

A host has a group for tracking (freeze, kill) and, where another hierarchy has the controller, one
for its CPU quota and one for its memory limit. They are made below this process's own groups
(version 1), so that what limits it limits them, or at the root (version 2, where a group with
processes cannot have limited children).
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

MIN_QUOTA_US = 1000
"""The least CPU time per period that the kernel takes."""

PERIOD_US = 5000
"""Short, because a stage computes in bursts: with the usual 100 ms it would run at full speed
inside its quota and never be held up, as if it were not slow at all."""

_CONTROLLERS = ("cpu", "memory")
_END_S = 5.0


class GroupError(Exception):
    """This machine's control groups cannot do what is asked; one line for the user."""


class Groups:
    """The groups of one testbed, all below directories named ``name``."""

    def __init__(self, name: str, root: Path = Path("/")) -> None:
        """``root`` is where /proc and /sys are looked for. Raises GroupError."""
        self._name = name
        self._parents, self._unified = _hierarchies(root)
        """Controller, or "track" -> directories to have groups in, the first for new ones."""
        if "track" not in self._parents:
            raise GroupError("no control groups (version 2, or the freezer) are mounted here")

    def create(self, host: str, *, cpu: bool, memory: bool) -> None:
        """Make the groups of ``host``. Raises GroupError where a wanted limit is not possible."""
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
        """Where a process must be registered to be on ``host``."""
        parents = dict.fromkeys(parents[0] for parents in self._parents.values())
        return [parent / self._name / host for parent in parents]

    def limit_cpu(self, host: str, percent: float | None) -> None:
        """Let ``host`` compute for that share of one core, from now on; None: without limit."""
        group = self._group("cpu", host)
        period_us, quota_us = cpu_quota(percent)
        if (group / "cpu.max").exists():
            _write(group / "cpu.max", f"{quota_us or 'max'} {period_us}")
        else:
            # One after the other must be valid: no quota, then the period, then the quota.
            _write(group / "cpu.cfs_quota_us", "-1")
            _write(group / "cpu.cfs_period_us", str(period_us))
            _write(group / "cpu.cfs_quota_us", str(quota_us or -1))

    def limit_memory(self, host: str, limit_bytes: int) -> None:
        """Kill what makes ``host`` take more than that, page cache that can be dropped aside."""
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
        """End every process on ``host``, frozen or not; returns when they are gone."""
        _kill(self.directories(host), host)

    def remove(self) -> None:
        """Kill everything on all hosts and remove all groups of this name. Idempotent."""
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
    """(period, quota per period) in microseconds, for a share of one core; None: no quota."""
    if percent is None:
        return PERIOD_US, None
    if not 0.1 <= percent <= 100_000:
        raise GroupError(f"a CPU share of {percent:g} %: must be between 0.1 and 100000")
    period_us = max(PERIOD_US, round(MIN_QUOTA_US * 100 / percent))
    return period_us, max(MIN_QUOTA_US, round(period_us * percent / 100))


def _hierarchies(root: Path) -> tuple[dict[str, list[Path]], Path | None]:
    """Directories by controller, and where version 2 is mounted."""
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
        with contextlib.suppress(OSError):  # It is gone, and all that were in it.
            found |= set(map(int, (group / "cgroup.procs").read_text().split()))
    return found


def _kill(groups: list[Path], host: str) -> None:
    for _ in _until_s(_END_S):
        processes = _processes(groups)
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        # A frozen process dies when it is let go, and whatever comes next must run.
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
            except OSError:  # Its last process is still being cleared away.
                continue
            break
        else:
            raise GroupError(f"control group {group} cannot be removed")


def _until_s(seconds: float) -> Iterator[None]:
    """Again and again for that long: control groups announce nothing that could be awaited."""
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
