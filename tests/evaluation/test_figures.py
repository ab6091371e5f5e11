"""Figures, their intervals, BLEU and the picture."""

from __future__ import annotations

import csv
import io
import math
import random
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from sacrebleu import corpus_bleu as sacrebleu_score

from evaluation.bleu import bleu_rows, corpus_bleu
from evaluation.bootstrap import Sums, estimate, mean
from evaluation.data import Question
from evaluation.kept import Kept
from evaluation.picture import figures_svg
from evaluation.report import Scored, csv_text, figures


def ones(values: list[float]) -> Sums:
    return np.asarray([(value, 1.0) for value in values])


def test_an_interval_is_that_of_the_mean() -> None:
    """Of 400 draws from a normal distribution, the mean has the standard error 1/20."""
    values = np.random.default_rng(7).normal(3, 1, 400)
    found = estimate(ones(values.tolist()), mean, seed=0)
    assert found.value == pytest.approx(values.mean())
    assert found.items == 400
    half = 1.96 * values.std() / math.sqrt(400)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)
    assert found.low < found.value < found.high


def test_equal_seeds_draw_the_same_items() -> None:
    rows = ones([float(value) for value in range(30)])
    assert estimate(rows, mean, seed=1) == estimate(rows, mean, seed=1)
    assert estimate(rows, mean, seed=1) != estimate(rows, mean, seed=2)
    single = estimate(ones([4.0]), mean, seed=0)
    assert (single.low, single.value, single.high) == (4, 4, 4)


def test_bleu_is_sacrebleus() -> None:
    draw = random.Random(3)
    words = [
        "the",
        "cat",
        "sat",
        "on",
        "a",
        "mat",
        ",",
        "and",
        "it",
        "was",
        "3.5",
        "m",
        "wide",
        "!",
        "café",
    ]

    def text(least: int) -> str:
        return " ".join(draw.choice(words) for _ in range(draw.randrange(least, 12)))

    answers = [text(0) for _ in range(200)]
    accepted = [[text(1) for _ in range(draw.randrange(1, 4))] for _ in answers]
    for place in range(0, 200, 3):
        answers[place] = accepted[place][0] + draw.choice(["", " again", "."])
    # The package takes None for a further reference that a line does not have.
    streams: list[Any] = [[one[n] if n < len(one) else None for one in accepted] for n in range(3)]
    rows = bleu_rows(answers, accepted)
    for some in (slice(None), slice(0, 40), slice(5, 6)):
        part = [stream[some] for stream in streams]
        with_all = [stream for stream in part if any(text is not None for text in stream)]
        wanted = sacrebleu_score(answers[some], with_all).score
        assert corpus_bleu(rows[some].sum(axis=0)) == pytest.approx(wanted)
    assert corpus_bleu(rows.sum(axis=0)) > 20


def scored(kept: Kept, questions: dict[int, Question], **more: object) -> Scored:
    values = {"rules": "1.1", "no_answer": "", "seed": 0, "with_bleu": False, **more}
    return Scored(kept, "r", [*questions], questions, **values)  # type: ignore[arg-type]  # mixed


QUESTIONS = {
    0: Question("0", "c", "q", ("cat",)),
    1: Question("1", "c", "q", ("the dog",)),
    2: Question("2", "c", "q", ()),
    3: Question("3", "c", "q", ()),
}


def test_figures_of_answers_by_the_rules_of_version_2() -> None:
    kept = Kept(None, {})
    answers = {0: "Cat.", 1: "big dog", 2: "Unanswerable!", 3: "cat"}
    for item, answer in answers.items():
        kept.put("r", "answer", item, {"answer": answer})
    found = figures(scored(kept, QUESTIONS, rules="2.0", no_answer="unanswerable"))
    assert {name: one.value for name, one in found.items()} == pytest.approx(
        {
            "exact_match": 50,
            "f1": 100 * (1 + 2 / 3 + 1) / 4,
            "has_answer_exact_match": 50,
            "has_answer_f1": 100 * (1 + 2 / 3) / 2,
            "no_answer_exact_match": 50,
            "no_answer_f1": 50,
        }
    )


def test_a_refused_prompt_scores_nothing() -> None:
    kept = Kept(None, {})
    kept.put("r", "answer", 2, {"answer": None, "refused": "too long"})
    found = figures(scored(kept, {2: QUESTIONS[2]}, rules="2.0"))
    assert found["exact_match"].value == 0
    kept.put("r", "answer", 2, {"answer": ""})
    assert figures(scored(kept, {2: QUESTIONS[2]}, rules="2.0"))["exact_match"].value == 100


def test_losses_are_weighted_by_tokens() -> None:
    kept = Kept(None, {})
    kept.put("r", "loss", 0, {"tokens": 3, "nats": 3.0, "kl": 0.3, "original_nats": 1.5})
    kept.put("r", "loss", 1, {"tokens": 1, "nats": 5.0, "kl": 0.1, "original_nats": 0.5})
    found = figures(scored(kept, QUESTIONS))
    assert {name: one.value for name, one in found.items()} == pytest.approx(
        {
            "loss": 2,
            "perplexity": math.exp(2),
            "kl": 0.1,
            "original_loss": 0.5,
            "original_perplexity": math.exp(0.5),
        }
    )
    kept.put("r", "loss", 1, {"tokens": 1, "nats": 1e6, "kl": None, "original_nats": None})
    found = figures(scored(kept, QUESTIONS))
    assert list(found) == ["loss", "perplexity"]
    assert found["perplexity"].value == math.inf


def test_csv_and_picture_have_every_figure() -> None:
    kept = Kept(None, {})
    for item in (0, 1):
        kept.put("r", "answer", item, {"answer": "cat"})
        kept.put("r", "loss", item, {"tokens": 1, "nats": 1e6, "kl": None, "original_nats": None})
    assert "bleu" not in figures(scored(kept, QUESTIONS, with_bleu=True))
    four = {**QUESTIONS, 0: Question("0", "c", "q", ("cat", "the cat sat there"))}
    found = figures(scored(kept, four, with_bleu=True))
    assert "bleu" in found
    rows = list(csv.DictReader(io.StringIO(csv_text([("4, bits", found), ("<x>", found)]))))
    assert {row["run"] for row in rows} == {"4, bits", "<x>"}
    assert [row["figure"] for row in rows[: len(found)]] == list(found)
    assert float(rows[0]["value"]) == 1e6
    picture = figures_svg("a & b", [("4, bits", found), ("<x>", found)])
    texts = [element.text for element in ElementTree.fromstring(picture).iter() if element.text]  # noqa: S314 - our own
    assert {"4, bits", "<x>", "F1, %", "a & b"} <= set(texts)
