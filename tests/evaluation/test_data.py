"""Data files of each kind, and what is wrong with others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evaluation import data as module
from evaluation.data import SQUAD_TEMPLATE, Question, read_data, sample, windows
from evaluation.errors import EvaluationError

ROOT = Path(__file__).parents[2]


def squad(*questions: dict[str, Any], context: str = "The cat sat.", **more: Any) -> str:
    return json.dumps({"data": [{"paragraphs": [{"context": context, "qas": questions}]}], **more})


def written(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "data"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_the_embedded_questions_are_squad() -> None:
    data = read_data(ROOT / "examples" / "tiny-opt" / "dev.json")
    assert (data.kind, data.rules, len(data.questions)) == ("squad", "1.1", 750)
    first = data.questions[0]
    assert (first.question, first.answers) == ("What is the fan set to?", ("45 degrees",))
    assert first.prompt("{context} {question}").endswith("pilot. What is the fan set to?")


def test_version_2_has_unanswerable_questions(tmp_path: Path) -> None:
    asked = [
        {"id": "1", "question": "Who?", "answers": [{"text": "cat"}], "is_impossible": False},
        {
            "id": "2",
            "question": "When?",
            "answers": [],
            "plausible_answers": [{"text": "cat"}],
            "is_impossible": True,
        },
    ]
    data = read_data(written(tmp_path, squad(*asked, version="v2.0")))
    assert (data.rules, [q.answers for q in data.questions]) == ("2.0", [("cat",), ()])


def test_hubs_keep_answers_as_one_object(tmp_path: Path) -> None:
    asked = {"question": "Who?", "answers": {"text": ["cat", "the cat"], "answer_start": [4, 0]}}
    (question,) = read_data(written(tmp_path, squad(asked))).questions
    assert question.answers == ("cat", "the cat")
    assert question.name == "data[0].paragraphs[0].qas[0]"


def test_braces_of_a_passage_are_no_fields() -> None:
    question = Question("1", "a {question} {0} {", "Who {context}?", ())
    assert question.prompt("{context}|{question}") == "a {question} {0} {|Who {context}?"
    assert question.prompt(SQUAD_TEMPLATE).endswith("\n\nQuestion: Who {context}?\nAnswer:")


def test_lines_of_prompts(tmp_path: Path) -> None:
    lines = (
        '{"prompt": "1+1=", "answer": "2"}\n\n'
        '{"prompt": "x\\u2028{context}", "answer": ["y", "z"], "id": 7}\n'
    )
    data = read_data(written(tmp_path, "\ufeff" + lines))
    assert data.kind == "jsonl"
    assert data.questions == (
        Question("1", "", "1+1=", ("2",)),
        Question("7", "", "x\u2028{context}", ("y", "z")),
    )
    assert data.questions[1].prompt(SQUAD_TEMPLATE) == "x\u2028{context}"


def test_a_text_is_what_is_no_json(tmp_path: Path) -> None:
    for text in ("Once upon a time.", "[Chapter 1] It began.", "{curly} words"):
        assert (read_data(written(tmp_path, text)).kind, read_data(tmp_path / "data").text) == (
            "text",
            text,
        )


@pytest.mark.parametrize("text", ['{"a": 1}', '[{"prompt": "x"}]', '{"version": 1, "x', "[[1, 2"])
def test_json_is_no_text_unless_the_user_says_so(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(EvaluationError, match="JSON, but neither SQuAD"):
        read_data(path)
    (note,) = read_data(path, "text").notes
    assert "is JSON" in note


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (squad({"question": "Who?", "answers": [{"text": "x"}]})[:-9], ":1: not JSON"),
        ('{"data": {}}', "data: expected a list"),
        ('{"data": [1]}', r"data\[0\]: expected an object"),
        (squad({"answers": []}), r"qas\[0\]\.question: expected a text"),
        (squad({"question": "Who?", "answers": [{}]}), r"qas\[0\]\.answers: expected a list"),
        (squad({"question": "Who?", "answers": []}), "no answer, which version 1.1 always has"),
        (squad(context=""), "context: expected a text"),
        (squad(), "no question in it"),
        ('{"prompt": "x", "answer": "y"}\n{"prompt": "x"', "data:2: expected an object"),
        ('{"prompt": "x"}', "data:1: answer: expected a text"),
        ('{"prompt": "x", "answer": []}', "data:1: answer: expected a text"),
        ('{"prompt": "", "answer": "x"}', "data:1: prompt: expected a text that is not empty"),
        ("[" * 100_000, "neither SQuAD"),
        ('{"data": ' + "[" * 100_000, "nested too deep"),
        (" \n", "an empty text"),
        (b"caf\xe9", "not UTF-8 text at byte 3"),
        ("a\0b", "zero bytes"),
    ],
)
def test_faults_are_named_with_their_place(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        read_data(written(tmp_path, text))


def test_files_are_read_up_to_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, "x" * 101)
    monkeypatch.setattr(module, "MAX_TEXT_BYTES", 100)
    with pytest.raises(EvaluationError, match="cut it"):
        read_data(path)
    monkeypatch.setattr(module, "MAX_DATA_BYTES", 100)
    with pytest.raises(EvaluationError, match="larger than"):
        read_data(path)


def test_a_sample_is_drawn_by_its_seed() -> None:
    assert sample(5, None, 0) == sample(5, 9, 0) == [0, 1, 2, 3, 4]
    one, two = sample(1000, 20, 1), sample(1000, 20, 2)
    assert one == sample(1000, 20, 1) != two
    assert one == sorted(set(one))
    assert len(one) == 20


@pytest.mark.parametrize("stride", [1, 3, 7, 8])
@pytest.mark.parametrize("length", [8])
@pytest.mark.parametrize("count", [0, 1, 2, 8, 9, 10, 31])
def test_windows_score_each_token_once(count: int, length: int, stride: int) -> None:
    tokens = list(range(count))
    found = windows(tokens, length, stride)
    scored = [token for piece, first in found for token in piece[first:]]
    assert scored == sorted(set(scored))
    assert all(len(piece) <= length and first >= 1 for piece, first in found)
    begins = {0} if stride < length else set(range(0, count, stride))
    assert set(tokens) - set(scored) == begins & set(tokens)
