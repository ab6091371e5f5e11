"""``shoal sweep`` for described devices: its grid, its files, and its evaluation."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from cli.main import main
from tests.cli.test_table1 import DEV, OPT, ROOT, TINY_OPT, questions
from tests.system.cluster import interrupt_at

LAB = ROOT / "examples" / "labs" / "wifi-3.yaml"


@pytest.fixture(autouse=True)
def own_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)


def asked(tmp_path: Path, *arguments: str, model: Path = TINY_OPT) -> list[str]:
    return ["sweep", str(model), f"--devices={LAB}", f"--out={tmp_path / 'out'}", *arguments]


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    code = main([*arguments, "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


def table(tmp_path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((tmp_path / "out" / "sweep.csv").read_text().splitlines()))


def test_every_combination_is_planned(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ("--quality-budget=0.001,0.03,none", "--bits=4,8", "--bits=8", "--links=1,x2")
    assert main(asked(tmp_path, *options)) == 2
    assert "--links: give amounts, or factors such as x2, but not both" in capsys.readouterr().err
    others = ("--links=x0.5,x2", "--objective=latency,request")
    found = answer(capsys, *asked(tmp_path, *options[:3], *others))
    assert len(found["cells"]) == 3 * 2 * 2 * 2
    for one in found["cells"]:
        cell, plan = one["cell"], one["plan"]
        assert plan["status"] == "optimal"
        assert set(plan["bits"]) <= set(map(int, cell["bits"].split(",")))
        if cell["quality_budget"] != "none":
            assert plan["kl"] <= float(cell["quality_budget"])
        assert one["measured"] is None
    # Without a bound, both widths may be used, and four bits are faster.
    both = [one["plan"] for one in found["cells"] if one["cell"]["bits"] == "4,8"]
    assert both[2]["decode_ms"] < both[0]["decode_ms"]
    rows = table(tmp_path)
    assert [row["predicted_kl"] for row in rows] == [
        str(one["plan"]["kl"]) for one in found["cells"]
    ]
    ElementTree.parse(tmp_path / "out" / "sweep.svg")  # noqa: S314 - our own


def test_it_goes_on_where_it_stopped(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ("--quality-budget=0.001,0.03,none", "--links=1,100")
    whole = answer(capsys, *asked(tmp_path, *options))
    log = tmp_path / "out" / "results.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:3]) + lines[3][:20])
    again = answer(capsys, *asked(tmp_path, *options))
    for one, before in zip(again["cells"], whole["cells"], strict=True):
        assert {**one["plan"], "solve_s": 0} == {**before["plan"], "solve_s": 0}
    # Three plans are as they were, with the seconds that they took then.
    assert log.read_text().startswith("".join(lines[:3]))
    wider = answer(capsys, *asked(tmp_path, *options[:1], "--links=1,10,100"))
    assert len(wider["cells"]) == 9
    assert main(asked(tmp_path, *options, "--context=64")) == 1
    assert "has results of another problem" in capsys.readouterr().err


def test_plans_are_evaluated_once_for_equal_bits(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = (f"--data={DEV}", "--template={context} {question}", "--questions=6", "--threads=1")
    bounds = ("--max-weight-error=1e-4,1", "--quality-budget=none,1e-5", "--links=1,100")
    found = answer(capsys, *asked(tmp_path, "--eval", *data, *bounds, "--bits=2,4,8,16"))
    cells = found["cells"]
    assert len(cells) == 8
    widths = {tuple(one["plan"]["bits"]) for one in cells}
    assert len(widths) < 8
    coarse = next(one for one in cells if one["cell"]["max_weight_error"] == "1")
    fine = next(one for one in cells if one["cell"]["quality_budget"] == "1e-05")
    assert coarse["measured"]["kl"]["value"] > 10 * fine["measured"]["kl"]["value"]
    assert coarse["plan"]["weight_error"] > 1e-4 >= fine["plan"]["weight_error"]
    assert all(one["measured"]["exact_match"]["items"] == 6 for one in cells)
    rows = table(tmp_path)
    assert [float(row["measured_loss"]) for row in rows] == [
        one["measured"]["loss"]["value"] for one in cells
    ]
    log = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    answers = [line for line in log if line.get("kind") == "answer"]
    assert len(answers) == 6 * len(widths)
    text = (tmp_path / "out" / "sweep.svg").read_text()
    assert "measured loss" in text
    # Losses alone, of a plan that was evaluated already.
    size = (tmp_path / "out/results.jsonl").stat().st_size
    options = (*data, *bounds, "--bits=2,4,8,16", "--metrics=loss,kl")
    assert main(asked(tmp_path, "--eval", *options)) == 0
    shown = capsys.readouterr().out
    assert "measured" in shown
    assert (tmp_path / "out/results.jsonl").stat().st_size == size


def test_ctrl_c_keeps_what_is_done(tmp_path: Path) -> None:
    log = tmp_path / "out" / "results.jsonl"
    links = "--links=" + ",".join(str(number) for number in range(1, 2000))
    done = (tmp_path / "out" / "sweep.csv").exists
    code, error, _ = interrupt_at(asked(tmp_path, links), done, timeout_s=120)
    assert code == 130, error
    assert f"results are kept in {log}: ask again to go on" in " ".join(error.split())
    assert table(tmp_path)[0]["links"] == "1"


def test_a_shape_without_files_is_enough_for_plans(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lab = ROOT / "examples" / "labs" / "four-pis.yaml"
    given = ["sweep", "--shape=llama-1b", f"--devices={lab}", f"--out={tmp_path / 'out'}"]
    assert main([*given, "--memory=100M,x2", "--objective=latency"]) == 2
    capsys.readouterr()
    assert main([*given, "--memory=50M,4G", "--objective=latency"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "2 plans of llama-1b, predicted for" in shown
    assert "infeasible" in shown
    assert "memory, MiB 50: " in shown
    assert [row["status"] for row in table(tmp_path)] == ["infeasible", "optimal"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--bits=9",), 2, "--bits"),
        (("--links=0",), 2, "Mbit/s such as 10,100, or factors such as x0.5,x2"),
        (("--links=1e-320",), 2, "Mbit/s such as 10,100, or factors such as x0.5,x2"),
        (("--links=x1e308",), 2, "Mbit/s such as 10,100, or factors such as x0.5,x2"),
        (("--memory=big",), 2, "sizes such as 1G,512M"),
        (("--quality-budget=-1",), 2, "numbers from 0 up, or none"),
        (("--objective=beauty",), 2, "some of latency,throughput,request,energy"),
        (("--eval",), 2, "--eval needs --data FILE"),
        (("--data=x.json",), 2, "--data is for an evaluation: add --eval"),
        (("--shape=llama-1b",), 2, "give one MODEL, or --shape NAME"),
        (("--eval", "--data=nowhere.json"), 1, "nowhere.json: no such file"),
        (("--devices=nowhere.yaml",), 1, "nowhere.yaml: no such file"),
        (("--links=1", "--url=http://127.0.0.1:9", "--devices=nowhere.yaml"), 1, "no such file"),
    ],
)
def test_exit_codes(
    arguments: tuple[str, ...],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    try:
        found = main(asked(tmp_path, *arguments))
    except SystemExit as usage:
        found = int(usage.code or 0)
    error = " ".join(capsys.readouterr().err.split())
    assert (found, message in error) == (code, True), error


def test_delta_needs_weights(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "config.json").write_text((OPT / "config.json").read_text())
    assert main(asked(tmp_path, "--max-weight-error=1e-3,1", model=folder)) == 2
    assert "--max-weight-error needs weights" in capsys.readouterr().err
    data = questions(tmp_path / "boxes.json")
    assert main(asked(tmp_path, "--eval", f"--data={data}", model=folder)) == 1
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    assert str(folder) in shown
