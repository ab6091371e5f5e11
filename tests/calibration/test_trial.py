"""Trials in a child process: what they find, what they remember, and how they end."""

from __future__ import annotations

import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backends.base import BackendError
from calibration import trial
from calibration.store import CalibrationStore
from calibration.trial import Trials, kinds_of_blocks
from model.checkpoint import Checkpoint
from model.quantize import Format
from tests.system.cluster import FIXTURES

SPEC = Checkpoint.open(FIXTURES / "llama").spec


def trials(directory: Path, **changes: Any) -> Trials:
    made = Trials(
        backend="onnx_cpu",
        version="1",
        containers={4: 4, 8: 8, 6: 8},
        threads=1,
        exact=False,
        fast_prompts=False,
        directory=directory,
        store=CalibrationStore(directory / "trials.json"),
    )
    return replace(made, **changes)


def nothing() -> None:
    """Nobody cancels."""


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The children that are started."""
    started: list[Any] = []
    start = subprocess.Popen

    def noted(*arguments: Any, **options: Any) -> Any:
        started.append(start(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", noted)
    return started


def test_what_passed_is_not_tried_again(tmp_path: Path, children: list[Any]) -> None:
    one = trials(tmp_path)
    one.require_widths(SPEC, [8, 2], nothing)
    assert len(children) == 1
    one.require_widths(SPEC, [8], nothing)
    # Six bits run as eight, and a layer of the same shape is the same.
    one.require(SPEC, [(2, Format.of(6)), (SPEC.head_block, Format.of(8))], nothing)
    assert len(children) == 1
    one.require_widths(SPEC, [4], nothing)
    replace(one, version="2").require_widths(SPEC, [8], nothing)
    assert len(children) == 3
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_shares_are_tried_like_models_of_their_own(tmp_path: Path, children: list[Any]) -> None:
    one, layer = trials(tmp_path), replace(SPEC.layers[0], kv_heads=4, head_dim=64, ffn=512)
    spec = replace(SPEC, layers=(layer, layer))
    one.require_widths(spec, [4, 8], nothing)
    assert len(children) == 1
    one.require_shares(spec, [4, 8, 2], nothing)
    # A half and a quarter; the whole has passed.
    assert len(children) == 3
    one.require_shares(spec, [4, 8], nothing)
    one.require_shares(SPEC, [4, 8], nothing)  # It is too narrow for a team.
    assert len(children) == 3


def test_a_death_is_named_and_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, children: list[Any]
) -> None:
    dying = """
import os, signal, sys
sys.stdin.read()
print("begun 0\\npassed 0\\nbegun 1", flush=True)
os.kill(os.getpid(), signal.SIGILL)
"""
    monkeypatch.setattr(trial, "_CHILD", dying)
    wanted = [(0, Format.of(8)), (1, Format.of(8))]
    with pytest.raises(BackendError, match=r"^layer 0 at 8 bits: onnx_cpu died by SIGILL"):
        trials(tmp_path).require(SPEC, wanted, nothing)
    # Together first, then one by one.
    assert len(children) == 2
    trials(tmp_path).require(SPEC, wanted[:1], nothing)
    assert len(children) == 2
    with pytest.raises(BackendError):
        trials(tmp_path).require(SPEC, wanted, nothing)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (-signal.SIGKILL, "died by SIGKILL (maybe for lack of memory)"),
        (-signal.SIGSEGV, "died by SIGSEGV (segmentation fault)"),
        (-200, "died by signal 200"),
        (3, "ended with exit code 3"),
    ],
)
def test_ends_in_words(code: int, said: str) -> None:
    assert trial._cause(code) == said


def test_errors_are_left_to_the_load(tmp_path: Path, children: list[Any]) -> None:
    # No kernel takes heads of an odd width.
    layer = replace(SPEC.layers[0], head_dim=15, rope=None)
    trials(tmp_path).require_widths(replace(SPEC, layers=(layer,)), [8], nothing)
    assert len(children) == 1


def test_who_goes_away_ends_the_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, children: list[Any]
) -> None:
    class Cancelled(Exception):
        """The user went away."""

    def cancel() -> None:
        raise Cancelled

    monkeypatch.setattr(trial, "_CHILD", "import signal; signal.pause()")
    with pytest.raises(Cancelled):
        trials(tmp_path).require_widths(SPEC, [8], cancel)
    assert children[0].returncode == -signal.SIGKILL


def test_a_child_that_is_ended_leaves_no_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = """
import json, os, signal, sys
os.mkdir(json.load(sys.stdin)["directory"] + "/.trial-of-child")
signal.pause()
"""

    def cancel() -> None:
        if any(tmp_path.rglob(".trial-of-child")):
            raise KeyboardInterrupt

    monkeypatch.setattr(trial, "_CHILD", busy)
    with pytest.raises(KeyboardInterrupt):
        trials(tmp_path).require_widths(SPEC, [8], cancel)
    assert [*tmp_path.iterdir()] == []


def test_each_kind_of_block_once() -> None:
    other = replace(SPEC.layers[0], ffn=SPEC.layers[0].ffn + 8)
    spec = replace(SPEC, layers=(SPEC.layers[0], other, SPEC.layers[0], other))
    assert kinds_of_blocks(spec) == [0, 1, 2, 5]


def test_a_large_vocabulary_is_cut_to_the_same_remainder() -> None:
    small, block = trial._small(replace(SPEC, vocab=128_259), SPEC.head_block)
    assert small.vocab < trial.MAX_VOCAB
    assert small.vocab % 64 == 128_259 % 64
    assert small.block_kind(block) == "head"


def test_modules_are_found_from_any_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "json.py").write_text("raise SystemExit(7)")
    one = trials(tmp_path / "state")
    one.require_widths(SPEC, [8], nothing)
    assert (tmp_path / "state" / "trials.json").exists()


def test_blocks_that_need_files_are_not_tried(tmp_path: Path, children: list[Any]) -> None:
    # Neither the device nor the compiler is here: a load would fail.
    chip = trials(tmp_path, backend="edgetpu", containers={8: 8})
    chip.require_widths(SPEC, [8], nothing)
    chip.require_widths(SPEC, [8], nothing)
    assert len(children) == 1
