"""The simulation of teams from the parts in a lab file: its arithmetic."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.team_simulation import (
    LAB,
    Parts,
    arithmetic,
    halves,
    parts_of,
    share_time,
    simulate,
)


def lab_parts() -> Parts:
    return parts_of(LAB, bits=4, layers=32, kv_heads=8)


def test_four_pis_gain_what_the_parts_add_up_to() -> None:
    parts = lab_parts()
    alone, four = simulate(parts, 1), simulate(parts, 4)
    assert alone.token_s == pytest.approx(32 * 12.3e-3 + 29.5e-3)
    one_sum_s = 0.15e-3 + 3 * 8196 / 117.5e6 + 0.15e-3
    assert four.sums_s == pytest.approx(64 * one_sum_s)
    assert four.layers_s + four.head_s == pytest.approx(alone.token_s * 0.28)
    assert alone.token_s / four.token_s > 2.5
    assert arithmetic(parts, four).endswith(f"= {1e3 * four.token_s:.1f} ms")


def test_the_slowest_software_and_link_that_are_expected_still_gain() -> None:
    slow = replace(lab_parts(), rtt_s=0.3e-3, sum_s=0.4e-3)
    assert simulate(slow, 1).token_s / simulate(slow, 4).token_s > 2.5
    wifi = replace(lab_parts(), rtt_s=5e-3, bytes_per_s=60e6 / 8)
    assert simulate(wifi, 4).token_s > simulate(wifi, 1).token_s


def test_members_wait_for_each_other_after_each_half_of_a_layer() -> None:
    """Three members have 3, 3 and 2 of 8 KV heads, and 75, 75 and 74 of 224 groups of columns."""
    (by_heads, heads), (by_columns, columns) = halves(lab_parts().model, 8, 3)
    assert by_heads == pytest.approx((4096 + 1024) * 2 / ((4096 + 1024) * 2 + 3 * 14336))
    assert by_heads + by_columns == pytest.approx(1.0)
    assert (heads, columns) == (3 / 8, 75 / 224)


def test_times_of_shares_are_linear_between_those_that_are_known() -> None:
    times = {0.25: 0.3, 0.5: 0.55, 1.0: 1.0}
    assert share_time(0.5, times) == pytest.approx(0.55)
    assert share_time(0.375, times) == pytest.approx(0.425)
    assert share_time(0.125, times) == pytest.approx(0.175)
    assert share_time(0.75, times) == pytest.approx(0.775)
