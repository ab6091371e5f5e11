"""Greedy decoding by the reference model, to compare answers with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from model.reference import ReferenceModel


@dataclass(frozen=True, slots=True)
class Generation:
    """A greedy continuation; ``margins[i]`` is by how much the logit of token i beat the next."""

    tokens: list[int]
    margins: list[float]


def generate_greedy(model: ReferenceModel, prompt: Sequence[int], max_tokens: int) -> Generation:
    """Continue ``prompt`` by the most likely token, ``max_tokens`` times, ignoring eos."""
    tokens: list[int] = []
    margins: list[float] = []
    logits = model.forward(prompt)[-1]
    while True:
        second, first = np.partition(logits, -2)[-2:]
        tokens.append(int(logits.argmax()))
        margins.append(float(first - second))
        if len(tokens) == max_tokens:
            return Generation(tokens, margins)
        logits = model.forward(tokens[-1:], len(prompt) + len(tokens) - 1)[-1]
