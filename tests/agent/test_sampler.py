from __future__ import annotations

import numpy as np
import pytest

from agent.sampler import Sampler
from wire.messages import Sampling

LOGITS = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))


def sampling(
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 1
) -> Sampling:
    return Sampling(16, (), temperature, top_k, top_p, seed)


def frequencies(settings: Sampling, draws: int = 20_000) -> np.ndarray:
    sampler = Sampler(settings)
    return np.bincount([sampler.sample(LOGITS, at) for at in range(draws)], minlength=4) / draws


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
    # Five standard deviations of 20,000 draws at most are 0.018.
    np.testing.assert_allclose(frequencies(settings), expected, atol=0.018)


def test_equal_seeds_draw_equal_tokens_and_others_do_not() -> None:
    def draw(seed: int) -> list[int]:
        sampler = Sampler(sampling(seed=seed))
        return [sampler.sample(LOGITS, position) for position in range(50)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    # Another device goes on with what this one would have drawn.
    other = Sampler(sampling(seed=7))
    assert [other.sample(LOGITS, position) for position in range(20, 50)] == draw(7)[20:]


@pytest.mark.parametrize("temperature", [1e-300, 1e-38, 1e-5])
def test_a_tiny_temperature_takes_the_likeliest(temperature: float) -> None:
    for logits in (LOGITS, -LOGITS, 100 * LOGITS):
        sampler = Sampler(sampling(temperature=temperature))
        assert sampler.sample(logits.astype(np.float32), 3) == int(np.argmax(logits))
