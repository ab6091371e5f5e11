"""Solvers: their input, answers, failures and time limits."""

from __future__ import annotations

import functools
import math
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pulp
import pytest

from planning import planner
from planning.exact.program import PlanProgram
from planning.exact.solver import Outcome, SolverError, SolverName, default_solver, run
from planning.plan import InfeasiblePlan, PlanError, Proof, assess, verify
from planning.planner import solve
from planning.problem import Objective, PlanningProblem
from planning.search.base import Found
from planning.search.search import search
from tests.planning.test_planner import (
    SOLVERS,
    exhaustive_s,
    hard_problem,
    make_device,
    make_problem,
    random_extras,
)

WIDTHS = (4, 8, 16)


def budget_problem(seed: int) -> PlanningProblem:
    """Five blocks on four devices. Losses span up to 20 magnitudes; so does what the budget leaves.

    The budget is what some widths take, or between that and what others take. In some problems all
    blocks lose much whatever their width, so that the budget hardly exceeds what is unavoidable.
    """
    rng = random.Random(seed)
    fast = {b: 1e-3 * rng.uniform(0.5, 1.0) * b**0.7 for b in WIDTHS}
    devices = [
        make_device(
            f"d{i}",
            5,
            int(rng.uniform(1_300, 8_000)),
            {b: s * rng.uniform(0.8, 1.3) for b, s in fast.items()},
            call_s=1e-4,
        )
        for i in range(4)
    ]
    floor = rng.choice([0.0, 0.0, 0.05])
    steps = [10.0 ** -rng.uniform(0, 6), 10.0 ** -rng.uniform(0, 6)]
    losses = []
    for _ in range(5):
        worst = 0.05 * rng.uniform(0.5, 2.0)
        row = {4: worst, 8: worst * steps[0], 16: worst * steps[0] * steps[1]}
        losses.append({b: floor + loss for b, loss in row.items()})
    some = [row[rng.choice(WIDTHS)] for row in losses]
    budget = math.fsum(some) * rng.choice([1.0, 1 + 1e-9, 1.3])
    least = math.fsum(row[16] for row in losses)
    return replace(
        make_problem(3, devices, bits=WIDTHS, rtt_s=0.001),
        sensitivities=tuple(losses),
        quality_budget=max(budget, least),
        objective=Objective(rng.choice(("latency", "throughput"))),
    )


@functools.cache
def expected_s(seed: int) -> float:
    """The least objective; it takes seconds to try everything."""
    return exhaustive_s(budget_problem(seed))


@pytest.mark.thorough
@pytest.mark.parametrize("solver", SOLVERS)
def test_budgets_of_all_magnitudes_are_kept_and_used(solver: SolverName) -> None:
    for seed in range(10):
        problem = budget_problem(seed)
        expected = expected_s(seed)
        try:
            plan = solve(problem, solver=solver)
        except InfeasiblePlan:
            assert expected == math.inf, seed
        else:
            verify(plan, problem)
            assert plan.value == pytest.approx(expected, rel=1e-6), seed
            assert plan.proven_optimal, seed


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_budget_far_below_the_largest_losses(solver: SolverName) -> None:
    # 4 bits lose 0.05 a block, 8 bits a few hundred-millionths: those may be used where 1.2e-7 in
    # all allow it. 16 bits lose nothing and take twice the memory and time.
    losses = [{4: 0.05, 8: (1 + k) * 1e-8, 16: 0.0} for k in range(6)]
    devices = [
        make_device(f"d{i}", 6, 2_500, {4: 0.001, 8: 0.002, 16: 0.004 + 0.001 * i})
        for i in range(4)
    ]
    problem = replace(
        make_problem(4, devices, bits=WIDTHS),
        sensitivities=tuple(losses),
        quality_budget=1.2e-7,
    )
    plan = solve(problem, solver=solver)
    verify(plan, problem)
    assert plan.value == pytest.approx(exhaustive_s(problem), rel=1e-6)
    assert plan.proven_optimal


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("floor", [0.0, 0.05])
def test_the_budget_that_is_advised_is_the_least(solver: SolverName, floor: float) -> None:
    # Memory for 16 bits in three of six blocks; the others lose least at 8 bits: 1 + 2 + 3.
    losses = [{4: floor + 0.05, 8: floor + (1 + k) * 1e-9, 16: floor} for k in range(6)]
    devices = [make_device("a", 6, 3 * 1_600 + 3 * 800 + 1, {4: 0.001, 8: 0.001, 16: 0.001})]
    problem = replace(
        make_problem(4, devices, bits=WIDTHS),
        sensitivities=tuple(losses),
        quality_budget=6 * floor,
    )
    with pytest.raises(InfeasiblePlan, match="raise the quality budget to") as caught:
        solve(problem, solver=solver)
    advised = caught.value.advice.quality_budget
    assert advised is not None
    assert advised == pytest.approx(6 * floor + 6e-9, rel=0.01)
    eased = replace(problem, quality_budget=advised)
    verify(solve(eased, solver=solver), eased)


def test_a_choice_as_a_solution_keeps_every_row() -> None:
    """The start that a solver gets is a solution, and says what the choice does."""
    told = 0
    for seed in range(120):
        problem = random_extras(seed)
        found = search(problem, deadline_s=time.monotonic() + 10, gap=0.01)
        if found.choice is None:
            continue
        program = PlanProgram(problem)
        values = program.values(found.choice)
        if values is None:
            continue
        told += 1
        for variable in program.program.variables():
            variable.varValue = values[variable.name]
            assert variable.valid(1e-9), (seed, variable.name)
        for row in program.program.constraints():
            assert row.valid(1e-6), (seed, row)
        plan = assess(problem, found.choice.stages, Proof("", 0.0, 0.0), found.choice.hop_bits)
        assert program.bound(program.program.objective.value()) <= plan.value * (1 + 1e-6)
        again = program.choice(values)
        same = assess(problem, again.stages, Proof("", 0.0, 0.0), again.hop_bits)
        assert same.value == pytest.approx(plan.value, rel=1e-9)
    assert told > 40


@pytest.mark.thorough
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_start_is_at_hand_when_the_limit_passes_at_once(solver: SolverName) -> None:
    problem = hard_problem()
    choice = search(problem, deadline_s=time.monotonic() + 2, gap=0.3).choice
    assert choice is not None
    program = PlanProgram(problem)
    for time_limit_s in (4.0, 16.0, 64.0):  # A busy machine reads the program for long.
        outcome = run(
            program.program,
            time_limit_s=time_limit_s,
            solver=solver,
            start=program.values(choice),
        )
        if outcome.status != "unknown":
            break
    assert outcome.status in ("feasible", "optimal")
    made = program.choice(outcome.values)
    start = assess(problem, choice.stages, Proof("", 0.0, 0.0), choice.hop_bits)
    plan = assess(problem, made.stages, Proof("", 0.0, 0.0), made.hop_bits)
    assert plan.value <= start.value * (1 + 1e-6)


def fails(*_: object, **__: object) -> Outcome:
    raise SolverError("the solver ended with exit status 11")


def refuses(*_: object, **__: object) -> Outcome:
    return Outcome("infeasible", "cbc")


def knows_nothing(*_: object, **__: object) -> Outcome:
    return Outcome("unknown", "cbc")


@pytest.mark.parametrize("answer", [fails, refuses, knows_nothing])
def test_a_plan_at_hand_stands_whatever_the_solver_says(
    answer: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "run", answer)
    problem = hard_problem()
    plan = solve(problem, time_limit_s=2.0, gap=1e-4)
    verify(plan, problem)
    assert plan.proof.solver == "search"


@pytest.mark.parametrize("answer", [fails, knows_nothing])
def test_a_failure_of_the_solver_is_not_called_infeasible(
    answer: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "run", answer)
    devices = [make_device(name, 4, 1_600, {8: 0.001}) for name in "ab"]
    small = make_problem(2, devices)
    # Small problems go to the solver first: the search stands in.
    verify(solve(small), small)
    monkeypatch.setattr(planner, "search", lambda *_, **__: Found(None, 0.0))
    for problem in (small, hard_problem()):
        with pytest.raises(PlanError, match="although one may exist") as caught:
            solve(problem, time_limit_s=0.1)
        assert not isinstance(caught.value, InfeasiblePlan)
        if answer is fails:
            assert "exit status 11" in str(caught.value)


@pytest.mark.skipif(default_solver() != "highs", reason="the extra highs is not installed")
def test_highs_prints_nothing_in_a_fresh_process() -> None:
    """Its banner comes once a process, wherever it is first made."""
    code = (
        "from tests.planning.test_planner import make_device, make_problem\n"
        "from planning.planner import solve\n"
        "devices = [make_device(name, 4, 1_600, {8: 0.001}) for name in 'ab']\n"
        "assert solve(make_problem(2, devices), solver='highs').proof.solver == 'highs'\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


NO_NUMBERS = """#!/bin/sh
while [ $# -gt 1 ]; do
    [ "$1" = -solution ] && solution=$2
    shift
done
{ echo "Optimal - objective value nan"; echo "0 X0000000 nan 0"; } > "$solution"
"""


@pytest.mark.parametrize("kind", [pulp.LpInteger, pulp.LpContinuous])
def test_a_solver_that_returns_no_numbers_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    cbc = tmp_path / "cbc"
    cbc.write_text(NO_NUMBERS)
    cbc.chmod(0o755)
    monkeypatch.setattr(pulp.PULP_CBC_CMD, "pulp_cbc_path", str(cbc))
    program = pulp.LpProblem("plan")
    variable = program.add_variable("x", 1, 2, kind)
    program.setObjective(variable)
    with pytest.raises(SolverError, match="cbc returned nan for x: use another solver"):
        run(program, time_limit_s=10, solver="cbc")
