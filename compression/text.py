"""The user's text as sequences of tokens: most to learn from, some to measure with."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from evaluation.losses import Target


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences padded behind their ends.

    tokens: int64 [sequences, n]. real: bool, where a token is.
    predicts: bool, where what follows matters: from the last token before the expected ones on,
        so that a student also learns where an answer ends.
    """

    tokens: torch.Tensor
    real: torch.Tensor
    predicts: torch.Tensor


def batch_of(targets: Sequence[Target]) -> Batch:
    """Return the batch of some sequences."""
    longest = max(len(target.tokens) for target in targets)
    tokens = torch.zeros((len(targets), longest), dtype=torch.int64)
    real = torch.zeros((len(targets), longest), dtype=torch.bool)
    predicts = torch.zeros_like(real)
    for row, target in enumerate(targets):
        count = len(target.tokens)
        tokens[row, :count] = torch.tensor(target.tokens)
        real[row, :count] = True
        predicts[row, target.first - 1 : count] = True
    return Batch(tokens, real, predicts)


def batches(targets: Sequence[Target], most_tokens: int) -> Iterator[Batch]:
    """Yield all sequences in batches of similar lengths, of ``most_tokens`` with the padding."""
    waiting: list[Target] = []
    for target in sorted(targets, key=lambda one: len(one.tokens)):
        if waiting and len(target.tokens) * (len(waiting) + 1) > most_tokens:
            yield batch_of(waiting)
            waiting = []
        waiting.append(target)
    if waiting:
        yield batch_of(waiting)


def drawn(targets: Sequence[Target], most_tokens: int, seed: int, step: int) -> Batch:
    """Return the batch of a training step, which ``seed`` and ``step`` alone decide."""
    rng = random.Random(f"{seed} {step}")  # noqa: S311 - no secret
    chosen: list[Target] = []
    longest = 0
    while True:
        target = rng.choice(targets)
        longest = max(longest, len(target.tokens))
        if chosen and longest * (len(chosen) + 1) > most_tokens:
            return batch_of(chosen)
        chosen.append(target)


def divided(items: Sequence[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Return items to learn from and a ``share`` of them to measure with, drawn by ``seed``.

    Both have at least one of two or more items.
    """
    order = list(items)
    random.Random(seed).shuffle(order)  # noqa: S311 - no secret
    held = min(max(1, round(share * len(order))), max(0, len(order) - 1))
    return order[held:], order[:held]
