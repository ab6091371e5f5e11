"""A running testbed: hosts with networks and limits of their own, and faults on request.

    with Testbed(Network({"a": Host(cpu_percent=40), "b": Host()}), "try") as bed:
        process = bed.popen("a", ["shoal", "agent"])
        bed.fault("a", "slow=10")

A testbed consists of a directory below RUN, control groups and one process, the switch. The
directory holds the namespaces, the switch's socket and the state. All of them carry the testbed's
name. ``down`` finds them by that name, even if the process that made them was killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from model.bounded import read_json
from testbed import namespaces, tap
from testbed.cgroups import GroupError, Groups
from testbed.network import Network, NetworkError
from testbed.switch import PortFault, fault_from_dict, fault_to_dict, request_fault

RUN = Path("/run/shoal-testbed")
FILES = Path("/var/tmp/shoal-testbed")  # noqa: S108 - only root creates files below it
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,23}")

FAULTS = (
    "kill, freeze, thaw, cut, heal, blackhole, lose=HOST, firewall, multicast=off, slow=PERCENT,"
    " slow=off, link:rate=MBIT,delay=MS,jitter=MS,loss=PERCENT"
)

_SWITCH = ".switch"
"""The switch's control group. No host can have this name."""

PACKAGES = Path(__file__).parents[1]
"""The directory from which shoal's packages are imported, installed or not."""

Result = TypeVar("Result")


class TestbedError(Exception):
    """A testbed cannot be made or used. The text is one line that says what to do."""

    __test__ = False  # pytest would take the class for a test because of its name.


class Testbed:
    """One testbed, found by its name. Every method raises TestbedError."""

    __test__ = False

    def __init__(self, network: Network, name: str) -> None:
        if not NAME.fullmatch(name):
            raise TestbedError(
                f"testbed name {name!r}: use at most 24 small letters, digits and dashes"
            )
        self.network = network
        self.name = name
        self._directory = RUN / name
        self._groups = _groups(name)
        self._ports: dict[str, PortFault] = {}

    @staticmethod
    def standing(name: str) -> Testbed:
        """Return the running testbed of that name."""
        try:
            state = read_json(RUN / name / "state.json")
        except FileNotFoundError:
            names = ", ".join(standing()) or "none"
            raise TestbedError(
                f"no testbed {name!r} stands here (running: {names}): run `shoal testbed up`"
            ) from None
        except (OSError, ValueError) as error:
            raise TestbedError(
                f"testbed {name!r} is damaged ({error}): run `shoal testbed down`"
            ) from error
        bed = Testbed(Network.from_dict(state["network"]), name)
        bed._ports = {host: fault_from_dict(fault) for host, fault in state["faults"].items()}
        return bed

    def __enter__(self) -> Testbed:
        self.up()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        down(self.name)

    @property
    def directory(self) -> Path:
        """The directory for files that are deleted together with the testbed."""
        return FILES / self.name

    def up(self) -> None:
        """Make the hosts and the switch, and remove an older testbed of this name first."""
        check_possible()
        with _locked():
            _remove(self.name)
            try:
                self._make()
            except BaseException as error:
                _remove(self.name)
                if isinstance(error, (OSError, GroupError)):
                    raise TestbedError(f"cannot make the testbed: {error}") from error
                raise

    def command(self, host: str, command: Sequence[str] = ()) -> list[str]:
        """Return the command line that runs ``command`` on ``host`` in the same process."""
        self._require(host)
        place = ["--net", str(self.namespace(host)), "--host", host]
        cores = self.network.hosts[host].cores
        if cores is not None:
            place += ["--cores", ",".join(map(str, cores))]
        return [*self._entry(host), *place, "--", *command]

    def popen(
        self, host: str, command: Sequence[str], *, descriptors: Sequence[int] = (), **options: Any
    ) -> subprocess.Popen[Any]:
        """Start a process on a host, and return when every fault can reach it.

        The process inherits ``descriptors``. ``options`` are passed to ``subprocess.Popen``. If a
        command cannot be started, the process says so on stderr and exits with code 1.
        """
        started, running = os.pipe()
        with os.fdopen(started, "rb") as event:
            line = self.command(host, command)
            at = line.index("--")
            line[at:at] = ["--ready", str(running)]
            try:
                process = subprocess.Popen(  # noqa: S603 - the caller's command
                    line, pass_fds=[running, *descriptors], **options
                )
            finally:
                os.close(running)
            event.read()
        return process

    def inside(self, host: str, call: Callable[[], Result]) -> Result:
        """Run ``call`` in this process with the network of ``host``, for its sockets."""
        self._require(host)
        return namespaces.inside(self.namespace(host), call)

    def namespace(self, host: str) -> Path:
        """The file that holds the host's network namespace."""
        return self._directory / f"{host}.net"

    def processes(self, host: str) -> set[int]:
        """The processes on a host, by their numbers on this machine."""
        self._require(host)
        return self._groups.processes(host)

    def port(self, host: str) -> PortFault:
        """Return the faults of the host's port."""
        return self._ports.get(host, PortFault())

    def fault(self, host: str, what: str) -> None:
        """Apply one fault to a host, and return when it is in force.

        ``kill``: power loss. The link goes first, so that no peer hears of it.
        ``freeze``, ``thaw``: stop all processes where they are, and let them go on.
        ``cut``: pull the cable.
        ``blackhole``: lose every frame while the cable seems fine.
        ``lose=HOST``: lose only the frames to that host.
        ``firewall``: refuse new TCP connections to the host.
        ``link:rate=5,delay=50``: set Mbit/s and one-way ms of all its links. Other keys are jitter
            (ms) and loss (%).
        ``multicast=off``: drop multicast frames, as some access points do.
        ``slow=10``, ``slow=off``: limit the host to 10 % of a core, or as described.
        ``heal``: restore the described link.
        """
        self._require(host)
        with _locked(), _reported():
            self._apply(host, what)

    def status(self) -> dict[str, Any]:
        """Return hosts, processes and faults in a form that JSON can hold."""
        return {
            "name": self.name,
            "switch": bool(self._groups.processes(_SWITCH)),
            "hosts": {
                name: {
                    "address": self.network.address(name),
                    "cpu_percent": host.cpu_percent,
                    "memory_bytes": host.memory_bytes,
                    "processes": sorted(self.processes(name)),
                    "fault": fault_to_dict(self.port(name)),
                }
                for name, host in self.network.hosts.items()
            },
        }

    # ---- making -----------------------------------------------------------------------------

    def _make(self) -> None:
        for directory in (self._directory, self.directory):
            directory.mkdir(parents=True, mode=0o700)
        self._ports = {}
        self._save()
        for name, host in self.network.hosts.items():
            namespaces.create(self.namespace(name))
            self._groups.create(
                name, cpu=host.cpu_percent is not None, memory=host.memory_bytes is not None
            )
            if host.cpu_percent is not None:
                self._groups.limit_cpu(name, host.cpu_percent)
            if host.memory_bytes is not None:
                self._groups.limit_memory(name, host.memory_bytes)
        self._groups.create(_SWITCH, cpu=False, memory=False)
        self._start_switch()

    def _entry(self, host: str) -> list[str]:
        """Return the command that puts a process into the control groups of a host."""
        entry = [sys.executable, "-I", "-S", str(PACKAGES / "testbed" / "enter.py")]
        for group in self._groups.directories(host):
            entry += ["--group", str(group)]
        return entry

    def _start_switch(self) -> None:
        command = [sys.executable, "-m", "testbed.switch", str(self._directory)]
        log = self._directory / "switch.log"
        ready, running = os.pipe()
        with os.fdopen(ready, "rb") as event, log.open("w") as stderr:
            try:
                process = subprocess.Popen(  # noqa: S603 - our own command
                    [*self._entry(_SWITCH), "--", *command],
                    stdin=subprocess.DEVNULL,
                    stdout=running,
                    stderr=stderr,
                    start_new_session=True,
                    env={**os.environ, "PYTHONPATH": str(PACKAGES)},
                )
            finally:
                os.close(running)
            said = event.readline()
        if not said:
            process.wait()
            reason = log.read_text().strip().splitlines()
            raise TestbedError(f"the switch did not start: {reason[-1] if reason else 'it ended'}")
        # The switch outlives this process or is ended by ``down``. Neither needs its exit code.
        process.returncode = 0

    def _apply(self, host: str, what: str) -> None:
        port, described = self.port(host), self.network.hosts[host]
        kind, _, value = what.partition("=")
        if what == "kill":
            self._set_port(host, replace(port, blackhole=True))
            self._groups.kill(host)
        elif what in ("freeze", "thaw"):
            self._groups.freeze(host, what == "freeze")
        elif what in ("cut", "blackhole", "firewall"):
            self._set_port(host, replace(port, **dict[str, Any]({what: True})))
        elif kind == "lose":
            self._require(value)
            self._set_port(host, replace(port, loses=(*port.loses, value)))
        elif what == "heal":
            self._set_port(host, PortFault())
        elif what == "multicast=off":
            self._set_port(host, replace(port, multicast=False))
        elif what.startswith("link:"):
            self._set_port(host, replace(port, **_link_fault(what.removeprefix("link:"))))
        elif kind == "slow":
            if described.cpu_percent is None:
                self._groups.create(host, cpu=True, memory=False)
            percent = described.cpu_percent if value == "off" else _number(value, what)
            self._groups.limit_cpu(host, percent)
        else:
            raise TestbedError(f"unknown fault {what!r}: known are {FAULTS}")

    def _set_port(self, host: str, fault: PortFault) -> None:
        request_fault(self._directory, host, fault)
        self._ports[host] = fault
        self._save()

    def _save(self) -> None:
        faults = {host: fault_to_dict(fault) for host, fault in self._ports.items()}
        state = {"network": self.network.to_dict(), "faults": faults}
        part = self._directory / "state.json.part"
        part.write_text(json.dumps(state))
        part.replace(self._directory / "state.json")

    def _require(self, host: str) -> None:
        if host not in self.network.hosts:
            raise TestbedError(f"no host {host!r}: there are {', '.join(self.network.hosts)}")


def standing() -> list[str]:
    """The names of the testbeds that run on this machine or have left files here."""
    return sorted(path.name for path in RUN.iterdir()) if RUN.is_dir() else []


def down(name: str) -> None:
    """Remove the testbed of that name and end every process on it. Idempotent."""
    check_possible()
    with _locked(), _reported():
        _remove(name)


def check_possible() -> None:
    """Raise TestbedError if this machine or user cannot have a testbed."""
    if os.geteuid() != 0:
        raise TestbedError(
            "a testbed needs root (network namespaces, control groups): run it with sudo"
        )
    if not Path(tap.DEVICE).exists():
        raise TestbedError(f"there is no {tap.DEVICE}: load the kernel module tun (modprobe tun)")


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """Allow one change at a time. The lock ends with its process."""
    RUN.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(RUN, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        with contextlib.suppress(OSError):
            RUN.rmdir()  # Fails while other testbeds exist.
        os.close(descriptor)


def _remove(name: str) -> None:
    groups = _groups(name)
    groups.remove()
    if (FILES / name).is_dir():
        shutil.rmtree(FILES / name)
    directory = RUN / name
    if directory.is_dir():
        for path in directory.glob("*.net"):
            namespaces.delete(path)
        shutil.rmtree(directory)
    with contextlib.suppress(OSError):
        FILES.rmdir()  # Fails while other testbeds exist.


def _groups(name: str) -> Groups:
    try:
        return Groups(f"shoal-testbed-{name}")
    except GroupError as error:
        raise TestbedError(str(error)) from error


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    try:
        yield
    except (OSError, GroupError, NetworkError) as error:
        raise TestbedError(str(error)) from error


def _link_fault(text: str) -> dict[str, Any]:
    """Return PortFault fields for ``rate=MBIT,delay=MS,jitter=MS,loss=PERCENT``."""
    fields = {
        "rate": ("bytes_per_s", 1e6 / 8),
        "delay": ("delay_s", 1e-3),
        "jitter": ("jitter_s", 1e-3),
        "loss": ("loss", 1e-2),
    }
    found = {}
    for part in text.split(","):
        key, _, value = part.partition("=")
        if key not in fields:
            raise TestbedError(f"unknown key {key!r} of a link: known are {', '.join(fields)}")
        name, unit = fields[key]
        found[name] = _number(value, part) * unit
    return found


def _number(text: str, what: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise TestbedError(f"{what}: expected a number, like slow=10") from None


def describe(faults: Mapping[str, Any]) -> str:
    """Return in words the faults of a port, given as ``status`` has them."""

    def one(name: str, value: Any) -> str:
        if value is True:
            return name
        return f"{name}={' '.join(value)}" if name == "loses" else f"{name}={value:g}"

    return ", ".join(one(name, value) for name, value in faults.items())
