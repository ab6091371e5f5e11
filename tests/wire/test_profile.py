"""Times of shares that were not measured, from those that were."""

from __future__ import annotations

from dataclasses import replace

import pytest

from wire.profile import BlockTiming

WHOLE = BlockTiming("layer", 0, 4, 10e-3, 1e-3)
CUT = replace(WHOLE, shares_s=((0.25, 4e-3, 0.3e-3), (0.5, 6e-3, 0.6e-3), (1.0, 11e-3, 1.1e-3)))


@pytest.mark.parametrize(
    ("fraction", "decode_s", "prefill_s"),
    [
        (0.25, 4e-3, 0.3e-3),
        (0.375, 5e-3, 0.45e-3),
        (0.75, 8.5e-3, 0.85e-3),
        (1.0, 11e-3, 1.1e-3),
        (0.125, 3e-3, 0.15e-3),  # As from 1/2 to 1/4.
    ],
)
def test_a_share_is_linear_between_measured_ones(
    fraction: float, decode_s: float, prefill_s: float
) -> None:
    assert CUT.share_s(fraction) == pytest.approx((decode_s, prefill_s))


def test_beyond_the_measured_shares_the_nearest_two_count() -> None:
    few = replace(CUT, shares_s=CUT.shares_s[:2])
    assert few.share_s(0.75) == pytest.approx((8e-3, 0.9e-3))


def test_an_unmeasured_share_is_assumed_to_have_a_fixed_part() -> None:
    assert WHOLE.share_s(0.5) == pytest.approx((5.5e-3, 0.55e-3))
    assert WHOLE.share_s(1.0) == pytest.approx((10e-3, 1e-3))
    single = replace(CUT, shares_s=((0.5, 6e-3, 0.6e-3),))
    assert single.share_s(0.5) == pytest.approx((6e-3, 0.6e-3))
    assert single.share_s(0.25) == pytest.approx((6e-3 * 0.325 / 0.55, 0.6e-3 * 0.325 / 0.55))


def test_a_whole_head_is_not_cut() -> None:
    head = BlockTiming("head", 0, 4, 10e-3, 1e-3, shares_s=((0.25, 4e-3, 0.4e-3),))
    assert head.share_s(1.0) == pytest.approx((10e-3, 1e-3))
    assert head.share_s(0.5) == pytest.approx((6e-3, 0.6e-3))


@pytest.mark.parametrize("disturbed_s", [1e-3, 5.99e-3, 6e-3, 40e-3])
def test_disturbed_figures_give_no_impossible_times(disturbed_s: float) -> None:
    timing = replace(CUT, shares_s=((0.25, disturbed_s, disturbed_s), *CUT.shares_s[1:]))
    for fraction in (0.01, 0.125, 0.3, 0.6, 1.0):
        assert all(seconds > 0 for seconds in timing.share_s(fraction))
