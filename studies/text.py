"""Tokens to measure sensitivities with: from items of the data that are not evaluated."""

from __future__ import annotations

import random

from evaluation.data import Data, windows
from evaluation.tasks import Tasks, answer_target
from model.tokenizer import Tokenizer


def other_sequences(
    data: Data, tasks: Tasks, tokenizer: Tokenizer, max_context: int, tokens: int
) -> list[list[int]]:
    """Return about ``tokens`` token ids of items that the tasks do not have, drawn by their seed.

    If the tasks have all items of the data, theirs are taken.
    """
    wishes = tasks.wishes
    chosen = set(tasks.items)
    others = [item for item in range(tasks.of) if item not in chosen] or sorted(chosen)
    random.Random(wishes.seed).shuffle(others)  # noqa: S311 - no secret
    pieces: list[tuple[list[int], int]] = []
    if data.kind == "text":
        window = min(wishes.window, max_context)
        pieces = windows(tokenizer.encode(data.text), window, min(wishes.stride, window))
    found: list[list[int]] = []
    left = tokens
    for item in others:
        if left < 1:
            break
        if data.kind == "text":
            sequence = pieces[item][0]
        else:
            question = data.questions[item]
            answer = next(iter(question.answers), wishes.no_answer)
            prompt = question.prompt(wishes.template)
            target = answer_target(prompt, answer, tokenizer, chat=wishes.chat)
            sequence = [] if target is None else list(target.tokens)
        sequence = sequence[: min(max_context, left)]
        if sequence:
            found.append(sequence)
            left -= len(sequence)
    return found
