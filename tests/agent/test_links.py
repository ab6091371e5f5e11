from __future__ import annotations

import pytest

from agent.links import RATE_SAMPLES, REPORT_S, RTT_SAMPLES, Link, LinkFigures, summary_s
from wire.messages import LinkChanged

TOLD = LinkFigures(rtt_s=1e-3, rtt_p90_s=2e-3, bytes_per_s=1e6)


def test_a_link_that_stays_what_it_is_is_no_news() -> None:
    link = Link("b", TOLD)
    for sample in range(100):
        link.add_rtt(1e-3 * (1 + 0.19 * (-1) ** sample))
        link.add_transfer(100_000, 0.1)
        assert link.news() is None


def test_some_outliers_are_no_news() -> None:
    link = Link("b", TOLD)
    for sample in range(100):
        link.add_rtt(1.0 if sample % 3 == 0 else 1e-3)
        link.add_transfer(100_000, 3.0 if sample % 3 == 0 else 0.1)
        assert link.news() is None


@pytest.mark.parametrize("rtt_s", [0.7e-3, 1.3e-3, 0.5])
def test_a_round_trip_that_moved_is_told_once(rtt_s: float) -> None:
    link = Link("b", TOLD)
    for _ in range(RTT_SAMPLES - 1):
        link.add_rtt(rtt_s)
        assert link.news() is None
    link.add_rtt(rtt_s)
    assert link.news(0) == LinkChanged("b", rtt_s, 1e6, rtt_s)
    assert link.news(2 * REPORT_S) is None


def test_a_rate_that_moved_is_told_and_not_too_often() -> None:
    link = Link("b", TOLD)
    for rate, now_s, told in ((5e5, 0.0, True), (1e6, REPORT_S / 2, False), (1e6, REPORT_S, True)):
        for _ in range(RATE_SAMPLES):
            link.add_transfer(100_000, 100_000 / rate)
        news = link.news(now_s)
        assert (news is not None) == told
        if news is not None:
            assert news.bytes_per_s == pytest.approx(rate)
            assert (news.rtt_s, news.rtt_p90_s) == (TOLD.rtt_s, TOLD.rtt_p90_s)


def test_transfers_shorter_than_a_round_trip_say_nothing_of_the_rate() -> None:
    link = Link("b", TOLD)
    for _ in range(RATE_SAMPLES):
        link.add_transfer(100_000, 0.9e-3)
    assert link.news() is None


def test_a_link_that_was_never_measured_is_not_reported() -> None:
    link = Link("b")
    for _ in range(RTT_SAMPLES):
        link.add_rtt(1.0)
    assert link.news() is None


def test_median_and_90th_percentile() -> None:
    assert summary_s([float(number) for number in range(10, 0, -1)]) == (5.5, 10.0)
    assert summary_s([3.0]) == (3.0, 3.0)
