"""``shoal calibrate`` on a machine whose agent is a service: its figures are the agent's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from calibration.store import CalibrationStore
from cli.commands.calibrate_agent import target_of
from cli.errors import UsageError
from model.checkpoint import Checkpoint

ROOT = Path(__file__).parents[2]
SPEC = Checkpoint.open(ROOT / "tests" / "fixtures" / "llama").spec
SERVICE_USER = 23456


def service(root: Path, settings: str = "") -> Path:
    """State and settings of an agent service below ``root``."""
    state, config = root / "var/lib/shoal/agent", root / "etc/shoal"
    state.mkdir(parents=True)
    config.mkdir(parents=True)
    (config / "agent.toml").write_text(settings)
    return state


def test_the_services_figures_are_measured_with_its_settings(tmp_path: Path) -> None:
    state = service(tmp_path, 'threads = 3\nbackend = "torch_cpu"\nexact = true\nmemory = "3G"\n')
    found = target_of(None, tmp_path)
    assert (found.state_dir, found.threads, found.backend, found.exact) == (
        state,
        3,
        "torch_cpu",
        True,
    )
    assert found.unreachable is None


def test_a_state_directory_that_is_named_counts(tmp_path: Path) -> None:
    service(tmp_path, "threads = 3\n")
    found = target_of(tmp_path / "mine", tmp_path)
    assert found.state_dir == tmp_path / "mine"
    assert found.threads == len(os.sched_getaffinity(0))


def test_without_a_service_it_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    found = target_of(None, tmp_path)
    assert found.state_dir == tmp_path / "home/shoal/agent"
    assert (found.backend, found.exact, found.unreachable) == ("onnx_cpu", False, None)


def test_wrong_settings_are_named(tmp_path: Path) -> None:
    service(tmp_path, "threads = 0\n")
    with pytest.raises(UsageError, match=r"agent\.toml: threads"):
        target_of(None, tmp_path)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts over /var/lib and /etc")


def calibrate(machine: Path, user: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command where /var/lib/shoal and /etc/shoal are those below ``machine``."""
    script = (
        "set -e; mkdir -p /var/lib/shoal /etc/shoal; "
        f"mount --bind {machine}/var/lib/shoal /var/lib/shoal; "
        f"mount --bind {machine}/etc/shoal /etc/shoal; "
        f"exec setpriv --reuid={user} --regid={user} --clear-groups "
        f"{sys.executable} -m cli calibrate --json --backend onnx_cpu {' '.join(arguments)}"
    )
    environment = {**os.environ, "XDG_STATE_HOME": str(machine / "home")}
    environment.pop("STATE_DIRECTORY", None)
    return subprocess.run(
        ["unshare", "--mount", "sh", "-c", script],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=120,
        check=False,
    )


@needs_root
@pytest.mark.netns
def test_the_administrator_reaches_what_the_service_uses(tmp_path: Path) -> None:
    state = service(tmp_path, "threads = 1\n")
    store = CalibrationStore(state / "calibration.json")
    store.note_model(SPEC.to_dict(), (4,))
    for path in (state, *state.iterdir()):
        os.chown(path, SERVICE_USER, SERVICE_USER)
    completed = calibrate(tmp_path, 0, "--again")
    assert completed.returncode == 0, completed.stderr
    answer = json.loads(completed.stdout.splitlines()[-1])
    assert answer["agent"]["models"] == 1
    assert answer["agent"]["state_dir"] == "/var/lib/shoal/agent"
    assert answer["device"]["threads"] == 1
    assert "measured anew for the agent" in completed.stderr
    # The service can read and replace all of it.
    for path in state.rglob("*"):
        assert path.stat().st_uid == SERVICE_USER, path
    entries = [json.loads(key) for key in json.loads(store.path.read_text())["conditions"]]
    assert {entry["kind"] for entry in entries} == {"device", "embedding", "layer", "head"}
