"""What must hold for every problem: more never hurts, names do not matter, ties have one answer."""

from __future__ import annotations

import itertools
import json
import math
import random
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.planner import instance
from model.spec import LayerSpec, ModelSpec
from planning.plan import InfeasiblePlan, Plan, PlanError, Proof, assess, verify
from planning.planner import solve
from planning.problem import BlockOption, Device, HopFormat, Objective, PlanningProblem
from planning.search.search import search
from wire.profile import LinkProfile

LAYER = LayerSpec(
    hidden=8,
    heads=2,
    kv_heads=2,
    head_dim=4,
    ffn=16,
    norm="layernorm",
    norm_eps=1e-5,
    norm_position="pre",
    activation="relu",
    gated=False,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
)
WIDTHS = (4, 8)
KINDS = ("latency", "throughput", "request")


def make(layers: int, count: int, seed: int, kind: str | None = None) -> PlanningProblem:
    """Layers alike but in their sensitivities, devices of different speed and size."""
    rng = random.Random(f"{layers} {count} {seed}")
    blocks = layers + 2
    devices = []
    for i in range(count):
        speed = rng.uniform(0.5, 2.0)
        row = tuple(BlockOption(b, 100 * b, 1e-3 * speed * (1 + b / 4), 1e-4) for b in WIDTHS)
        memory = int(800 * blocks / count * rng.uniform(0.6, 1.8))
        devices.append(Device(f"d{i}", memory, 10**9, (row,) * blocks, call_s=1e-4))
    links = {
        (i, j): LinkProfile(f"d{i}", f"d{j}", rng.uniform(1e-4, 3e-3), 1e6)
        for i, j in itertools.permutations(range(count), 2)
    }
    losses = tuple({b: rng.uniform(0.5, 2.0) * 4.0**-b for b in WIDTHS} for _ in range(blocks))
    share = rng.uniform(0.3, 1.0)
    return PlanningProblem(
        spec=ModelSpec(
            vocab=32,
            hidden=8,
            embed_dim=8,
            max_context=64,
            layers=(LAYER,) * layers,
            learned_positions=0,
            position_offset=0,
            final_norm=True,
            tied_head=False,
            bos_token=None,
            eos_tokens=(),
        ),
        devices=tuple(devices),
        links=links,
        bits=WIDTHS,
        stored_bytes=tuple({b: 100 * b for b in WIDTHS} for _ in range(blocks)),
        kv_bytes=(0,) * blocks,
        weight_errors=tuple({} for _ in range(blocks)),
        max_weight_error=(math.inf,) * blocks,
        sensitivities=losses,
        quality_budget=share * math.fsum(row[4] for row in losses),
        objective=Objective(kind or rng.choice(KINDS), prompt_tokens=20, output_tokens=3),  # type: ignore[arg-type] # any
        hop_formats=(HopFormat(8, 2e-3 * rng.random()), HopFormat(16, 2e-4), HopFormat(32, 0.0)),
    )


problems = st.builds(make, st.integers(1, 4), st.integers(1, 3), st.integers(0, 10**6))


def best(problem: PlanningProblem) -> Plan | None:
    """The verified plan, proved to be optimal; None where there is none."""
    try:
        plan = solve(problem)
    except InfeasiblePlan:
        return None
    verify(plan, problem)
    assert plan.proven_optimal
    return plan


def value(problem: PlanningProblem) -> float:
    plan = best(problem)
    return math.inf if plan is None else plan.value


@pytest.mark.thorough
@settings(max_examples=25, deadline=None)
@given(problem=problems, factor=st.floats(1.0, 3.0), which=st.integers(0, 2))
def test_more_memory_faster_links_and_looser_budgets_never_hurt(
    problem: PlanningProblem, factor: float, which: int
) -> None:
    which %= len(problem.devices)
    devices = list(problem.devices)
    devices[which] = replace(devices[which], memory_bytes=int(factor * devices[which].memory_bytes))
    links = {
        pair: replace(link, rtt_s=link.rtt_s / factor, bytes_per_s=factor * link.bytes_per_s)
        if which in pair
        else link
        for pair, link in problem.links.items()
    }
    assert problem.quality_budget is not None
    found = value(problem)
    before = found * (1 + 2e-6)
    assert value(replace(problem, devices=tuple(devices))) <= before
    assert value(replace(problem, links=links)) <= before
    assert value(replace(problem, quality_budget=factor * problem.quality_budget)) <= before
    fewer = replace(problem, hop_formats=problem.hop_formats[which:])
    assert value(fewer) * (1 + 2e-6) >= found


@settings(max_examples=20, deadline=None)
@given(problem=problems, order=st.permutations(range(3)))
def test_order_and_names_of_devices_change_no_figure(
    problem: PlanningProblem, order: list[int]
) -> None:
    count = len(problem.devices)
    order = [i for i in order if i < count]
    place = {old: new for new, old in enumerate(order)}
    other = replace(
        problem,
        devices=tuple(replace(problem.devices[old], name=f"x{old}") for old in order),
        links={(place[i], place[j]): link for (i, j), link in problem.links.items()},
    )
    assert value(other) == pytest.approx(value(problem), rel=2e-6)


@settings(max_examples=15, deadline=None)
@given(problem=problems)
def test_the_same_problem_has_the_same_plan(problem: PlanningProblem) -> None:
    first, second = best(problem), best(problem)
    if first is None or second is None:
        assert first is second
    else:
        assert first.placements == second.placements


@settings(max_examples=15, deadline=None)
@given(problem=problems)
def test_a_pin_or_an_exclusion_never_helps_and_is_kept(problem: PlanningProblem) -> None:
    free = value(problem)
    pinned = best(replace(problem, pins={1: 0}))
    if pinned is not None:
        assert pinned.value >= free * (1 - 2e-6)
        assert next(place.device for place in pinned.placements if place.block == 1) == "d0"
    without = best(replace(problem, excluded=frozenset({0})))
    if without is not None:
        assert without.value >= free * (1 - 2e-6)
        assert "d0" not in {stage.device for stage in without.stages}


@pytest.mark.thorough
@pytest.mark.parametrize(("layers", "count"), [(12, 2), (12, 4), (24, 8), (32, 8)])
def test_plans_of_large_problems_are_verified(layers: int, count: int) -> None:
    for seed, kind in itertools.product(range(5), ("latency", "throughput")):
        problem = instance(layers, count, seed, Objective(kind))  # type: ignore[arg-type] # any
        plan = solve(problem, gap=0.05, time_limit_s=5.0)
        verify(plan, problem)
        # How small the gap is depends on the machine: benchmarks/planner.py measures it.
        assert 0 <= plan.gap < 1
        json.dumps([plan.to_dict(), plan.gap, plan.proven_optimal])


@pytest.mark.thorough
@pytest.mark.parametrize("kind", KINDS)
def test_search_alone_and_the_program_agree(kind: str) -> None:
    for seed in range(4):
        problem = make(5, 3, seed, kind)
        exact = value(problem)
        found = search(problem, deadline_s=time.monotonic() + 10, gap=0.01)
        assert found.bound <= exact * (1 + 1e-6)
        if found.choice is not None:
            proof = Proof("search", 0.0, found.bound)
            plan = assess(problem, found.choice.stages, proof, found.choice.hop_bits)
            verify(plan, problem)
            assert exact * (1 - 1e-6) <= plan.value


def test_a_migration_weight_keeps_blocks_where_they_are() -> None:
    problem = make(4, 2, 1, "latency")
    roomy = replace(problem, quality_budget=None, sensitivities=())
    fastest = solve(roomy)
    held = tuple(frozenset(WIDTHS) for _ in range(6))
    slow = next(i for i, d in enumerate(roomy.devices) if d.name != fastest.stages[0].device)
    devices = tuple(
        replace(
            device,
            memory_bytes=10**6,
            load_bytes_per_s=1e3,
            held=held if i == slow else (),
        )
        for i, device in enumerate(roomy.devices)
    )
    staying = Objective("latency", migration_weight=1.0)
    plan = solve(replace(roomy, devices=devices, objective=staying))
    assert [stage.device for stage in plan.stages] == [roomy.devices[slow].name]
    assert plan.load_s == 0.0
    moved = solve(replace(roomy, devices=devices, objective=Objective("latency")))
    assert moved.decode_s <= plan.decode_s


def test_advice_on_a_budget_and_on_pins_works_when_followed() -> None:
    problem = make(4, 2, 3, "latency")
    tight = replace(problem, quality_budget=1e-9)
    with pytest.raises(InfeasiblePlan, match="raise the quality budget to") as caught:
        solve(tight)
    enough = caught.value.advice.quality_budget
    assert enough is not None
    verify(solve(replace(tight, quality_budget=enough)), replace(tight, quality_budget=enough))
    alone = replace(
        problem,
        quality_budget=None,
        devices=(problem.devices[0], replace(problem.devices[1], memory_bytes=100)),
        excluded=frozenset({0}),
    )
    roomy = replace(
        alone, devices=(replace(alone.devices[0], memory_bytes=10**6), alone.devices[1])
    )
    with pytest.raises(InfeasiblePlan, match="drop the exclusion of d0") as caught:
        solve(roomy)
    assert caught.value.advice.free_device == "d0"
    solve(replace(roomy, excluded=frozenset()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quality_budget": 1e-9}, "the sensitivities add up to"),
        ({"excluded": frozenset({0})}, "which is excluded"),
        ({"pins": {0: 1}}, "embedding is on d0, not d1"),
    ],
)
def test_verify_checks_budget_pins_and_exclusions(change: dict[str, object], message: str) -> None:
    problem = replace(make(2, 2, 0, "latency"), quality_budget=None)
    roomy = replace(problem.devices[0], memory_bytes=10**6)
    problem = replace(problem, devices=(roomy, problem.devices[1]))
    plan = assess(problem, [(0, 0, (4,) * 4)], Proof("by hand", 0.0, 0.0))
    verify(plan, problem)
    with pytest.raises(PlanError, match=message):
        verify(plan, replace(problem, **change))  # type: ignore[arg-type] # any
