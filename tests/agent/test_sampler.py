from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from agent.sampler import EXACT_COUNT, GROUPS, Sampler, highest
from backends.base import ALL_LOGITS, BackendError
from backends.onnx_session import flush_denormals
from wire.messages import Sampling

LOGITS = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))


def sampling(
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 1
) -> Sampling:
    return Sampling(16, (), temperature, top_k, top_p, seed)


def exact(logits: np.ndarray, settings: Sampling) -> np.ndarray:
    """Every token's probability, by sorting in float64."""
    order = np.argsort(-logits, kind="stable")[: settings.top_k or None]
    below = logits[order].astype(np.float64) - float(logits[order[0]])
    with np.errstate(over="ignore"):
        weights = np.exp(below / settings.temperature)
    weights /= weights.sum()
    before = np.cumsum(weights) - weights
    if settings.top_p < 1:
        weights[max(int(np.count_nonzero(before < settings.top_p)), 1) :] = 0
    probabilities = np.zeros(len(logits))
    probabilities[order] = weights / weights.sum()
    return probabilities


def draws(logits: np.ndarray, settings: Sampling, count: int) -> np.ndarray:
    sampler = Sampler(settings)
    return np.array([sampler.sample(logits, position) for position in range(count)])


def assert_drawn_from(probabilities: np.ndarray, drawn: np.ndarray) -> None:
    """Nothing impossible was drawn, and Pearson's chi-square is not beyond one in a million."""
    assert (probabilities[drawn] > 0).all()
    # Neighbours in a shuffled order share a bin, so that 20 draws are expected in each.
    order = np.random.default_rng(0).permutation(len(probabilities))
    expected = probabilities[order].cumsum() * len(drawn)
    bins = np.zeros(len(order), np.int64)
    bins[order] = np.unique((expected / 20).astype(np.int64), return_inverse=True)[1]
    wanted = np.bincount(bins, weights=probabilities) * len(drawn)
    found = np.bincount(bins[drawn], minlength=len(wanted))
    used = wanted > 1e-9
    freedom = int(np.count_nonzero(used)) - 1
    if freedom == 0:
        return
    square = float(((found - wanted)[used] ** 2 / wanted[used]).sum())
    # Wilson and Hilferty: its cube root is nearly normal.
    spread = 2 / (9 * freedom)
    deviations = ((square / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    assert deviations < 4.75


def test_greedy_takes_the_largest_and_the_lowest_id_on_ties() -> None:
    sampler = Sampler(sampling(temperature=0))
    assert sampler.sample(np.array([1, 3, 2], np.float32), 0) == 1
    assert sampler.sample(np.array([3, 1, 3], np.float32), 0) == 0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (sampling(), [0.5, 0.3, 0.15, 0.05]),
        (sampling(temperature=0.5), np.array([0.25, 0.09, 0.0225, 0.0025]) / 0.365),
        (sampling(top_k=2), [0.625, 0.375, 0, 0]),
        (sampling(top_k=1), [1, 0, 0, 0]),
        # 0.5 alone does not reach 0.6; 0.5 + 0.3 does.
        (sampling(top_p=0.6), [0.625, 0.375, 0, 0]),
        (sampling(top_p=0.5), [1, 0, 0, 0]),
        (sampling(top_p=0.0), [1, 0, 0, 0]),
        (sampling(top_k=3, top_p=0.9), np.array([0.5, 0.3, 0.15, 0]) / 0.95),
    ],
)
def test_frequencies_are_those_of_the_distribution(
    settings: Sampling, expected: list[float]
) -> None:
    drawn = draws(LOGITS, settings, 10_000)
    np.testing.assert_allclose(exact(LOGITS, settings), expected, atol=1e-6)
    assert_drawn_from(np.array(expected), drawn)


SETTINGS = [
    sampling(),
    sampling(temperature=0.5),
    sampling(temperature=2.0),
    sampling(top_k=40),
    sampling(top_k=GROUPS),
    sampling(top_k=GROUPS + 1),
    sampling(top_k=1 << 31),
    sampling(top_p=0.9),
    sampling(top_p=0.2),
    sampling(temperature=0.7, top_k=50, top_p=0.8),
    sampling(temperature=1.5, top_p=0.999),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=repr)
@pytest.mark.parametrize("spread", [0.3, 4.0])
@pytest.mark.parametrize("vocab", [1000, EXACT_COUNT + 1])
def test_large_vocabularies_are_drawn_from_exactly(
    vocab: int, spread: float, settings: Sampling
) -> None:
    """In float64 and in float32, of flat distributions and of such with a few likely tokens."""
    logits = np.random.default_rng(vocab).normal(0, spread, vocab).astype(np.float32)
    assert_drawn_from(exact(logits, settings), draws(logits, settings, 2_000))


def test_the_vocabulary_of_llama_3_is_drawn_from_exactly() -> None:
    logits = np.random.default_rng(3).normal(0, 2, 128_256).astype(np.float32)
    for settings in (sampling(), sampling(top_k=40), sampling(top_p=0.9)):
        assert_drawn_from(exact(logits, settings), draws(logits, settings, 1_000))


@pytest.mark.parametrize("vocab", [6, EXACT_COUNT + 7])
@pytest.mark.parametrize(
    "settings",
    [sampling(), sampling(top_k=4), sampling(top_p=0.5), sampling(temperature=0.3, top_p=0.7)],
    ids=repr,
)
def test_equal_huge_and_impossible_logits_are_drawn_from_exactly(
    vocab: int, settings: Sampling
) -> None:
    infinity = np.float32(np.inf)
    ids = np.arange(vocab)
    cases = {
        "all equal": np.zeros(vocab),
        "equal and huge": np.full(vocab, 3e38),
        "from one end to the other": np.where(ids % 2, 3e38, -3e38),
        "some impossible": np.where(ids % 3 == 1, 1.0, -infinity),
        "one possible": np.where(ids == vocab - 1, 0.0, -infinity),
        "ties of three": np.log(1 + ids // 3),
        "high": 80 + np.log(1 + ids % 4),
        "low": np.log(1 + ids % 4) - 120,
    }
    for name, values in cases.items():
        logits = values.astype(np.float32)
        probabilities = exact(logits, settings)
        drawn = draws(logits, settings, 500)
        assert (probabilities[drawn] > 0).all(), name
        assert_drawn_from(probabilities, drawn)


def test_of_equal_logits_top_k_and_top_p_keep_the_lowest_ids() -> None:
    logits = np.tile(np.array([0, 2, 2, 1], np.float32), 3 * GROUPS)
    likely = np.flatnonzero(logits == 2)
    assert highest(logits, 3).tolist() == likely[:3].tolist()
    assert highest(logits, len(likely) + 1).tolist() == sorted([*likely, 3])
    assert set(draws(logits, sampling(top_k=3), 200)) == set(likely[:3])
    share = 5 / np.exp(logits.astype(np.float64) - 2).sum()
    # As many as reach it: not a sixth one, nor only four.
    assert set(draws(logits, sampling(top_p=share * 0.999), 300)) == set(likely[:5])


def test_the_highest_are_those_of_a_sort() -> None:
    random = np.random.default_rng(5)
    for vocab in (5, GROUPS, 2 * GROUPS + 1, 9999):
        # Rounded, so that there are ties.
        logits = np.round(random.normal(0, 3, vocab), 1).astype(np.float32)
        for count in {1, 4, min(GROUPS, vocab - 1), vocab - 1}:
            wanted = np.sort(np.argsort(-logits, kind="stable")[:count])
            np.testing.assert_array_equal(highest(logits, count), wanted)


def test_equal_seeds_draw_equal_tokens_and_others_do_not() -> None:
    def draw(seed: int) -> list[int]:
        return [int(token) for token in draws(LOGITS, sampling(seed=seed), 50)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    # Another device goes on with what this one would have drawn.
    other = Sampler(sampling(seed=7))
    assert [other.sample(LOGITS, position) for position in range(20, 50)] == draw(7)[20:]


def test_tokens_of_a_seed_stay_the_same_from_version_to_version() -> None:
    """An answer that continues on a device with a newer release continues with the same tokens."""
    logits = np.linspace(0, 3, 5000, dtype=np.float32)
    drawn = {
        name: draws(logits, settings, 5).tolist()
        for name, settings in {
            "plain": sampling(seed=2**63 - 1),
            "top_k": sampling(top_k=40),
            "top_p": sampling(top_p=0.3),
        }.items()
    }
    assert drawn == {
        "plain": [4316, 4207, 2583, 3350, 2087],
        "top_k": [4973, 4962, 4975, 4970, 4985],
        "top_p": [4488, 4464, 4659, 4834, 4998],
    }


@pytest.mark.parametrize("vocab", [1000, EXACT_COUNT + 1])
def test_logits_may_be_near_0_or_far_from_it(vocab: int) -> None:
    """Only their differences count, wherever the highest one is."""
    steps = np.random.default_rng(8).integers(-16, 0, vocab, endpoint=True)
    steps[77] = 0
    logits = (steps / 4).astype(np.float32)
    settings = [*SETTINGS, replace(sampling(), min_p=0.1), replace(sampling(top_p=0.6), min_p=0.3)]
    for one in settings:
        expected = draws(logits, one, 60).tolist()
        for shift in (-500, -19, 14, 19, 21, 90):
            assert draws(logits + np.float32(shift), one, 60).tolist() == expected, (one, shift)


@pytest.mark.parametrize(
    "settings", [sampling(), sampling(top_k=40), sampling(top_p=0.9)], ids=repr
)
def test_drawing_takes_less_than_sorting_the_vocabulary(settings: Sampling) -> None:
    logits = np.random.default_rng(3).normal(0, 2, 128_256).astype(np.float32)
    sampler = Sampler(settings)

    def least_s(call: Callable[[int], object]) -> float:
        """Of the processor, which others may be busy with."""
        times_s = []
        for number in range(8):
            started_s = time.thread_time()
            call(number)
            times_s.append(time.thread_time() - started_s)
        return min(times_s)

    sorting_s = least_s(lambda _: np.argsort(-logits, kind="stable"))
    assert least_s(lambda position: sampler.sample(logits, position)) < sorting_s


def test_logits_are_left_as_they_are() -> None:
    logits = np.random.default_rng(1).normal(0, 1, 5000).astype(np.float32)
    before = logits.copy()
    for settings in SETTINGS:
        Sampler(settings).sample(logits, 1)
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize("temperature", [1e-300, 1e-38, 1e-5])
def test_a_tiny_temperature_takes_the_likeliest(temperature: float) -> None:
    flush_denormals()  # As in the thread of a stage.
    many = np.random.default_rng(2).permutation(6000)
    for logits in (LOGITS, -LOGITS, 100 * LOGITS, many / 100):
        sampler = Sampler(sampling(temperature=temperature))
        assert sampler.sample(logits.astype(np.float32), 3) == int(np.argmax(logits))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("wrong", [[1, math.nan, 2], [1, math.inf, 2], [-math.inf] * 3])
def test_logits_that_are_no_numbers_are_an_error(wrong: list[float], temperature: float) -> None:
    with pytest.raises(BackendError, match="not finite"):
        Sampler(sampling(temperature=temperature)).sample(np.array(wrong, np.float32), 0)


# ---- repetition penalty ------------------------------------------------------------------------

ONCE = np.array([2.0, -1.0, 1.9, 0.5, -0.9], np.float32)


def penalized(penalty: float, *tokens: int, temperature: float = 0.0) -> Sampling:
    return Sampling(16, (), temperature, repetition_penalty=penalty, penalized=tokens)


def test_logits_of_earlier_tokens_are_divided_or_multiplied_once() -> None:
    """As by transformers' RepetitionPenaltyLogitsProcessor."""
    # 2.0 / 1.25 = 1.6 falls behind 1.9; a token that came twice counts once.
    assert Sampler(penalized(1.25)).sample(ONCE, 0) == 0
    assert Sampler(penalized(1.25, 0)).sample(ONCE, 0) == 2
    assert Sampler(penalized(1.05, 0, 0, 0)).sample(ONCE, 0) == 0
    # -1.0 * 0.5 = -0.5 and -0.9 * 1.25 = -1.125: negative logits move the same way.
    low = np.array([-1.0, -0.9], np.float32)
    assert Sampler(penalized(0.5, 0)).sample(low, 0) == 0
    assert Sampler(penalized(1.25, 1)).sample(low, 0) == 0


def test_each_sampled_token_is_penalized_from_then_on() -> None:
    sampler = Sampler(penalized(10.0))
    # 0.2 is left of 2.0, 0.19 of 1.9 and 0.05 of 0.5. -1.0 and -0.9 have become -10 and -9.
    assert [sampler.sample(ONCE, position) for position in range(5)] == [0, 2, 3, 0, 0]
    assert ONCE[0] == 2.0, "the caller's logits are not changed"


def test_the_penalty_comes_before_temperature_top_k_and_top_p() -> None:
    before = (1, 5, 7, 300)
    logits = np.random.default_rng(5).normal(0, 2, 400).astype(np.float32)
    changed = logits.copy()
    for token in before:
        changed[token] *= 1.5 if changed[token] < 0 else 1 / 1.5
    for plain in (sampling(0.7, 50, 0.8), sampling(1.0, 3), sampling(1.0, 0, 0.9, seed=9)):
        settings = replace(plain, repetition_penalty=1.5, penalized=before)
        for position in range(50):
            expected = Sampler(plain).sample(changed, position)
            assert Sampler(settings).sample(logits, position) == expected


def test_a_sampler_that_is_told_the_earlier_tokens_continues_like_the_first() -> None:
    random = np.random.default_rng(1)
    rows = random.normal(0, 1, (40, 200)).astype(np.float32)
    settings = replace(sampling(), repetition_penalty=1.4, penalized=(1, 2, 3))
    whole = Sampler(settings)
    tokens = [whole.sample(row, position) for position, row in enumerate(rows)]
    later = Sampler(replace(settings, penalized=(1, 2, 3, *tokens[:25])))
    assert [later.sample(rows[at], at) for at in range(25, 40)] == tokens[25:]


def test_a_penalty_needs_all_logits() -> None:
    assert Sampler(penalized(1.1)).candidates == ALL_LOGITS
    assert Sampler(penalized(1.0)).candidates == 1
