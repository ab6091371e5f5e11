"""Guessing the next tokens, and how many guesses a pass checks."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from agent.drafts import SIZES, History, Pacer
from wire import limits


def history(*tokens: int) -> History:
    return History(np.array(tokens, np.int64), 100)


def test_what_followed_before_is_guessed_again() -> None:
    one = history(5, 6, 7, 8, 9, 1, 2, 5, 6)
    assert one.guess(4) == ((7, 8, 9, 1), 2)
    one.append((7,))
    assert one.guess(3) == ((8, 9, 1), 3)
    one.append((0,))
    assert one.guess(3) == ((), 0)


def test_the_longest_match_decides_and_of_equal_ones_the_newest() -> None:
    assert history(1, 2, 3, 10, 2, 3, 20, 1, 2, 3).guess(1) == ((10,), 3)
    assert history(2, 3, 10, 2, 3, 20, 7, 2, 3).guess(1) == ((20,), 2)


def test_a_match_that_ends_too_soon_is_taken_to_repeat() -> None:
    assert history(4, 1, 1, 1).guess(5) == ((1,) * 5, 2)
    assert history(8, 1, 2, 1, 2).guess(5) == ((1, 2, 1, 2, 1), 2)


@pytest.mark.parametrize("tokens", [(), (1,), (1, 2), (1, 2, 3, 4), (1, 2, 2)])
def test_nothing_is_guessed_without_a_match(tokens: tuple[int, ...]) -> None:
    assert history(*tokens).guess(5) == ((), 0)


def test_guesses_are_those_of_a_plain_search() -> None:
    rng = random.Random(0)
    for _ in range(300):
        tokens = [rng.randrange(4) for _ in range(rng.randrange(40))]
        best, end = 0, 0
        for at in range(2, len(tokens)):
            length = 0
            while length < min(at, 16) and tokens[at - 1 - length] == tokens[-1 - length]:
                length += 1
            if length >= max(2, best):
                best, end = length, at
        guesses, matched = history(*tokens).guess(6)
        assert matched == best
        assert guesses == tuple(
            tokens[end + at % (len(tokens) - end)] for at in range(6 * bool(best))
        )


# ---- how many ----------------------------------------------------------------------------------

Cost = Callable[[int], float]
"""Seconds of a pass by its guesses."""


def tokens_per_s(
    pacer: Pacer, cost_s: Cost, right: Callable[[], int], matched: int, tokens: int
) -> float:
    """Simulate an answer: ``right`` says how many guesses in a row would be right now."""
    made, seconds = 0, 0.0
    while made < tokens:
        guesses = pacer.choose(limits.DRAFT_TOKENS, matched)
        accepted = min(right(), guesses)
        took_s = cost_s(guesses)
        pacer.note(took_s, guesses, accepted, matched)
        made += 1 + accepted
        seconds += took_s
    return made / seconds


def slow_links(guesses: int) -> float:
    return 0.030 + 0.0005 * guesses


def slow_chip(guesses: int) -> float:
    return 0.010 * (1 + guesses)


def steps(guesses: int) -> float:
    """Two rows cost what one costs, and three cost three times as much."""
    return 0.002 if guesses <= 1 else 0.0065 + 0.0003 * guesses if guesses < 8 else 0.025


@pytest.mark.parametrize("matched", [2, 5, 16])
@pytest.mark.parametrize("cost_s", [slow_links, slow_chip, steps])
@pytest.mark.parametrize("tokens", [128, 2000])
def test_wrong_guesses_cost_less_than_three_hundredths(
    cost_s: Cost, matched: int, tokens: int
) -> None:
    speed = tokens_per_s(Pacer(), cost_s, lambda: 0, matched, tokens)
    assert speed * cost_s(0) > 0.97


@pytest.mark.parametrize("cost_s", [slow_links, slow_chip, steps])
@pytest.mark.parametrize("chance", [0.02, 0.2, 0.5, 0.8])
def test_guesses_that_are_sometimes_right_never_cost_more_than_that(
    cost_s: Cost, chance: float
) -> None:
    rng = random.Random(1)

    def right() -> int:
        count = 0
        while rng.random() < chance and count < 20:
            count += 1
        return count

    assert tokens_per_s(Pacer(), cost_s, right, 5, 1000) * cost_s(0) > 0.97


@pytest.mark.parametrize(("cost_s", "gain"), [(slow_links, 8.0), (steps, 1.9)])
def test_right_guesses_pay(cost_s: Cost, gain: float) -> None:
    assert tokens_per_s(Pacer(), cost_s, lambda: 99, 16, 400) * cost_s(0) > gain


def test_rows_that_cost_as_much_as_passes_are_not_added() -> None:
    assert tokens_per_s(Pacer(), slow_chip, lambda: 99, 16, 1000) * slow_chip(0) > 0.97


def test_a_text_that_begins_to_repeat_is_noticed() -> None:
    pacer = Pacer()
    tokens_per_s(pacer, slow_links, lambda: 0, 16, 1000)
    assert tokens_per_s(pacer, slow_links, lambda: 99, 16, 1000) * slow_links(0) > 3


def test_one_slow_pass_is_not_believed_for_ever() -> None:
    pacer = Pacer()
    slow = iter([1.0])

    def cost_s(guesses: int) -> float:
        return slow_links(guesses) + (next(slow, 0.0) if guesses else 0.0)

    tokens_per_s(pacer, cost_s, lambda: 99, 16, 300)
    assert tokens_per_s(pacer, cost_s, lambda: 99, 16, 400) * slow_links(0) > 8


def test_no_more_is_guessed_than_there_is() -> None:
    pacer = Pacer()
    for _ in range(5):
        pacer.note(0.03, 0, 0, 0)
    assert pacer.choose(0, 16) == 0
    assert pacer.choose(2, 16) == 1  # More are tried once the time of one is known.
    pacer.note(0.03, 1, 1, 16)
    assert pacer.choose(2, 16) == 2
    assert SIZES[-1] == limits.DRAFT_TOKENS


def test_nothing_is_guessed_before_single_rows_were_measured() -> None:
    pacer = Pacer()
    assert pacer.choose(14, 16) == 0
