"""Answers and names in a text, from the scores that an encoder gives to each token."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from model.tokenizer import EncodedText

Scores = npt.NDArray[Any]

MOST_ANSWER_TOKENS = 30
"""The longest answer, as BERT's authors scored SQuAD."""

BEST_ENDS = 20
"""The tokens at which answers are tried to begin and to end."""

LEAST_WINDOW = 8
"""A question must leave room for so many tokens of the text."""

MOST_WINDOWS = 2048
"""The most parts of a text. Small parts of a long text would fill the memory."""


@dataclass(frozen=True, slots=True)
class Span:
    """A part of the text, at characters [start, end).

    score: its probability among all parts of the text that are short enough.
    """

    text: str
    start: int
    end: int
    score: float


@dataclass(frozen=True, slots=True)
class Entity:
    """Neighbouring tokens of one class. Its score is the mean of theirs."""

    label: str
    start: int
    end: int
    score: float

    def to_json(self) -> dict[str, Any]:
        return {"label": self.label, "start": self.start, "end": self.end, "score": self.score}


def windows(
    encode: Callable[[str, str | None], EncodedText], question: str, context: str, most: int
) -> list[EncodedText]:
    """Return the question with parts of the text, each of at most ``most`` tokens.

    Parts overlap by a quarter. Offsets are those of the whole text. Raises ValueError if the
    question leaves too little room for the text.
    """
    whole = encode(question, context)
    if len(whole.tokens) <= most:
        return [whole]
    own = [index for index, part in enumerate(whole.parts) if part == 1]
    room = most - (len(whole.tokens) - len(own))
    if room < LEAST_WINDOW:
        raise ValueError(f"it leaves no room for the text in a context of {most} tokens")
    step = max(room - room // 4, 1)
    before, after = whole.parts.index(1), own[-1] + 1
    found = []
    begins = range(0, max(len(own) - room + step, 1), step)
    if len(begins) > MOST_WINDOWS:
        raise ValueError(
            f"beside it the text takes {len(begins)} parts of {room} tokens, and at most "
            f"{MOST_WINDOWS} are read: shorten the text"
        )
    for begin in begins:
        kept = [*range(before), *own[begin : begin + room], *range(after, len(whole.tokens))]
        found.append(
            EncodedText(
                tuple(whole.tokens[index] for index in kept),
                min(whole.second, len(kept)),
                tuple(whole.parts[index] for index in kept),
                tuple(whole.offsets[index] for index in kept),
            )
        )
    return found


def best_spans(
    context: str,
    texts: Sequence[EncodedText],
    scores: Sequence[Scores],
    top: int,
    *,
    may_lack: bool = False,
) -> list[Span]:
    """Return the parts of a text that answer a question best, the best first.

    scores: of each window [tokens, 2], how well an answer begins and ends at a token.
    may_lack: an empty answer is one of them, if the text may lack the answer, as in SQuAD 2.0. Its
        score is that of each window's first token, in the window where that is least.
    """
    logits: dict[tuple[int, int], float] = {}
    for text, rows in zip(texts, scores, strict=True):
        for start, end, score in _candidates(text, rows.astype(np.float64)):
            logits[start, end] = max(score, logits.get((start, end), -np.inf))
    if not logits:
        return []
    if may_lack:
        logits[0, 0] = min(float(rows[0, 0]) + float(rows[0, 1]) for rows in scores)
    values = np.array(list(logits.values()))
    shares = np.exp(values - values.max())
    shares /= shares.sum()
    spans = [
        Span(context[start:end], start, end, float(share))
        for (start, end), share in zip(logits, shares, strict=True)
    ]
    return heapq.nlargest(top, spans, key=lambda span: span.score)


def _candidates(text: EncodedText, rows: Scores) -> Iterator[tuple[int, int, float]]:
    """Yield likely answers in a window: characters [start, end), and the sum of two scores."""
    own = np.array([index for index, part in enumerate(text.parts) if part == 1])
    if not len(own):
        return
    begins = own[np.argsort(-rows[own, 0], kind="stable")[:BEST_ENDS]]
    ends = own[np.argsort(-rows[own, 1], kind="stable")[:BEST_ENDS]]
    for begin in begins.tolist():
        for end in ends.tolist():
            if begin <= end < begin + MOST_ANSWER_TOKENS:
                score = float(rows[begin, 0] + rows[end, 1])
                yield text.offsets[begin][0], text.offsets[end][1], score


def entities(text: EncodedText, shares: Scores, names: Sequence[str]) -> list[Entity]:
    """Return runs of tokens of one class, without those of the class O.

    Classes may begin with B- and I-, as in names of persons. B- begins a new run.

    shares: probabilities of each token's classes [tokens, classes].
    """
    found: list[tuple[str, int, int, list[float]]] = []
    last = -1
    for index, (part, row) in enumerate(zip(text.parts, shares, strict=True)):
        start, end = text.offsets[index]
        label = names[int(row.argmax())]
        if part < 0 or start == end or label == "O":
            continue
        begins = label.startswith("B-")
        label = label[2:] if label[:2] in ("B-", "I-") else label
        if found and not begins and last == index - 1 and found[-1][0] == label:
            found[-1] = (label, found[-1][1], end, [*found[-1][3], float(row.max())])
        else:
            found.append((label, start, end, [float(row.max())]))
        last = index
    return [
        Entity(label, start, end, sum(scores) / len(scores)) for label, start, end, scores in found
    ]
