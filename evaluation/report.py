"""Sums results up: each figure with its interval, by run."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from evaluation import squad
from evaluation.bleu import bleu_rows, corpus_bleu, has_order
from evaluation.bootstrap import Estimate, Statistic, Sums, estimate, mean
from evaluation.data import Question
from evaluation.judge import CRITERIA
from evaluation.kept import Kept

_MAX_EXPONENT = 700.0

LABELS = {
    "loss": "loss, nats per token",
    "perplexity": "perplexity",
    "kl": "KL to the original, nats per token",
    "original_loss": "loss of the original",
    "original_perplexity": "perplexity of the original",
    "exact_match": "exact match, %",
    "f1": "F1, %",
    "has_answer_exact_match": "exact match, answerable, %",
    "has_answer_f1": "F1, answerable, %",
    "no_answer_exact_match": "exact match, unanswerable, %",
    "no_answer_f1": "F1, unanswerable, %",
    "bleu": "BLEU, 0 to 100",
    **{f"judge_{name}": f"judge: {name}, 0 to 10" for name in CRITERIA},
    "judge": "judge: mean of the four, 0 to 10",
}
"""Every figure in the order of tables, with its words."""


@dataclass(frozen=True, slots=True)
class Scored:
    """How a run is scored: its results, and the items that it should have.

    questions: of data with questions, by item. Text has none.
    no_answer: an answer with these words says that there is none.
    """

    kept: Kept
    run: str
    items: Sequence[int]
    questions: Mapping[int, Question]
    rules: squad.Rules
    no_answer: str
    seed: int
    with_bleu: bool


def figures(scored: Scored) -> dict[str, Estimate]:
    """Return every figure that the results of a run give, by its name in LABELS."""
    found = {**_loss_figures(scored), **_answer_figures(scored), **_judge_figures(scored)}
    return {name: found[name] for name in LABELS if name in found}


def answer_of(values: Mapping[str, object], no_answer: str) -> str | None:
    """Return the text of a kept answer as it is scored. None: the prompt was refused."""
    text = values.get("answer")
    if not isinstance(text, str):
        return None
    is_none = bool(no_answer) and squad.normalized(text) == squad.normalized(no_answer)
    return "" if is_none else text


def csv_text(runs: Iterable[tuple[str, Mapping[str, Estimate]]]) -> str:
    """Return a table with one line for each figure of each run."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "figure", "value", "low", "high", "items"])
    for run, found in runs:
        for name, one in found.items():
            writer.writerow([run, name, one.value, one.low, one.high, one.items])
    return text.getvalue()


def plain(found: Mapping[str, Estimate]) -> dict[str, dict[str, float | None]]:
    """Return figures as plain values for JSON, which has null for what is not finite."""
    return {
        name: {key: value if math.isfinite(value) else None for key, value in asdict(one).items()}
        for name, one in found.items()
    }


def _loss_figures(scored: Scored) -> dict[str, Estimate]:
    losses = [
        values
        for item in scored.items
        if (values := scored.kept.get(scored.run, "loss", item)) is not None
    ]
    if not losses:
        return {}
    found: dict[str, Estimate] = {}
    columns = {"": "nats"}
    if all(values.get("kl") is not None for values in losses):
        columns["original_"] = "original_nats"
        found["kl"] = _estimate(_columns(losses, "kl"), mean, scored)
    for prefix, column in columns.items():
        rows = _columns(losses, column)
        loss = found[f"{prefix}loss"] = _estimate(rows, mean, scored)
        value, low, high = map(_perplexity, (loss.value, loss.low, loss.high))
        found[f"{prefix}perplexity"] = Estimate(value, low, high, loss.items)
    return found


def _columns(losses: Sequence[Mapping[str, float]], name: str) -> Sums:
    return np.asarray([(values[name], values["tokens"]) for values in losses], np.float64)


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < _MAX_EXPONENT else math.inf


def _answer_figures(scored: Scored) -> dict[str, Estimate]:
    answers = {
        item: answer_of(values, scored.no_answer)
        for item in scored.items
        if (values := scored.kept.get(scored.run, "answer", item)) is not None
    }
    if not answers:
        return {}
    kinds: dict[str, Callable[[Question], bool]] = {"": lambda question: True}
    if scored.rules == "2.0":
        kinds["has_answer_"] = lambda question: bool(question.answers)
        kinds["no_answer_"] = lambda question: not question.answers
    found: dict[str, Estimate] = {}
    for prefix, belongs in kinds.items():
        some = [item for item in answers if belongs(scored.questions[item])]
        pairs = [_exact_and_f1(scored, item, answers[item]) for item in some]
        for column, name in enumerate(("exact_match", "f1") if some else ()):
            rows = np.asarray([(100.0 * pair[column], 1.0) for pair in pairs])
            found[f"{prefix}{name}"] = _estimate(rows, mean, scored)
    accepted = [scored.questions[item].answers for item in answers]
    if scored.with_bleu and has_order(accepted):
        texts = [answer or "" for answer in answers.values()]
        found["bleu"] = _estimate(bleu_rows(texts, accepted), corpus_bleu, scored)
    return found


def _exact_and_f1(scored: Scored, item: int, answer: str | None) -> tuple[float, float]:
    """A refused prompt scores 0, as a question without an answer does in the official scripts."""
    if answer is None:
        return 0.0, 0.0
    return squad.scores(answer, scored.questions[item].answers, scored.rules)


def _judge_figures(scored: Scored) -> dict[str, Estimate]:
    judged = [
        values
        for item in scored.items
        if (values := scored.kept.get(scored.run, "judge", item)) and CRITERIA[0] in values
    ]
    if not judged:
        return {}
    found = {}
    for name in CRITERIA:
        rows = np.asarray([(values[name], 1.0) for values in judged])
        found[f"judge_{name}"] = _estimate(rows, mean, scored)
    means = np.asarray([(sum(values[name] for name in CRITERIA) / 4, 1.0) for values in judged])
    return {**found, "judge": _estimate(means, mean, scored)}


def _estimate(rows: Sums, statistic: Statistic, scored: Scored) -> Estimate:
    return estimate(rows, statistic, scored.seed)
