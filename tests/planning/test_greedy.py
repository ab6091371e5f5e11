"""Plans that are made at once: they exist for hundreds of devices, and other searches use them."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest

from planning import planner, twins
from planning.plan import Proof, assess, verify
from planning.planner import solve
from planning.problem import BlockOption, Device, HopFormat, Objective, PlanningProblem
from planning.search import base, slowest, sums
from planning.search import search as plan_search
from planning.search.beam import beam as real
from planning.search.greedy import fill
from planning.search.packing import Packed
from planning.search.search import search
from planning.search.tables import Tables
from tests.planning.test_planner import make_problem, make_spec, random_extras
from wire.profile import LinkProfile

WIDTHS = (4, 8)


def wide_problem(layers: int, count: int, seed: int, kind: str) -> PlanningProblem:
    """A fleet of which filling one device after the other needs up to three quarters."""
    rng = random.Random(f"{layers} {count} {seed}")
    blocks = layers + 2
    devices = []
    for i in range(count):
        row = tuple(BlockOption(b, 100 * b, 1e-3 * rng.uniform(0.5, 2.0), 1e-4) for b in WIDTHS)
        share = 800 * max(1.0, 1.5 * blocks / count)
        devices.append(
            Device(f"d{i}", int(share * rng.uniform(0.9, 1.8)), 10**9, (row,) * blocks, call_s=1e-4)
        )
    losses = tuple({b: rng.uniform(0.5, 2.0) * 4.0**-b for b in WIDTHS} for _ in range(blocks))
    links = {
        (i, j): LinkProfile(f"d{i}", f"d{j}", rng.uniform(1e-4, 3e-3), 1e6)
        for i, j in itertools.permutations(range(count), 2)
    }
    return PlanningProblem(
        spec=make_spec(layers),
        devices=tuple(devices),
        links=links,
        bits=WIDTHS,
        stored_bytes=tuple({b: 100 * b for b in WIDTHS} for _ in range(blocks)),
        kv_bytes=(0,) * blocks,
        weight_errors=tuple({} for _ in range(blocks)),
        max_weight_error=(math.inf,) * blocks,
        sensitivities=losses,
        quality_budget=2.0 * math.fsum(row[8] for row in losses),
        objective=Objective(kind),  # type: ignore[arg-type] # either
        hop_formats=(HopFormat(16, 0.0),),
    )


@pytest.mark.parametrize("kind", ["latency", "throughput"])
@pytest.mark.parametrize("count", [64, 128, 256])
def test_many_devices_have_a_plan_at_once(count: int, kind: str) -> None:
    """Before anything is searched for: with no time at all there is a plan."""
    for layers in (32, 80):
        problem = wide_problem(layers, count, 0, kind)
        found = search(problem, deadline_s=0.0, gap=0.01)
        assert found.choice is not None, (layers, count)
        plan = assess(problem, found.choice.stages, Proof("", 0.0, 0.0), found.choice.hop_bits)
        verify(plan, problem)


def test_equal_devices_are_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """To find them takes about as many comparisons as there are devices, not their square."""
    problem = make_problem(4, [Device(f"d{i}", 10**6, 10**9, ()) for i in range(200)])
    compared = []
    real = twins.are_twins

    def counted(*pair: object) -> bool:
        compared.append(pair)
        return real(*pair)  # type: ignore[arg-type] # as called

    monkeypatch.setattr(twins, "are_twins", counted)
    ties = planner._ties(problem)
    assert ties.sum() == 200 * 199 / 2
    assert len(compared) < 200


def test_fillings_are_what_they_say() -> None:
    """Every walk covers all blocks, fits, keeps pins and exclusions, and is worth its value."""
    plans = within = 0
    for seed in range(200):
        problem = random_extras(seed)
        # Of a plan the best chunks count, here those of 16 rows at most.
        aim = replace(problem.objective, prompt_tokens=problem.objective.prompt_tokens % 17)
        problem = replace(problem, objective=aim)
        tables = Tables(problem)
        if not tables.longest:
            continue
        for one in fill(tables):
            choice = tables.choice(one.spans, one.chosen, one.hops)
            plan = assess(problem, choice.stages, Proof("", 0.0, 0.0), choice.hop_bits)
            if aim.kind != "throughput":
                assert one.value == pytest.approx(plan.value, rel=1e-9)
            elif not aim.migration_weight:
                assert one.value == pytest.approx(plan.bottleneck_s, rel=1e-9)
            easy = problem if one.within else replace(problem, quality_budget=math.inf)
            if one.within or len(problem.permitted_hops) == len(problem.hop_formats):
                verify(plan, easy)
            plans += 1
            within += one.within
    assert plans > within > 50


@pytest.mark.parametrize(("kind", "name"), [("latency", "Cheapest"), ("throughput", "Fastest")])
def test_each_search_finishes_the_walks_of_the_other(
    kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its own beam finds nothing, and nothing is made at once."""
    problem = wide_problem(6, 4, 0, kind)
    monkeypatch.setattr(base, "fill", lambda *_: [])
    monkeypatch.setattr(base, "pack", lambda *_, **__: Packed(None))
    owners: list[bool] = []

    def beam(tables: Tables, *arguments: object, **settings: object) -> object:
        own = tables.throughput == (kind == "throughput")
        owners.append(own)
        return ([], 0.0) if own else real(tables, *arguments, **settings)  # type: ignore[arg-type] # as called

    monkeypatch.setattr(sums, "beam", beam)
    monkeypatch.setattr(slowest, "beam", beam)
    assert name in vars(plan_search)
    plan = solve(problem, gap=0.5, time_limit_s=5.0)
    verify(plan, problem)
    assert plan.proof.solver == "search"
    assert False in owners
