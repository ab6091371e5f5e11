"""``shoal plan A B`` without any agent: what it prints, writes and refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from cli.main import main
from tests.cli.test_planning import CONFIG

LAB = """\
devices:
  - &pi
    name: pi-1
    memory: 900K
    storage: 4M
    bits: [4, 8]
    layer_ms: {decode: {4: 2, 8: 3}}
    embed_ms: 1
    head_ms: 1
    watts: 5
  - {<<: *pi, name: pi-2}
  - {<<: *pi, name: "[attic]", layer_ms: {decode: {4: 9, 8: 9}}}
default_link: {rtt_ms: 1, mbit_per_s: 100}
"""


@pytest.fixture(autouse=True)
def wide_terminal_and_own_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    """Two models of one shape, without weights."""
    for name in ("town", "river"):
        (tmp_path / name).mkdir()
        shutil.copy(CONFIG, tmp_path / name)
    return [str(tmp_path / "town"), str(tmp_path / "river")]


@pytest.fixture
def lab(tmp_path: Path) -> str:
    path = tmp_path / "lab.yaml"
    path.write_text(LAB)
    return f"--devices={path}"


def plan(*arguments: str) -> int:
    return main(["plan", *arguments, "--context=64", "--time-limit=10", "--objective=latency"])


def plan_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert plan(*arguments, "--json") == 0
    values: dict[str, Any] = json.loads(capsys.readouterr().out)
    return values


def test_two_models_are_planned_together(
    capsys: pytest.CaptureFixture[str], models: list[str], lab: str
) -> None:
    assert plan(*models, lab, "--weights=2,1", "--explain") == 0
    shown = capsys.readouterr().out
    assert "plans for town and river, predicted from" in shown
    assert "[attic]" in shown or "pi-2" in shown
    for words in (
        "memory of each device",
        "67%",
        "mean time of a request while all models answer",
        "town, then river",
        "times of river: assumed",
        "river: loss not measured",
    ):
        assert words in shown
    assert "by the rule for a typical model" in shown


def test_json_has_each_models_plan_and_times(
    capsys: pytest.CaptureFixture[str], models: list[str], lab: str
) -> None:
    answer = plan_json(capsys, *models, lab, "--explain")
    assert answer["figures"] == "predicted from described devices"
    assert [entry["model"] for entry in answer["models"]] == ["town", "river"]
    for entry in answer["models"]:
        assert entry["predicted_together_s"] >= entry["predicted_alone_s"] > 0
        assert len(entry["plan"]["blocks"]) == len(answer["models"][0]["plan"]["blocks"])
        assert entry["quality"]["kind"] == "assumed"
    assert all(device["memory_part"] <= 1 for device in answer["devices"])
    orders = answer["explanation"]["one_after_the_other"]
    assert [turn["order"] for turn in orders] == [["town", "river"], ["river", "town"]]
    for turn in orders:
        assert turn["planned_mean_s"] >= answer["planned_mean_s"] * (1 - 1e-9)
        assert turn["predicted_mean_s"] > 0


def test_plans_are_drawn_saved_and_read_again(
    capsys: pytest.CaptureFixture[str], models: list[str], lab: str, tmp_path: Path
) -> None:
    saved, drawn = tmp_path / "plans.json", tmp_path / "plans.svg"
    first = plan_json(capsys, *models, lab, f"--save={saved}", f"--plot={drawn}")
    assert ElementTree.parse(drawn).getroot().tag.endswith("svg")  # noqa: S314 - our own file
    again = plan_json(capsys, *models, lab, f"--plan={saved}")
    assert again["predicted_mean_s"] == pytest.approx(first["predicted_mean_s"])
    values = json.loads(saved.read_text())
    values["plans"][1]["stages"][0]["device"] = "cellar"
    saved.write_text(json.dumps(values))
    assert plan(*models, lab, f"--plan={saved}") == 1
    assert "plans[1]: unknown device cellar" in capsys.readouterr().err


def test_a_model_with_a_plan_stays_and_the_other_is_planned_beside_it(
    capsys: pytest.CaptureFixture[str], models: list[str], lab: str, tmp_path: Path
) -> None:
    saved = tmp_path / "town.json"
    alone = plan_json(capsys, models[0], lab, f"--save={saved}")
    beside = plan_json(capsys, *models, lab, f"--plan={saved}")
    assert beside["models"][0]["plan"]["blocks"] == alone["plan"]["blocks"]
    assert plan(models[1], models[1] + "/../river", lab, f"--plan={saved}") == 1
    message = capsys.readouterr().err
    assert "a model is named twice: river, river" in message or "has a plan of town" in message


def test_models_that_do_not_fit_get_advice(
    capsys: pytest.CaptureFixture[str], models: list[str], tmp_path: Path
) -> None:
    small = tmp_path / "small.yaml"
    small.write_text(LAB.replace("900K", "450K"))
    assert plan(*models, f"--devices={small}") == 1
    message = " ".join(capsys.readouterr().err.split())
    assert "town and river do not fit together: memory is short by" in message
    assert "leave out river (town fits)" in message
    assert "more device" in message


def test_options_for_one_model_are_refused(
    capsys: pytest.CaptureFixture[str], models: list[str], lab: str
) -> None:
    for arguments, words in (
        (["--weights=1,2,3"], "--weights has 3 numbers for 2 models"),
        (["--simulate=3"], "--simulate is for one model"),
        (["--pin=head:pi-1"], "--pin is for one model"),
        (["--formulation=dilemma"], "--formulation dilemma is for one model"),
        (["--check-quality"], "--check-quality is for one model"),
    ):
        assert plan(*models, lab, *arguments) == 2, arguments
        assert words in capsys.readouterr().err
    for weights in ("0,1", "1e308,1e308", "1e-7,1"):
        with pytest.raises(SystemExit):
            plan(*models, lab, f"--weights={weights}")
        assert "expected a number from 1e-6 to 1e6 for each model" in capsys.readouterr().err
    assert plan(models[0], lab, "--weights=1") == 2
    assert "--weights is for several models" in capsys.readouterr().err
    assert plan(*[f"m{i}" for i in range(9)], lab) == 2
    assert "9 models: at most 8 are planned together" in capsys.readouterr().err
