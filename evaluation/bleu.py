"""BLEU of all answers together, by the sacrebleu package, which is installed on request."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from evaluation.bootstrap import Sums
from evaluation.errors import EvaluationError

_ORDERS = 4


def bleu_rows(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Sums:
    """Return the counts [items, 10] of each answer. ``corpus_bleu`` takes their sums.

    The columns are the matching and all n-grams of 1 to 4 words, then both lengths in words.
    Raises EvaluationError if sacrebleu is not installed.
    """
    metric = _metric()
    rows = np.zeros((len(answers), 2 * _ORDERS + 2))
    for row, (answer, accepted) in enumerate(zip(answers, references, strict=True)):
        found = metric.sentence_score(answer, list(accepted) or [""])
        rows[row] = [*found.counts, *found.totals, found.sys_len, found.ref_len]
    return rows


def corpus_bleu(sums: Sums) -> float:
    """Return sacrebleu's corpus BLEU from 0 to 100, with its default settings."""
    counts = [round(value) for value in sums]
    return float(
        _metric()
        .compute_bleu(
            correct=counts[:_ORDERS],
            total=counts[_ORDERS : 2 * _ORDERS],
            sys_len=counts[-2],
            ref_len=counts[-1],
            smooth_method="exp",
        )
        .score
    )


def has_order(references: Iterable[Sequence[str]]) -> bool:
    """Whether any reference has the four words that BLEU compares. Without one it is always 0."""
    return any(len(text.split()) >= _ORDERS for accepted in references for text in accepted)


def is_installed() -> bool:
    """Whether sacrebleu can be imported."""
    try:
        _metric()
    except EvaluationError:
        return False
    return True


def _metric() -> Any:
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise EvaluationError("BLEU needs sacrebleu: pip install 'shoal-llm[eval]'") from error
    # Sentences are only counted here, so a smoothing of theirs has no effect.
    return BLEU(effective_order=True)
