"""Losses from the log-probabilities of an echo."""

from __future__ import annotations

from typing import Any

import pytest

from evaluation.errors import EvaluationError
from evaluation.losses import Loss
from evaluation.served import echoed_loss


def told(*tokens: tuple[str, float | None]) -> dict[str, Any]:
    return {
        "tokens": [text for text, _ in tokens],
        "token_logprobs": [value for _, value in tokens],
    }


def test_tokens_with_letters_of_the_answer_count() -> None:
    echo = told(("<s>", None), ("It is", -1), (" r", -2), ("ed", -3))
    assert echoed_loss(echo, " red") == Loss(2, 5)
    assert echoed_loss(echo, "d") == Loss(1, 3)  # A part of a token is the whole of it.
    assert echoed_loss(echo, "s red") == Loss(3, 6)


def test_pieces_of_a_character_are_joined() -> None:
    echo = told(("Say", None), (" ", -1), (r"bytes:\xf0\x9f", -2), (r"bytes:\xa6\x99", -4))
    assert echoed_loss(echo, "\U0001f999") == Loss(2, 6)
    assert echoed_loss(echo, " \U0001f999") == Loss(3, 7)


@pytest.mark.parametrize("expected", ["Red", "", "It red", "It"])
def test_an_answer_that_is_not_echoed_has_no_loss(expected: str) -> None:
    assert echoed_loss(told(("It", None), (" blue", -1)), expected) is None


@pytest.mark.parametrize(
    "logprobs",
    [
        {"tokens": ["It"]},
        {"tokens": [1], "token_logprobs": [-1]},
        {"tokens": ["It"], "token_logprobs": ["x"]},
        {"tokens": ["It", "x"], "token_logprobs": [-1]},
    ],
)
def test_other_answers_of_an_api_are_refused(logprobs: dict[str, Any]) -> None:
    with pytest.raises(EvaluationError, match="without log-probabilities"):
        echoed_loss(logprobs, "It")
