"""Machines with a real systemd as PID 1: nspawn containers on the hosts of a testbed.

Each has an overlay over one Debian tree, so that what an installation leaves behind can be listed.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from pathlib import Path
from types import TracebackType

from testbed.bed import Testbed
from tests.system.cluster import wait_for

BOOT_TIMEOUT_S = 60.0
COMMAND_TIMEOUT_S = 300.0
CGROUPS = Path("/sys/fs/cgroup")

ALWAYS_CHANGING = (
    "./dev/", "./proc/", "./run/", "./sys/", "./tmp/", "./mnt/", "./var/log/", "./var/tmp/",
    "./var/lib/systemd/", "./etc/machine-id", "./etc/resolv.conf", "./var/cache/ldconfig/",
)  # fmt: skip
"""What a running system changes by itself."""


class Machine:
    """A container while the context is open; ``name`` is its host on the network."""

    def __init__(
        self, name: str, tree: Path, directory: Path, bed: Testbed, binds: dict[Path, str]
    ) -> None:
        """tree: a Debian tree with systemd and python3-venv. binds: shown read-only inside."""
        self.name = name
        self.address = bed.network.address(name)
        self._tree = tree
        self._bed = bed
        self._binds = binds
        self._upper, self._work, self.root = (
            directory / name / part for part in ("upper", "work", "root")
        )
        self._log = directory / f"{name}.console"
        self._group = f"shoal-install-{os.getpid()}-{name}"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Machine:
        for path in (self._upper, self._work, self.root):
            path.mkdir(parents=True)
        options = f"lowerdir={self._tree},upperdir={self._upper},workdir={self._work}"
        command = ["mount", "-t", "overlay", "overlay", "-o", options, str(self.root)]
        subprocess.run(command, check=True)
        (self.root / "etc" / "hostname").write_text(f"{self.name}\n")
        (self.root / "etc" / "hosts").write_text(f"127.0.0.1 localhost {self.name}\n")
        self.boot()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.power_off()
        subprocess.run(["umount", str(self.root)], check=False)
        for hierarchy in self._hierarchies():
            for group in sorted((hierarchy / self._group).rglob("*"), reverse=True):
                if group.is_dir():
                    with contextlib.suppress(OSError):
                        group.rmdir()
            with contextlib.suppress(OSError):
                (hierarchy / self._group).rmdir()

    def boot(self) -> None:
        """Start, and wait until systemd has."""
        groups = []
        for hierarchy in self._hierarchies():
            with contextlib.suppress(OSError):
                (hierarchy / self._group).mkdir(exist_ok=True)
                groups.append(hierarchy / self._group / "cgroup.procs")
        enter = "".join(f"echo $$ > {path} 2>/dev/null; " for path in groups)
        namespace = self._bed.namespace(self.name)
        command = [
            "systemd-nspawn",
            "--quiet",
            f"--directory={self.root}",
            "--boot",
            "--register=no",
            "--keep-unit",
            "--console=read-only",
            f"--machine={self.name}",
            f"--network-namespace-path={namespace}",
            *(f"--bind-ro={outside}:{inside}" for outside, inside in self._binds.items()),
        ]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                ["sh", "-c", f'{enter}exec "$@"', "sh", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        # "degraded" is as far as a container comes whose kernel lacks something.
        wait_for(
            lambda: (
                self.shell("systemctl is-system-running", check=False).strip()
                in ("running", "degraded")
            ),
            BOOT_TIMEOUT_S,
            f"{self.name} booting",
        )

    def power_off(self) -> None:
        """Shut down in order, as `poweroff` does."""
        process, self._process = self._process, None
        if process is None:
            return
        leader = self._leader(process)
        if leader is not None:
            self._enter(leader, ["systemctl", "poweroff"], check=False)
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def reboot(self) -> None:
        self.power_off()
        self.boot()

    def shell(self, script: str, *, check: bool = True) -> str:
        """What ``script`` prints inside, errors included."""
        assert self._process is not None
        leader = self._leader(self._process)
        if leader is None:
            return ""
        completed = self._enter(leader, ["sh", "-c", script], check=False)
        assert completed.returncode == 0 or not check, f"{script}:\n{completed.stdout}"
        return completed.stdout

    def enforce_limits(self) -> None:
        """Let this systemd use the control groups of its machine, until the next boot."""
        mounts = " ".join(f"/sys/fs/cgroup/{name}" for name in ("memory", "cpu", "cpuacct", "pids"))
        self.shell(f"for at in {mounts}; do mount -o remount,rw,bind $at; done")
        self.shell("systemctl daemon-reexec")

    def pid(self, unit: str) -> int:
        """The unit's main process, as numbered inside; 0 for none."""
        return int(self.shell(f"systemctl show -P MainPID {unit}"))

    def property(self, unit: str, name: str) -> str:
        return self.shell(f"systemctl show -P {name} {unit}").strip()

    def files(self) -> set[str]:
        """Every path but those that a running system changes by itself."""
        listed = self.shell("cd / && find . -xdev -not -path './proc/*' -not -path './sys/*'")
        return {
            line
            for line in listed.splitlines()
            if not f"{line}/".startswith(ALWAYS_CHANGING) and "__pycache__" not in line
        }

    def wait(self, script: str, wanted: str, timeout_s: float) -> float:
        """Wait until ``script`` prints ``wanted``; the seconds it took."""
        started_s = time.monotonic()
        wait_for(
            lambda: wanted in self.shell(script, check=False),
            timeout_s,
            f"{self.name}: {wanted!r} from `{script}`",
        )
        return time.monotonic() - started_s

    def _enter(
        self, leader: int, command: list[str], *, check: bool
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["nsenter", "-t", str(leader), "-m", "-u", "-i", "-n", "-p", "-C", "--", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin", "LANG": "C.UTF-8"},
            check=check,
        )

    def _leader(self, process: subprocess.Popen[bytes]) -> int | None:
        """PID 1 of the container, as numbered outside."""
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        try:
            numbers = [int(word) for word in children.read_text().split()]
        except OSError:
            return None
        for number in numbers:
            with contextlib.suppress(OSError):
                if Path(f"/proc/{number}/comm").read_text().strip() in ("systemd", "init"):
                    return number
        return None

    def _hierarchies(self) -> list[Path]:
        return [
            path
            for path in sorted(CGROUPS.iterdir())
            if path.is_dir() and not path.is_symlink() and path.name != "cpuset"
        ]
