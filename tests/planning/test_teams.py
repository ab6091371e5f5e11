"""Devices that share layers: plans against exhaustive search, and plans that are wrong."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.share import Share
from planning.build import DeviceInput, RequestInput, build_problem
from planning.candidates import MOST_TEAMS, division, with_teams
from planning.exact.solver import SolverName
from planning.plan import InfeasiblePlan, Plan, PlanError, Proof, Stage, assess, verify
from planning.planner import solve
from planning.problem import HopFormat, Objective, PlanningProblem
from planning.search import slowest
from planning.search.search import search
from planning.sensitivity import own_share
from planning.teams import incidence, with_team
from tests.planning.exhaustive_teams import exhaustive, random_teams
from tests.planning.shapes import llama_8b
from tests.planning.test_planner import SOLVERS
from wire.profile import BlockTiming, DeviceProfile, LinkProfile, TimingKind

SEEDS = int(os.environ.get("SHOAL_BRUTE_FORCE", "200"))
"""Problems that are tried exhaustively, of all solvers together."""

NO_PROOF = Proof("", 0.0, 0.0)
WIDTHS = (4, 8)
ETHERNET, WIFI = (0.0003, 117e6), (0.005, 7.5e6)
FACTORS: dict[TimingKind, float] = {"embedding": 1e-3, "layer": 1.0, "head": 2.4}
"""Times of blocks, in those of a layer."""


def without_teams(problem: PlanningProblem) -> PlanningProblem:
    return replace(problem, no_teams=True)


def candidate_sets(problem: PlanningProblem) -> tuple[tuple[int, ...], ...]:
    """The sets of devices that are candidates, each lead first."""
    index = {device.name: i for i, device in enumerate(problem.devices)}
    teams = [device.team for device in with_teams(problem).devices if device.team is not None]
    return tuple(dict.fromkeys(tuple(index[part.name] for part in one.parts) for one in teams))


@pytest.mark.thorough
@pytest.mark.parametrize("solver", SOLVERS)
def test_plans_equal_exhaustive_search(solver: SolverName) -> None:
    """Over teams, their shares, placement, bits of blocks, hops and sums, for all objectives."""
    found: Counter[str] = Counter()
    for seed in range(SEEDS):
        if (seed % 3 == 0) != (solver == "cbc"):
            continue
        problem = random_teams(seed)
        expected = exhaustive(problem)
        try:
            plan = solve(problem, solver=solver)
        except InfeasiblePlan:
            assert expected == math.inf, seed
            found["none"] += 1
            continue
        assert plan.value == pytest.approx(expected, rel=1e-6), seed
        assert plan.proven_optimal, seed
        verify(plan, problem)
        if any(stage.members for stage in plan.stages):
            found[problem.objective.kind] += 1
    if SEEDS >= 100:
        assert {"latency", "request"} <= set(found)
        assert found["none"] < SEEDS / 3


@pytest.mark.thorough
def test_the_search_alone_proves_nothing_wrong() -> None:
    """Its bounds are below every plan, and its plans are nearly always the best."""
    best = plans = 0
    for seed in range(0, SEEDS, 4):
        problem = random_teams(seed)
        expected = exhaustive(problem)
        found = [searched(variant) for variant in with_teams(problem).variants]
        assert min(bound for bound, _ in found) <= expected * (1 + 1e-9), seed
        value = min(value for _, value in found)
        assert value >= expected * (1 - 1e-9), seed
        if expected < math.inf:
            plans += 1
            best += value <= expected * 1.01
    assert best > 0.9 * plans


@pytest.mark.thorough
def test_bounds_of_many_devices_prove_nothing_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their hops lead anywhere, and plans are looked for among some of the devices."""
    monkeypatch.setattr(slowest, "_SOME", 0)
    plans = 0
    for seed in range(SEEDS):
        monkeypatch.setattr(slowest, "_MANY", (96, 3)[seed % 2])
        # A team asked for that cannot be is refused before any search.
        problem = replace(random_teams(seed), objective=Objective("throughput"), teams=())
        expected = exhaustive(problem)
        for variant in with_teams(problem).variants:
            bound, value = searched(variant)
            assert bound <= expected * (1 + 1e-9), seed
            assert value >= expected * (1 - 1e-9), seed
            plans += value < math.inf
    assert plans > SEEDS / 4


def searched(problem: PlanningProblem) -> tuple[float, float]:
    """The bound and the value of a search; inf if it found nothing."""
    found = search(problem, deadline_s=math.inf, gap=0.0)
    if found.choice is None:
        return (math.inf if found.impossible else found.bound), math.inf
    choice = found.choice
    return found.bound, assess(problem, choice.stages, NO_PROOF, choice.hop_bits).value


def shoal(
    speeds: dict[str, float],
    link: tuple[float, float] = ETHERNET,
    *,
    layers: int = 32,
    memory: int = 7 * 10**9,
    shares: bool = True,
    ffn: int = 14_336,
    others: dict[str, object] | None = None,
) -> PlanningProblem:
    """Devices that take so many milliseconds per layer at 4 bits, with equal links. Assumed."""
    spec = llama_8b(layers, ffn=ffn)
    devices = []
    for name, milliseconds in speeds.items():
        profile = DeviceProfile(
            machine="pi",
            processor="cpu",
            cores=4,
            threads=4,
            backend="onnx_cpu",
            backend_version="1",
            container_bits=tuple((bits, bits) for bits in WIDTHS),
            memory_bytes=memory,
            memory_total_bytes=8 * 10**9,
            storage_bytes=10**11,
            memory_read_bytes_per_s=10e9,
            disk_write_bytes_per_s=1e8,
            call_s=2e-4,
            watts=8.0,
            shares=shares,
            sum_s=5e-5,
        )
        timings = [
            BlockTiming(kind, 0, bits, factor * 1e-3 * milliseconds * bits / 4, 4e-3)
            for bits in WIDTHS
            for kind, factor in FACTORS.items()
        ]
        devices.append(DeviceInput(name, profile, timings))
    links = [LinkProfile(a, b, *link) for a, b in itertools.permutations(speeds, 2)]
    values = {"bits": WIDTHS, "context_tokens": 2048, "objective": Objective("latency")}
    return build_problem(RequestInput(spec, **{**values, **(others or {})}), devices, links)  # type: ignore[arg-type] # a test's own fields


FOUR_PIS = {f"pi-{n}": 12.2 for n in range(1, 5)}


def members(plan: Plan) -> list[tuple[str, ...]]:
    return [stage.devices for stage in plan.stages]


def fraction(stage: Stage, name: str) -> float:
    """The part of the MLP's columns that a member has."""
    (one,) = (member for member in stage.members if member.device == name)
    begin, end = one.share.columns
    return (end - begin) / stage.members[-1].share.columns[1]


def test_four_equal_pis_are_one_team_that_is_three_times_as_fast() -> None:
    problem = shoal(FOUR_PIS)
    plan = solve(problem)
    assert members(plan) == [tuple(FOUR_PIS)]
    verify(plan, problem)
    assert plan.proven_optimal
    alone = solve(without_teams(problem))
    assert 2.5 < alone.decode_s / plan.decode_s < 3.3
    (stage,) = plan.stages
    assert [member.share.kv_heads for member in stage.members] == [(0, 2), (2, 4), (4, 6), (6, 8)]
    # 64 sums of 0.15 ms, 0.05 ms and three times 8,196 bytes at 117 MB/s.
    assert stage.sums_s == pytest.approx(64 * (0.00015 + 0.00005 + 3 * 8196 / 117e6))
    assert [member.sums_s for member in stage.members] == pytest.approx(4 * [64 * 0.00005])
    assert all(member.own_s < stage.compute_s for member in stage.members)
    assert stage.sum_bits == 16


def test_over_wifi_no_devices_share_layers() -> None:
    problem = shoal(FOUR_PIS, WIFI)
    assert candidate_sets(problem) == ()
    assert with_teams(problem) is problem
    plan = solve(problem)
    assert not any(stage.members for stage in plan.stages)
    assert not solve(shoal(FOUR_PIS, shares=False)).stages[0].members


def test_a_device_of_half_the_speed_gets_half_the_share() -> None:
    plan = solve(shoal({"fast": 10.0, "slow": 20.0}))
    (stage,) = plan.stages
    assert stage.devices == ("fast", "slow")
    # A tenth of the slow one's time does not shrink: (1 + 9 f) 2 = 1 + 9 (1 - f).
    assert fraction(stage, "slow") == pytest.approx(8 / 27, abs=0.005)


def test_shares_bend_to_memory() -> None:
    """The fast device has room for a third of the model, so its share is smaller than by speed."""
    problem = shoal({"fast": 10.0, "slow": 20.0})
    memory_bytes = problem.devices[0].stage_bytes + 1_800_000_000
    small = replace(problem.devices[0], memory_bytes=memory_bytes)
    problem = replace(problem, devices=(small, problem.devices[1]))
    plan = solve(problem)
    verify(plan, problem)
    shared = [stage for stage in plan.stages if stage.members]
    assert shared
    assert fraction(shared[0], "fast") < 0.4
    assert plan.decode_s < 0.9 * solve(without_teams(problem)).decode_s


def test_measured_shares_count() -> None:
    """A block that a quarter of makes as long as the whole is not shared."""
    problem = shoal({"a": 10.0, "b": 10.0})
    flat = tuple(
        replace(
            device,
            options=tuple(
                tuple(
                    replace(o, shares_s=tuple((f, o.decode_s, 4e-3) for f in (0.25, 0.5, 1.0)))
                    for o in row
                )
                for row in device.options
            ),
        )
        for device in problem.devices
    )
    assert candidate_sets(problem) == ((0, 1),)
    assert candidate_sets(replace(problem, devices=flat)) == ()


def test_twins_are_compared_once() -> None:
    """Of equal devices only runs are candidates: two, three or four of four."""
    sets = candidate_sets(shoal(FOUR_PIS))
    assert set(sets) == {(0, 1), (1, 2), (2, 3), (0, 1, 2), (1, 2, 3), (0, 1, 2, 3)}


def test_large_shoals_have_a_bounded_number_of_teams() -> None:
    problem = with_teams(shoal({f"d{n}": 5.0 + 0.1 * n for n in range(40)}, layers=4))
    assert 40 < len(problem.devices) - len(problem.real) <= MOST_TEAMS
    assert max(incidence(problem).sum(1)) == 8


def test_wishes_of_teams() -> None:
    problem = shoal({"a": 10.0, "b": 10.0, "c": 4.0})
    assert members(solve(problem)) != [("a", "b")]
    asked = replace(problem, teams=((0, 1),))
    plan = solve(asked)
    verify(plan, asked)
    assert ("a", "b") in members(plan)
    forbidden = replace(problem, no_teams=True)
    assert not any(stage.members for stage in solve(forbidden).stages)
    with pytest.raises(PlanError, match="do not share layers, as was asked"):
        verify(solve(problem), asked)
    with pytest.raises(PlanError, match="teams are forbidden"):
        verify(plan, forbidden)


def test_an_asked_team_is_used_although_it_loses() -> None:
    problem = shoal({"a": 10.0, "b": 10.0}, WIFI)
    asked = replace(problem, teams=((0, 1),))
    plan = solve(asked)
    assert members(plan) == [("a", "b")]
    assert plan.decode_s > solve(problem).decode_s


def test_an_asked_team_that_cannot_be_is_refused_with_the_reason() -> None:
    for problem, reason in (
        (shoal({"a": 10.0, "b": 10.0}, shares=False), "the backend of a loads no shares"),
        (shoal({f"d{n}": 10.0 for n in range(9)}), "divided into 8 parts at most"),
    ):
        asked = replace(problem, teams=(tuple(range(len(problem.devices))),))
        with pytest.raises(InfeasiblePlan, match=f"{reason}.*: drop --team$") as caught:
            solve(asked)
        assert caught.value.advice.free_teams
        solve(replace(asked, teams=()))


def test_a_wish_for_no_teams_that_leaves_too_little_room_is_named() -> None:
    problem = shoal({"a": 10.0, "b": 10.0}, layers=3, memory=680 * 10**6)
    solve(problem)
    with pytest.raises(InfeasiblePlan, match=r"memory is short by .*drop --no-teams") as caught:
        solve(replace(problem, no_teams=True))
    assert caught.value.advice.free_teams


def test_a_pin_means_the_device_alone_or_the_asked_team() -> None:
    problem = replace(shoal({"a": 10.0, "b": 10.0}), pins={5: 1})
    plan = solve(problem)
    (stage,) = (one for one in plan.stages if one.first <= 5 < one.last)
    assert stage.devices == ("b",)
    asked = replace(problem, teams=((0, 1),), pins={0: 1, 5: 1})
    plan = solve(asked)
    verify(plan, asked)
    # The embedding is on the lead alone.
    assert members(plan) == [("b", "a")]


def test_sums_at_8_bits_need_a_measured_loss_and_count_twice_per_layer() -> None:
    slow = (0.0003, 10e6)
    rows = [dict.fromkeys(WIDTHS, 1e-4) for _ in range(34)]
    hops = [HopFormat(8, 1e-5), HopFormat(16, 0.0)]
    others: dict[str, object] = {"sensitivities": rows, "quality_budget": 1.0, "hop_formats": hops}
    problem = shoal(FOUR_PIS, slow, others=others)
    plan = solve(problem)
    shared = [stage for stage in plan.stages if stage.members]
    assert [stage.sum_bits for stage in shared] == [8]
    layers = len(shared[0].bits) - (shared[0].first == 0) - (shared[0].last == 34)
    hop_loss = 1e-5 * (len(plan.stages) - 1)
    assert plan.total_sensitivity == pytest.approx(34e-4 + 2 * layers * 1e-5 + hop_loss)
    assert own_share(problem, plan) == pytest.approx(2 * layers * 1e-5)
    unmeasured = replace(problem, hop_formats=(HopFormat(8), HopFormat(16, 0.0)))
    assert {stage.sum_bits for stage in solve(unmeasured).stages} <= {16, None}


def test_more_sums_at_8_bits_than_the_budget_allows_are_at_16() -> None:
    rows = [dict.fromkeys(WIDTHS, 1e-4) for _ in range(34)]
    others: dict[str, object] = {
        "sensitivities": rows,
        "quality_budget": 35e-4,
        "hop_formats": [HopFormat(8, 1e-5), HopFormat(16, 0.0)],
    }
    plan = solve(shoal(FOUR_PIS, (0.0003, 10e6), others=others))
    assert {stage.sum_bits for stage in plan.stages if stage.members} == {16}


def test_plans_with_teams_survive_json() -> None:
    problem = shoal(FOUR_PIS)
    plan = solve(problem)
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    verify(again, problem)
    assert PlanningProblem.from_dict(json.loads(json.dumps(problem.to_dict()))) == problem


def with_member(plan: Plan, at: int, **changes: object) -> Plan:
    stage = plan.stages[0]
    changed = [*stage.members]
    changed[at] = replace(changed[at], **changes)  # type: ignore[arg-type] # any field
    return with_stage(plan, members=tuple(changed))


def with_stage(plan: Plan, **changes: object) -> Plan:
    return replace(plan, stages=(replace(plan.stages[0], **changes), *plan.stages[1:]))  # type: ignore[arg-type] # any field


def with_share(plan: Plan, at: int, **spans: tuple[int, int]) -> Plan:
    return with_member(plan, at, share=replace(plan.stages[0].members[at].share, **spans))


@pytest.mark.parametrize(
    ("falsify", "says"),
    [
        (lambda p: with_share(p, 1, kv_heads=(1, 4)), "KV heads do not follow"),
        (lambda p: with_share(p, 1, columns=(3648, 7168)), "columns do not follow"),
        (lambda p: with_share(p, 3, vocab=(96_192, 128_000)), "vocabulary end at 128000"),
        (lambda p: with_share(p, 0, kv_heads=(0, 0)), "KV heads do not follow"),
        (
            lambda p: with_share(with_share(p, 0, columns=(0, 3600)), 1, columns=(3600, 7168)),
            "cut a quantization group",
        ),
        (lambda p: with_member(p, 2, compute_s=0.001), "compute_s"),
        (lambda p: with_member(p, 2, memory_bytes=1), "memory_bytes"),
        (lambda p: with_member(p, 2, storage_limit_bytes=1), "storage_limit_bytes"),
        (lambda p: with_member(p, 3, device="pi-3"), "each once"),
        (lambda p: with_member(p, 3, device="pi-9"), "unknown device pi-9"),
        (lambda p: with_stage(p, device="pi-2"), "does not lead"),
        (lambda p: with_stage(p, members=p.stages[0].members[:1]), "at least two devices"),
        (lambda p: with_stage(p, sum_bits=8), "8 bit"),
        (lambda p: with_stage(p, sum_bits=None), "0 bit"),
        (lambda p: with_stage(p, sums_s=0.0), "sums_s"),
        (lambda p: with_stage(p, members=()), "compute_s"),
        (lambda p: with_stage(p, compute_s=0.05), "compute_s"),
    ],
)
def test_falsified_teams_are_refused(falsify: Callable[[Plan], Plan], says: str) -> None:
    problem = shoal(FOUR_PIS)
    with pytest.raises(PlanError, match=says):
        verify(falsify(solve(problem)), problem)


def leaves(value: Any, *way: str | int) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Every number, text and list in a plan as JSON, with the way to it."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, *way, key)
        return
    yield way, value
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from leaves(item, *way, index)


def other_values(value: Any) -> list[Any]:
    """Values of the same type, or of one that None stands for."""
    if value is None:
        return [1, 1.0]
    if isinstance(value, list):
        return [value[:-1], [*value, *value[-1:]]]
    if isinstance(value, float):
        return [value * (1 + 1e-6) + 1e-12, 0.0]
    return [f"{value}x"] if isinstance(value, str) else [value + 1, value - 1]


def falsified(plain: Any, way: Sequence[str | int], value: Any) -> Any:
    """A copy with another value at the end of the way."""
    copied = json.loads(json.dumps(plain))
    inner = copied
    for key in way[:-1]:
        inner = inner[key]
    inner[way[-1]] = value
    return copied


def test_verify_refuses_every_other_figure_of_a_plan() -> None:
    """Whatever fields a plan may have one day. Only what is said of its solver is believed."""
    count = 2 + 2
    problem = shoal(
        {"a": 12.0, "b": 12.0, "c": 12.0},
        layers=2,
        others={
            "objective": Objective("throughput", 100, 20, migration_weight=0.5),
            "slots": 4,
            "weight_errors": [{4: 0.01, 8: 0.001}] * count,
            "sensitivities": [{4: 0.01, 8: 0.001}] * count,
        },
    )
    timed = [
        replace(
            device,
            load_bytes_per_s=1e8,
            options=tuple(
                tuple(replace(one, rows_s=(0.02, 0.03, 0.05)) for one in row)
                for row in device.options
            ),
        )
        for device in problem.devices
    ]
    problem = replace(problem, devices=tuple(timed))
    spans = [[(0, end // 2), (end // 2, end)] for end in (8, 14_336, 128_256)]
    with_both, team = with_team(
        problem, (0, 1), [Share(*one) for one in zip(*spans, strict=True)], 16
    )
    plan = assess(with_both, [(team, 0, (4, 8)), (2, 2, (4, 8))], Proof("by hand", 1.0, 0.0))
    verify(plan, problem)
    plain = plan.to_dict()
    believed = {("proof", "solver"), ("proof", "solve_s"), ("proof", "bound")}
    accepted = set()
    for way, value in leaves(plain):
        for other in other_values(value):
            try:
                read = Plan.from_dict(falsified(plain, way, other))
            except PlanError:
                continue  # It cannot be read, and so not shown.
            try:
                verify(read, problem)
            except PlanError:
                continue
            if read != plan:
                accepted.add(way)
    assert accepted == believed


def test_a_member_over_its_memory_is_refused_although_the_team_has_room() -> None:
    problem = shoal(FOUR_PIS)
    plan = solve(problem)
    devices = list(problem.devices)
    devices[2] = replace(devices[2], memory_bytes=devices[2].stage_bytes + 10**9)
    smaller = replace(problem, devices=tuple(devices))
    with pytest.raises(PlanError, match=r"pi-3 needs .* bytes of memory"):
        verify(plan, smaller)
    other = solve(smaller)
    verify(other, smaller)
    assert other.decode_s < solve(without_teams(smaller)).decode_s


def test_a_device_in_two_stages_and_an_embedding_alone_are_refused() -> None:
    problem = shoal(FOUR_PIS)
    shares = tuple(member.share for member in solve(problem).stages[0].members)
    halves = tuple(
        Share(*(both(a, b) for a, b in zip(*pair, strict=True))) for pair in pairs(shares)
    )
    problem, one = with_team(problem, (0, 1), halves, 16)
    problem, other = with_team(problem, (1, 2), halves, 16)
    bits = (4,) * 17
    twice = assess(problem, [(one, 0, bits), (other, 17, bits)], NO_PROOF)
    with pytest.raises(PlanError, match="pi-2 has more than one stage"):
        verify(twice, problem)
    embedding = assess(problem, [(one, 0, (4,)), (2, 1, (4,) * 33)], NO_PROOF)
    with pytest.raises(PlanError, match="share no layer"):
        verify(embedding, problem)


def pairs(shares: tuple[Share, ...]) -> list[tuple[tuple[tuple[int, int], ...], ...]]:
    """Of four shares the first two, and the last two."""
    spans = [(share.kv_heads, share.columns, share.vocab) for share in shares]
    return [(spans[0], spans[1]), (spans[2], spans[3])]


def both(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    return one[0], other[1]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_teams_never_make_a_plan_worse(seed: int) -> None:
    problem = replace(random_teams(seed), teams=())
    try:
        alone = solve(without_teams(problem)).value
    except InfeasiblePlan:
        alone = math.inf
    try:
        together = solve(problem).value
    except InfeasiblePlan:
        together = math.inf
    assert together <= alone * (1 + 1e-6)


@settings(max_examples=50, deadline=None)
@given(
    speeds=st.lists(st.floats(0.5, 40.0), min_size=2, max_size=4),
    rtt_s=st.floats(1e-5, 0.02),
    bytes_per_s=st.floats(1e6, 1e9),
)
def test_devices_share_only_where_it_pays(
    speeds: list[float], rtt_s: float, bytes_per_s: float
) -> None:
    """A candidate is faster than its fastest member would be with sums that take no time saved."""
    named = {f"d{at}": speed for at, speed in enumerate(speeds)}
    problem = shoal(named, (rtt_s, bytes_per_s), layers=2)
    for team in candidate_sets(problem):
        one = division(problem, team)
        assert one is not None
        slowest = 1e-3 * max(speeds[i] for i in team)
        assert one.layer_s < slowest
        assert 2 * rtt_s / 2 < slowest


@pytest.mark.parametrize("seed", range(6))
def test_several_sequences_at_once(seed: int) -> None:
    """With passes of several rows, no choice of teams, cuts and widths is better than the plan."""
    rng = random.Random(seed)
    speeds = {name: rng.uniform(5.0, 20.0) for name in ("a", "b")}
    problem = shoal(speeds, layers=2, others={"objective": Objective("throughput"), "slots": 4})
    devices = tuple(
        replace(
            device,
            options=tuple(
                tuple(replace(o, rows_s=tuple(o.decode_s * g for g in growth)) for o in row)
                for row in device.options
            ),
        )
        for device in problem.devices
        for growth in [sorted(rng.uniform(1.0, 4.0) for _ in range(3))]
    )
    problem = replace(problem, devices=devices, sequences=4)
    everything = with_teams(problem)
    alone = [(i, (i,)) for i in problem.real]
    units = alone + [(i, (0, 1)) for i in range(2, len(everything.devices))]
    best = math.inf
    for order in itertools.chain(*(itertools.permutations(units, n) for n in (1, 2))):
        used = [i for _, some in order for i in some]
        cuts = [(0, 4)] if len(order) == 1 else [(0, at, 4) for at in (1, 2, 3)]
        for cut in cuts if len(set(used)) == len(used) else ():
            stages = [
                (unit, first, (4,) * (end - first))
                for (unit, _), (first, end) in zip(order, itertools.pairwise(cut), strict=True)
            ]
            best = min(best, assess(everything, stages, NO_PROOF).value)
    assert solve(problem).value == pytest.approx(best, rel=1e-6)


def test_one_more_device_is_advised_where_only_a_team_holds_large_layers() -> None:
    """Three devices hold a layer each, and a third of a layer more in a team."""
    problem = shoal({"a": 12.0, "b": 12.0}, layers=4, memory=960 * 10**6, ffn=49_152)
    with pytest.raises(InfeasiblePlan) as caught:
        solve(problem, time_limit_s=10)
    assert caught.value.advice.more_devices == ("a", 1)
