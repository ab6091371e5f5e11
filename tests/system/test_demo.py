"""`shoal demo`: answers, progress, and how it ends."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from model.families import load_spec
from tests.system import made_up
from tests.system.cluster import COMMAND, ROOT, TINY_OPT, demo_processes, last_json, shoal

EXACT_HOPS = "--hop-bits=32"
"""A hop at 16 bits rounds, which is not what is compared here."""


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Spares demos to measure. One test is without it."""
    directory = tmp_path_factory.mktemp("measured")
    made_up.add_device(directory / "calibration.json")
    made_up.add_model(directory / "calibration.json", load_spec(TINY_OPT))
    return f"--measurements-dir={directory}"


def demo(model: Path, prompt: str, *options: str) -> Any:
    return last_json(shoal("demo", "--json", f"--model={model}", f"--prompt={prompt}", *options))


def test_the_demo_answers_rightly_the_same_split_and_unsplit(kept: str) -> None:
    answers = [
        last_json(shoal("demo", "--json", "--bits=16", EXACT_HOPS, f"--agents={agents}", kept))
        for agents in (1, 2, 3)
    ]
    assert [len(answer["plan"]["stages"]) for answer in answers] == [1, 2, 3]
    assert {tuple(answer["tokens"]) for answer in answers} == {tuple(answers[0]["tokens"])}
    assert "attic" in answers[0]["text"]
    # The answer is as short as it is right; the speed is measured over more tokens than it has.
    assert all(len(answer["tokens"]) < 64 <= answer["speed_tokens"] for answer in answers)
    assert all(answer["decode_tokens_per_s"] > 0 for answer in answers)


def test_the_demo_shows_devices_plan_answer_and_speed() -> None:
    completed = shoal("demo", "--memory=4M,5M,20M")
    assert completed.returncode == 0, completed.stderr
    for shown in ("measured devices", "device-3", "predicted", "attic"):
        assert shown in completed.stdout
    rate = re.search(r"decode: [\d]+ tokens/s measured over (\d+) tokens", completed.stdout)
    assert rate is not None, completed.stdout
    assert int(rate[1]) >= 64
    assert "Traceback" not in completed.stderr


def on_a_terminal(*arguments: str) -> list[str]:
    """What a command that succeeds shows on standard error where that is a terminal."""
    ours, its = pty.openpty()
    command = [*COMMAND, *arguments]
    environment = os.environ | {"TERM": "dumb"}
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=its, cwd=ROOT, env=environment
    ) as process:
        os.close(its)
        shown = b""
        with os.fdopen(ours, "rb", buffering=0) as terminal, contextlib.suppress(OSError):
            # Reading fails once the other end is closed.
            while piece := terminal.read(1 << 16):
                shown += piece
    assert process.returncode == 0
    return shown.decode().splitlines()


def test_a_terminal_is_told_what_the_demo_does_from_its_first_moment(kept: str) -> None:
    lines = on_a_terminal("demo", "--memory=4M,5M,20M", kept)
    steps = [line for line in lines if "demo: " in line]
    assert steps[0] == "demo: reading the model"
    assert steps[1] == "demo: starting a coordinator"
    assert steps[2] == (
        "demo: starting 3 agents with 4.0 MiB, 5.0 MiB, 20.0 MiB; they measure this machine"
    )
    last = steps.index("demo: 3 of 3 agents have joined")
    assert {"demo: measuring links", "demo: quantizing blocks"} <= set(steps[last + 1 : -1])
    assert steps[-1].startswith("demo: loaded in ")


def test_nothing_is_left_running(kept: str) -> None:
    completed = shoal("demo", "--json", f"--model={TINY_OPT}", "--max-tokens=2", kept)
    answer = last_json(completed)
    assert {"model", "devices", "plan", "prompt_tokens", "tokens", "text"} <= set(answer)
    assert {"prefill_tokens_per_s", "decode_tokens_per_s"} <= set(answer)
    assert {"block", "device", "bits"} <= set(answer["plan"]["blocks"][0])
    assert answer["plan"]["predicted_ms_per_token"] > 0
    assert not demo_processes()
