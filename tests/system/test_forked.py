"""Forked processes are to tests as those with an interpreter of their own."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.system import forked
from tests.system.cluster import COMMAND, ROOT


@pytest.mark.parametrize(
    "arguments", [["--version"], ["plan", "no-such-model"], ["plan", "--bits=7"]], ids=" ".join
)
def test_streams_and_exit_codes_are_the_same(arguments: list[str]) -> None:
    plain = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, cwd=ROOT)
    run = forked.run(arguments, 60)
    assert (run.returncode, run.stdout, run.stderr) == (
        plain.returncode,
        plain.stdout,
        plain.stderr,
    )


def test_the_environment_is_that_of_the_test(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "own"))
    assert str(tmp_path / "own") in forked.run(["pull", "org/name"], 60).stderr


def test_nothing_that_runs_is_forked() -> None:
    """A lock that another thread held would stay locked in every process."""
    forked.run(["--version"], 60)
    children = [one for one in psutil.Process().children() if one.status() != "zombie"]
    (server,) = (one for one in children if "forkserver" in " ".join(one.cmdline()))
    assert server.num_threads() == 1


def test_signals_end_it_as_they_end_others(tmp_path: Path) -> None:
    options = ("--insecure", "--no-mdns", "--bind=127.0.0.1", "--port=0", "--http=127.0.0.1:0")
    for number, code in ((signal.SIGTERM, 0), (signal.SIGINT, 130), (signal.SIGKILL, -9)):
        arguments = ["coordinator", "--json", *options, f"--state-dir={tmp_path}"]
        process = forked.Forked(arguments, stdout=subprocess.PIPE, stderr=2)
        with process:
            assert process.stdout is not None
            assert process.stdout.readline()
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0)
            process.send_signal(number)
            assert process.wait(60) == code
