"""Installing below a directory, and the resulting units, without a running systemd."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

from cli import errors
from cli.main import main
from cli.service.install import template, with_settings
from cli.service.settings import parse_toml
from wire.invite import Invite, new_invite
from wire.messages import Endpoint

ROOT = Path(__file__).parents[2]
TOKEN = Invite(bytes(32), bytes(range(32))).text  # Test ids must not differ between processes.
UNITS = "etc/systemd/system"
HIGHEST_EXPOSURE = 3.5

needs_systemd_analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="needs systemd-analyze"
)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Run `shoal KIND install --root` with more options; returns the root."""
    monkeypatch.delenv("SHOAL_TOKEN", raising=False)

    def run(kind: str, *options: str, action: str = "install") -> Path:
        assert main([kind, action, f"--root={tmp_path}", *options]) == 0
        return tmp_path

    return run


def files(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): path.read_text()
        for path in root.rglob("*")
        if path.is_file() or path.is_symlink()
    }


def test_everything_is_written_and_removed_again(
    install: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_TOKEN", TOKEN)
    root = install("agent", "--coordinator=10.0.0.1", "--memory=1.5G", "--name=pi-1")
    settings = parse_toml((root / "etc/shoal/agent.toml").read_text(), root)
    assert settings == {
        "name": "pi-1",
        "coordinator": "10.0.0.1:7420",
        "memory": "1536M",
        "token_file": "/etc/shoal/token",
    }
    limits = (root / UNITS / "shoal-agent.service.d/limits.conf").read_text()
    assert f"MemoryMax={1536 + 384}M" in limits
    wants = root / UNITS / "multi-user.target.wants/shoal-agent.service"
    assert wants.resolve() == root / UNITS / "shoal-agent.service"
    token = root / "etc/shoal/token"
    assert token.read_text() == f"{TOKEN}\n"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert "z /etc/shoal/token 0640 root shoal" in (root / "etc/tmpfiles.d/shoal.conf").read_text()

    install("coordinator")
    install("coordinator", "--yes", action="uninstall")
    assert token.exists()  # The agent's still.
    install("agent", "--yes", action="uninstall")
    assert files(root) == {}


def test_addresses_to_advertise_are_a_setting(install: Callable[..., Path]) -> None:
    root = install("agent", "--advertise=10.0.0.9", "--advertise", "[2001:db8::1]:7430")
    path = root / "etc/shoal/agent.toml"
    wanted = ["10.0.0.9", "[2001:db8::1]:7430"]
    assert parse_toml(path.read_text(), path)["advertise"] == wanted
    install("agent", "--threads=2")
    assert parse_toml(path.read_text(), path)["advertise"] == wanted


def test_installing_again_keeps_what_it_is_not_told(install: Callable[..., Path]) -> None:
    root = install("agent", "--memory=1G", "--cpu-weight=20")
    path = root / "etc/shoal/agent.toml"
    path.write_text(path.read_text() + "# mine\n")
    before = files(root)
    install("agent")
    assert files(root) == before
    install("agent", "--memory=2G", "--threads=3")
    text = path.read_text()
    assert text.endswith("# mine\n")
    assert parse_toml(text, path) == {"memory": "2G", "threads": 3}
    limits = (root / UNITS / "shoal-agent.service.d/limits.conf").read_text()
    assert "MemoryMax=2432M" in limits
    assert "CPUWeight=20" in limits


def test_a_default_that_is_given_replaces_what_the_file_says(install: Callable[..., Path]) -> None:
    root = install("coordinator", "--http=0.0.0.0:7421", "--rebalance=off", "--queue=4")
    path = root / "etc/shoal/coordinator.toml"
    install("coordinator", "--http=127.0.0.1:7421", "--rebalance=auto")
    settings = parse_toml(path.read_text(), path)
    assert settings == {"http": "127.0.0.1:7421", "rebalance": "auto", "queue": 4}


def test_an_option_before_the_action_is_a_setting_as_well(tmp_path: Path) -> None:
    arguments = ["coordinator", "--http=0.0.0.0:7421", "--http-host=a", "install", "--http-host=b"]
    assert main([*arguments, f"--root={tmp_path}"]) == 0
    path = tmp_path / "etc/shoal/coordinator.toml"
    settings = parse_toml(path.read_text(), path)
    assert settings == {"http": "0.0.0.0:7421", "http_host": "b"}


def test_a_service_has_its_state_where_its_unit_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["agent", "--state-dir=/x", "install", f"--root={tmp_path}"]) == errors.EXIT_USAGE
    assert "a service keeps its state in /var/lib/shoal/agent" in capsys.readouterr().err
    assert files(tmp_path) == {}


def test_a_dry_run_shows_all_and_the_token_to_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SHOAL_TOKEN", TOKEN)
    assert main(["agent", "install", "--dry-run", "--command=/opt/shoal/bin/shoal"]) == 0
    shown = capsys.readouterr().out
    assert template("shoal-agent.service") in shown
    assert "$ systemctl --quiet enable shoal-agent.service" in shown
    assert TOKEN not in shown
    assert main(["agent", "install", "--dry-run", f"--root={tmp_path}"]) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("around", ["{}\n", "shoal agent --token-file -\n  {}  \n# for pi-1\n"])
def test_the_token_comes_by_standard_input(
    around: str, install: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what stands around it where it was copied from. It is on no command line."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(around.format(TOKEN)))
    root = install("agent", "--token-file=-")
    assert (root / "etc/shoal/token").read_text() == f"{TOKEN}\n"
    settings = parse_toml((root / "etc/shoal/agent.toml").read_text(), root)
    assert settings == {"token_file": "/etc/shoal/token"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "this is no token"),
        ("x" * 40, "this is no token, or one of an older shoal; make one"),
        (TOKEN[:-4], "the token is cut or mistyped"),
        (f"{TOKEN}\n{new_invite(bytes(32)).text}", "several tokens: give one"),
    ],
)
def test_no_token_on_standard_input_writes_nothing(
    text: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert main(["agent", "install", f"--root={tmp_path}", "--token-file=-"]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_terminal_is_asked_for_the_token_and_does_not_show_it(tmp_path: Path) -> None:
    leader, follower = os.openpty()
    command = [sys.executable, "-m", "cli", "agent", "install", f"--root={tmp_path}"]
    # In a session of its own, this terminal is the process's.
    program = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    program += "os.execv(sys.argv[1], sys.argv[1:])"
    with subprocess.Popen(
        [sys.executable, "-c", program, *command, "--token-file=-"],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        cwd=ROOT,
        start_new_session=True,
    ) as process:
        os.close(follower)
        shown = b""
        while b"it is not shown" not in shown:
            shown += os.read(leader, 4096)
        os.write(leader, f"{TOKEN}\n".encode())
        with contextlib.suppress(OSError):  # Its end.
            while more := os.read(leader, 4096):
                shown += more
        assert process.wait(30) == 0
    os.close(leader)
    assert TOKEN.encode() not in shown
    assert (tmp_path / "etc/shoal/token").read_text() == f"{TOKEN}\n"


def test_a_coordinator_has_no_token_of_its_own(
    install: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """One that an older version wrote is not used any more."""
    root = install("coordinator")
    assert not (root / "etc/shoal/token").exists()
    path = root / "etc/shoal/coordinator.toml"
    path.write_text('token_file = "/etc/shoal/token"\nqueue = 7\n')
    install("coordinator")
    assert parse_toml(path.read_text(), path) == {"queue": 7}
    assert main(["coordinator", "install", f"--root={root}", "--token-file=/etc/hostname"]) == 2
    assert "needs no token" in capsys.readouterr().err


def test_data_is_not_removed_unasked(
    install: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = install("agent", "--memory=1G")
    (root / "var/lib/shoal/agent").mkdir(parents=True)
    with Path(os.devnull).open() as nobody:
        monkeypatch.setattr(sys, "stdin", nobody)
        assert main(["agent", "uninstall", f"--root={root}"]) == 2
    assert "--keep-data" in capsys.readouterr().err
    install("agent", "--keep-data", action="uninstall")
    assert (root / "var/lib/shoal/agent").exists()
    assert 'memory = "1G"' in (root / "etc/shoal/agent.toml").read_text()
    assert not (root / UNITS / "shoal-agent.service").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--memory=lots"], "expected a size"),
        (["--token-file=/nowhere"], "no such file"),
        (["--token-file=/etc/hostname"], "run `chmod o= /etc/hostname`"),
        (["--cpu-weight=0"], "must be between 1 and 10000"),
    ],
)
def test_a_wrong_option_writes_nothing(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["agent", "install", f"--root={tmp_path}", *options])
    except SystemExit as ended:
        code = int(ended.code or 0)
    assert code == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_accelerators_get_their_device_nodes(install: Callable[..., Path], tmp_path: Path) -> None:
    device = tmp_path / "sys/bus/usb/devices/1-1"
    device.mkdir(parents=True)
    (device / "idVendor").write_text("1a6e\n")
    (device / "idProduct").write_text("089a\n")
    drop_ins = install("agent") / UNITS / "shoal-agent.service.d"
    assert sorted(path.name for path in drop_ins.iterdir()) == ["coral.conf"]
    assert "DeviceAllow=char-usb_device rw" in (drop_ins / "coral.conf").read_text()
    shutil.rmtree(tmp_path / "sys")
    driver = tmp_path / "proc/driver/nvidia/version"
    driver.parent.mkdir(parents=True)
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  575.51\n")
    install("agent")
    assert sorted(path.name for path in drop_ins.iterdir()) == ["nvidia.conf"]
    assert "DeviceAllow=char-nvidia* rw" in (drop_ins / "nvidia.conf").read_text()
    # A Jetson's GPU is another kind of device.
    (tmp_path / "etc/nv_tegra_release").write_text("# R36 (release), REVISION: 4.3\n")
    install("agent")
    assert sorted(path.name for path in drop_ins.iterdir()) == ["jetson.conf"]


def test_settings_are_put_where_the_template_has_them() -> None:
    text = '# Name.\n#name = "pi-1"\n\nport = 1\n'
    changed = with_settings(text, {"name": 'a "b"', "port": 2, "coordinator": Endpoint("::1", 3)})
    assert changed == '# Name.\nname = "a \\"b\\""\n\nport = 2\ncoordinator = "[::1]:3"\n'
    assert with_settings("", {"http_host": ["a.lan", "b"]}) == 'http_host = "a.lan,b"\n'


# ---- the units ---------------------------------------------------------------------------------


@pytest.fixture(
    params=["agent", "coordinator", "agent with a Coral", "agent on a Jetson", "agent with a GPU"]
)
def unit(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A unit with its drop-ins, starting a command that exists."""
    kind, _, hardware = request.param.partition(" ")
    assert main([kind, "install", f"--root={tmp_path}", "--command=/bin/true"]) == 0
    path = tmp_path / UNITS / f"shoal-{kind}.service"
    name = {
        "with a Coral": "coral.conf",
        "on a Jetson": "jetson.conf",
        "with a GPU": "nvidia.conf",
    }.get(hardware)
    if name is not None:
        # `systemd-analyze security --offline` reads the unit alone.
        path.write_text(path.read_text() + template(name))
    return path


@needs_systemd_analyze
def test_a_unit_is_one_that_systemd_understands(unit: Path) -> None:
    completed = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False
    )
    # Of keys that it does not know it only warns. The words about char- groups are of this kernel.
    complaints = [line for line in completed.stderr.splitlines() if unit.name in line]
    assert (completed.returncode, complaints) == (0, [])


@needs_systemd_analyze
def test_a_unit_exposes_little(unit: Path) -> None:
    shown = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--no-pager", str(unit)],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    found = re.search(r"Overall exposure level.*: ([0-9.]+)", shown)
    assert found is not None, shown
    assert float(found[1]) <= HIGHEST_EXPOSURE


@pytest.mark.parametrize("kind", ["agent", "coordinator"])
def test_a_unit_does_not_restart_what_cannot_work(kind: str) -> None:
    line = f"RestartPreventExitStatus={errors.EXIT_USAGE} {errors.EXIT_UNAVAILABLE}\n"
    assert line in template(f"shoal-{kind}.service")


@pytest.mark.parametrize("kind", ["agent", "coordinator"])
def test_a_settings_template_holds_what_the_command_knows(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = re.sub(r"^#(\w+ = )", r"\1", template(f"{kind}.toml"), flags=re.MULTILINE)
    path = tmp_path / "settings.toml"
    path.write_text(text + "surely_unknown = 1\n")
    assert main([kind, f"--config={path}"]) == 2
    # It came past everything of the template.
    said = capsys.readouterr().err
    assert "unknown setting 'surely_unknown'" in said
    known = set(said.partition("known are ")[2].strip().split(", "))
    # The unit says where the state is.
    assert set(parse_toml(text, path)) == known - {"state_dir"}


# ---- the wheel ---------------------------------------------------------------------------------


def test_a_wheel_holds_every_file_of_the_tree(tmp_path: Path) -> None:
    """Built as `pip wheel` does it, without a network."""
    source = tmp_path / "source"
    packages = (
        "model",
        "wire",
        "backends",
        "calibration",
        "agent",
        "planning",
        "paper",
        "coordinator",
        "api",
        "testbed",
        "evaluation",
        "compression",
        "studies",
        "cli",
    )
    for name in (*packages, "systemd"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    program = "from setuptools.build_meta import build_wheel; print(build_wheel('.'))"
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], cwd=source, check=True, capture_output=True
    )
    (wheel,) = source.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if "dist-info" not in name}
    expected = {
        str(path.relative_to(source)).replace("systemd/", "cli/units/")
        for name in (*packages, "systemd")
        for path in (source / name).rglob("*")
        if path.is_file() and path.name != "README.md"
    }
    assert inside == expected


def test_locks_cover_what_the_package_asks_for() -> None:
    try:
        requires = distribution("shoal-llm").requires or []
    except PackageNotFoundError:
        pytest.skip("run uninstalled")
    for lock, extras in (("agent", {"agent"}), ("run", {"agent", "coordinator"})):
        text = (ROOT / "requirements" / f"{lock}.lock").read_text()
        locked = set(re.findall(r"^([a-z0-9-]+)==", text, re.MULTILINE))
        for line in requires:
            name = re.split(r"[^A-Za-z0-9_.-]", line)[0].lower().replace("_", "-")
            extra = re.search(r"extra == ['\"](\w+)", line)
            if extra is None or extra[1] in extras:
                assert name in locked, f"{name} is missing in {lock}.lock: make lock"


def test_the_board_script_is_one_that_a_shell_understands() -> None:
    subprocess.run(["sh", "-n", str(ROOT / "install.sh")], check=True)
    completed = subprocess.run(
        ["sh", str(ROOT / "install.sh"), "--help"], capture_output=True, text=True, check=True
    )
    assert "--token-file -" in completed.stdout
    wrong = subprocess.run(["sh", str(ROOT / "install.sh")], capture_output=True, check=False)
    assert wrong.returncode == 2


def test_json_of_the_doctor_is_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--json", "--coordinator=127.0.0.1:9"])
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is (code == 0)
    assert {"board", "backend", "disk", "multicast"} <= {c["name"] for c in report["checks"]}
