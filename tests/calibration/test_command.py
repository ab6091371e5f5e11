"""``shoal calibrate`` as a user calls it."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from calibration import layers, survey, table
from cli.commands.calibrate import add_calibrate_arguments, run_calibrate
from cli.errors import CommandFailed, UsageError
from cli.render import Screen
from cli.tables import fitting
from model.families import load_spec
from planning.labs.sensitivity_file import read_sensitivities
from tests.cli.test_tables import Recording, rendered
from wire import conditions

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "_FLOPS_TIME_S", 0.01)
    monkeypatch.setattr(survey, "_HIDDEN", 128)
    monkeypatch.setattr(survey, "_REPEATS_LIMIT_S", 0.5)
    monkeypatch.setattr(table, "_QUICK", (1, 0.0, 0.01))
    monkeypatch.setattr(layers, "_MIN_TIME_S", 0.001)
    monkeypatch.setenv("COLUMNS", "160")


def shoal(*arguments: object) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    add_calibrate_arguments(parser)
    options = parser.parse_args(["--threads", "1", *map(str, arguments)])
    run_calibrate(options, Screen(json_output=options.json))


def test_the_device_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shoal("--state-dir", tmp_path, "--watts", "6.5")
    shown = capsys.readouterr().out
    assert "GB/s" in shown
    assert "GFLOP/s" in shown
    assert "6.5 W (declared)" in shown
    assert "…" not in shown


def test_a_model_as_json_with_a_roofline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "roof.svg"
    shoal(
        *("--state-dir", tmp_path, "--model", FIXTURES / "llama", "--bits", "4,8"),
        *("--json", "--plot", picture, "--sustain", "1s"),
    )
    answer = json.loads(capsys.readouterr().out)
    assert answer["device"]["sustained"]["duration_s"] >= 1
    assert {tuple(item["bits"]) for item in answer["layers"]["layers"]} == {(4,), (8,)}
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")  # noqa: S314 - our own
    assert (tmp_path / "calibration.json").exists()


def test_the_tables_of_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--state-dir", tmp_path, "--model", FIXTURES / "opt-post", "--bits", "4")
    shoal(*arguments)
    shown = capsys.readouterr()
    assert "one layer, ms a call" in shown.out
    assert "embedding and head" in shown.out
    assert "earlier run" not in shown.err
    shoal(*arguments)
    assert "earlier run" in capsys.readouterr().err


def test_quality_with_a_heat_map_and_plans(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, text = tmp_path / "heat.svg", tmp_path / "text.txt"
    text.write_text("The lamp is on the table.\n\nThe cat sat on the mat, and the dog sat by it.\n")
    arguments = (
        *("--quality", "--model", FIXTURES / "llama", "--bits", "3,8", "--state-dir", tmp_path),
        *("--text", text, "--check-plans", "2"),
    )
    shoal(*arguments, "--plot", picture)
    shown = capsys.readouterr().out
    assert "predicted sum" in shown
    assert "layer 0" in shown
    hops = shown[shown.index("hops, KL in nats") :]
    assert hops.index("embedding") < hops.index("predicted sum")
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")  # noqa: S314 - our own
    shoal(*arguments, "--json")
    answer = json.loads(capsys.readouterr().out)
    assert len(answer["plans"]) == 2
    assert {item["bits"] for item in answer["blocks"]} == {3, 8}
    assert answer["blocks"][0]["name"] == "embedding"
    assert answer["hops"][0]["after"] == "embedding"
    # What was printed is what a plan reads.
    saved = tmp_path / "quality-answer.json"
    saved.write_text(json.dumps(answer))
    known = read_sensitivities(saved, load_spec(FIXTURES / "llama"))
    worst = max(hop["kl"] for hop in answer["hops"] if hop["bits"] == 8)
    assert known.hops[8] == worst > known.hops[16]


def test_quality_without_a_text_uses_the_built_in_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shoal(
        *("--quality", "--model", FIXTURES / "opt-pre", "--bits", "4", "--json"),
        *("--max-tokens", "60", "--state-dir", tmp_path),
    )
    assert 0 < json.loads(capsys.readouterr().out)["tokens"] <= 60


def test_wrong_arguments_are_one_line(tmp_path: Path) -> None:
    state = ("--state-dir", tmp_path)
    with pytest.raises(UsageError, match="--model"):
        shoal("--quality", *state)
    with pytest.raises(CommandFailed, match="llama-1b"):
        shoal("--shape", "llama-9000b", *state)
    with pytest.raises(CommandFailed, match="no such directory"):
        shoal("--quality", "--model", tmp_path / "none", *state)
    with pytest.raises(UsageError, match="--on NAME goes with --quality"):
        shoal("--on", "auto", *state)
    with pytest.raises(UsageError, match="--threads does not go with --on"):
        shoal("--quality", "--on", "auto", *state)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(CommandFailed, match="no calibration text"):
        shoal("--quality", "--model", FIXTURES / "llama", "--text", tmp_path / "empty.txt", *state)


@pytest.mark.parametrize(
    "arguments",
    [("--bits", "7"), ("--bits", "x"), ("--sustain", "0"), ("--watts", "-1"), ("--threads", "0"),
     ("--model", "a", "--shape", "b"), ("--check-plans", "-1")],
)  # fmt: skip
def test_the_parser_refuses(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        shoal(*arguments)
    assert "usage" in capsys.readouterr().err


def test_its_tables_are_whole_on_a_narrow_terminal(tmp_path: Path) -> None:
    screen = Recording()
    for arguments in (
        ("--model", FIXTURES / "llama", "--bits", "2,3,4,6,8,16,32", "--sustain", "1s"),
        ("--quality", "--model", FIXTURES / "llama", "--check-plans", "2", "--max-tokens", "20"),
    ):
        parser = argparse.ArgumentParser()
        parser.add_argument("--json", action="store_true")
        add_calibrate_arguments(parser)
        chosen = ["--state-dir", tmp_path, "--threads", "1", *arguments]
        run_calibrate(parser.parse_args(list(map(str, chosen))), screen)
    screen.check()
    survey_table, _ = screen.tables[0]
    labels = [str(cell) for cell in survey_table.columns[0].cells]
    (part,) = fitting(survey_table, 80)
    lines = rendered(part, 80).splitlines()
    for label in labels:
        assert any(line.strip().startswith(label) for line in lines)
    assert len(fitting(survey_table, 60)) == 1


def test_figures_of_a_busy_machine_are_marked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--state-dir", tmp_path, "--backend", "onnx_cpu", "--model", FIXTURES / "llama")
    monkeypatch.setattr(conditions, "QUIET_CORES", 1e6)
    monkeypatch.setattr(conditions, "QUIET_SPREAD", 1e6)
    shoal(*arguments, "--bits", "4")
    assert "*" not in capsys.readouterr().out
    monkeypatch.setattr(conditions, "QUIET_CORES", 0.1)
    code = "import os; os.nice(5); print(flush=True)\nwhile True: pass"
    children = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        for _ in os.sched_getaffinity(0)
    ]
    with contextlib.ExitStack() as stack:
        for child in children:
            stack.enter_context(child)
            stack.callback(child.kill)
            assert child.stdout is not None
            child.stdout.readline()
        shoal(*arguments, "--bits", "8")
    shown = capsys.readouterr().out
    assert re.search(r"memory read, 1 thread +\d+\.\d GB/s \*", shown)
    assert re.search(r"GFLOP/s \(best call [\d.]+\) \*", shown)
    assert re.search(r"\* measured while other programs used \d\.\d of \d+ cores", shown)
    assert "run it again with --again when it is quiet" in shown


def test_a_machine_that_was_much_faster_before_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--state-dir", tmp_path, "--backend", "onnx_cpu")
    shoal(*arguments)
    assert "slower than before" not in capsys.readouterr().out
    path = tmp_path / "calibration.json"
    content = json.loads(path.read_text())
    for key, values in content["entries"].items():
        if json.loads(key)["kind"] == "survey":
            values[0] *= 100
    path.write_text(json.dumps(content))
    shoal(*arguments)
    shown = capsys.readouterr().out
    assert re.search(r"slower than before: memory read, 1 thread: \d+\.\d GB/s now, \d+\.\d", shown)
    assert re.search(r"slower than before: onnx_cpu [\d.]+, 4 bits: [\d.]+ GFLOP/s now", shown)
    # Whoever measures again wants the new figures to count.
    shoal(*arguments, "--again", "--json")
    answer = json.loads(capsys.readouterr().out)
    assert answer["slower_than_before"]
    assert answer["agent"]["memory_read_bytes_per_s"] > 0
    fast = max(
        values[0]
        for key, values in json.loads(path.read_text())["entries"].items()
        if json.loads(key)["figure"].startswith("memory read")
    )
    assert fast < 1e12
