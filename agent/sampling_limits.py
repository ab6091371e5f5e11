"""Limits of the settings that a coordinator may send. Others are refused before use."""

from __future__ import annotations

from collections.abc import Sequence

from wire.limits import MAX_GRAMMAR_BYTES, MAX_LOGIT_BIASES
from wire.logprobs import MOST_TOP_LOGPROBS
from wire.messages import Sampling


def problem_of(sampling: Sampling, vocab: int) -> str | None:
    """Return what is wrong with ``sampling`` for a model of ``vocab`` tokens, or None."""
    if not sampling.repetition_penalty > 0 or not _are_tokens(sampling.penalized, vocab):
        return "the coordinator sent penalized tokens that do not fit"
    biased = [token for token, _ in sampling.logit_bias]
    if not _are_tokens(biased, vocab) or len(set(biased)) < len(biased):
        return "the coordinator sent biased tokens that do not fit"
    if len(biased) > MAX_LOGIT_BIASES or len(sampling.grammar) > MAX_GRAMMAR_BYTES:
        return "the coordinator sent a bias or a grammar that is too large"
    if not _are_tokens(sampling.answer, vocab) or min(sampling.stop_tokens, default=0) < 0:
        return "the coordinator sent tokens outside the vocabulary"
    if not 0 <= sampling.min_p <= 1 or not -1 <= sampling.top_logprobs <= MOST_TOP_LOGPROBS:
        return "the coordinator sent sampling settings that do not fit"
    try:
        sampling.grammar.decode()
    except UnicodeDecodeError:
        return "the coordinator sent a grammar that is no text"
    return "the seed is negative" if sampling.seed < 0 else None


def _are_tokens(tokens: Sequence[int], vocab: int) -> bool:
    return all(0 <= token < vocab for token in tokens)
