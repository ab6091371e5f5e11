"""``make train-town`` makes the town model again, and goes on after a kill as if there was none."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the extra torch")
pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parents[2]
TOWN = ROOT / "examples" / "town"
STEPS = 4
OPTIONS = (f"--steps={STEPS}", "--every=1")
"""A run of seconds that keeps a checkpoint after every step."""


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    texts = [str(argument) for argument in arguments]
    return subprocess.run(texts, capture_output=True, text=True, cwd=ROOT, check=False)


def training(work: Path, *more: str) -> list[object]:
    model = f"--model-dir={work}/model"
    return [sys.executable, TOWN / "train.py", f"--work={work}", model, *OPTIONS, *more]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one command makes."""
    work = tmp_path_factory.mktemp("whole")
    python = f"BIN={Path(sys.executable).parent}"
    options = (f"TOWN={work}", f"ARGS={' '.join(OPTIONS)}", "MEASURE=--bits 16")
    completed = run("make", "--old-file=.venv/run.stamp", "train-town", python, *options)
    assert completed.returncode == 0, completed.stderr
    assert "| bits | read | call | home | sum | all |" in completed.stdout
    return work


def test_one_command_makes_all_files(whole: Path) -> None:
    """The committed ones have equivalents; the weights differ, because the run is short."""
    assert (whole / "dev.jsonl").read_bytes() == (TOWN / "dev.jsonl").read_bytes()
    committed = {path.name: path for path in (TOWN / "model").iterdir()}
    del committed["README.md"]  # It is written by hand.
    assert {path.name for path in (whole / "model").iterdir()} == set(committed)
    weights = committed.pop("model.safetensors")
    assert (whole / "model" / weights.name).stat().st_size == weights.stat().st_size
    for name, path in committed.items():
        assert (whole / "model" / name).read_bytes() == path.read_bytes(), name


def test_a_killed_run_ends_with_the_same_bits(whole: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [str(one) for one in training(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    reports = [process.stdout.readline() for _ in range(2)]
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert [text.split(", ")[1] for text in reports] == ["step 1", "step 2"]
    assert not (tmp_path / "model").exists()
    completed = run(*training(tmp_path))
    assert completed.returncode == 0, completed.stderr
    assert "step 4" in completed.stdout
    assert "step 2" not in completed.stdout
    states = [torch.load(one / "checkpoint.pt", weights_only=True) for one in (whole, tmp_path)]
    assert states[0]["step"] == states[1]["step"] == STEPS
    for part in ("model", "aux"):
        for name, value in states[0][part].items():
            assert torch.equal(value, states[1][part][name]), name
    for path in (whole / "model").iterdir():
        assert path.read_bytes() == (tmp_path / "model" / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(False, f"of a run of {STEPS} steps, not {STEPS + 1}"), (True, "cannot be read")],
)
def test_a_checkpoint_of_another_run_is_not_gone_on_with(
    whole: Path, tmp_path: Path, damage: bool, reason: str
) -> None:
    shutil.copy(whole / "checkpoint.pt", tmp_path)
    if damage:
        (tmp_path / "checkpoint.pt").write_bytes(b"damaged")
    completed = run(*training(tmp_path, f"--steps={STEPS + 1}"))
    assert completed.returncode == 1
    assert reason in completed.stderr
    assert "Traceback" not in completed.stderr
