"""Scores of encoders: GLUE's figures against definitions, labelled files, and answers here."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from backends.base import StageOptions
from backends.onnx_cpu import OnnxCpuBackend
from evaluation.data import Question
from evaluation.encoders import (
    Labelled,
    LocalEncoder,
    class_figures,
    f1,
    label_of,
    matthews,
    read_labelled,
    span_figures,
)
from evaluation.errors import EvaluationError
from model.quantize import Format
from model.tokenizer import Tokenizer
from tests.encoder_cases import ENCODERS, stored


def test_matthews_is_the_correlation_of_two_classes() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        right, found = random.integers(0, 2, (2, 50))
        table = np.array([[np.sum((right == i) & (found == j)) for j in (0, 1)] for i in (0, 1)])
        assert matthews(table.astype(float)) == pytest.approx(np.corrcoef(right, found)[0, 1])


def test_f1_is_that_of_the_second_of_two_classes() -> None:
    table = np.array([[5.0, 1.0], [2.0, 4.0]])
    precision, recall = 4 / 5, 4 / 6
    assert f1(table) == pytest.approx(100 * 2 * precision * recall / (precision + recall))
    three = np.array([[1.0, 0, 0], [0, 1.0, 0], [0, 1.0, 0]])
    assert f1(three) == pytest.approx(100 * (1 + 2 / 3 + 0) / 3)


def test_figures_that_are_not_defined_are_zero() -> None:
    assert matthews(np.array([[4.0, 0.0], [0.0, 0.0]])) == 0
    assert f1(np.array([[4.0, 0.0], [0.0, 0.0]])) == 0


def test_figures_have_intervals() -> None:
    right = [0, 1] * 50
    found = [0, 1, 1, 1] * 25
    figures = class_figures(right, found, 2, seed=0)
    assert figures["accuracy"].value == pytest.approx(75)
    assert figures["accuracy"].low < 75 < figures["accuracy"].high
    assert figures["matthews"].items == 100
    questions = [Question("1", "c", "q", ("a b",)), Question("2", "c", "q", ("x",))]
    spans = span_figures(questions, ["a b", "y"], "1.1", seed=0)
    assert spans["exact_match"].value == 50
    assert spans["f1"].value == 50


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("dev.tsv", "sentence\tlabel\nit's \"good\t1\nbad\t0\n"),
        ("dev.jsonl", '{"sentence": "it\'s \\"good", "label": 1}\n{"text": "bad", "label": "0"}\n'),
    ],
)
def test_labelled_texts_are_read(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    items = read_labelled(path).items
    assert items == (Labelled(("it's \"good",), "1"), Labelled(("bad",), "0"))


def test_pairs_are_read(tmp_path: Path) -> None:
    path = tmp_path / "dev.tsv"
    path.write_text("index\tquestion\tsentence\tlabel\n0\twho\tyou\tentailment\n")
    (item,) = read_labelled(path).items
    assert item.texts == ("who", "you")
    assert label_of(item, ["not_entailment", "ENTAILMENT"]) == 1
    with pytest.raises(EvaluationError, match="none of the model's: red"):
        label_of(item, ["red"])


@pytest.mark.parametrize(
    "text", ["a\tb\n1\t2\n", '{"text": "a"}\n', '{"text": "a", "label": 1}\n{\n', "", "sentence\n"]
)
def test_damaged_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "dev.tsv"
    path.write_text(text)
    with pytest.raises(EvaluationError, match="dev"):
        read_labelled(path)


def test_this_machine_answers(tmp_path: Path) -> None:
    """The best answer is one that the text has, and a long text is read in windows."""
    checkpoint, artifacts = stored("bert-span", Format.of(32), tmp_path)
    tokenizer = Tokenizer.load(ENCODERS / "bert-span")
    options = StageOptions(1, 64, 1, exact=True)
    with closing(OnnxCpuBackend().stage(checkpoint.spec, artifacts, options)) as stage:
        encoder = LocalEncoder(stage, tokenizer, 64)
        for repeats in (1, 8):
            context = "The ship is in the river. " * repeats
            question = Question("1", context, "where is the ship?", ())
            answer = encoder.answer(question, may_lack=False)
            assert answer
            assert answer in context
        too_long = Question("1", "ship", "where " * 80, ())
        assert encoder.answer(too_long, may_lack=False) == ""


def test_this_machine_classifies(tmp_path: Path) -> None:
    checkpoint, artifacts = stored("bert-class", Format.of(32), tmp_path)
    tokenizer = Tokenizer.load(ENCODERS / "bert-class")
    options = StageOptions(1, 64, 1, exact=True)
    items = [Labelled(("the red house",), "0"), Labelled(("who", "a " * 90), "1")]
    with closing(OnnxCpuBackend().stage(checkpoint.spec, artifacts, options)) as stage:
        encoder = LocalEncoder(stage, tokenizer, 64)
        together = encoder.classes(items)
        assert together == [encoder.classes([item])[0] for item in items]
    assert json.loads((ENCODERS / "bert-class" / "config.json").read_text())["id2label"]
