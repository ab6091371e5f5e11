"""Limits of the settings that a coordinator may send. Others are refused before use."""

from __future__ import annotations

from collections.abc import Sequence

from model.generation import (
    MAX_BIAS,
    MAX_PENALTY,
    MAX_REPETITION_PENALTY,
    MAX_TEMPERATURE,
    MAX_TOP_K,
    MIN_REPETITION_PENALTY,
)
from wire.limits import MAX_GRAMMAR_BYTES, MAX_LOGIT_BIASES
from wire.logprobs import MOST_TOP_LOGPROBS
from wire.messages import Sampling

_RANGES: dict[str, tuple[float, float]] = {
    "max_tokens": (1, 1 << 31),
    "temperature": (0, MAX_TEMPERATURE),
    "top_k": (0, MAX_TOP_K),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "seed": (0, (1 << 63) - 1),
    "repetition_penalty": (MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY),
    "presence_penalty": (-MAX_PENALTY, MAX_PENALTY),
    "frequency_penalty": (-MAX_PENALTY, MAX_PENALTY),
    "top_logprobs": (-1, MOST_TOP_LOGPROBS),
}


def problem_of(sampling: Sampling, vocab: int) -> str | None:
    """Return what is wrong with ``sampling`` for a model of ``vocab`` tokens, or None."""
    for name, (low, high) in _RANGES.items():
        if not low <= getattr(sampling, name) <= high:
            return f"the coordinator sent a {name} that is not between {low:g} and {high:g}"
    if not _are_tokens(sampling.penalized, vocab):
        return "the coordinator sent penalized tokens that do not fit"
    biased = [token for token, _ in sampling.logit_bias]
    if not _are_tokens(biased, vocab) or len(set(biased)) < len(biased):
        return "the coordinator sent biased tokens that do not fit"
    if not all(-MAX_BIAS <= bias <= MAX_BIAS for _, bias in sampling.logit_bias):
        return f"the coordinator sent a bias that is not between {-MAX_BIAS:g} and {MAX_BIAS:g}"
    if len(biased) > MAX_LOGIT_BIASES or len(sampling.grammar) > MAX_GRAMMAR_BYTES:
        return "the coordinator sent a bias or a grammar that is too large"
    if not _are_tokens(sampling.answer, vocab) or min(sampling.stop_tokens, default=0) < 0:
        return "the coordinator sent tokens outside the vocabulary"
    try:
        sampling.grammar.decode()
    except UnicodeDecodeError:
        return "the coordinator sent a grammar that is no text"
    return None


def _are_tokens(tokens: Sequence[int], vocab: int) -> bool:
    return all(0 <= token < vocab for token in tokens)
