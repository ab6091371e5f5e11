"""Prompts through stages, with the arithmetic in comments."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planning.forecast import best_chunk_tokens, prefill_s
from planning.plan import Stage
from wire import limits
from wire.profile import LinkProfile


def stage(device: str, prefill_s_per_token: float) -> Stage:
    return Stage(device, 0, (8,), 0.0, prefill_s_per_token, 0, 0, 0, 0)


LINKS = [LinkProfile("a", "b", 2.0, 100.0), LinkProfile("b", "c", 0.0, 1e9)]


def test_one_chunk_passes_every_stage_in_turn() -> None:
    # 10 rows: 10 s on a, 10 * 20 bytes at 100 bytes/s, half of 2 s, 20 s on b.
    stages = [stage("a", 1.0), stage("b", 2.0)]
    assert prefill_s(stages, LINKS, 10, 20, chunk_tokens=16) == pytest.approx(10 + 2 + 1 + 20)


def test_chunks_overlap_and_the_slowest_stage_decides() -> None:
    # a is done after 10, 20 and 30 s; b gets the first after 13 s and needs 20 s for each.
    stages = [stage("a", 1.0), stage("b", 2.0)]
    assert prefill_s(stages, LINKS, 30, 20, chunk_tokens=10) == pytest.approx(13 + 3 * 20)


def test_a_slow_link_can_be_the_bottleneck() -> None:
    # 10 rows of 200 bytes take 20 s on the link: the last of three chunks is there after
    # 10 + 60 + 1 s, and takes b 1 s.
    stages = [stage("a", 1.0), stage("b", 0.1)]
    assert prefill_s(stages, LINKS, 30, 200, chunk_tokens=10) == pytest.approx(72)


def test_the_last_chunk_may_be_short() -> None:
    assert prefill_s([stage("a", 1.0)], [], 25, 20, chunk_tokens=10) == pytest.approx(25)


def test_neighbours_need_a_link() -> None:
    with pytest.raises(KeyError):
        prefill_s([stage("b", 1.0), stage("a", 1.0)], LINKS, 1, 1)


def timed(row_s: float, chunk_s: float) -> Stage:
    """A stage by what one row takes, and a whole chunk."""
    return Stage("a", 0, (8,), row_s, chunk_s / limits.PREFILL_CHUNK_TOKENS, 0, 0, 0, 0)


def test_chunks_are_small_where_stages_follow_each_other_and_rows_cost_alike() -> None:
    # 64 rows take 64 s. Four stages: 4 + 7, 4 + 15 and 4 + 31 turns of 64, 32 and 16 s, less one.
    alike = timed(1.0, 64.0)
    assert best_chunk_tokens([alike] * 4, 512) == 16
    assert best_chunk_tokens([alike], 512) == limits.PREFILL_CHUNK_TOKENS
    # A single chunk would keep three of the stages waiting.
    assert best_chunk_tokens([alike] * 4, 64) == 16


def test_chunks_stay_large_where_a_call_costs_as_much_for_few_rows() -> None:
    assert best_chunk_tokens([timed(1.0, 1.0)] * 4, 512) == limits.PREFILL_CHUNK_TOKENS
    # One row takes 18.75 s, 64 take 64: 16, 32 and 64 rows take 29.5, 41 and 64 s each, so that
    # 35, 19 and 11 turns take 1032, 779 and 704 s.
    assert best_chunk_tokens([timed(18.75, 64.0)] * 4, 512) == limits.PREFILL_CHUNK_TOKENS
    # 5, 6 and 11 turns of 128 tokens: 320 s, then 287, then 325.
    assert best_chunk_tokens([timed(18.75, 64.0)] * 4, 128) == 32


def test_a_forecast_is_of_the_chunks_that_will_be_run() -> None:
    stages = [replace(timed(1.0, 64.0), device=name) for name in "abc"]
    links = [LinkProfile("a", "b", 0.0, 1e9), LinkProfile("b", "c", 0.0, 1e9)]
    # Four chunks of 16 rows through three stages.
    assert prefill_s(stages, links, 64, 0) == pytest.approx((4 + 2) * 16)
