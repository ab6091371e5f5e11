"""install.sh on a machine that has shoal already: upgrade, rollback, and what is cut short.

The script is the real one, in a mount namespace of its own; Python, pip, systemctl and the shoal
command are stand-ins that write down what they are asked.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PYTHON = """#!/bin/sh
# Stands for the system's Python and for that of an environment, which knows a version.
here=$(dirname "$(dirname "$0")")
case "$*" in
*'-m venv'*)
    for last in "$@"; do :; done
    rm -rf "$last"
    mkdir -p "$last/bin"
    touch "$last/pyvenv.cfg"
    cp "$0" "$last/bin/python"
    ;;
*'--no-deps --force-reinstall'*)
    for last in "$@"; do :; done
    [ ! -e "$FAKES/pip-fails" ] || { echo half > "$here/broken"; exit 1; }
    version=$(basename "$last" | cut -d- -f2)
    echo "$version" > "$here/version"
    printf '#!/bin/sh\\necho "%s $*" >> "$FAKES/said"\\n' "$version" > "$here/bin/shoal"
    echo 'case "$*" in *--token-file*-*) cat > "$FAKES/token" ;; esac' >> "$here/bin/shoal"
    chmod +x "$here/bin/shoal"
    ;;
*'m.version('*) cat "$here/version" ;;
esac
"""

SYSTEMCTL = """#!/bin/sh
for last in "$@"; do :; done
case "$*" in
*is-enabled*) [ -e "$FAKES/enabled/$last" ] ;;
is-active*) if [ -e "$FAKES/active/$last" ]; then echo active; else echo inactive; exit 3; fi ;;
*) echo "systemctl $*" >> "$FAKES/said" ;;
esac
"""

INSIDE = """
mount --bind "$FAKES/units" /etc/systemd/system && mount --bind "$FAKES/bin" /usr/local/bin &&
exec sh "$@"
"""


class Machine:
    """A folder that stands for a machine's; ``said`` is what the stand-ins were asked."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.prefix = directory / "opt" / "shoal"
        for name in ("units", "bin", "enabled", "active", "opt"):
            (directory / name).mkdir()
        for name, text in (("python", PYTHON), ("systemctl", SYSTEMCTL)):
            (directory / "bin" / name).write_text(text)
            (directory / "bin" / name).chmod(0o755)

    def release(self, version: str) -> Path:
        """What `make dist` makes, as far as the script looks."""
        folder = self.directory / f"dist-{version}"
        folder.mkdir(exist_ok=True)
        shutil.copy(ROOT / "install.sh", folder)
        for name in (f"shoal_llm-{version}-py3-none-any.whl", "agent.lock", "run.lock"):
            (folder / name).touch()
        return folder / "install.sh"

    def run(
        self, version: str, *arguments: str, typed: str = "", umask: int = 0o022
    ) -> subprocess.CompletedProcess[str]:
        namespace = ["unshare", "--user", "--map-root-user", "--mount"]
        script = self.release(version)
        return subprocess.run(
            [*namespace, "sh", "-c", INSIDE, "sh", str(script), *arguments],
            env={
                "PATH": f"{self.directory / 'bin'}:{os.environ['PATH']}",
                "FAKES": str(self.directory),
                "SHOAL_PREFIX": str(self.prefix),
                "PYTHON": str(self.directory / "bin" / "python"),
            },
            capture_output=True,
            text=True,
            check=False,
            input=typed,
            umask=umask,
        )

    def install(self, version: str, *arguments: str, typed: str = "") -> str:
        completed = self.run(version, *arguments, typed=typed)
        assert completed.returncode == 0, completed.stderr
        return completed.stdout

    def has_service(self, kind: str, *states: str) -> None:
        for state in ("units", *states):
            (self.directory / state / f"shoal-{kind}.service").touch()

    @property
    def said(self) -> list[str]:
        path = self.directory / "said"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [line for line in lines if "--help" not in line and "doctor" not in line]

    @property
    def versions(self) -> tuple[str, str]:
        """In place, and kept."""
        paths = self.prefix / "version", Path(f"{self.prefix}.previous") / "version"
        here, kept = (path.read_text().strip() if path.exists() else "" for path in paths)
        return here, kept


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    probe = ["unshare", "--user", "--map-root-user", "--mount", "true"]
    if shutil.which("unshare") is None or subprocess.run(probe, check=False).returncode:
        pytest.skip("needs mount namespaces")
    return Machine(tmp_path)


@pytest.mark.parametrize("option", [["--token-file", "-"], ["--token-file=-"]])
def test_a_token_from_standard_input_reaches_the_command_by_a_pipe(
    option: list[str], machine: Machine
) -> None:
    """And not by its arguments, which all users of a machine see."""
    machine.install("0.1.0", "agent", *option, "--memory=1G", typed="shoal1.a.b\n")
    assert machine.said == [f"0.1.0 agent install {' '.join(option)} --memory=1G"]
    assert (machine.directory / "token").read_text() == "shoal1.a.b\n"
    refused = machine.run("0.1.0", "agent", *option)
    assert (refused.returncode, refused.stderr) == (1, "install.sh: no token was given\n")


@pytest.mark.parametrize("umask", [0o077, 0o000])
def test_the_service_reads_the_environment_and_only_root_writes_it(
    umask: int, machine: Machine
) -> None:
    """Whatever permissions the administrator's new files have."""
    completed = machine.run("0.1.0", "agent", umask=umask)
    assert completed.returncode == 0, completed.stderr
    modes = {path.name: path.stat().st_mode & 0o777 for path in machine.prefix.rglob("*")}
    modes["."] = machine.prefix.stat().st_mode & 0o777
    assert modes == {".": 0o755, "bin": 0o755, "python": 0o755, "shoal": 0o755, "version": 0o644,
                     "pyvenv.cfg": 0o644}  # fmt: skip


def both(machine: Machine) -> None:
    for kind in ("coordinator", "agent"):
        machine.has_service(kind, "enabled", "active")


def test_an_upgrade_restarts_both_services_and_can_be_taken_back(machine: Machine) -> None:
    assert "shoal 0.1.0 is installed in" in machine.install("0.1.0", "coordinator")
    assert machine.versions == ("0.1.0", "")
    both(machine)
    machine.said  # noqa: B018 - forget what the first installation said
    told = machine.install("0.2.0", "agent", "--memory", "1G")
    assert machine.said == [
        "0.2.0 agent install --memory 1G",
        "0.2.0 coordinator install --no-start",
        "systemctl restart shoal-coordinator.service",
    ]
    assert "shoal 0.1.0 -> 0.2.0 in" in told
    assert "restarted: shoal-agent, shoal-coordinator" in told
    assert f"shoal 0.1.0 is kept in {machine.prefix}.previous" in told
    assert machine.versions == ("0.2.0", "0.1.0")

    told = machine.install("0.2.0", "rollback")
    assert machine.said == [
        "0.1.0 coordinator install --no-start",
        "systemctl restart shoal-coordinator.service",
        "0.1.0 agent install --no-start",
        "systemctl restart shoal-agent.service",
    ]
    assert "shoal 0.2.0 -> 0.1.0 in" in told
    assert "restarted: shoal-coordinator, shoal-agent" in told
    assert machine.versions == ("0.1.0", "0.2.0")
    machine.install("0.2.0", "rollback")
    assert machine.versions == ("0.2.0", "0.1.0")


def test_the_same_version_again_does_not_cover_the_one_before(machine: Machine) -> None:
    for version in ("0.1.0", "0.2.0", "0.2.0"):
        machine.install(version, "agent")
    assert machine.versions == ("0.2.0", "0.1.0")


def test_a_service_that_is_stopped_stays_so(machine: Machine) -> None:
    machine.install("0.1.0", "agent")
    machine.has_service("coordinator")
    machine.said  # noqa: B018
    told = machine.install("0.2.0", "agent", "--no-start")
    assert machine.said == ["0.2.0 agent install --no-start"]
    assert "restarted: nothing" in told


def test_an_upgrade_that_fails_leaves_what_was_there(machine: Machine) -> None:
    machine.install("0.1.0", "agent")
    both(machine)
    machine.said  # noqa: B018
    (machine.directory / "pip-fails").touch()
    failed = machine.run("0.2.0", "agent")
    assert failed.returncode == 1
    assert "the upgrade failed: shoal 0.1.0 is in place again" in failed.stderr
    assert machine.versions == ("0.1.0", "")
    assert not (machine.prefix / "broken").exists()
    assert machine.said == []


def test_an_upgrade_that_a_power_cut_ended_is_mended_by_the_next_run(machine: Machine) -> None:
    machine.install("0.1.0", "agent")
    shutil.copytree(machine.prefix, f"{machine.prefix}.kept")
    (machine.prefix / "version").unlink()
    told = machine.install("0.2.0", "agent")
    assert "an upgrade was cut short: shoal 0.1.0 is in place again" in told
    assert machine.versions == ("0.2.0", "0.1.0")
    # And a rollback, between its steps.
    machine.prefix.rename(f"{machine.prefix}.swap")
    machine.install("0.2.0", "rollback")
    assert machine.versions == ("0.1.0", "0.2.0")


def test_there_is_nothing_to_go_back_to(machine: Machine) -> None:
    machine.install("0.1.0", "agent")
    failed = machine.run("0.1.0", "rollback")
    assert failed.returncode == 1
    assert "there is nothing to go back to" in failed.stderr
    assert machine.versions == ("0.1.0", "")


def test_nothing_is_left_behind(machine: Machine) -> None:
    for version in ("0.1.0", "0.2.0"):
        machine.install(version, "agent")
    machine.install("0.2.0", "uninstall")
    assert list((machine.directory / "opt").iterdir()) == []


def test_a_removal_without_the_shoal_command_says_what_to_do(machine: Machine) -> None:
    machine.install("0.1.0", "agent")
    machine.has_service("agent")
    (machine.prefix / "bin" / "shoal").unlink()
    failed = machine.run("0.1.0", "uninstall")
    assert failed.returncode == 1
    assert "install it again with `sudo sh install.sh agent`, then remove it" in failed.stderr
