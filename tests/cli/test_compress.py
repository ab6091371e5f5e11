"""``shoal compress``: its points, its files, its choice, and how it goes on after a stop."""

from __future__ import annotations

import contextlib
import csv
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cli.errors import EXIT_UNAVAILABLE
from cli.main import main
from cli.results_folder import results_folder
from compression.errors import CompressionError
from compression.points import Points
from model.checkpoint import Checkpoint
from tests.cli.test_imports import run_without

pytest.importorskip("torch", reason="needs the extra torch")

ROOT = Path(__file__).parents[2]
LLAMA = ROOT / "tests" / "fixtures" / "llama"
TINY_OPT = ROOT / "examples" / "tiny-opt" / "model"
DEV = ROOT / "examples" / "tiny-opt" / "dev.json"
LAB = ROOT / "examples" / "labs" / "wifi-3.yaml"
PASSAGES = ROOT / "model" / "passages.txt"


@pytest.fixture(autouse=True)
def no_coordinator(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here asks a coordinator that happens to run on this machine."""
    monkeypatch.setenv("SHOAL_COORDINATOR", "http://127.0.0.1:9")


def asked(out: Path, *more: str) -> list[str]:
    """The arguments of a small run, whose text lies beside ``out``."""
    text = out.parent / "text.txt"
    text.write_text(PASSAGES.read_text(encoding="utf-8")[:3000], encoding="utf-8")
    return [
        *("compress", str(LLAMA), f"--data={text}", f"--out={out}", "--sizes=1,0.7"),
        *("--steps=20", "--window=24", "--batch-tokens=384", "--questions=20", "--threads=1"),
        *more,
    ]


def answer(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> Any:
    """The JSON of a run that must have worked."""
    code = main([*arguments, "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


@pytest.mark.thorough
def test_points_with_and_without_teaching(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    found = answer(capsys, asked(out, "--bits=16,3"))
    points = {(one["size"], one["distilled"], one["bits"]): one for one in found["points"]}
    assert set(points) == {
        *((1, False, bits) for bits in (16, 3)),
        *((0.7, taught, bits) for taught in (False, True) for bits in (16, 3)),
    }
    assert points[1, False, 16]["kl"] == pytest.approx(0, abs=1e-6)
    assert points[1, False, 3]["kl"] > 0.01
    assert points[0.7, True, 16]["kl"] < points[0.7, False, 16]["kl"]
    assert points[0.7, True, 16]["bytes"] < points[1, False, 16]["bytes"]
    assert points[0.7, True, 3]["bytes"] < points[0.7, True, 16]["bytes"]
    assert points[0.7, True, 16]["exact_match"] is None
    made = Checkpoint.open(out / "70")
    one = points[0.7, True, 16]
    assert (len(made.spec.layers), made.spec.layers[0].ffn) == (one["layers"], one["ffn"])
    assert one["folder"] == str(out / "70")
    rows = list(csv.DictReader((out / "curve.csv").read_text().splitlines()))
    assert len(rows) == len(points)
    assert (out / "curve.svg").read_text().startswith("<svg")
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_answers_are_scored_where_the_data_has_questions(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = json.loads(DEV.read_text(encoding="utf-8"))
    few = [{"title": "few", "paragraphs": data["data"][0]["paragraphs"][:12]}]
    questions = tmp_path / "few.json"
    questions.write_text(json.dumps({"version": "1.1", "data": few}), encoding="utf-8")
    found = answer(
        capsys,
        [
            *(
                "compress",
                str(TINY_OPT),
                f"--data={questions}",
                f"--eval={questions}",
                f"--out={tmp_path}/out",
            ),
            *("--template={context} {question}", "--max-tokens=8", "--questions=12"),
            *("--sizes=1,0.8", "--steps=0", "--threads=1"),
        ],
    )
    whole, pruned = found["points"]
    assert (whole["exact_match"], whole["f1"]) == (100, 100)
    assert pruned["kl"] > whole["kl"]
    assert pruned["kv_heads"] == whole["kv_heads"]  # OPT's heads stay.
    assert not pruned["distilled"]
    made = Checkpoint.open(Path(pruned["folder"]))
    assert made.spec.layers[0].ffn == pruned["ffn"]


@pytest.mark.thorough
def test_a_point_is_chosen_by_its_predicted_time(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    all_of_them = answer(capsys, asked(out, "--bits=16,4", f"--lab={LAB}"))["points"]
    times = {(one["size"], one["bits"]): one["latency_ms"] for one in all_of_them}
    assert times[0.7, 16] < times[1, 16]
    assert times[1, 4] < times[1, 16]
    between = (times[0.7, 16] + times[1, 16]) / 2
    lab = ("--bits=16,4", f"--lab={LAB}")
    chosen = answer(capsys, asked(out, *lab, f"--at-most={between}ms"))["chosen"]
    able = [one for one in all_of_them if one["latency_ms"] <= between]
    kept = [one for one in able if one["folder"] or one["size"] == 1]
    assert chosen["kl"] <= min(one["kl"] for one in kept)
    assert chosen["latency_ms"] <= between
    # Some blocks have 16 bits and others 4, which loses less than one width for all.
    assert set(chosen["bits"]) == {16, 4}
    assert chosen["kl"] < min(one["kl"] for one in kept)
    assert chosen["bound"] <= chosen["predicted_kl"]
    folder = chosen["folder"] or str(LLAMA)
    plan = answer(
        capsys,
        ["plan", folder, f"--devices={LAB}", f"--plan={chosen['plan']}", "--quality-budget=none"],
    )["plan"]
    assert plan["predicted_ms_per_token"] == pytest.approx(chosen["latency_ms"])
    assert [block["bits"] for block in plan["blocks"]] == chosen["bits"]
    # The other way, the same loss needs no more time.
    budget = chosen["kl"] * (1 + 1e-6)
    quick = answer(capsys, asked(out, *lab, f"--quality-budget={budget}"))["chosen"]
    assert quick["kl"] <= budget
    assert quick["latency_ms"] <= chosen["latency_ms"] * (1 + 1e-6)
    assert main(asked(out, *lab, f"--at-most={between}")) == 0
    shown = capsys.readouterr().out
    assert "no other choice of size, bits and devices is predicted to lose less than" in shown
    assert f"shoal load {folder} --plan {out / 'plan.json'}" in shown
    assert main(asked(out, "--bits=4", f"--lab={LAB}", "--quality-budget=0")) == 1
    assert "loses at most 0 nats" in capsys.readouterr().err
    assert main(asked(out, *lab, "--at-most=0.001")) == 1
    error = capsys.readouterr().err
    assert "no size takes at most 0.001 ms" in error
    assert "the fastest takes" in error
    # Without a lab, the times of the one before are not shown.
    later = answer(capsys, asked(out, "--bits=16,4"))
    assert later["times_predicted_for"] is None
    assert {one["latency_ms"] for one in later["points"]} == {None}


def test_points_have_the_codes_of_the_scheme(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prepared quantizer's codes are measured, of the whole model and of a pruned one."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)

    def losses(scheme: str) -> list[float]:
        options = ("--steps=0", "--bits=2,16", f"--scheme={scheme}")
        found = answer(capsys, asked(tmp_path / scheme, *options))
        return [one["loss"] for one in found["points"]]

    rounded, clipped = losses("rtn"), losses("clip")
    # Points are by size, then from many bits to few.
    assert clipped[0::2] == pytest.approx(rounded[0::2])
    assert all(a != pytest.approx(b) for a, b in zip(clipped[1::2], rounded[1::2], strict=True))
    # Results of a version that measured this scheme as rtn are not gone on with.
    kept = tmp_path / "clip" / "compress.json"
    values = json.loads(kept.read_text())
    del values["settings"]["codes"]
    kept.write_text(json.dumps(values))
    assert main(asked(tmp_path / "clip", "--steps=0", "--bits=2,16", "--scheme=clip")) == 1
    assert "has results of another codes" in capsys.readouterr().err
    # The line to load the chosen one asks for the same codes.
    lab = ("--bits=4", f"--lab={LAB}", "--at-most=100000", "--group-size=32")
    assert main(asked(tmp_path / "chosen", "--steps=0", "--scheme=clip", *lab)) == 0
    assert "plan.json --scheme clip --group-size 32" in capsys.readouterr().out


def test_a_stopped_run_goes_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Ctrl-C in the middle of teaching ends with 130 and a line, and nothing is done again."""
    out = tmp_path / "out"
    arguments = asked(out, "--steps=4000")
    process = subprocess.Popen(
        [sys.executable, "-m", "cli", *arguments],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    training = out / ".training-70.pt"
    while not training.exists():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.1)
            pytest.fail(f"it ended by itself: {process.communicate()}")
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    assert "ask again to go on" in error
    assert "Traceback" not in error
    assert training.exists()
    kept = json.loads((out / "compress.json").read_text())
    assert {"importance", "cut 0.7", "point 1 16 pruned", "point 0.7 16 pruned"} <= set(kept)
    assert main([*arguments, "--data", str(DEV)]) == 1  # Other data is another run.
    assert "another data" in capsys.readouterr().err


def test_wrong_wishes_are_told_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert main(asked(out, "--at-most=40")) == 2
    assert "--at-most needs --lab" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(asked(out, "--sizes=0.5,2"))
    assert "shares between 0 and 1" in capsys.readouterr().err
    assert main(asked(out, "--template={context}")) == 2
    assert "--template: {question} is missing" in capsys.readouterr().err
    short = tmp_path / "short.jsonl"
    short.write_text('{"prompt": "1 2", "answer": "3"}\n')
    assert main(asked(out, f"--data={short}")) == 1
    assert "two or more sequences" in capsys.readouterr().err
    folder = ROOT / "tests" / "families" / "gpt2"
    assert main(["compress", str(folder), f"--data={PASSAGES}", f"--out={out}"]) == 1
    assert "gpt2 stores q.weight fused or scaled" in capsys.readouterr().err
    out.mkdir()
    (out / "compress.json").write_text("nonsense")
    assert main(asked(out)) == 1
    assert "name another --out" in capsys.readouterr().err
    with results_folder(out, "compress"):
        assert main(asked(out)) == 1
    assert "another command keeps its results there" in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage",
    [
        {"settings": None},
        {"settings": [1]},
        {"point 1 16 pruned": {"size": 1}},
        {"point 1 16 pruned": 3},
        {"shoal_compress": 2},
    ],
)
def test_damaged_results_are_named(damage: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "compress.json"
    Points(path, {}).put("importance", 1)
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(CompressionError, match=f"{path}: .*name another --out"):
        Points(path, {})


def test_without_torch_it_says_what_to_install(tmp_path: Path) -> None:
    completed = run_without(["torch"], *asked(tmp_path / "out"))
    assert completed.returncode == EXIT_UNAVAILABLE
    assert "pip install 'shoal-llm[torch]'" in completed.stderr
