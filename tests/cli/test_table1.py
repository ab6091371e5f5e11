"""``shoal study table1`` on a model of OPT-350m's structure, and on the embedded one."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from cli.main import main
from evaluation import judge
from tests.evaluation.fake_judge import fake_judge
from tests.system.cluster import interrupt_at

ROOT = Path(__file__).parents[2]
OPT = ROOT / "tests" / "fixtures" / "opt-post"
"""As OPT-350m, it has its norms behind, and a narrower embedding."""
TINY_OPT = ROOT / "examples" / "tiny-opt" / "model"
DEV = ROOT / "examples" / "tiny-opt" / "dev.json"
QUICK = ("--threads=1", "--group-size=32", "--runs=2")


def questions(path: Path, count: int = 12) -> Path:
    """SQuAD questions that fit 160 tokens of a letter each."""
    passages = [
        {
            "context": f"the box {number} is red",
            "qas": [
                {
                    "id": f"q{number}",
                    "question": "what is red?",
                    "answers": [{"text": f"box {number} is red", "answer_start": 4}],
                }
            ],
        }
        for number in range(count)
    ]
    data = {"version": "1.1", "data": [{"title": "boxes", "paragraphs": passages}]}
    path.write_text(json.dumps(data))
    return path


def asked(tmp_path: Path, *arguments: str) -> list[str]:
    data = questions(tmp_path / "boxes.json")
    given = ["study", "table1", str(OPT), f"--data={data}", f"--out={tmp_path / 'out'}"]
    return [*given, "--questions=4", "--max-tokens=2", "--tokens=64", *QUICK, *arguments]


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    code = main([*arguments, "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


@pytest.mark.thorough
def test_the_whole_study_of_a_model_with_opts_structure(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(judge, "FIRST_PAUSE_S", 0.001)
    with fake_judge() as server:
        options = ("--plans=3", "--answer-plans", "--budgets=0.001,0.1", f"--judge={server.url}")
        found = answer(capsys, *asked(tmp_path, *options))
    rows = {row["row"]: row for row in found["rows"]}
    assert len(rows) == 1 + 8 + 2 * 2
    assert rows["original"]["figures"]["kl"]["value"] == pytest.approx(0, abs=1e-9)
    assert rows["original"]["ratio_to_32_bits"] == 1
    deltas = [row for row in found["rows"] if row["kind"] == "delta"]
    # A stricter delta needs more bits, more time, and loses less.
    for key in ("ratio_to_32_bits", "time_s"):
        values = [row[key] for row in deltas]
        assert values == sorted(values, reverse=True)
    assert max(deltas[0]["bits_of_layers"]) > 8
    assert deltas[-1]["bits_of_layers"] == [4, 4, 4]
    kls = [row["figures"]["kl"]["value"] for row in deltas]
    assert kls[0] < 1e-4 < kls[-1]
    assert deltas[0]["paper"] == {
        "loss": 0.0591, "perplexity": 1.0609, "bleu": 0.2949, "ratio": 0.375
    }  # fmt: skip
    for row in found["rows"]:
        assert {"loss", "perplexity", "exact_match", "f1", "bleu", "judge"} <= set(row["figures"])
        assert row["figures"]["loss"]["items"] == 4
    assert [(one["rounding"]["scheme"], one["kind"]) for one in found["plans"]] == [
        *(("truncate", "any"), ("truncate", "even"), ("rtn", "any"), ("rtn", "even"))
    ]
    drawn = found["plans"][2]
    assert {one["outcome"] for one in drawn["correlations"]} == {"loss", "kl", "exact_match", "f1"}
    by = drawn["correlations"][1]["by"]
    assert -1 <= by["delta"]["low"] <= by["delta"]["value"] <= by["delta"]["high"] <= 1
    assert len(found["links"]["spreads"]) == 5
    out = tmp_path / "out"
    pictures = {path.name for path in out.glob("*.svg")}
    assert pictures == {
        *("figure-2-weights.svg", "figure-3-objective.svg", "figure-4-judge.svg"),
        *("figure-5-links.svg", "figure-6-clock.svg", "table1.svg", "trade-off.svg"),
        *(
            f"plans-{scheme}-{kind}.svg"
            for scheme in ("rtn", "truncate")
            for kind in ("any", "even")
        ),
    }
    for name in pictures:
        ElementTree.parse(out / name)  # noqa: S314 - our own
    table = list(csv.DictReader((out / "table1.csv").read_text().splitlines()))
    assert [line["row"] for line in table] == list(rows)
    assert float(table[1]["paper_ratio"]) == 0.375
    assert all(line["loss_low"] <= line["loss"] and line["judge"] for line in table)
    plans = list(csv.DictReader((out / "plans.csv").read_text().splitlines()))
    assert len(plans) == 12
    assert all(line["loss"] and line["exact_match"] for line in plans)


def test_it_goes_on_where_it_stopped(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ("--plans=3", "--no-answers", "--budgets=0.01", "--schemes=rtn")
    whole = answer(capsys, *asked(tmp_path, *options))
    assert "exact_match" not in whole["rows"][0]["figures"]
    log = tmp_path / "out" / "results.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[: len(lines) // 2]) + lines[-1][:7])
    (tmp_path / "out" / "draws.jsonl").unlink()
    assert answer(capsys, *asked(tmp_path, *options)) == whole
    assert sorted(log.read_text().splitlines(keepends=True)) == sorted(lines)
    # Nothing is measured again, and more plans begin with the same ones.
    more = answer(capsys, *asked(tmp_path, "--plans=5", *options[1:]))
    assert more["plans"][0]["plans"][:3] == whole["plans"][0]["plans"]
    assert log.read_text().startswith("".join(lines[: len(lines) // 2]))
    assert main(asked(tmp_path, *options, "--no-answer=none")) == 1
    assert "has results of another no_answer" in capsys.readouterr().err


def test_ctrl_c_keeps_what_is_done(tmp_path: Path) -> None:
    log = tmp_path / "out" / "results.jsonl"
    asking = asked(tmp_path, "--plans=400", "--no-answers")
    code, error, _ = interrupt_at(
        asking, lambda: log.exists() and '"kl"' in log.read_text(), timeout_s=120
    )
    assert code == 130, error
    assert f"results are kept in {log}: ask again to go on" in " ".join(error.split())
    assert "Traceback" not in error


def test_the_tables_name_what_was_computed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = (f"--data={DEV}", "--template={context} {question}", "--questions=3", "--tokens=64")
    options = ("--plans=3", "--deltas=1e-3,1", "--budgets=0,0.1", "--schemes=rtn", "--no-answers")
    given = ["study", "table1", str(TINY_OPT), *data, *options, *QUICK, f"--out={tmp_path}"]
    assert main(given) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in (
        "Table 1 on dev.json",
        "delta 0.001",
        "KL 0.1, rtn 32",
        "3 random plans of any bits, rtn 32",
        "plans with the same narrowest layer",
        "figure 6: T in s over 2 runs",
        "computed on this machine from rounded weights",
        "T: by the paper's cost model on three assumed servers: computed, not measured",
    ):
        assert words in shown


def test_a_text_has_rows_of_losses(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the red box is in the attic, and the key is blue. " * 40)
    options = ("--questions=2", "--plans=0", "--budgets=0.1", "--deltas=1e-4", "--window=80")
    given = ["study", "table1", str(OPT), f"--data={text}", f"--out={tmp_path / 'out'}"]
    found = answer(capsys, *given, *options, *QUICK)
    assert found["plans"] == []
    assert found["tokens_of_sensitivities"] > 500
    assert all("loss" in row["figures"] for row in found["rows"])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--deltas=1,x",), 2, "numbers from 0 up"),
        (("--schemes=magic",), 2, "some of truncate,rtn"),
        (("--judge=http://127.0.0.1:9/v1", "--no-answers"), 2, "--judge scores answers"),
        (("--template={context}",), 2, "{question} is missing"),
        (("--backend=abacus",), 2, "expected one of edgetpu, onnx_cpu,"),
        (("--data=nowhere.json",), 1, "nowhere.json: no such file"),
        (("--window=x",), 2, "--window"),
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


def test_a_folder_that_cannot_be_made_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    assert main(asked(tmp_path, f"--out={tmp_path / 'file' / 'out'}")) == 2
    assert "not a directory" in capsys.readouterr().err
