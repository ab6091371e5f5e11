"""Plans for requests: prompts in chunks, which stages compute one behind the other."""

from __future__ import annotations

import itertools
import math
import os
import random
import time
from dataclasses import replace
from typing import Any

import pytest

from planning import planner
from planning.exact.solver import Outcome, SolverError, SolverName, run
from planning.plan import InfeasiblePlan, Plan, PlanError, Proof, assess, verify
from planning.planner import solve
from planning.problem import Objective, PlanningProblem
from planning.search.search import search
from tests.planning.test_planner import (
    SOLVERS,
    exhaustive_in_chunks_s,
    exhaustive_s,
    make_device,
    make_problem,
    random_extras,
    random_problem,
)

SEEDS = int(os.environ.get("SHOAL_BRUTE_FORCE", "30"))
"""Problems that are tried exhaustively, of each kind and solver."""


def random_request(seed: int) -> PlanningProblem:
    """A random problem for a request; times of prompts depend on widths, or hardly."""
    rng = random.Random(f"request {seed}")
    problem = (random_extras if seed % 2 else random_problem)(seed)
    devices = tuple(
        replace(
            device,
            options=tuple(
                tuple(
                    replace(
                        option,
                        prefill_s_per_token=option.decode_s
                        * rng.choice([0.05, 0.2, 0.2, 1.0, 2.0]),
                    )
                    for option in row
                )
                for row in device.options
            ),
        )
        for device in problem.devices
    )
    aim = Objective("request", rng.choice([10, 30, 40, 100, 300, 777]), rng.randint(0, 20))
    return replace(problem, devices=devices, objective=aim)


@pytest.mark.parametrize("solver", SOLVERS)
def test_requests_equal_exhaustive_search(solver: SolverName) -> None:
    """All orders, cuts, widths, formats of hops and sizes of chunks."""
    stages = []
    for seed in range(SEEDS):
        problem = random_request(seed)
        expected_s = exhaustive_s(problem)
        try:
            plan = solve(problem, solver=solver)
        except InfeasiblePlan:
            assert expected_s == math.inf, seed
        else:
            assert plan.value == pytest.approx(expected_s, rel=1e-6), seed
            assert plan.proven_optimal, seed
            stages.append(len(plan.stages))
    assert {1, 2, 3} == set(stages)


@pytest.mark.thorough
def test_the_search_for_requests_keeps_its_bound() -> None:
    found = feasible = close = 0
    for seed in range(500, 560):
        problem = random_request(seed)
        for rows in problem.chunk_choices:
            best_s = exhaustive_in_chunks_s(problem, rows or 0)
            feasible += best_s < math.inf
            chosen = replace(problem, chunk_tokens=rows)
            answer = search(chosen, deadline_s=time.monotonic() + 10, gap=0.01)
            assert answer.bound <= best_s * (1 + 1e-9), seed
            if answer.choice is not None:
                plan = assess(
                    chosen, answer.choice.stages, Proof("", 0.0, 0.0), answer.choice.hop_bits
                )
                verify(plan, chosen)
                assert plan.value >= exhaustive_s(problem) * (1 - 1e-9), seed
                found += 1
                close += plan.value <= answer.bound / 0.99
    assert found >= 0.95 * feasible > 20
    assert close >= 0.7 * feasible


def four_alike(objective: Objective) -> Plan:
    """32 layers on four devices of which one would be enough."""
    devices = [make_device(name, 34, 10**6, {8: 0.001}) for name in "abcd"]
    return solve(replace(make_problem(32, devices), objective=objective))


def test_long_prompts_are_spread_although_one_device_is_enough() -> None:
    # A block takes 1 ms a token, a hop 1 ms.
    assert len(four_alike(Objective("latency")).stages) == 1
    plan = four_alike(Objective("request", 2000, 20))
    # The head counts for one row only: 33 blocks are shared out as 8, 8, 8 and 9.
    blocks = [len(range(stage.first, min(stage.last, 33))) for stage in plan.stages]
    assert sorted(blocks) == [8, 8, 8, 9]
    # 64 rows take 16 ms in a block and 1 + 2.048 ms on each of three hops. The slowest stage has
    # 2000 / 64 - 1 = 30.25 chunks more.
    assert plan.chunk_tokens(2000) == 64
    expected_s = 33 * 0.016 + 30.25 * 9 * 0.016 + 3 * (0.001 + 0.002048)
    assert plan.prompt_s(2000) == pytest.approx(expected_s)
    assert plan.first_token_s(2000) == pytest.approx(plan.prompt_s(2000) + 0.001)
    assert plan.value == pytest.approx(plan.first_token_s(2000) + 20 * plan.decode_s)


def test_a_short_prompt_is_one_chunk_and_is_not_spread() -> None:
    assert len(four_alike(Objective("request", 10, 20)).stages) == 1


def test_a_plan_with_wrong_times_of_chunks_is_refused() -> None:
    devices = [make_device(name, 6, 2_500, {8: 0.001}) for name in "ab"]
    problem = replace(make_problem(4, devices), objective=Objective("request", 100, 10))
    plan = solve(problem)
    stage, hop = plan.stages[0], plan.hops[0]
    faster = replace(stage, passage=replace(stage.passage, row_s=stage.passage.row_s / 2))
    nearer = replace(hop, passage=replace(hop.passage, delay_s=0.0))
    for wrong in (
        replace(plan, stages=(faster, *plan.stages[1:])),
        replace(plan, hops=(nearer,)),
    ):
        with pytest.raises(PlanError, match="passage"):
            verify(wrong, problem)


def test_a_solver_that_fails_beside_a_known_plan_is_asked_without_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """HiGHS was seen to fail for the one row that leaves out what is not better."""
    devices = [make_device(name, 6, 2_500, {8: 0.001}) for name in "ab"]
    problem = replace(make_problem(4, devices), objective=Objective("request", 100, 10))
    expected = solve(problem)
    calls = itertools.count()

    def failing(*arguments: Any, **options: Any) -> Outcome:
        if next(calls) == 1:
            raise SolverError("Solve error")
        return run(*arguments, **options)

    monkeypatch.setattr(planner, "run", failing)
    plan = solve(problem)
    assert plan.value == pytest.approx(expected.value)
    assert plan.proven_optimal
    assert next(calls) == 4  # Three sizes of chunks, one of them twice.
