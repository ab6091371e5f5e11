"""Logits of a divided vocabulary, put together from what members send."""

from __future__ import annotations

import numpy as np
import pytest

from agent.sampler import Sampler
from agent.team_logits import JoinedLogits, encode_logits, pick
from backends.base import ALL_LOGITS, Array, BackendError
from wire.errors import ProtocolError
from wire.messages import Sampling, TeamLogits

VOCAB = 3000
SPANS = ((0, 1100), (1100, 1900), (1900, VOCAB))


def joined(logits: Array, wanted: int) -> Array:
    """The lead's logits, if every member sends what is wanted of its own."""
    whole = JoinedLogits(VOCAB)
    for _ in range(2):  # Memory is used again.
        whole.begin(len(logits))
        for index, (begin, end) in enumerate(SPANS):
            best, ids = pick(logits[:, begin:end], begin, wanted)
            if index == 0:
                whole.put(best, ids, begin)
            else:
                payload = encode_logits(best, ids)
                message = TeamLogits(1, 1, len(best), best.shape[1], begin)
                whole.take(message, payload, wanted)
    return whole.logits


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(9, ()),
        Sampling(9, (), temperature=0.8, top_k=1, seed=1),
        Sampling(9, (), temperature=0.8, top_k=7, seed=2),
        Sampling(9, (), temperature=0.8, top_k=1000, top_p=0.7, seed=3),
        Sampling(9, (), temperature=1.2, top_p=0.9, seed=4),
        Sampling(9, (), temperature=1.2, seed=5),
        Sampling(9, (), repetition_penalty=1.3, penalized=tuple(range(0, VOCAB, 3))),
        Sampling(
            9, (), 0.8, 7, seed=6, repetition_penalty=0.7, penalized=tuple(range(0, VOCAB, 2))
        ),
    ],
)
def test_tokens_are_those_of_all_logits(sampling: Sampling) -> None:
    random = np.random.default_rng(7)
    for position in range(40):
        logits = random.standard_normal((2, VOCAB)).astype(np.float32)
        if position % 2:
            logits = np.round(logits)  # Many are equal, and the lowest ids count.
        parts = joined(logits, Sampler(sampling).candidates)
        for row, whole in zip(parts, logits, strict=True):
            drawn = [Sampler(sampling).sample(these, position) for these in (row, whole)]
            assert drawn[0] == drawn[1]


@pytest.mark.parametrize("wanted", [1, 5])
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_named(wanted: int, wrong: float) -> None:
    logits = np.zeros((1, 100), np.float32)
    logits[0, 40] = wrong
    with pytest.raises(BackendError, match="not finite"):
        pick(logits, 0, wanted)


@pytest.mark.parametrize(
    ("message", "size"),
    [
        (TeamLogits(1, 1, 2, 1, 0), 8),
        (TeamLogits(1, 1, 1, 0, 0), 0),
        (TeamLogits(1, 1, 1, -1, 0), 0),
        (TeamLogits(1, 1, 1, 3, 0), 24),
        (TeamLogits(1, 1, 1, 2, 0), 12),
        (TeamLogits(1, 1, 1, 2, VOCAB - 1), 8),
        (TeamLogits(1, 1, 1, 2, -1), 8),
        (TeamLogits(1, 1, 1, 1 << 40, 0), 8),
    ],
)
def test_logits_that_do_not_fit_are_refused(message: TeamLogits, size: int) -> None:
    whole = JoinedLogits(VOCAB)
    whole.begin(1)
    with pytest.raises(ProtocolError):
        whole.take(message, memoryview(bytes(size)), 2)
    assert (whole.logits == -np.inf).all()


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_tokens_outside_the_vocabulary_are_refused(token: int) -> None:
    whole = JoinedLogits(VOCAB)
    whole.begin(1)
    payload = encode_logits(np.zeros((1, 1), np.float32), np.array([[token]], np.int32))
    with pytest.raises(ProtocolError, match="outside the vocabulary"):
        whole.take(TeamLogits(1, 1, 1, 1, 0), payload, ALL_LOGITS)
