"""Commands that get something else than a model say so, without asking a coordinator."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from cli.commands.plan_arguments import absolute_model
from cli.errors import CommandFailed
from cli.main import main

LLAMA = Path(__file__).parents[1] / "fixtures" / "llama"
LAB = Path(__file__).parents[2] / "examples" / "labs" / "home-4-pis.yaml"

HERE = (
    ("plan", "{}", f"--devices={LAB}"),
    ("calibrate", "--model={}"),
    ("calibrate", "--quality", "--model={}"),
    ("calibrate", "--quality", "--on=auto", "--model={}"),
    ("demo", "--model={}"),
)
"""Commands that read the model themselves."""
THERE = (("load", "{}"), ("plan", "{}"))
"""Commands whose coordinator reads it."""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


def error(command: Sequence[str], model: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main([argument.format(model) for argument in command]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("command", HERE)
def test_the_name_of_a_hubs_model_without_a_network(
    command: Sequence[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = error(command, "meta-llama/Llama-3.2-1B", capsys)
    assert line.startswith("error: meta-llama/Llama-3.2-1B is not in the cache of ")
    assert "run `shoal pull meta-llama/Llama-3.2-1B` where there is a network" in line
    assert f"models--meta-llama--Llama-3.2-1B to {tmp_path / 'hub'} here" in line


@pytest.mark.parametrize("command", THERE)
def test_the_coordinator_is_asked_before_anything_is_fetched(
    command: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [argument.format("meta-llama/Llama-3.2-1B") for argument in command]
    assert main([*arguments, "--url=http://127.0.0.1:9"]) == 3
    assert "no coordinator answers" in capsys.readouterr().err


@pytest.mark.parametrize("command", [*HERE, *THERE])
def test_a_name_of_ollamas(command: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    line = error(command, "llama3.2:1b", capsys)
    assert "Ollama's name for meta-llama/Llama-3.2-1B-Instruct" in line


@pytest.mark.parametrize("command", HERE)
def test_a_file_instead_of_a_folder(
    command: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = error(command, str(LLAMA / "model.safetensors"), capsys)
    assert f"give the folder that it is in, {LLAMA}" in line


def test_only_an_absolute_path_may_be_the_coordinators_alone(tmp_path: Path) -> None:
    assert absolute_model("/srv/models/llama") == Path("/srv/models/llama")
    shutil.copytree(LLAMA, "llama")
    assert absolute_model("llama") == tmp_path / "llama"
    with pytest.raises(CommandFailed, match="no such directory"):
        absolute_model("llama-2")
