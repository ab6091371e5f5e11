"""``make train-town`` makes the town model again, and goes on after a kill as if there was none."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the extra torch")

ROOT = Path(__file__).parents[2]
TOWN = ROOT / "examples" / "town"
STEPS = 12


def command(work: Path, *more: str) -> list[str]:
    """A run through all stages in seconds. It keeps a checkpoint every 3 steps."""
    options = (f"--work={work}", f"--model-dir={work}/model", f"--steps={STEPS}", "--every=3")
    return [sys.executable, str(TOWN / "train.py"), *options, *more]


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, check=False)


def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    completed = run(command(whole))
    assert completed.returncode == 0, completed.stderr
    process = subprocess.Popen(
        command(killed), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    reports = [process.stdout.readline() for _ in range(2)]
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert [text.split(", ")[1] for text in reports] == ["step 3", "step 6"]
    assert not (killed / "model").exists()
    completed = run(command(killed))
    assert completed.returncode == 0, completed.stderr
    assert "step 9" in completed.stdout
    assert "step 6" not in completed.stdout
    states = [torch.load(one / "checkpoint.pt", weights_only=True) for one in (whole, killed)]
    assert states[0]["step"] == states[1]["step"] == STEPS
    for part in ("model", "aux"):
        for name, value in states[0][part].items():
            assert torch.equal(value, states[1][part][name]), name
    for path in (whole / "model").iterdir():
        assert path.read_bytes() == (killed / "model" / path.name).read_bytes(), path.name


def test_a_checkpoint_of_another_run_is_not_gone_on_with(tmp_path: Path) -> None:
    assert run(command(tmp_path, "--stop-after=0")).returncode == 0
    completed = run(command(tmp_path, "--steps=13"))
    assert completed.returncode == 1
    assert "of a run of 12 steps, not 13" in completed.stderr
    (tmp_path / "checkpoint.pt").write_bytes(b"damaged")
    completed = run(command(tmp_path))
    assert completed.returncode == 1
    assert "cannot be read" in completed.stderr
    assert "Traceback" not in completed.stderr


def test_one_command_makes_all_files(tmp_path: Path) -> None:
    """The committed ones have equivalents; the weights differ, because the run is short."""
    python = f"BIN={Path(sys.executable).parent}"
    options = (f"TOWN={tmp_path}", f"ARGS=--steps={STEPS}", "MEASURE=--bits 16")
    completed = run(["make", "--old-file=.venv/run.stamp", "train-town", python, *options])
    assert completed.returncode == 0, completed.stderr
    assert "| bits | read | call | home | sum | all |" in completed.stdout
    assert (tmp_path / "dev.jsonl").read_bytes() == (TOWN / "dev.jsonl").read_bytes()
    committed = {path.name: path for path in (TOWN / "model").iterdir()}
    del committed["README.md"]  # It is written by hand.
    assert {path.name for path in (tmp_path / "model").iterdir()} == set(committed)
    weights = committed.pop("model.safetensors")
    assert (tmp_path / "model" / weights.name).stat().st_size == weights.stat().st_size
    for name, path in committed.items():
        assert (tmp_path / "model" / name).read_bytes() == path.read_bytes(), name
