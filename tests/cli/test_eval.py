"""``shoal eval`` on this machine alone: its figures, its files and its exit codes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from cli.main import main
from tests.cli.test_imports import run_without

ROOT = Path(__file__).parents[2]
TINY_OPT = ROOT / "examples" / "tiny-opt" / "model"
DEV = ROOT / "examples" / "tiny-opt" / "dev.json"
ASKED = (
    *("eval", str(TINY_OPT), f"--data={DEV}", "--template={context} {question}"),
    *("--group-size=32", "--threads=1"),
)


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """The JSON of a run that must have worked."""
    code = main([*arguments, "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_figures_at_several_widths(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out, table, plot = tmp_path / "out.jsonl", tmp_path / "t.csv", tmp_path / "p.svg"
    options = ("--bits=2,16", f"--out={out}", f"--csv={table}", f"--plot={plot}")
    found = answer(capsys, *ASKED, *options, "--questions=40", "--seed=1")
    assert (found["items"], found["items_in_data"], found["squad_rules"]) == (40, 750, "1.1")
    coarse, fine = found["runs"]
    assert (coarse["bits_per_weight"], coarse["quantization_ratio"]) == (2, 0.125)
    assert fine["figures"]["exact_match"] == {"value": 100, "low": 100, "high": 100, "items": 40}
    assert fine["figures"]["kl"]["value"] == pytest.approx(0, abs=1e-7)
    assert 0 < fine["figures"]["loss"]["value"] < 0.001
    # Two bits hurt this model (its card says 90.7 % over all questions).
    figures = coarse["figures"]
    assert 0.01 < figures["loss"]["value"] < 1
    assert figures["loss"]["low"] < figures["loss"]["value"] < figures["loss"]["high"]
    assert figures["exact_match"]["value"] < 100
    assert figures["original_loss"]["value"] == pytest.approx(fine["figures"]["loss"]["value"])
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert {row["run"] for row in rows} == {"2 bits", "16 bits"}
    assert plot.read_text().startswith("<svg")
    kept = lines(out)
    assert {line["kind"] for line in kept[1:]} == {"loss", "answer"}
    assert len(kept) == 1 + 2 * 2 * 40
    answered = next(line for line in kept if line.get("kind") == "answer")
    assert answered["accepted"]
    assert answered["answer"]
    assert answered["id"].startswith("dev-")


def test_it_goes_on_where_it_stopped(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """More questions, a lost line and a plan of the same widths need only what is missing."""
    out, plan = tmp_path / "out.jsonl", tmp_path / "plan.json"
    asked = (*ASKED, f"--out={out}")
    first = answer(capsys, *asked, "--bits=4", "--questions=8")
    before = out.read_text().splitlines(keepends=True)
    out.write_text("".join(before[:-3]) + before[-3][:20])
    again = answer(capsys, *asked, "--bits=4", "--questions=8")
    assert again["runs"][0]["figures"] == first["runs"][0]["figures"]
    assert sorted(out.read_text().splitlines(keepends=True)) == sorted(before)
    stages = [{"device": "pi-1", "bits": "4x6"}, {"device": "pi-2", "bits": "4x4"}]
    plan.write_text(json.dumps({"shoal_plan": 1, "model": "tiny-opt", "stages": stages}))
    planned = answer(capsys, *asked, f"--plan={plan}", "--questions=8")
    assert planned["runs"][0]["figures"] == first["runs"][0]["figures"]
    assert planned["runs"][0]["questions_per_s"] is None
    assert sorted(out.read_text().splitlines(keepends=True)) == sorted(before)
    assert main([*asked, "--bits=4", "--max-tokens=2"]) == 1
    assert "another max_tokens" in capsys.readouterr().err


def test_a_text_has_losses_and_no_answers(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The lamp is in the attic. The nurse has the key. " * 40)
    asked = ("eval", str(TINY_OPT), f"--data={text}", "--bits=8", "--window=64")
    found = answer(capsys, *asked)
    (run,) = found["runs"]
    assert found["items"] == found["items_in_data"] > 5
    assert list(run["figures"]) == [
        *("loss", "perplexity", "kl", "original_loss", "original_perplexity")
    ]
    seen = answer(capsys, *asked, "--stride=16", "--metrics=loss")["runs"][0]["figures"]
    assert list(seen) == ["loss", "perplexity"]
    # With more tokens before them, tokens are easier to tell.
    assert seen["loss"]["value"] < run["figures"]["loss"]["value"]


def test_the_table_says_how_each_figure_was_computed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ASKED, "--bits=8", "--questions=3", "--exact"]) == 0
    shown = capsys.readouterr().out
    assert "losses and KL: computed on this machine, block by block" in shown
    assert "answers on this machine alone, onnx_cpu, activations not rounded" in shown
    assert "8 bits per weight, 0.5 of the original's" in shown
    assert "no BLEU: it compares four words at a time, which no accepted answer has" in shown


def test_without_sacrebleu_one_line_says_so() -> None:
    shown = run_without(["sacrebleu"], *ASKED, "--bits=16", "--questions=2", "--metrics=answers")
    assert shown.returncode == 0, shown.stderr
    assert "no BLEU, because sacrebleu is not installed: pip install 'shoal-llm[eval]'" in (
        shown.stderr
    )
    assert "exact match" in shown.stdout
    assert "BLEU" not in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--bits=9",), 2, "--bits"),
        (("--bits=4", "--plan=p.json"), 2, "not allowed with"),
        (("--bits=4", "--metrics=love"), 2, "some of loss,kl,answers"),
        (("--bits=4", "--template={context}"), 2, "{question} is missing"),
        (("--bits=4", "--stop="), 2, "--stop"),
        (("--bits=4", "--plot=x.png"), 2, "end the name in .svg"),
        (("--bits=4", "--judge=http://x", "--metrics=loss"), 2, "--judge scores answers"),
        (("--bits=4", "--format=jsonl"), 1, 'dev.json:1: expected an object with "prompt"'),
        (("--bits=4", "--format=text", "--metrics=answers"), 2, "a plain text has no questions"),
        (("--plan=nowhere.json",), 1, "nowhere.json: no such file"),
        (("--bits=4", "--judge=nonsense"), 1, "--judge nonsense: expected http://HOST/v1"),
        (("--bits=4", "--backend=abacus"), 2, "expected one of edgetpu, onnx_cpu,"),
        (("--url=http://127.0.0.1:9", "--group-size=64"), 3, "no coordinator answers"),
        ((), 2, "--group-size goes with --bits or --plan"),
        (("--exact",), 2, "--exact goes with --bits or --plan"),
        (("--bits=4", "--adapter=nowhere"), 2, "--adapter nowhere: no such folder"),
    ],
)
def test_exit_codes(
    arguments: tuple[str, ...], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        found = main([*ASKED, "--questions=1", *arguments])
    except SystemExit as usage:
        found = int(usage.code or 0)
    error = " ".join(capsys.readouterr().err.split())
    assert (found, message in error) == (code, True), error


def test_a_plan_of_another_model_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "plan.json"
    stages = [{"device": "pi-1", "bits": "4x6"}]
    plan.write_text(json.dumps({"shoal_plan": 1, "model": "other", "stages": stages}))
    assert main([*ASKED, f"--plan={plan}"]) == 1
    assert "it has 6 blocks and the model 10" in capsys.readouterr().err
