"""Biases, penalties, min_p and log-probabilities, beside a sampler that is written out plainly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from agent.adjustments import Adjustments, FormatFailed
from agent.sampler import SMALLEST_LOGPROB, Sampler
from agent.sampling_limits import problem_of
from backends.base import ALL_LOGITS, BackendError
from model.generation import (
    MAX_BIAS,
    MAX_PENALTY,
    MAX_REPETITION_PENALTY,
    MAX_TEMPERATURE,
    MAX_TOP_K,
    MIN_REPETITION_PENALTY,
)
from model.grammar_process import GrammarFailed, GrammarProcessLost
from wire.limits import MAX_GRAMMAR_BYTES, MAX_LOGIT_BIASES
from wire.logprobs import MOST_TOP_LOGPROBS, decode_logprobs
from wire.messages import Sampling

VOCAB = 40
PLAIN = Sampling(16, (0,), temperature=1.0, seed=3)


def reference(
    logits: np.ndarray,
    sampling: Sampling,
    prompt: Sequence[int] = (),
    answer: Sequence[int] = (),
    allowed: Sequence[int] | None = None,
) -> np.ndarray:
    """Every token's probability, token by token in float64."""
    values = [float(value) for value in logits]
    for token, bias in sampling.logit_bias:
        values[token] += bias
    for token in {*prompt, *answer}:
        factor = sampling.repetition_penalty
        values[token] = values[token] * factor if values[token] < 0 else values[token] / factor
    for token, times in Counter(answer).items():
        values[token] -= times * sampling.frequency_penalty + sampling.presence_penalty
    if allowed is not None:
        values = [x if token in allowed else -np.inf for token, x in enumerate(values)]
    ranked = sorted(range(len(values)), key=lambda token: (-values[token], token))
    ranked = [token for token in ranked if values[token] > -np.inf]
    if sampling.temperature == 0:
        return np.array([float(token == ranked[0]) for token in range(len(values))])
    kept = ranked[: sampling.top_k or None]
    weights = {
        token: np.exp((values[token] - values[kept[0]]) / sampling.temperature) for token in kept
    }
    total, before, chosen = sum(weights.values()), 0.0, list[int]()
    for token in kept:
        if before < sampling.top_p * total or not chosen:
            chosen.append(token)
        before += weights[token]
    chosen = [token for token in chosen if weights[token] >= sampling.min_p]
    probabilities = np.zeros(len(values))
    for token in chosen:
        probabilities[token] = weights[token] / sum(weights[other] for other in chosen)
    return probabilities


SETTINGS = {
    "bias": replace(PLAIN, logit_bias=((1, 3.0), (2, -100.0), (7, 0.5))),
    "presence": replace(PLAIN, presence_penalty=1.5),
    "frequency": replace(PLAIN, frequency_penalty=0.7),
    "both, rewarded": replace(PLAIN, frequency_penalty=-0.4, presence_penalty=-0.3),
    "repetition": replace(PLAIN, repetition_penalty=1.8),
    "min_p": replace(PLAIN, min_p=0.2),
    "min_p 1": replace(PLAIN, min_p=1.0),
    "min_p, hot": replace(PLAIN, min_p=0.1, temperature=1.7),
    "min_p and top_p": replace(PLAIN, min_p=0.15, top_p=0.8),
    "all": replace(
        PLAIN,
        temperature=0.8,
        top_k=20,
        top_p=0.95,
        min_p=0.02,
        repetition_penalty=1.1,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        logit_bias=((3, 2.0), (30, 1.0)),
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_draws_are_those_of_a_sampler_that_is_written_out(name: str) -> None:
    random = np.random.default_rng(len(name))
    settings = SETTINGS[name]
    logits = random.normal(0, 2, VOCAB).astype(np.float32)
    prompt, answer = random.integers(0, VOCAB, 8).tolist(), random.integers(0, 12, 12).tolist()
    expected = reference(logits, settings, prompt, answer)
    told = replace(settings, penalized=tuple({*prompt, *answer}), answer=tuple(answer))
    count = 4000
    drawn = np.array([Sampler(told).sample(logits, position) for position in range(count)])
    frequencies = np.bincount(drawn, minlength=VOCAB) / count
    assert (expected[drawn] > 0).all()
    deviations = (frequencies - expected) / np.sqrt(expected * (1 - expected) / count + 1e-9)
    assert np.abs(deviations).max() < 5
    greedy = replace(told, temperature=0)
    best = Sampler(greedy).sample(logits, 0)
    assert reference(logits, greedy, prompt, answer)[best] == 1


@pytest.mark.parametrize("vocab", [VOCAB, 9000])
@pytest.mark.parametrize("name", SETTINGS)
def test_an_answer_goes_on_equally_on_another_device(name: str, vocab: int) -> None:
    """The other device is told the answer so far, and nothing else."""
    random = np.random.default_rng(5)
    prompt = [4, 9, 9, 30]
    rows = random.normal(0, 3, (60, vocab)).astype(np.float32)
    first = Sampler(replace(SETTINGS[name], penalized=tuple(set(prompt))))
    answer = [first.sample(row, 4 + at) for at, row in enumerate(rows)]
    for cut in (1, 17, 59):
        told = tuple(answer[:cut])
        other = Sampler(replace(SETTINGS[name], penalized=tuple({*prompt, *told}), answer=told))
        rest = [other.sample(row, 4 + cut + at) for at, row in enumerate(rows[cut:])]
        assert rest == answer[cut:]


@pytest.mark.parametrize("vocab", [5, 3000, 128_256])
def test_logprobs_are_those_of_the_whole_distribution(vocab: int) -> None:
    logits = np.random.default_rng(vocab).normal(0, 4, vocab).astype(np.float32)
    exact = logits.astype(np.float64) - logits.max()
    exact -= np.log(np.exp(exact).sum())
    ranked = np.argsort(-exact, kind="stable")
    for top in (0, 3, MOST_TOP_LOGPROBS):
        sampler = Sampler(replace(PLAIN, temperature=0.3, top_logprobs=top, min_p=0.9))
        assert sampler.tells_logprobs
        assert sampler.candidates == ALL_LOGITS
        token = vocab // 2
        told = decode_logprobs(sampler.logprobs(logits, token), token=token, top=top, vocab=vocab)
        assert told.logprob == pytest.approx(exact[token], abs=1e-5)
        assert [other for other, _ in told.top] == ranked[:top].tolist()
        assert [value for _, value in told.top] == pytest.approx(exact[ranked[:top]], abs=1e-5)


def test_an_impossible_token_has_a_logprob_that_json_can_hold() -> None:
    logits = np.array([0, -np.inf, 1], np.float32)
    told = decode_logprobs(
        Sampler(replace(PLAIN, top_logprobs=3)).logprobs(logits, 1), token=1, top=3, vocab=3
    )
    assert told.logprob == SMALLEST_LOGPROB
    assert [token for token, _ in told.top] == [2, 0, 1]


def test_nothing_is_adjusted_where_nothing_is_asked() -> None:
    assert Adjustments.of(PLAIN, None) is None
    assert Adjustments.of(replace(PLAIN, min_p=0.5, top_logprobs=3), None) is None
    assert Sampler(replace(PLAIN, temperature=0)).candidates == 1
    for name in ("bias", "presence", "frequency", "repetition"):
        assert Sampler(replace(SETTINGS[name], temperature=0)).candidates == ALL_LOGITS


class Allowing:
    """A matcher that allows the same tokens each time."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.accepted: list[int] = []
        mask = np.zeros(VOCAB - VOCAB % 8, np.uint8)
        mask[list(tokens)] = 1
        self._bits = np.packbits(mask, bitorder="little").tobytes()

    @property
    def is_ready(self) -> bool:
        return True

    def allowed(self) -> bytes:
        return self._bits

    def accept(self, token: int) -> None:
        self.accepted.append(token)


def test_only_tokens_that_the_grammar_allows_are_drawn() -> None:
    random = np.random.default_rng(1)
    allowed = [3, 8, 21, 39]
    matcher = Allowing(allowed)
    sampler = Sampler(PLAIN, matcher)
    rows = random.normal(0, 2, (300, VOCAB)).astype(np.float32)
    drawn = [sampler.sample(row, at) for at, row in enumerate(rows)]
    assert set(drawn) == set(allowed)
    assert matcher.accepted == drawn
    greedy = Sampler(replace(PLAIN, temperature=0), matcher)
    for row in rows[:20]:
        best = greedy.sample(row, 0)
        assert reference(row, replace(PLAIN, temperature=0), allowed=allowed)[best] == 1


def test_where_one_stop_token_may_come_all_may_and_none_is_followed() -> None:
    matcher = Allowing([5])
    logits = np.zeros(VOCAB, np.float32)
    logits[7] = 9
    sampler = Sampler(replace(PLAIN, stop_tokens=(5, 7, 10**6), temperature=0), matcher)
    assert sampler.sample(logits, 0) == 7
    assert matcher.accepted == []


def test_a_grammar_that_fails_or_allows_nothing_ends_the_sequence() -> None:
    class Failing(Allowing):
        def allowed(self) -> bytes:
            raise GrammarFailed("it takes too much")

    logits = np.zeros(VOCAB, np.float32)
    with pytest.raises(FormatFailed, match="format cannot be kept: it takes too much"):
        Sampler(PLAIN, Failing([])).sample(logits, 0)
    with pytest.raises(FormatFailed, match="allows no token"):
        Sampler(PLAIN, Allowing([])).sample(logits, 0)


def test_a_device_that_cannot_follow_a_grammar_blames_none() -> None:
    class Helpless(Allowing):
        def allowed(self) -> bytes:
            raise GrammarProcessLost("20 MiB are free")

    with pytest.raises(BackendError, match="cannot follow the answer's format: 20 MiB") as raised:
        Sampler(PLAIN, Helpless([])).sample(np.zeros(VOCAB, np.float32), 0)
    assert not isinstance(raised.value, FormatFailed)


@pytest.mark.parametrize(
    "wrong",
    [
        {"logit_bias": ((VOCAB, 1.0),)},
        {"logit_bias": ((-1, 1.0),)},
        {"logit_bias": ((1, 1.0), (1, 2.0))},
        {"logit_bias": tuple((token, 0.0) for token in range(MAX_LOGIT_BIASES + 1))},
        {"answer": (VOCAB,)},
        {"penalized": (-1,)},
        {"stop_tokens": (-1,)},
        {"min_p": 1.5},
        {"min_p": -0.1},
        {"top_logprobs": MOST_TOP_LOGPROBS + 1},
        {"top_logprobs": -2},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 1e-50},
        {"repetition_penalty": 1e308},
        {"presence_penalty": 1e308},
        {"frequency_penalty": -1e308},
        {"logit_bias": ((1, -1e308),)},
        {"temperature": -0.1},
        {"temperature": 1e308},
        {"top_k": -1},
        {"top_k": 1 << 62},
        {"top_p": -0.1},
        {"top_p": 1.1},
        {"max_tokens": 0},
        {"max_tokens": 1 << 62},
        {"grammar": b"\xff"},
        {"grammar": b"x" * (MAX_GRAMMAR_BYTES + 1)},
        {"seed": -1},
    ],
    ids=repr,
)
def test_settings_that_no_coordinator_sends_are_refused(wrong: dict[str, object]) -> None:
    vocab = MAX_LOGIT_BIASES + 5 if len(str(wrong)) > 5000 else VOCAB
    assert problem_of(replace(PLAIN, **wrong), vocab) is not None  # type: ignore[arg-type]  # by name
    assert problem_of(PLAIN, VOCAB) is None


def test_extreme_settings_and_logits_give_a_token_or_a_named_error() -> None:
    """No NaN comes of finite numbers, and no warning, which would be an error here."""
    random = np.random.default_rng(5)
    largest = np.finfo(np.float32).max
    odd = np.array([largest, -largest, 1e-45, -1e-45, 0, 90, -np.inf, np.inf], np.float32)
    signalling = np.array([0x7FA00000], np.uint32).view(np.float32)
    drawn = 0
    for case in range(1500):
        pick = random.choice
        vocab = int(pick((3, VOCAB, 2100)))
        logits = pick(odd[: pick((3, 6, 7, 8))], vocab)
        if case % 10 == 0:
            logits[pick(vocab)] = pick((np.float32(np.nan), signalling[0]))
        tokens = tuple(int(token) for token in random.permutation(vocab)[:3])
        sampling = Sampling(
            1 << 31,
            (0,),
            temperature=pick((0.0, 5e-324, 1e-38, 1.0, MAX_TEMPERATURE)),
            top_k=int(pick((0, 1, 2, MAX_TOP_K))),
            top_p=pick((0.0, 5e-324, 0.5, 1.0)),
            min_p=pick((0.0, 5e-324, 1.0)),
            repetition_penalty=pick((MIN_REPETITION_PENALTY, 1.0, MAX_REPETITION_PENALTY)),
            penalized=tokens,
            answer=tokens,
            presence_penalty=pick((-MAX_PENALTY, 0.0, MAX_PENALTY)),
            frequency_penalty=pick((-MAX_PENALTY, 0.0, MAX_PENALTY)),
            logit_bias=tuple((token, pick((-MAX_BIAS, MAX_BIAS))) for token in tokens),
            top_logprobs=2,
        )
        assert problem_of(sampling, vocab) is None
        sampler = Sampler(sampling, Allowing([0, 1, 2]) if case % 2 else None)
        try:
            token = sampler.sample(logits, case)
            told = decode_logprobs(sampler.logprobs(logits, token), token=token, top=2, vocab=vocab)
        except BackendError:
            continue
        drawn += 1
        assert np.isfinite([logprob for _, logprob in told.top]).all()
    assert drawn > 500
