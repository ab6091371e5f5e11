"""`shoal doctor` on machines that lack something."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from api.key_book import KeyBook
from backends.registry import BACKENDS
from cli.doctor import checks, network
from cli.doctor.checks import Check, Machine
from cli.doctor.command import bounded
from cli.main import main
from testbed.bed import Testbed
from tests.system.cluster import COMMAND, ROOT
from tests.system.namespaces import bed_of

PI_4 = {
    "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.4\0",
    "proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd evtstrm crc32 cpuid\n",
    "etc/os-release": 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\n',
    "proc/meminfo": "MemTotal: 3884000 kB\nMemAvailable: 3400000 kB\n",
    "sys/class/thermal/thermal_zone0/temp": "48200\n",
}
CORAL = {
    "sys/bus/usb/devices/2-1/idVendor": "18d1\n",
    "sys/bus/usb/devices/2-1/idProduct": "9302\n",
    "sys/bus/usb/devices/2-1/speed": "5000\n",
}
LIBEDGETPU = {"usr/lib/aarch64-linux-gnu/libedgetpu.so.1": "\x7fELF"}

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def board(tmp_path: Path) -> Callable[..., Machine]:
    """A machine whose kernel shows these files."""

    def make(*parts: dict[str, str], backend: str = "onnx_cpu") -> Machine:
        root = tmp_path / "root"
        for part in parts:
            for name, text in part.items():
                path = root / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
        return Machine(root, tmp_path, "shoal", None, backend)

    return make


@pytest.fixture
def no_torch(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hides torch from commands that are asked about something else: it loads for seconds."""
    directory = tmp_path_factory.mktemp("no-torch")
    missing = "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')"
    (directory / "torch.py").write_text(missing)
    monkeypatch.syspath_prepend(str(directory))
    monkeypatch.setenv("PYTHONPATH", str(directory), prepend=os.pathsep)


def only(found: list[Check]) -> Check:
    (check,) = found
    return check


def test_a_board_is_named_with_its_instructions(board: Callable[..., Machine]) -> None:
    machine = board(PI_4)
    check = only(checks.check_board(machine))
    assert check.state == "ok"
    assert check.text.startswith("Raspberry Pi 4 Model B Rev 1.4; ")
    assert check.text.endswith(" asimd")
    assert "Debian GNU/Linux 12" in only(checks.check_system(machine)).text
    assert only(checks.check_memory(machine)).text == "3.2 GiB of 3.7 GiB available"
    heat = only(checks.check_heat(machine))
    assert (heat.state, heat.text) == ("ok", "none seen; 48 °C")


@pytest.mark.parametrize(
    ("flags", "state", "said"),
    [
        ("50005", "warning", "under-voltage, throttled; 48 °C"),
        ("50000", "note", "since boot: under-voltage, throttled; now none; 48 °C"),
        ("0", "ok", "none seen; 48 °C"),
    ],
)
def test_throttling_is_told_as_the_firmware_tells_it(
    board: Callable[..., Machine], flags: str, state: str, said: str
) -> None:
    path = "sys/devices/platform/soc/soc:firmware/get_throttled"
    check = only(checks.check_heat(board(PI_4, {path: flags})))
    assert (check.state, check.text) == (state, said)


@pytest.mark.parametrize(
    ("parts", "state", "said", "fix"),
    [
        ((), "ok", "none besides the CPU", ""),
        ((CORAL,), "warning", "its library libedgetpu is not installed", "apt install libedgetpu1"),
        ((CORAL, LIBEDGETPU), "ok", "Coral Edge TPU on USB 2-1", ""),
        (
            (CORAL, LIBEDGETPU, {"sys/bus/usb/devices/2-1/speed": "480\n"}),
            "warning",
            "at USB 2 speed",
            "USB 3",
        ),
        (
            ({"etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 1\nmore\n"},),
            "ok",
            "Jetson: # R36 (release), REVISION: 4.3, GCID: 1",
            "",
        ),
    ],
)
def test_accelerators_are_seen_where_the_kernel_shows_them(
    board: Callable[..., Machine],
    parts: tuple[dict[str, str], ...],
    state: str,
    said: str,
    fix: str,
) -> None:
    check = only(checks.check_accelerators(board(PI_4, *parts)))
    assert check.state == state
    assert said in check.text
    assert fix in check.fix


@pytest.mark.parametrize(
    ("kib", "state"), [(100_000, "failed"), (300_000, "warning"), (900_000, "ok")]
)
def test_little_memory_is_said(board: Callable[..., Machine], kib: int, state: str) -> None:
    text = f"MemTotal: 1000000 kB\nMemAvailable: {kib} kB\n"
    assert only(checks.check_memory(board({"proc/meminfo": text}))).state == state


def test_a_kernel_that_bounds_no_memory_is_named(board: Callable[..., Machine]) -> None:
    path = "sys/fs/cgroup/cgroup.controllers"
    assert checks.check_limits(board({path: "cpuset cpu io memory pids\n"})) == []
    check = only(checks.check_limits(board({path: "cpuset cpu io pids\n"})))
    assert check.state == "note"
    assert "cgroup_enable=memory" in check.fix


def test_swap_on_a_card_is_told_from_compressed_memory(board: Callable[..., Machine]) -> None:
    head = "Filename\tType\tSize\tUsed\tPriority\n"
    assert only(checks.check_swap(board({"proc/swaps": head}))).text == "none"
    machine = board({"proc/swaps": head + "/dev/zram0 partition 1 0 100\n"})
    assert only(checks.check_swap(machine)).state == "ok"
    check = only(checks.check_swap(board({"proc/swaps": head + "/var/swap file 1 0 -2\n"})))
    assert check.state == "note"
    assert "/var/swap" in check.text


@pytest.mark.usefixtures("no_torch")
@pytest.mark.parametrize(
    ("source", "reason", "fix"),
    [
        (
            "raise ModuleNotFoundError(\"No module named 'onnxruntime'\", name='onnxruntime')",
            "cannot import onnxruntime",
            "-m pip install onnx onnxruntime",
        ),
        ("import os; os.abort()", "its library crashes here (signal 6)", ""),
        ("raise SystemError('wrong glibc')", "its library fails: SystemError: wrong glibc", ""),
    ],
    ids=["missing", "crashing", "failing"],
)
def test_a_library_that_does_not_load_is_named(
    board: Callable[..., Machine],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    reason: str,
    fix: str,
) -> None:
    (tmp_path / "onnxruntime.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    first = next(c for c in checks.check_backends(board()) if c.text.startswith("onnx_cpu:"))
    assert first.state == "failed"
    assert first.text == f"onnx_cpu: {reason}"
    assert first.fix.endswith(fix)


@pytest.mark.parametrize(
    ("reason", "said", "fix"),
    [
        (
            "torch is not installed: pip install torch (Jetson: ...)",
            "torch is not installed",
            "torch",
        ),
        ("neither is installed: pip install 'a[b]', or [c]", "neither is installed", "'a[b]'"),
        ("cannot import ml_dtypes", "cannot import ml_dtypes", "ml-dtypes"),
    ],
)
def test_what_is_to_be_installed_goes_into_this_environment(
    board: Callable[..., Machine], reason: str, said: str, fix: str
) -> None:
    assert checks._backend_fix(reason, board()) == (said, f"{sys.executable} -m pip install {fix}")


def test_a_jetson_is_not_told_to_install_the_common_torch(board: Callable[..., Machine]) -> None:
    jetson = board({"etc/nv_tegra_release": "# R36 (release), REVISION: 4.3\n"})
    _, fix = checks._backend_fix("torch is not installed: pip install torch (Jetson: ...)", jetson)
    assert "NVIDIA's torch" in fix
    assert "pip install" not in fix


def test_every_backend_is_listed(board: Callable[..., Machine]) -> None:
    found = checks.check_backends(board())
    assert [check.text.partition(":")[0] for check in found] == list(BACKENDS)


@pytest.mark.usefixtures("no_torch")
def test_an_available_backend_has_a_version_and_an_unknown_one_is_refused(
    board: Callable[..., Machine],
) -> None:
    found = checks.check_backends(board(backend="quantum"))
    assert any(c.state == "ok" and c.text.startswith("onnx_cpu: available (1.") for c in found)
    assert found[-1].state == "failed"
    assert "quantum: unknown" in found[-1].text


@needs_root
@pytest.mark.usefixtures("no_torch")
def test_a_full_disk_is_called_full(tmp_path: Path) -> None:
    """A file system of 2 MiB, in a mount namespace that ends with the command."""
    script = (
        f"mount -t tmpfs -o size=2m tmpfs {tmp_path} && head -c 2M /dev/zero > {tmp_path}/x; "
        f'exec "$@" doctor --json --coordinator=127.0.0.1:9 --state-dir={tmp_path}/state'
    )
    code, found = report(["unshare", "--mount", "sh", "-c", script, "sh", *COMMAND])
    assert code == 1
    assert found["disk"]["state"] == "failed"
    assert "the disk is full" in found["disk"]["text"]


def test_a_check_that_hangs_or_crashes_is_a_finding(board: Callable[..., Machine]) -> None:
    released = threading.Event()

    def check_hung(machine: Machine) -> list[Check]:
        released.wait()
        return []

    def check_broken(machine: Machine) -> list[Check]:
        raise RuntimeError("surprise")

    machine = board()
    assert only(bounded(check_hung, machine, 0.05)) == Check(
        "hung", "failed", "no answer within 0.05 s"
    )
    assert "RuntimeError('surprise')" in only(bounded(check_broken, machine, 5)).text
    released.set()


@pytest.mark.parametrize(
    ("policy", "drops"), [("accept", False), ("drop", True)], ids=["open", "closed"]
)
def test_a_firewall_is_judged_by_its_policy(policy: str, drops: bool) -> None:
    chain = {"family": "inet", "hook": "input", "policy": policy, "name": "input"}
    rules = json.dumps({"nftables": [{"metainfo": {}}, {"chain": chain}]})
    assert network._nft_drops(rules) is drops
    assert network._iptables_drops(f"-P INPUT {policy.upper()}\n-A INPUT -j x\n") is drops
    assert not network._nft_drops("not json")


# ---- on networks -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'coordinator = "pi:99999"', "agent.toml: coordinator: 'pi:99999'"),
        (b'cluster = "\xff"', "agent.toml is not UTF-8 text"),
    ],
)
def test_settings_that_cannot_be_read_are_one_clear_error(
    content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "etc/shoal/agent.toml"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert main(["doctor", "--root", str(tmp_path)]) == 2
    assert message in "".join(capsys.readouterr().err.split("\n"))


@pytest.fixture
def bed() -> Iterator[Testbed]:
    """One host, ``pi``."""
    with bed_of("pi") as bed:
        yield bed


def report(command: list[str]) -> tuple[int, dict[str, Any]]:
    """Exit code and findings by name of a doctor's --json."""
    completed = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False
    )
    assert "Traceback" not in completed.stderr
    found = json.loads(completed.stdout.splitlines()[-1])["checks"]
    return completed.returncode, {check["name"]: check for check in found}


@needs_root
@pytest.mark.netns
@pytest.mark.usefixtures("no_torch")
def test_a_machine_without_multicast_is_told_to_name_the_coordinator(bed: Testbed) -> None:
    off = ["ip", "link", "set", "eth0", "multicast", "off"]
    subprocess.run(bed.command("pi", off), check=True)
    # As `ip netns exec` does: with the /sys of this host's network.
    own_sys = ["unshare", "--mount", "sh", "-c", 'mount -t sysfs sysfs /sys && exec "$@"', "sh"]
    code, found = report(bed.command("pi", [*own_sys, *COMMAND, "doctor", "--json"]))
    assert code == 0
    assert found["multicast"]["state"] == "warning"
    assert "--coordinator HOST" in found["multicast"]["fix"]


@needs_root
@pytest.mark.netns
@pytest.mark.usefixtures("no_torch")
def test_a_machine_without_a_network_is_told_so(bed: Testbed) -> None:
    subprocess.run(bed.command("pi", ["ip", "address", "flush", "dev", "eth0"]), check=True)
    code, found = report(bed.command("pi", [*COMMAND, "doctor", "--json"]))
    assert code == 1
    assert found["multicast"]["text"] == "no network interface has an address"


# ---- a coordinator -----------------------------------------------------------------------------


@needs_root
@pytest.mark.netns
def test_a_coordinator_is_judged_by_what_a_coordinator_needs(bed: Testbed) -> None:
    subprocess.run(bed.command("pi", ["ip", "address", "flush", "dev", "eth0"]), check=True)
    code, found = report(bed.command("pi", [*COMMAND, "doctor", "--json", "--role=coordinator"]))
    assert code == 0
    assert found["multicast"]["state"] == "warning"
    assert "only agents on this machine can join" in found["multicast"]["text"]
    assert not {"backend", "accelerator", "limits"} & set(found)


def coordinator_report(
    root: Path, capsys: pytest.CaptureFixture[str], *options: str
) -> tuple[int, dict[str, Any], list[str]]:
    code = main(["doctor", f"--root={root}", f"--state-dir={root}", "--json", *options])
    shown = json.loads(capsys.readouterr().out)
    return code, {check["name"]: check for check in shown["checks"]}, shown["roles"]


def test_the_installed_service_says_what_a_machine_is_to_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    units = tmp_path / "etc/systemd/system"
    units.mkdir(parents=True)
    (units / "shoal-coordinator.service").touch()
    (tmp_path / "etc/shoal").mkdir()
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 900000 kB\nMemAvailable: 90000 kB\n")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        settings = tmp_path / "etc/shoal/coordinator.toml"
        settings.write_text(f"port = {port}\nno_mdns = true\n")
        code, found, roles = coordinator_report(tmp_path, capsys)
    assert (code, roles) == (0, ["coordinator"])
    assert found["coordinator"]["text"] == f"listens at 0.0.0.0:{port}"
    assert "no_mdns is set" in found["multicast"]["text"]
    assert found["memory"]["state"] == "warning"  # An agent could hold no stage.
    assert "starlette" in found["libraries"]["text"]
    _, found, _ = coordinator_report(tmp_path, capsys)
    assert found["coordinator"]["state"] == "warning"
    assert "systemctl start shoal-coordinator" in found["coordinator"]["fix"]


def test_what_a_coordinator_lacks_is_said_of_a_coordinator(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["doctor", "--role=coordinator", f"--root={tmp_path}"]
    assert main([*command, "--state-dir=/proc/no-disk"]) == 1
    assert "this machine cannot be a coordinator yet: disk" in capsys.readouterr().err


def test_a_coordinator_that_others_reach_is_told_to_make_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tmp_path / "etc/shoal/coordinator.toml"
    settings.parent.mkdir(parents=True)

    def keys(text: str) -> dict[str, str] | None:
        settings.write_text(text)
        _, found, _ = coordinator_report(tmp_path, capsys, "--role=coordinator")
        return found.get("keys")

    assert keys("") is None
    assert keys('http = "127.0.0.1:7421"') is None
    told = keys('http = "0.0.0.0:7421"')
    assert told is not None
    assert (told["state"], told["fix"]) == ("warning", "sudo shoal key create NAME")
    told = keys('http = "0.0.0.0:7421"\ninsecure_http = true')
    assert told is not None
    assert "asks for no key" in told["text"]
    KeyBook(tmp_path).create("alice")
    told = keys('http = "0.0.0.0:7421"')
    assert told is not None
    assert (told["state"], told["text"]) == ("ok", "1 API key")
