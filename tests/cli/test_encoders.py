"""``shoal plan`` and ``shoal eval`` of encoders, without any agent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli.errors import CommandFailed
from cli.main import main
from tests.encoder_cases import ENCODERS

LAB = """\
devices:
  - name: pi-1
    memory: 20M
    storage: 20M
    bits: [4, 8]
    layer_ms: {decode: {4: 2, 8: 3}, prefill_per_token: {4: 0.2, 8: 0.3}}
    embed_ms: 1
    head_ms: 1
default_link: {rtt_ms: 1, mbit_per_s: 100}
"""
SQUAD = {
    "version": "1.1",
    "data": [
        {
            "paragraphs": [
                {
                    "context": "The ship is in the river.",
                    "qas": [
                        {
                            "id": "1",
                            "question": "where is the ship?",
                            "answers": [{"text": "in the river", "answer_start": 12}],
                        }
                    ],
                }
            ]
        }
    ],
}


@pytest.fixture(autouse=True)
def own_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "lab.yaml").write_text(LAB)
    (tmp_path / "squad.json").write_text(json.dumps(SQUAD))
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\nthe ship\tred\nwho was it\tblue\n")
    return tmp_path


def shoal(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Run a command here, and return its exit code with all that it said."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except CommandFailed as error:
        return 1, str(error)
    said = capsys.readouterr()
    return code or 0, said.out + said.err


def test_a_plan_has_eight_bits_and_says_what_a_pass_takes(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lab = files / "lab.yaml"
    code, said = shoal(capsys, "plan", ENCODERS / "minilm", "--devices", lab)
    assert code == 0, said
    assert "ms for texts of 64 tokens in one pass" in said
    assert "8x5" in said
    code, said = shoal(
        capsys, "plan", ENCODERS / "minilm", "--devices", lab, "--quality-budget", "0.1"
    )
    assert code == 2
    assert "choose widths with --bits" in said


def scores(said: str) -> Any:
    return json.loads(said.splitlines()[-1])["runs"]


def test_classes_and_spans_are_scored(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = shoal(
        capsys, "eval", ENCODERS / "bert-class", "--data", files / "dev.tsv", "--format", "glue",
        "--bits", "4,8", "--json",
    )  # fmt: skip
    assert code == 0, said
    assert [run["run"] for run in scores(said)] == ["4 bits", "8 bits"]
    assert all(0 <= run["accuracy"]["value"] <= 100 for run in scores(said))
    code, said = shoal(
        capsys, "eval", ENCODERS / "bert-span", "--data", files / "squad.json", "--bits", "8",
        "--json",
    )  # fmt: skip
    assert code == 0, said
    assert scores(said)[0]["f1"]["items"] == 1


@pytest.mark.parametrize(
    ("model", "data", "more", "needs"),
    [
        ("minilm", "squad.json", (), "gives vectors"),
        ("bert-class", "squad.json", (), "--format glue"),
        ("bert-span", "dev.tsv", ("--format", "glue"), "give SQuAD's JSON"),
        ("bert-span", "squad.json", ("--chat",), "for models that generate"),
    ],
)
def test_what_a_model_cannot_do_says_what_to_give(
    files: Path,
    capsys: pytest.CaptureFixture[str],
    model: str,
    data: str,
    more: tuple[str, ...],
    needs: str,
) -> None:
    code, said = shoal(
        capsys, "eval", ENCODERS / model, "--data", files / data, "--bits", "8", *more
    )
    assert code != 0
    assert needs in said


def test_a_grid_of_plans_needs_no_budget(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The default budget of models that generate has nothing to count here."""
    lab = tmp_path / "lab.yaml"
    lab.write_text(LAB)
    model, out = ENCODERS / "minilm", f"--out={tmp_path / 'out'}"
    wishes = ("--devices", lab, "--bits", "4", "--bits", "4,8", out)
    code, said = shoal(capsys, "sweep", model, *wishes)
    assert code == 0, said
    text = tmp_path / "text.txt"
    text.write_text("The ship is in the river.")
    code, said = shoal(capsys, "sweep", model, *wishes, "--eval", "--data", text)
    assert code == 1
    assert "it encodes texts: compare widths with `shoal eval --bits`" in said


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("calibrate", "--quality", "--bits=4", "--model"), "this model encodes texts: compare"),
        (("study", "table1"), "it encodes texts: the study needs a model that generates"),
    ],
)
def test_divergences_of_next_tokens_are_not_measured(
    command: tuple[str, ...], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The ship is in the river.\n\nWhere is the ship?\n" * 9)
    rest = () if command[0] == "calibrate" else ("--data", text, f"--out={tmp_path / 'out'}")
    code, said = shoal(capsys, *command, ENCODERS / "bert-class", *rest)
    assert code == 1
    assert words in said
