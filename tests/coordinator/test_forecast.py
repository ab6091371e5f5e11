"""Prompts through stages, with the arithmetic in comments."""

from __future__ import annotations

import pytest

from coordinator.forecast import prefill_s
from coordinator.plan import Stage
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
