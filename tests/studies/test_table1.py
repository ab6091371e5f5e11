"""Rows of the paper's table with a budget of KL divergence."""

from __future__ import annotations

import pytest

from paper import dilemma
from paper.study import opt_350m, relaxed_instance
from studies.table1 import _with_ties_broken


@pytest.mark.parametrize("swapped", [False, True])
def test_of_equal_times_the_least_loss_is_taken(swapped: bool) -> None:
    """4 and 6 bits cost the same either way round, and both keep the budget."""
    losses = [{4: 0.5, 6: 0.2, 8: 0.0}, {4: 0.6, 6: 0.25, 8: 0.0}]
    if swapped:
        losses.reverse()
    instance = relaxed_instance(opt_350m(2), (), (4, 6, 8), losses=losses, budget=0.85)
    found = dilemma.solve(_with_ties_broken(instance, 0.85))
    bits = tuple(choice.bits for choice in found.choices)
    assert bits == ((6, 4) if swapped else (4, 6))
    # The tie costs less than a step of bits, and T is that of the choice.
    plain = dilemma.solve(instance)
    honest = dilemma.charge(instance, dilemma.ALL_REPAIRS, found.choices)
    assert honest == pytest.approx(plain.objective_s)
