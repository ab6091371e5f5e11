"""Throughput of so many sequences: rows that meet in a stage share a pass."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable
from dataclasses import replace

import pytest

from planning.forecast import decode_tokens_per_s
from planning.plan import InfeasiblePlan, PlanError, Proof, assess
from planning.planner import solve
from planning.problem import Objective, PlanningProblem
from planning.together import pass_s, row_s
from tests.planning.test_planner import described, make_device, make_problem, random_problem
from wire.profile import TIMED_ROWS

ROWS_S = (1.25, 1.75, 2.75)
"""What 2, 4 and 8 rows take where one takes 1 s."""


def test_a_pass_is_linear_between_what_was_timed() -> None:
    for rows, seconds in zip((1, *TIMED_ROWS), (1.0, *ROWS_S), strict=True):
        assert pass_s(1.0, ROWS_S, rows) == seconds
    assert pass_s(1.0, ROWS_S, 3) == 1.5
    assert pass_s(1.0, ROWS_S, 12) == 3.75
    assert pass_s(1.0, ROWS_S, 0.5) == 0.5
    assert pass_s(1.0, (), 8) == 8


def test_rows_share_passes_where_they_meet() -> None:
    # Alone: all in one pass.
    assert row_s(1.0, ROWS_S, 8, 1) == 2.75 / 8
    # Two stages of four rows each: the first one alone, then three.
    assert row_s(1.0, ROWS_S, 8, 2) == (1 + 1.5) / 4
    # Two rows each hardly meet, one row never does.
    assert row_s(1.0, ROWS_S, 8, 4) == row_s(1.0, ROWS_S, 2, 4) == 1.0
    assert row_s(1.0, (), 8, 2) == 1.0


def shared(problem: PlanningProblem, sequences: int, shares: Iterable[float]) -> PlanningProblem:
    """The problem for so many sequences; another row adds such a share of one on each device."""
    devices = []
    for device, share in zip(problem.devices, shares, strict=False):
        options = tuple(
            tuple(
                replace(o, rows_s=tuple(o.decode_s * (1 + share * (n - 1)) for n in TIMED_ROWS))
                for o in row
            )
            for row in device.options
        )
        devices.append(replace(device, options=options))
    return replace(
        problem,
        devices=tuple(devices),
        objective=Objective("throughput"),
        sequences=sequences,
    )


def tried_s(problem: PlanningProblem) -> float:
    """Least seconds between two tokens over all orders, cuts and widths."""
    blocks, best = problem.spec.block_count, math.inf
    for count in range(1, len(problem.devices) + 1):
        for order in itertools.permutations(range(len(problem.devices)), count):
            for cuts in itertools.combinations(range(1, blocks), count - 1):
                spans = list(zip(order, (0, *cuts), (*cuts, blocks), strict=True))
                for bits in itertools.product(problem.bits, repeat=blocks):
                    stages = [(i, a, bits[a:b]) for i, a, b in spans]
                    if all(problem.within_error(k, width) for k, width in enumerate(bits)):
                        best = min(best, worth_s(problem, stages))
    return best


def worth_s(problem: PlanningProblem, stages: list[tuple[int, int, tuple[int, ...]]]) -> float:
    """The value of a plan that fits; else inf."""
    try:
        plan = assess(problem, stages, Proof("", 0.0, 0.0))
    except PlanError:
        return math.inf
    fits = all(
        stage.memory_bytes <= stage.memory_limit_bytes
        and stage.storage_bytes <= stage.storage_limit_bytes
        for stage in plan.stages
    )
    return plan.value if fits else math.inf


def test_throughput_of_sequences_equals_trying_everything() -> None:
    stages = set()
    for seed in range(60):
        rng = random.Random(f"shared {seed}")
        shares = [rng.choice([0.1, 0.3, 0.9]) for _ in range(3)]
        problem = shared(random_problem(seed), rng.choice([2, 3, 4, 8]), shares)
        if problem.spec.block_count > 5:
            continue
        expected_s = tried_s(problem)
        try:
            plan = solve(problem)
        except InfeasiblePlan:
            assert expected_s == math.inf, seed
        else:
            assert plan.value == pytest.approx(expected_s, rel=1e-6), seed
            assert plan.proven_optimal, seed
            stages.add(len(plan.stages))
    assert stages == {1, 2, 3}


def test_one_device_may_serve_several_sequences_as_well_as_two() -> None:
    devices = [make_device(name, 10, 10_000, {8: 0.01}) for name in "ab"]
    plain = replace(make_problem(8, devices), objective=Objective("throughput"))
    # A row after the other: two devices let through twice as many.
    assert len(solve(plain).stages) == 2
    assert len(solve(replace(plain, sequences=8)).stages) == 2
    # Eight rows in the time of 1.7: one pass takes 0.17 s for eight tokens.
    plan = solve(shared(plain, 8, [0.1, 0.1]))
    assert described(plan) == [("a", 0, 10)]
    assert decode_tokens_per_s(plan, 8) == pytest.approx(8 / 0.17)
    assert plan.value == pytest.approx(0.17 / 8)


def test_many_rows_on_few_stages_go_round_together() -> None:
    # Five blocks are on each device. There a row takes 50 ms, and 8 rows take 85 ms.
    devices = [make_device(name, 10, 10_000, {8: 0.01}) for name in "ab"]
    plain = replace(make_problem(8, devices), pins={block: block // 5 for block in range(10)})
    plan = solve(shared(plain, 8, [0.1, 0.1]))
    links_s = sum(hop.seconds for hop in plan.hops) + plan.return_s
    links_s += 7 * sum(hop.passage.row_s for hop in plan.hops)
    assert decode_tokens_per_s(plan, 8) == pytest.approx(8 / (2 * 0.085 + links_s))
    # Of two rows each has a stage of its own.
    assert decode_tokens_per_s(plan, 2) == pytest.approx(1 / plan.shared_s(2))
