"""Widths that cost no time: what is saved by fewer bytes, and what loss a byte must remove."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from planning.plan import InfeasiblePlan, verify
from planning.planner import solve
from planning.problem import BlockOption, Device, PlanningProblem
from planning.widths import undominated
from tests.planning.test_planner import make_problem, random_problem

BLOCKS = 4


def alike(
    widths: tuple[int, ...],
    *,
    losses: dict[int, float] | None = None,
    budget: float | None = None,
    storage_bytes: int = 1 << 30,
) -> PlanningProblem:
    """One device that takes as long and as much memory at each width, whatever is stored."""
    row = tuple(BlockOption(bits, 1_600, 0.001, 1e-5) for bits in widths)
    device = Device("a", 100_000, storage_bytes, (row,) * BLOCKS)
    problem = make_problem(2, [device], bits=widths)
    rows = () if losses is None else (losses,) * BLOCKS
    return replace(problem, sensitivities=rows, quality_budget=budget)


def bits_of(problem: PlanningProblem) -> tuple[int, ...]:
    plan = solve(problem)
    verify(plan, problem)
    return plan.stages[0].bits


def test_equally_fast_widths_do_not_send_four_times_the_bytes() -> None:
    assert bits_of(alike((4, 8, 16))) == (4,) * BLOCKS
    # At 3 bits a third less is sent, and much more is lost.
    assert bits_of(alike((3, 4, 16))) == (4,) * BLOCKS
    assert bits_of(alike((4, 16))) == (4,) * BLOCKS
    assert bits_of(alike((8, 16))) == (8,) * BLOCKS


def test_a_wider_block_has_to_remove_loss_for_its_bytes() -> None:
    # All at 4 bits lose the budget. Going to 5 costs a quarter of the bytes and removes 3/4.
    budget = 0.04
    steps = {bits: (15 / (2**bits - 1)) ** 2 for bits in (4, 5, 6, 8)}
    losses = {bits: budget / BLOCKS * step for bits, step in steps.items()}
    assert bits_of(alike((4, 5, 6, 8), losses=losses, budget=budget)) == (5,) * BLOCKS
    # Of losses far below the budget none is worth a byte.
    tiny = {bits: loss / 100 for bits, loss in losses.items()}
    assert bits_of(alike((4, 5, 6, 8), losses=tiny, budget=budget)) == (4,) * BLOCKS


def test_a_width_that_prompts_or_tokens_pay_for_is_not_free() -> None:
    row = (BlockOption(4, 800, 0.001, 1e-5), BlockOption(5, 800, 0.001, 2e-5))
    slow_prompts = Device("a", 100_000, 1 << 30, (row,) * BLOCKS)
    assert bits_of(make_problem(2, [slow_prompts], bits=(4, 5))) == (4,) * BLOCKS
    row = (BlockOption(4, 800, 0.001, 1e-5), BlockOption(5, 900, 0.001, 1e-5))
    little = Device("a", 4 * 800 + 250, 1 << 30, (row,) * BLOCKS)
    assert sorted(bits_of(make_problem(2, [little], bits=(4, 5)))) == [4, 4, 5, 5]


@pytest.mark.parametrize("seed", range(40))
def test_options_left_out_change_no_objective(seed: int) -> None:
    problem = random_problem(seed, tightness=1.5)
    rng = random.Random(seed)
    losses = tuple(
        {b: rng.uniform(0.1, 2.0) * 4.0**-b for b in problem.bits} for _ in problem.kv_bytes
    )
    worst = math.fsum(max(row.values()) for row in losses)
    bounded = replace(problem, sensitivities=losses, quality_budget=0.7 * worst)
    fewer = undominated(bounded)
    try:
        plan = solve(bounded)
    except InfeasiblePlan:
        with pytest.raises(InfeasiblePlan):
            solve(fewer)
        return
    verify(plan, bounded)
    assert solve(fewer).value == pytest.approx(plan.value, rel=1e-6)
