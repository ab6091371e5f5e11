"""The checks of ``shoal doctor`` that need no network. Each takes a Machine and returns findings.

The kernel's files are read below ``Machine.root``, so that tests can be any board.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import getpass
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from backends.registry import BACKENDS
from calibration.machine import processor_name, usable_cores
from calibration.sensors import Sensors
from cli.doctor.hardware import Coral, board_model, corals, is_jetson, read_text
from model.memory import memory_bytes
from wire.messages import Endpoint
from wire.sizes import format_size

State = Literal["ok", "note", "warning", "failed"]

PROBE_TIMEOUT_S = 60.0
"""A backend's library takes seconds to import on a board with a slow card."""

NEEDED = ("shoal-llm", "cryptography", "msgpack", "numpy", "psutil", "rich", "zeroconf")

FEATURES = {
    "flags": ("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8"),
    "Features": ("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve"),
}
"""Instructions that backends use, by their label in /proc/cpuinfo."""

LOW_MEMORY_BYTES = 512 << 20
LEAST_MEMORY_BYTES = 160 << 20
"""An agent with its library takes about 95 MB without any block."""

LOW_DISK_BYTES = 1 << 30
LEAST_DISK_BYTES = 64 << 20
_WRITE_BYTES = 1 << 20

FIRST_RELEASE_YEAR = 2026
HOT_C = 80.0
"""The temperature at which a Raspberry Pi begins to slow down."""

_STA_UNSYNC = 0x40
_ADJTIMEX_BYTES = 512

_PROBE = """
import json, sys
path, name = json.load(sys.stdin)
sys.path[:] = path
from backends.base import BackendUnavailable
from backends.registry import backend_class
try:
    answer = {"version": backend_class(name).probe().version}
except BackendUnavailable as error:
    answer = {"reason": error.reason}
print()
print(json.dumps(answer))
"""


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine to check.

    root: / or a test's directory in its place.
    backend: the backend that the agent will use.
    """

    root: Path
    state_dir: Path
    cluster: str
    coordinator: Endpoint | None
    """The coordinator to join. For a coordinator's machine, the address where it listens."""
    backend: str
    announces: bool = True
    """Whether a coordinator here announces itself by mDNS."""
    http: Endpoint | None = None
    """Where a coordinator here answers HTTP. None means the default, which is loopback."""
    insecure_http: bool = False
    """Whether its settings do without API keys."""

    @property
    def real(self) -> bool:
        return self.root == Path("/")


@dataclass(frozen=True, slots=True)
class Check:
    """One finding, with ``fix`` as its advice.

    The state ``failed`` means that the machine cannot be an agent, or a coordinator.
    """

    name: str
    state: State
    text: str
    fix: str = ""

    def as_dict(self) -> dict[str, str]:
        return dataclasses.asdict(self)


def check_board(machine: Machine) -> list[Check]:
    """Check the board, the processor and its instructions. A 32-bit system fails."""
    fields: dict[str, str] = {}
    for line in read_text(machine.root / "proc/cpuinfo").splitlines():
        label, _, value = line.partition(":")
        fields.setdefault(label.strip(), value.strip())
    words = {word for label in FEATURES for word in fields.get(label, "").split()}
    known = [name for names in FEATURES.values() for name in names if name in words]
    kind = platform.machine()
    text = (
        f"{board_model(machine.root) or 'unknown board'}; {processor_name(machine.root)}, "
        f"{kind}, {usable_cores(machine.root)} cores, {' '.join(known) or 'no known extensions'}"
    )
    if sys.maxsize < 1 << 32:
        return [
            Check(
                "board",
                "failed",
                f"{text}; this is a 32-bit system, for which ONNX Runtime has no packages",
                "install the 64-bit edition of its operating system",
            )
        ]
    if machine.real and kind == "aarch64" and "flags" in fields:
        text += "; emulated, the kernel's processor is of another kind"
    return [Check("board", "ok", text)]


def check_system(machine: Machine) -> list[Check]:
    """Show the operating system, kernel and Python."""
    release = dict(
        line.partition("=")[::2]
        for line in read_text(machine.root / "etc/os-release").splitlines()
        if "=" in line
    )
    name = release.get("PRETTY_NAME", "unknown system").strip('"')
    libc = " ".join(platform.libc_ver()) or "unknown libc"
    text = f"{name}, Linux {platform.release()}, {libc}, Python {platform.python_version()}"
    if machine.real and (Path("/.dockerenv").exists() or Path("/run/systemd/container").exists()):
        text += ", in a container"
    return [Check("system", "ok", text)]


def check_libraries(machine: Machine) -> list[Check]:
    """Check the libraries that every agent imports."""
    return installed(NEEDED)


def installed(packages: Iterable[str]) -> list[Check]:
    """Check that these packages are installed, and show their versions."""
    found, missing = [], []
    for name in packages:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    missing = [name for name in missing if name != "shoal-llm"]  # It may run from its tree.
    if missing:
        return [
            Check("libraries", "failed", f"missing: {', '.join(missing)}", _pip(" ".join(missing)))
        ]
    return [Check("libraries", "ok", ", ".join(found))]


def check_backends(machine: Machine) -> list[Check]:
    """Check each backend in a process of its own, because such libraries may crash."""
    with ThreadPoolExecutor(len(BACKENDS)) as pool:
        answers = dict(zip(BACKENDS, pool.map(probe_backend, BACKENDS), strict=True))
    usable = [name for name, answer in answers.items() if "version" in answer]
    found = []
    for name, answer in answers.items():
        if "version" in answer:
            found.append(Check("backend", "ok", f"{name}: available ({answer['version']})"))
            continue
        essential = name == machine.backend or not usable
        reason, fix = _backend_fix(answer["reason"], machine)
        state: State = "failed" if essential else "note"
        found.append(Check("backend", state, f"{name}: {reason}", fix))
    if machine.backend not in answers:
        fix = f"set backend to one of {', '.join(answers)}"
        found.append(Check("backend", "failed", f"{machine.backend}: unknown", fix))
    return found


def probe_backend(name: str) -> dict[str, str]:
    """The ``version`` of an available backend, or the ``reason`` why it is not available."""
    try:
        completed = subprocess.run(  # noqa: S603 - this interpreter
            [sys.executable, "-I", "-c", _PROBE],
            input=json.dumps([sys.path, name]),
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"reason": f"its library did not load within {PROBE_TIMEOUT_S:g} s"}
    try:
        answer: dict[str, str] = json.loads(completed.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        if completed.returncode < 0:
            return {"reason": f"its library crashes here (signal {-completed.returncode})"}
        said = completed.stderr.strip().splitlines()
        return {"reason": f"its library fails: {said[-1] if said else 'no message'}"}
    return answer


def check_accelerators(machine: Machine) -> list[Check]:
    """Check Edge TPUs and Jetsons, and what a backend needs to use them."""
    found = [_coral(machine, coral) for coral in corals(machine.root)]
    if is_jetson(machine.root):
        release = read_text(machine.root / "etc/nv_tegra_release").partition("\n")[0]
        found.append(Check("accelerator", "ok", f"Jetson: {release or 'no L4T release file'}"))
    return found or [Check("accelerator", "ok", "none besides the CPU")]


def check_clock(machine: Machine) -> list[Check]:
    """Check the clock. A board without a clock chip starts in the past, and certificates fail."""
    now = time.gmtime()
    text = time.strftime("%Y-%m-%d %H:%M:%S UTC", now)
    fix = "sudo timedatectl set-ntp true"
    if now.tm_year < FIRST_RELEASE_YEAR:
        return [Check("clock", "warning", f"{text} is in the past: downloads will fail", fix)]
    if _unsynchronized():
        return [Check("clock", "note", f"{text}, not synchronized", fix)]
    return [Check("clock", "ok", text)]


def check_memory(machine: Machine) -> list[Check]:
    available, total = memory_bytes(machine.root)
    text = f"{format_size(available)} of {format_size(total)} available"
    if available < LEAST_MEMORY_BYTES:
        return [
            Check("memory", "failed", f"{text}, too little for any stage", "end other programs")
        ]
    if available < LOW_MEMORY_BYTES:
        return [Check("memory", "warning", f"{text}, room for few layers", "end other programs")]
    return [Check("memory", "ok", text)]


def check_limits(machine: Machine) -> list[Check]:
    """Check the control group that bounds memory. Raspberry Pi OS starts without it."""
    controllers = read_text(machine.root / "sys/fs/cgroup/cgroup.controllers").split()
    if controllers and "memory" not in controllers:
        fix = "add cgroup_enable=memory to /boot/firmware/cmdline.txt and reboot"
        text = "the kernel does not enforce the service's MemoryMax"
        return [Check("limits", "note", text, fix)]
    return []


def check_swap(machine: Machine) -> list[Check]:
    """Check swap. A stage that swaps to a card does not fail, but is hundreds of times slower."""
    lines = read_text(machine.root / "proc/swaps").splitlines()[1:]
    names = [line.split()[0] for line in lines if line.split()]
    if not names:
        return [Check("swap", "ok", "none")]
    slow = [name for name in names if "zram" not in name]
    if not slow:
        return [Check("swap", "ok", f"compressed memory only ({', '.join(names)})")]
    fix = "leave the agent less than what is free (--memory), or sudo swapoff -a"
    return [Check("swap", "note", f"on {', '.join(slow)}: slow if a stage is swapped out", fix)]


def check_disk(machine: Machine) -> list[Check]:
    """Check free space in the state directory, and write a file there."""
    directory = machine.state_dir
    while not _reachable(directory) and directory != directory.parent:
        directory = directory.parent
    try:
        free = shutil.disk_usage(directory).free
    except OSError as error:
        return [Check("disk", "failed", f"{directory}: {error.strerror}")]
    text = f"{format_size(free)} free at {machine.state_dir}"
    fix = "free some room, or keep blocks elsewhere with --state-dir"
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".write-test-") as file:
            file.write(bytes(_WRITE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except PermissionError:
        if directory.is_relative_to(Path("/var/lib/shoal")):
            return [
                Check(
                    "disk", "note", f"{text}; only the service may write there", "sudo shoal doctor"
                )
            ]
        return [
            Check("disk", "failed", f"{directory} cannot be written by {getpass.getuser()}", fix)
        ]
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else f"cannot be written: {error.strerror}"
        return [Check("disk", "failed", f"{text}; {reason}", fix)]
    if free < LEAST_DISK_BYTES:
        return [Check("disk", "failed", f"{text}, too little for any block", fix)]
    if free < LOW_DISK_BYTES:
        return [Check("disk", "warning", f"{text}, room for a small model's blocks only", fix)]
    return [Check("disk", "ok", text)]


def check_heat(machine: Machine) -> list[Check]:
    """Check the temperature, and whether the firmware slows the processor down."""
    zones = sorted(machine.root.glob("sys/class/thermal/thermal_zone*/temp"))
    degrees = [int(text) / 1000 for zone in zones if (text := read_text(zone)).isdigit()]
    governor = read_text(machine.root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    parts = [f"{max(degrees):.0f} °C" if degrees else "no thermal sensor"]
    if governor:
        parts.append(f"governor {governor}")
    sensors = Sensors(machine.root) if machine.real else Sensors(machine.root, ask_firmware=str)
    throttling = sensors.throttling()
    fix = "check its power supply and its cooling"
    if throttling is not None and throttling.now:
        return [
            Check("throttling", "warning", f"{', '.join(throttling.now)}; {', '.join(parts)}", fix)
        ]
    if degrees and max(degrees) >= HOT_C:
        return [Check("throttling", "warning", f"hot: {', '.join(parts)}", fix)]
    if throttling is not None and throttling.since_boot:
        reasons = ", ".join(throttling.since_boot)
        return [
            Check("throttling", "note", f"since boot: {reasons}; now none; {', '.join(parts)}", fix)
        ]
    return [Check("throttling", "ok", f"none seen; {', '.join(parts)}")]


# ---- parts -------------------------------------------------------------------------------------


def _coral(machine: Machine, coral: Coral) -> Check:
    text = f"Coral Edge TPU on {coral.bus} {coral.place}"
    libraries = ("usr/lib", "usr/lib/*-linux-gnu", "usr/local/lib", "lib")
    if not any(list(machine.root.glob(f"{place}/libedgetpu.so.1*")) for place in libraries):
        return Check(
            "accelerator",
            "warning",
            f"{text}; its library libedgetpu is not installed",
            "sudo apt install libedgetpu1-std (docs/install.md names its archive)",
        )
    if machine.real and coral.bus == "USB":
        device = machine.root / "sys/bus/usb/devices" / coral.place
        numbers = [read_text(device / name).zfill(3) for name in ("busnum", "devnum")]
        node = Path("/dev/bus/usb", *numbers)
        if not os.access(node, os.R_OK | os.W_OK):
            user = getpass.getuser()
            fix = f"sudo usermod -aG plugdev {user}, then log in again and replug it"
            return Check("accelerator", "warning", f"{text}; {user} may not open it", fix)
    if coral.slow:
        fix = "plug it into a blue (USB 3) port"
        return Check("accelerator", "warning", f"{text}, at USB 2 speed", fix)
    return Check("accelerator", "ok", text)


def _backend_fix(reason: str, machine: Machine) -> tuple[str, str]:
    """Split ``reason`` into the cause and a command that mends it in this environment.

    A backend advises "pip install", but that is rarely the pip of this environment.
    """
    reason, _, advice = reason.partition(": pip install ")
    if advice:
        packages = re.split(r",| \(", advice)[0]
    elif found := re.match(r"cannot import (\w+)", reason):
        known = {"onnx": "onnx onnxruntime", "onnxruntime": "onnx onnxruntime"}
        packages = known.get(found[1], found[1].replace("_", "-"))
    else:
        return reason, ""
    if packages == "torch" and is_jetson(machine.root):
        return reason, "install NVIDIA's torch, then run install.sh again (docs/install.md)"
    return reason, _pip(packages)


def _pip(packages: str) -> str:
    return f"{sys.executable} -m pip install {packages}"


def _reachable(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def _unsynchronized() -> bool:
    """Whether the kernel says that its clock is not synchronized."""
    buffer: Any = ctypes.create_string_buffer(_ADJTIMEX_BYTES)  # modes 0: only read
    try:
        if ctypes.CDLL(None).adjtimex(buffer) < 0:
            return False
    except (OSError, AttributeError):
        return False
    # struct timex: unsigned modes, four longs (offset, freq, maxerror, esterror), int status.
    word = ctypes.sizeof(ctypes.c_long)
    status = int.from_bytes(buffer.raw[5 * word : 5 * word + 4], sys.byteorder)
    return bool(status & _STA_UNSYNC)
