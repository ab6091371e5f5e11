"""Exact match and F1 against the official scripts, whose scores were written down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evaluation import squad

CASES = [
    json.loads(line)
    for line in Path(__file__).with_name("squad_scores.jsonl").read_text("utf-8").splitlines()
]


def scored(case: Any, rules: squad.Rules) -> list[float]:
    prediction, answers, *_ = case
    return list(squad.scores(prediction, answers, rules))


def test_the_scores_are_the_official_scripts() -> None:
    """Each prediction is odd: articles alone, no words, other alphabets, rare white space."""
    assert len(CASES) >= 1000
    some = [case for case in CASES if case[2] is not None]
    assert len(some) > 800
    assert [case for case in some if scored(case, "1.1") != pytest.approx(case[2])] == []
    assert [case for case in CASES if scored(case, "2.0") != pytest.approx(case[3])] == []
    # The cases tell wrong rules apart: the two scripts differ, and scores take many values.
    assert sum(case[2] != case[3] for case in some) > 10
    assert len({case[3][1] for case in CASES}) > 30


@pytest.mark.parametrize(
    ("prediction", "answers", "first", "second"),
    [
        ("The Cat!", ["cat"], (1, 1), (1, 1)),
        ("", ["the"], (1, 0), (1, 1)),  # Without "the" no word is left on either side.
        ("a cat", ["cat sat"], (0, 2 / 3), (0, 2 / 3)),
        ("cat cat", ["cat"], (0, 2 / 3), (0, 2 / 3)),
        ("dog", ["cat", "dog"], (1, 1), (1, 1)),
    ],
)
def test_known_scores(
    prediction: str,
    answers: list[str],
    first: tuple[float, float],
    second: tuple[float, float],
) -> None:
    assert squad.scores(prediction, answers, "1.1") == pytest.approx(first)
    assert squad.scores(prediction, answers, "2.0") == pytest.approx(second)


def test_only_an_empty_answer_is_right_for_an_unanswerable_question() -> None:
    assert squad.scores("", [], "2.0") == (1, 1)
    assert squad.scores("The.", [], "2.0") == (1, 1)
    assert squad.scores("Paris", [], "2.0") == (0, 0)
