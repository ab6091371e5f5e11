"""Exact match and F1 of an answer, as the official SQuAD scripts count them.

The scripts of versions 1.1 and 2.0 differ when no word is left after articles and punctuation are
dropped. Then F1 is 0 in version 1.1. In version 2.0 it is 1 if both texts have no word.

Source: Rajpurkar et al., evaluate-v1.1.py and evaluate-v2.0.py of SQuAD.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Literal

Rules = Literal["1.1", "2.0"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> str:
    """Return a text in lower case without punctuation, articles and further white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def scores(prediction: str, answers: Sequence[str], rules: Rules) -> tuple[float, float]:
    """Return (exact match, F1) of a prediction, each from 0 to 1: the best over the answers.

    An unanswerable question has no answers; only an empty prediction is right there.
    """
    if rules == "2.0":
        # An answer without any word is none.
        answers = [answer for answer in answers if normalized(answer)] or [""]
    exact = max(float(normalized(prediction) == normalized(answer)) for answer in answers)
    return exact, max(_f1(prediction, answer, rules) for answer in answers)


def _f1(prediction: str, answer: str, rules: Rules) -> float:
    got, expected = normalized(prediction).split(), normalized(answer).split()
    if rules == "2.0" and not (got and expected):
        return float(got == expected)
    same = (Counter(got) & Counter(expected)).total()
    if same == 0:
        return 0.0
    precision, recall = same / len(got), same / len(expected)
    return 2 * precision * recall / (precision + recall)
