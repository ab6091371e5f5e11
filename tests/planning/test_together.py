"""Throughput of so many sequences: rows that meet in a stage share a pass."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Iterable
from dataclasses import replace

import pytest

from planning.forecast import decode_tokens_per_s, rows_at_once
from planning.plan import InfeasiblePlan, Plan, PlanError, Proof, assess
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
    # Two stages of four rows each, four of two each, and more stages than rows.
    assert row_s(1.0, ROWS_S, 8, 2) == 1.75 / 4
    assert row_s(1.0, ROWS_S, 8, 4) == 1.25 / 2
    assert row_s(1.0, ROWS_S, 2, 4) == 1.0
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
    # Two groups of four: each device takes 1.3 times a row's time for one of them.
    both = solve(shared(plain, 8, [0.1, 0.1]))
    assert len(both.stages) == 2
    assert decode_tokens_per_s(both, 8) == pytest.approx(8 / (2 * 1.3 * 0.05), rel=0.02)
    # Of a fast and a slow device the fast one is better alone. Eight rows take 1.7 times its time.
    slow = make_device("b", 10, 10_000, {8: 0.05})
    plan = solve(shared(replace(plain, devices=(devices[0], slow)), 8, [0.1, 0.1]))
    assert described(plan) == [("a", 0, 10)]
    assert decode_tokens_per_s(plan, 8) == pytest.approx(8 / 0.17)
    assert plan.value == pytest.approx(0.17 / 8)


def ring(times_s: list[float], sequences: int, share: float) -> Plan:
    """A plan of one block per device, whose pass of one row takes so long."""
    devices = [
        make_device(f"d{index}", 10, 10_000, {8: seconds}) for index, seconds in enumerate(times_s)
    ]
    plain = replace(make_problem(8, devices), objective=Objective("throughput"))
    count = plain.spec.block_count
    cuts = [index * count // len(devices) for index in range(len(devices) + 1)]
    pins = {b: index for index in range(len(devices)) for b in range(cuts[index], cuts[index + 1])}
    return solve(replace(shared(plain, sequences, [share] * len(devices)), pins=pins))


def simulated_tokens_per_s(plan: Plan, sequences: int, rows: int) -> float:
    """What an event simulation gives, where the first stage takes at most so many rows."""
    ways_s = [hop.seconds for hop in plan.hops] + [plan.return_s]
    stages, ticks = len(plan.stages), itertools.count()
    waiting: list[list[int]] = [[] for _ in range(stages)]
    running: list[list[int]] = [[] for _ in range(stages)]
    events = [(0.0, next(ticks), 0, tuple(range(sequences)), True)]
    told_s: list[float] = []
    while len(told_s) < 60 * sequences:
        now_s, _, stage, group, arrives = heapq.heappop(events)
        if arrives:
            waiting[stage].extend(group)
        else:
            running[stage] = []
            after = (stage + 1) % stages
            heapq.heappush(events, (now_s + ways_s[stage], next(ticks), after, group, True))
            if stage == stages - 1:
                told_s += [now_s] * len(group)
        if waiting[stage] and not running[stage]:
            most = rows if stage == 0 else sequences
            running[stage], waiting[stage] = waiting[stage][:most], waiting[stage][most:]
            seconds = pass_s(
                plan.stages[stage].compute_s, plan.stages[stage].rows_s, len(running[stage])
            )
            event = (now_s + seconds, next(ticks), stage, tuple(running[stage]), False)
            heapq.heappush(events, event)
    half = len(told_s) // 2
    return (len(told_s) - half) / (told_s[-1] - told_s[half - 1])


def test_groups_of_rows_are_as_fast_as_events_show() -> None:
    gained = []
    for seed in range(60):
        rng = random.Random(f"groups {seed}")
        times_s = [rng.uniform(0.005, 0.02) for _ in range(rng.choice([2, 3, 4]))]
        sequences = rng.choice([2, 4, 8])
        plan = ring(times_s, sequences, rng.choice([0.1, 0.3, 0.9]))
        assert len(plan.stages) == len(times_s)
        rows = rows_at_once(plan, sequences)
        reached = simulated_tokens_per_s(plan, sequences, rows)
        assert decode_tokens_per_s(plan, sequences) == pytest.approx(reached, rel=0.1), seed
        gained.append(reached / simulated_tokens_per_s(plan, sequences, sequences))
        best = max(simulated_tokens_per_s(plan, sequences, most) for most in range(1, 9))
        assert reached > 0.9 * best, seed
    assert min(gained) > 0.99
    assert sorted(gained)[len(gained) // 2] > 1.1


def test_a_stage_alone_runs_all_rows_at_once() -> None:
    plan = ring([0.01], 8, 0.1)
    assert [rows_at_once(plan, count) for count in range(1, 9)] == list(range(1, 9))


def test_each_stage_of_an_even_ring_has_a_group() -> None:
    plan = ring([0.01] * 2, 8, 0.1)
    assert [rows_at_once(plan, count) for count in (1, 2, 4, 8)] == [1, 1, 2, 4]
    five_s = plan.stages[0].compute_s
    assert decode_tokens_per_s(plan, 8) == pytest.approx(8 / (2 * 1.3 * five_s), rel=0.02)
