"""Text to measure a model with: the passages that come with the package, or a user's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

SEQUENCE_TOKENS = 128
MAX_TOKENS = 1024


def built_in_text() -> list[str]:
    """Passages of the calibration text that comes with the package."""
    return passages_of(Path(__file__).with_name("passages.txt").read_text(encoding="utf-8"))


def passages_of(text: str) -> list[str]:
    """Passages of a text, which blank lines separate; line ends inside one become spaces."""
    passages = (" ".join(part.split()) for part in text.split("\n\n"))
    return [passage for passage in passages if passage]


def split_passages(
    passages: Iterable[Sequence[int]],
    sequence_tokens: int = SEQUENCE_TOKENS,
    max_tokens: int = MAX_TOKENS,
) -> list[list[int]]:
    """Cut passages into sequences to calibrate with, of ``max_tokens`` tokens in total.

    A position sees nothing from before its cut. Sequences of one token are dropped.
    """
    sequences: list[list[int]] = []
    left = max_tokens
    for passage in passages:
        for begin in range(0, len(passage), sequence_tokens):
            piece = list(passage[begin : begin + min(sequence_tokens, left)])
            if len(piece) < 2:
                continue
            sequences.append(piece)
            left -= len(piece)
            if left < 2:
                return sequences
    return sequences
