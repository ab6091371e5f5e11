"""Rank correlations by hand, and random plans with a known better predictor."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from xml.etree import ElementTree

import numpy as np
import pytest

from evaluation.bootstrap import Estimate
from studies.correlation import (
    correlation,
    difference,
    random_plans,
    ranks,
    shuffled_plans,
)
from studies.pictures import Group, Panel, panels_svg, weights_svg
from studies.plans import (
    KINDS,
    MixedPlan,
    correlations,
    draw_plans,
    plan_json,
    plans_csv,
    same_widths,
)
from studies.rounding import Rounding

ROUNDING = Rounding("rtn", 32)


def spearman(first: list[float], second: list[float]) -> float:
    return correlation(first, second, seed=0, draws=2).value


def test_spearman_by_hand() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 1000]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [9, 7, 2, 0]) == pytest.approx(-1)
    # 1 - 6 sum d^2 / (n (n^2 - 1)) with d = 0, 1, -1, 0.
    assert spearman([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert ranks(np.array([[3.0, 1.0, 3.0, 7.0]])).tolist() == [[2.5, 1, 2.5, 4]]
    # Equal values: Pearson's correlation of the ranks 1.5, 1.5, 3 and 1, 2, 3.
    assert spearman([1, 1, 2], [5, 6, 7]) == pytest.approx(3**0.5 / 2)
    assert spearman([1, 1, 1], [5, 6, 7]) == 0


def test_an_interval_covers_the_correlation_and_repeats() -> None:
    random = np.random.default_rng(5)
    truth = random.standard_normal(40)
    noisy, useless = truth + random.standard_normal(40), random.standard_normal(40)
    good = correlation(noisy.tolist(), truth.tolist(), seed=1)
    assert good.low < good.value < good.high <= 1
    assert good == correlation(noisy.tolist(), truth.tolist(), seed=1)
    assert good != correlation(noisy.tolist(), truth.tolist(), seed=2)
    none = correlation(useless.tolist(), truth.tolist(), seed=1)
    assert none.low < 0 < none.high
    ahead = difference(noisy.tolist(), useless.tolist(), truth.tolist(), seed=1)
    assert ahead.low > 0
    assert ahead.value == pytest.approx(good.value - none.value)
    with pytest.raises(ValueError, match="too few"):
        correlation([1, 2], [1, 2], seed=0)


def test_many_drawn_plans_are_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = [3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]
    whole = correlation(first, second, seed=3, draws=50)
    monkeypatch.setattr("studies.correlation._COMPARED", 200)
    assert correlation(first, second, seed=3, draws=50) == whole


def test_random_plans_are_mixed_and_differ() -> None:
    plans = random_plans(12, (2, 3, 4, 6, 8), 40, seed=4)
    assert len(set(plans)) == 40
    assert plans[:10] == random_plans(12, (8, 6, 4, 3, 2), 10, seed=4)
    assert plans != random_plans(12, (2, 3, 4, 6, 8), 40, seed=5)
    assert all(len(plan) == 12 and len(set(plan)) > 1 for plan in plans)
    assert {min(plan) for plan in plans} >= {2, 3, 4}
    # Two layers of two widths have two mixed plans.
    assert sorted(random_plans(2, (4, 8), 30, seed=0)) == [(4, 8), (8, 4)]


def test_plans_of_equal_bits_differ_in_their_order_alone() -> None:
    plans = shuffled_plans(7, (2, 4, 8), 30, seed=1)
    assert len(set(plans)) == 30
    assert {tuple(sorted(plan)) for plan in plans} == {(2, 2, 2, 4, 4, 8, 8)}


def test_the_better_predictor_is_found() -> None:
    """Here a model loses the sum by design, and its layers have equal weight errors."""
    widths, layers = (2, 3, 4, 6, 8), 10
    errors = [{width: 2.0 ** (-2 * width) for width in widths}] * layers
    losses = [{width: (1 + layer) * 4.0**-width for width in widths} for layer in range(layers)]
    for kind in KINDS:
        drawn = draw_plans(ROUNDING, kind, widths, errors, losses, 30, seed=0)
        assert len(drawn.plans) == 30

        def measured(plan: MixedPlan) -> Mapping[str, Estimate]:
            value = 1.5 * plan.kl_sum
            exact = 100 - 100 * value
            return {
                "loss": Estimate(value, value, value, 9),
                "exact_match": Estimate(exact, exact, exact, 9),
            }

        by_loss, by_match = correlations(drawn.plans, measured, seed=0)
        assert (by_loss.outcome, by_match.outcome) == ("loss", "exact_match")
        for one in (by_loss, by_match):
            assert one.by["kl_sum"].value == pytest.approx(1)
            assert one.by["delta"].value < 0.99
            assert one.kl_sum_ahead.low > 0
        if kind == "even":
            # Every plan has the same bits and, here, the same delta: neither says anything.
            assert (by_loss.by["delta"].value, by_loss.by["bits"].value) == (0, 0)
        else:
            assert by_loss.by["bits"].value > 0.5
        groups = same_widths(drawn.plans, measured)
        assert sum(group.plans for group in groups) == 30
        assert all(group.delta[0] == group.delta[1] for group in groups)
        rows = list(csv.DictReader(plans_csv(drawn.plans, measured).splitlines()))
        assert float(rows[0]["loss"]) == pytest.approx(1.5 * float(rows[0]["kl_sum"]))
        assert rows[0]["kl"] == ""
        plan = drawn.plans[0]
        assert plan_json(plan, measured(plan))["bits_of_layers"] == list(plan.subject.bits)
    assert correlations(drawn.plans[:2], measured, seed=0) == ()


def test_pictures_are_drawings() -> None:
    panels = [
        Panel("one", "x", "y", (Group("a", ((1e-7, 0.0), (1.0, 2.0)), joined=True),)),
        Panel("flat", "x", "y", (Group("b", ((3.0, 5.0), (3.0, 5.0))),), log_x=False, log_y=False),
        Panel("empty", "x", "y", (Group("c", ()),)),
    ]
    text = panels_svg("title & more", "note", panels)
    ElementTree.fromstring(text)  # noqa: S314 - our own
    assert "empty" not in text
    assert panels_svg("nothing yet", "note", panels[2:]).startswith("<svg")
    bars = weights_svg("w", "n", np.linspace(-1, 1, 5), np.array([0, 1000, 1, 0]))
    ElementTree.fromstring(bars)  # noqa: S314 - our own
