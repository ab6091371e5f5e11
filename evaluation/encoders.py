"""Scores of encoders: answers to SQuAD's questions, and classes of texts as in GLUE.

Accuracy, F1 and Matthews' correlation are GLUE's own figures. F1 is that of the second class (1),
where there are two, and the mean over classes (macro) where there are more.

Sources: Wang et al., "GLUE"; Matthews, "Comparison of the predicted and observed secondary
structure of T4 phage lysozyme", generalized by Gorodkin for more than two classes.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from backends.base import Stage
from evaluation.bootstrap import Estimate, Sums, estimate, mean
from evaluation.data import MAX_DATA_BYTES, Question
from evaluation.errors import EvaluationError
from evaluation.squad import Rules, scores
from model.bounded import read_bytes
from model.spans import best_spans, windows
from model.texts import PASS_ROWS, Texts, split
from model.tokenizer import EncodedText, Tokenizer

TEXT_FIELDS = (
    ("sentence1", "sentence2"), ("question1", "question2"), ("question", "sentence"),
    ("premise", "hypothesis"), ("text1", "text2"), ("sentence",), ("text",),
)  # fmt: skip
"""The names of a line's texts in GLUE's tasks and elsewhere. The first that all are there count."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """One or two texts with the right class: its number, or its name."""

    texts: tuple[str, ...]
    label: str


@dataclass(frozen=True, slots=True)
class LabelledData:
    """The lines of a file."""

    path: Path
    sha256: str
    items: tuple[Labelled, ...]


def read_labelled(path: Path) -> LabelledData:
    """Read texts with classes: one JSON object a line, or GLUE's TSV with a head.

    Raises EvaluationError that names the file and the line, and OSError.
    """
    try:
        content = read_bytes(path, MAX_DATA_BYTES)
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{path}: not UTF-8 text at byte {error.start}") from error
    except ValueError as error:
        raise EvaluationError(f"{path}: {error}: cut it") from error
    rows = _json_rows(path, text) if text.lstrip().startswith("{") else _table_rows(path, text)
    items = tuple(_labelled(where, row) for where, row in rows)
    if not items:
        raise EvaluationError(f"{path}: no line in it")
    return LabelledData(path, hashlib.sha256(content).hexdigest(), items)


def _json_rows(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise EvaluationError(f"{path}:{number}: not JSON") from error
            if not isinstance(row, dict):
                raise EvaluationError(f"{path}:{number}: expected an object")
            yield f"{path}:{number}", row


def _table_rows(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    lines = csv.reader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    head = next(lines, [])
    for number, cells in enumerate(lines, start=2):
        if cells:
            yield f"{path}:{number}", dict(zip(head, cells, strict=False))


def _labelled(where: str, row: dict[str, Any]) -> Labelled:
    names = next((names for names in TEXT_FIELDS if set(names) <= row.keys()), None)
    label = row.get("label")
    if names is None or not isinstance(label, str | int) or isinstance(label, bool):
        raise EvaluationError(
            f"{where}: expected a label beside a text (sentence, text) or two (sentence1 and "
            "sentence2, question and sentence, premise and hypothesis)"
        )
    texts = tuple(row[name] for name in names)
    if not all(isinstance(text, str) and text for text in texts):
        raise EvaluationError(f"{where}: {', '.join(names)}: expected texts that are not empty")
    return Labelled(texts, str(label))


def label_of(item: Labelled, names: Sequence[str]) -> int:
    """Return the number of the right class. Raises EvaluationError for one the model lacks."""
    lowered = [name.lower() for name in names]
    if item.label.isdecimal() and int(item.label) < len(names):
        return int(item.label)
    if item.label.lower() in lowered:
        return lowered.index(item.label.lower())
    raise EvaluationError(
        f"the label {item.label!r} is none of the model's: {', '.join(names)[:200]}"
    )


# ---- who answers --------------------------------------------------------------------------------


class LocalEncoder:
    """Answers on this machine, with a stage that holds the whole model."""

    def __init__(self, stage: Stage, tokenizer: Tokenizer, context_tokens: int) -> None:
        self._stage = stage
        self._tokenizer = tokenizer
        self._context_tokens = context_tokens

    def classes(self, items: Sequence[Labelled]) -> list[int]:
        """Return the class of each item. A text that is too long is cut."""
        encoded = [self._cut(self._tokenizer.encode_text(*item.texts)) for item in items]
        return [int(row.argmax()) for row in self._run(encoded)]

    def answer(self, question: Question, *, may_lack: bool) -> str:
        """Return the best answer, or "" if the text lacks it."""
        try:
            texts = windows(
                self._tokenizer.encode_text,
                question.question,
                question.context,
                self._context_tokens,
            )
        except ValueError:
            return ""  # The question alone fills the context.
        found = best_spans(question.context, texts, self._run(texts), 1, may_lack=may_lack)
        return found[0].text if found else ""

    def _cut(self, text: EncodedText) -> EncodedText:
        most = self._context_tokens
        if len(text.tokens) <= most:
            return text
        kept = [*range(most - 1), len(text.tokens) - 1]
        return EncodedText(
            tuple(text.tokens[index] for index in kept),
            min(text.second, most),
            tuple(text.parts[index] for index in kept),
            tuple(text.offsets[index] for index in kept),
        )

    def _run(self, texts: Sequence[EncodedText]) -> list[Any]:
        results: list[Any] = [None] * len(texts)
        for chosen in split([len(text.tokens) for text in texts], PASS_ROWS):
            own = [texts[index] for index in chosen]
            tokens = np.concatenate([np.array(text.tokens, np.int64) for text in own])
            bounds = Texts(
                tuple(len(text.tokens) for text in own), tuple(text.second for text in own)
            )
            result = self._stage.encode(tokens, bounds)
            per_text = len(result) == len(own) and bounds.rows != len(own)
            begins = bounds.begins().tolist()
            for place, index in enumerate(chosen):
                rows = result[begins[place] : begins[place + 1]]
                results[index] = result[place] if per_text else rows
        return results


# ---- figures ------------------------------------------------------------------------------------

Figures = dict[str, Estimate]


def span_figures(
    questions: Sequence[Question], answers: Sequence[str], rules: Rules, seed: int
) -> Figures:
    """Return exact match and F1 in percent."""
    found = [
        scores(answer, question.answers, rules)
        for question, answer in zip(questions, answers, strict=True)
    ]
    exact, overlap = (np.array([[100 * pair[index], 1.0] for pair in found]) for index in (0, 1))
    return {"exact_match": estimate(exact, mean, seed), "f1": estimate(overlap, mean, seed)}


def class_figures(right: Sequence[int], found: Sequence[int], count: int, seed: int) -> Figures:
    """Return accuracy and F1 in percent, and Matthews' correlation, of ``count`` classes."""
    rows = np.zeros((len(right), count * count))
    rows[np.arange(len(right)), np.array(right) * count + np.array(found)] = 1.0

    def of(figure: Callable[[Sums], float]) -> Estimate:
        return estimate(rows, lambda sums: figure(sums.reshape(count, count)), seed)

    return {"accuracy": of(accuracy), "f1": of(f1), "matthews": of(matthews)}


def accuracy(table: Sums) -> float:
    """Return the percent of right classes. table: [right, found] counts."""
    return float(100 * np.trace(table) / table.sum())


def f1(table: Sums) -> float:
    """Return F1 in percent: of class 1 of two, else the mean over classes."""
    both = np.diag(table)
    total = table.sum(axis=0) + table.sum(axis=1)
    each = np.divide(2 * both, total, out=np.zeros(len(table)), where=total > 0)
    return float(100 * (each[1] if len(table) == 2 else each.mean()))


def matthews(table: Sums) -> float:
    """Return Matthews' correlation, from -1 to 1. 0 where it is not defined."""
    right, found = table.sum(axis=1), table.sum(axis=0)
    count = table.sum()
    above = np.trace(table) * count - right @ found
    below = (count**2 - found @ found) * (count**2 - right @ right)
    return float(above / np.sqrt(below)) if below > 0 else 0.0
