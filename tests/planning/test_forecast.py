"""Prompts through stages, with the arithmetic in comments, and against a simulation of events."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from planning.prompt import Passage, best_chunk_tokens, block_passage, prompt_s
from wire import limits

WHOLE = limits.PREFILL_CHUNK_TOKENS


def simulated_s(passages: Sequence[Passage], prompt_tokens: int, chunk_tokens: int) -> float:
    """Seconds until the last row has left the last passage, one chunk after the other."""
    done_s = [0.0] * len(passages)
    arrived_s = 0.0
    for begin in range(0, prompt_tokens, chunk_tokens):
        rows = min(chunk_tokens, prompt_tokens - begin)
        arrived_s = 0.0
        for index, passage in enumerate(passages):
            done_s[index] = max(done_s[index], arrived_s) + passage.busy_s(rows)
            arrived_s = done_s[index] + passage.delay_s
    return arrived_s


def test_one_chunk_passes_every_stage_in_turn() -> None:
    # 10 rows: 10 s on a, 2 s on the link and 1 s until they arrive, 20 s on b.
    passages = [Passage(0.0, 1.0), Passage(0.0, 0.2, 1.0), Passage(0.0, 2.0)]
    assert prompt_s(passages, 10, 16) == pytest.approx(10 + 2 + 1 + 20)


def test_chunks_overlap_and_the_slowest_stage_decides() -> None:
    # a is done after 10, 20 and 30 s; b gets the first after 13 s and needs 20 s for each.
    passages = [Passage(0.0, 1.0), Passage(0.0, 0.2, 1.0), Passage(0.0, 2.0)]
    assert prompt_s(passages, 30, 10) == pytest.approx(13 + 3 * 20)


def test_a_slow_link_can_be_the_bottleneck() -> None:
    # 10 rows take 20 s on the link: the last of three chunks is there after 10 + 60 + 1 s, and
    # takes b 1 s.
    passages = [Passage(0.0, 1.0), Passage(0.0, 2.0, 1.0), Passage(0.0, 0.1)]
    assert prompt_s(passages, 30, 10) == pytest.approx(72)


def test_a_last_chunk_that_is_short_counts_by_its_rows() -> None:
    assert prompt_s([Passage(0.0, 1.0)], 25, 10) == pytest.approx(25)


def test_no_prompt_takes_no_time() -> None:
    assert prompt_s([Passage(1.0, 1.0, 1.0)], 0, 16) == 0.0


def test_the_formula_is_what_events_come_to() -> None:
    rng = random.Random(5)
    for _ in range(300):
        passages = [
            Passage(rng.choice([0.0, rng.random()]), rng.random() / 20, rng.choice([0.0, 0.5]))
            for _ in range(rng.randint(1, 7))
        ]
        rows, chunks = rng.choice([16, 32, 64]), rng.randint(1, 12)
        expected_s = simulated_s(passages, rows * chunks, rows)
        assert prompt_s(passages, rows * chunks, rows) == pytest.approx(expected_s)
        # With a last chunk that is short it is off by less than one chunk takes.
        odd = rows * chunks - rng.randint(1, rows - 1)
        off_s = prompt_s(passages, odd, rows) - simulated_s(passages, odd, rows)
        assert abs(off_s) < sum(one.busy_s(rows) for one in passages)


def timed(row_s: float, chunk_s: float) -> Passage:
    """A stage by what one row takes, and a whole chunk."""
    return block_passage(row_s, chunk_s / WHOLE)


def test_chunks_are_small_where_stages_follow_each_other_and_rows_cost_alike() -> None:
    # 64 rows take 64 s. Four stages: 4 + 7, 4 + 15 and 4 + 31 turns of 64, 32 and 16 s, less one.
    alike = timed(1.0, 64.0)
    assert best_chunk_tokens([alike] * 4, 512) == 16
    assert best_chunk_tokens([alike], 512) == WHOLE
    # A single chunk would keep three of the stages waiting.
    assert best_chunk_tokens([alike] * 4, 64) == 16


def test_chunks_stay_large_where_a_call_costs_as_much_for_few_rows() -> None:
    assert best_chunk_tokens([timed(1.0, 1.0)] * 4, 512) == WHOLE
    # One row takes 18.75 s, 64 take 64: 16, 32 and 64 rows take 29.5, 41 and 64 s each, so that
    # 35, 19 and 11 turns take 1032, 779 and 704 s.
    assert best_chunk_tokens([timed(18.75, 64.0)] * 4, 512) == WHOLE
    # 11, 7 and 5 turns of 128 tokens take 325, 287 and 320 s.
    assert best_chunk_tokens([timed(18.75, 64.0)] * 4, 128) == 32


def test_slow_links_count_when_chunks_are_chosen() -> None:
    # The stage alone would have chunks of 64; the link takes as long and is filled sooner by 16.
    assert best_chunk_tokens([timed(1.0, 64.0), Passage(0.0, 1.0)], 64) == 16
