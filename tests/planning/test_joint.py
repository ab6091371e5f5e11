"""Plans of several models: against exhaustive search, by hand, and wrong ones."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from planning.candidates import with_teams
from planning.joint.advice import JointInfeasible
from planning.joint.beside import solve_beside
from planning.joint.compare import better_of, one_after_the_other, shared_devices
from planning.joint.forecast import simulated_s
from planning.joint.plan import JointPlan, assess_joint, paces_of, value_at, verify_joint
from planning.joint.planner import solve_at, solve_joint
from planning.joint.problem import JointProblem, lessened, replanned
from planning.joint.rounds import in_turn
from planning.joint.saved import holds_several, parse_plans, plans_text, read_plans
from planning.joint.view import describe_joint, joint_svg
from planning.plan import InfeasiblePlan, Plan, PlanError, Proof, verify
from planning.planner import solve
from planning.problem import Objective
from planning.time_limit import now_s
from tests.planning.exhaustive_joint import exhaustive_at, random_joint
from tests.planning.test_planner import make_device, make_problem
from tests.planning.test_teams import shoal

KINDS = [
    # models, devices, teams, seeds
    (2, 2, False, range(60)),
    (2, 2, False, range(60, 120)),
    (2, 2, True, range(50)),
    (2, 1, False, range(30)),
    (3, 2, False, range(8)),
    (2, 3, False, range(8)),
]


@pytest.mark.thorough
@pytest.mark.parametrize(("models", "devices", "teams", "seeds"), KINDS)
def test_joint_plans_equal_exhaustive_search(
    models: int, devices: int, teams: bool, seeds: range
) -> None:
    """At given paces: at the models' own, the times are those that users see."""
    possible = 0
    for seed in seeds:
        problem = random_joint(seed, models=models, devices=devices, teams=teams)
        rng = random.Random(seed)
        paces = [rng.choice([1.0, 0.5, 3.0]) for _ in problem.names]
        expected = exhaustive_at(problem, paces)
        full = {m: with_teams(one) for m, one in enumerate(problem.problems)}
        answer = solve_at(problem, full, paces, deadline_s=now_s() + 60)
        if answer.plans is None:
            assert expected == math.inf, seed
            continue
        possible += 1
        assert value_at(problem, answer.plans, paces) == pytest.approx(expected, rel=1e-6), seed
        assert expected * (1 - 3e-6) <= answer.bound <= expected * (1 + 1e-9), seed
    assert possible >= len(seeds) / 4


@pytest.mark.parametrize("teams", [False, True])
def test_what_is_proved_is_true(teams: bool) -> None:
    solved = 0
    for seed in range(8):
        problem = random_joint(seed, teams=teams)
        try:
            plan = solve_joint(problem, time_limit_s=20)
        except InfeasiblePlan:
            assert exhaustive_at(problem, [1.0] * len(problem.names)) == math.inf, seed
            continue
        solved += 1
        verify_joint(plan, problem)
        best = exhaustive_at(problem, paces_of(plan))
        assert plan.proof.bound <= best * (1 + 1e-9), seed
        assert plan.least <= plan.value * (1 + 1e-9), seed
        if plan.proven_optimal:
            assert plan.value == pytest.approx(best, rel=3e-6), seed
        for turn in one_after_the_other(problem, time_limit_s=20):
            assert turn.plan is None or turn.plan.value >= plan.value * (1 - 1e-6), seed
    assert solved >= 3


def two_models(
    memory: tuple[int, int] = (3_000, 3_000), *, speeds: tuple[float, float] = (0.010, 0.020)
) -> JointProblem:
    """Two models of three blocks on a quick and a slow device; a block takes 100 bytes a bit."""
    devices = [
        make_device(f"d{i}", 3, size, {4: speed, 8: 1.5 * speed})
        for i, (size, speed) in enumerate(zip(memory, speeds, strict=True))
    ]
    one = replace(make_problem(1, devices, rtt_s=0.2), objective=Objective("latency"))
    return JointProblem(("A", "B"), (one, one), (1.0, 1.0))


def test_models_go_apart_where_sharing_takes_longer() -> None:
    """On the quick device both would take 60 ms. Apart they take 30 and 60."""
    plan = solve_joint(two_models())
    used = [{stage.device for stage in one.stages} for one in plan.plans]
    assert used in ([{"d0"}, {"d1"}], [{"d1"}, {"d0"}])
    assert sorted(plan.together_s) == pytest.approx([0.030, 0.060])
    assert plan.together_s == plan.alone_s
    assert plan.proven_optimal
    quick = solve_joint(two_models(speeds=(0.010, 0.050)))
    assert quick.together_s == pytest.approx((0.060, 0.060))
    assert quick.alone_s == pytest.approx((0.030, 0.030))


def test_weights_decide_who_gets_the_quick_device() -> None:
    problem = two_models()
    for weights, device in (((5.0, 1.0), 0), ((1.0, 5.0), 1)):
        plan = solve_joint(replace(problem, weights=weights))
        assert [s.device for s in plan.plans[device].stages] == ["d0"]


def test_what_one_model_takes_is_not_there_for_the_other() -> None:
    """Each model fits on the quick device alone. One that goes first leaves the other no room."""
    spread = [
        make_device("big", 3, 2_400, {4: 0.010, 8: 0.004}),
        make_device("small", 3, 1_200, {4: 0.012}),
    ]
    one = replace(make_problem(1, spread), objective=Objective("latency"))
    only_big = replace(one, bits=(4,), excluded=frozenset({1}))
    problem = JointProblem(("A", "B"), (one, only_big), (1.0, 1.0))
    assert solve(one).stages[0].bits == (8, 8, 8)
    assert in_turn(problem, (0, 1), time_limit_s=10) is None
    plan = solve_joint(problem)
    verify_joint(plan, problem)
    turns = one_after_the_other(problem, time_limit_s=10)
    assert [turn.plan is None for turn in turns] == [True, False]
    assert better_of(plan, turns) is plan


def test_a_loaded_model_stays_and_the_other_is_planned_beside_it() -> None:
    problem = two_models(memory=(2_000, 3_000))
    loaded = solve(problem.problems[0])
    assert [stage.device for stage in loaded.stages] == ["d0"]
    beside = replace(problem, fixed=(loaded, None))
    plan = solve_joint(beside)
    verify_joint(plan, beside)
    assert plan.plans[0].placements == loaded.placements
    assert [stage.device for stage in plan.plans[1].stages] == ["d1"]
    moved = replace(plan, plans=(plan.plans[1], plan.plans[0]))
    with pytest.raises(PlanError, match="A is loaded already, and its blocks would move"):
        verify_joint(moved, beside)


def test_a_loaded_model_whose_team_changes_does_not_stay() -> None:
    """Its blocks have the same first device and the same bits."""
    both = shoal({"pi-1": 10.0, "pi-2": 10.0})
    team, alone = solve(both), solve(replace(both, no_teams=True))
    assert team.placements == alone.placements
    problem = JointProblem(("A",), (both,), (1.0,), (team,))
    verify_joint(assess_joint(problem, [team], team.proof), problem)
    with pytest.raises(PlanError, match="A is loaded already, and its blocks would move"):
        verify_joint(assess_joint(problem, [alone], alone.proof), problem)


@pytest.mark.parametrize("seed", range(0, 40, 2))
def test_beside_a_loaded_model_equals_exhaustive_search(seed: int) -> None:
    problem = random_joint(seed)
    try:
        loaded = solve(problem.problems[0], advise=False)
    except PlanError:
        return
    beside = replace(problem, fixed=(loaded, None))
    paces = [1.0, 2.0]
    full = {1: with_teams(beside.left(1, [loaded]))}
    answer = solve_at(beside, full, paces, deadline_s=now_s() + 60)
    expected = exhaustive_at(beside, paces)
    if answer.plans is None:
        assert expected == math.inf
    else:
        assert value_at(beside, answer.plans, paces) == pytest.approx(expected, rel=1e-6)


def test_a_model_beside_loaded_ones_keeps_out_of_their_way() -> None:
    """The quick device is taken all the time: both would take 60 ms there, apart 30 and 45."""
    problem = two_models(memory=(4_800, 4_800), speeds=(0.010, 0.015)).problems[0]
    loaded = solve(problem)
    left = lessened(problem, [loaded])
    assert [stage.device for stage in solve(left).stages] == ["d0"]
    beside = solve_beside(left, [loaded])
    assert [stage.device for stage in beside.stages] == ["d1"]
    verify(beside, left)
    assert solve_beside(left, []).stages[0].device == "d0"
    # On a device that is far slower it would be slower than in turns with the other.
    problem = two_models(memory=(4_800, 4_800), speeds=(0.010, 0.040)).problems[0]
    left = lessened(problem, [loaded])
    assert [stage.device for stage in solve_beside(left, [loaded]).stages] == ["d0"]


Change = Callable[[JointPlan], JointPlan]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: replace(p, together_s=(0.030, p.together_s[1])), "A: time together"),
        (lambda p: replace(p, alone_s=(0.031, p.alone_s[1])), "A: time alone"),
        (lambda p: replace(p, shares=(0.4, 0.6)), "share of requests"),
        (lambda p: replace(p, chunk_tokens=(64, 64)), "chunks of"),
        (lambda p: replace(p, names=("A", "C")), "the plans are of A, C"),
        (lambda p: replace(p, proof=replace(p.proof, bound=1.0)), "the proved bound 1.0 is above"),
        (
            lambda p: replace(p, plans=(p.plans[0], replace(p.plans[1], decode_s=9.0))),
            "B: plan.decode_s: 9.0, recomputed",
        ),
    ],
)
def test_wrong_plans_are_refused(change: Change, message: str) -> None:
    problem = two_models(speeds=(0.010, 0.050))
    plan = solve_joint(problem)
    verify_joint(plan, problem)
    with pytest.raises(PlanError, match=message):
        verify_joint(change(plan), problem)


def test_plans_that_fit_alone_and_not_together_are_refused() -> None:
    problem = two_models(memory=(2_000, 3_000))
    alone = solve(problem.problems[0])
    both = solve_joint(problem)
    crowded = replace(both, plans=(alone, alone))
    with pytest.raises(PlanError, match=r"A and B together take .* of the memory of d0"):
        verify_joint(crowded, problem)


def test_a_chip_that_holds_more_of_one_model_is_shared_by_parts() -> None:
    """Half of each model's own limit may be used beside half of the other's."""
    problem = two_models(memory=(4_800, 0))
    small = problem.problems[1].devices
    smaller = tuple(replace(device, memory_bytes=device.memory_bytes // 2) for device in small)
    second = replace(problem.problems[1], devices=smaller)
    shared = JointProblem(("A", "B"), (problem.problems[0], second), (1.0, 1.0))
    plan = solve_joint(shared)
    (device,) = shared_devices(shared, plan)
    assert device.memory_part == pytest.approx(0.75)
    assert device.memory_bytes == (1_200, 1_200)


def test_advice_says_what_is_missing_and_who_fits() -> None:
    problem = two_models(memory=(1_300, 0))
    with pytest.raises(JointInfeasible) as raised:
        solve_joint(problem)
    text = str(raised.value)
    assert "A and B do not fit together: memory is short by 0.1 MB in all (d0 0.1 MB)" in text
    assert "leave out B (A fits)" in text
    assert "add one more device like d0" in text
    assert raised.value.fitting == ("A",)
    assert raised.value.advice.more_devices == ("d0", 1)
    # 1,200 bytes for each at 4 bits, 2,400 in all.
    for memory, fits in ((2_399, False), (2_400, True)):
        changed = two_models(memory=(memory, 0))
        if fits:
            assert solve_joint(changed).proven_optimal
        else:
            with pytest.raises(JointInfeasible):
                solve_joint(changed)


def test_advice_leaves_out_the_model_with_the_fewest_requests() -> None:
    one = two_models(memory=(2_500, 0)).problems[0]
    problem = JointProblem(("A", "B", "C"), (one, one, one), (1.0, 3.0, 2.0))
    with pytest.raises(JointInfeasible) as raised:
        solve_joint(problem)
    assert raised.value.fitting == ("B", "C")


def test_a_model_that_does_not_fit_alone_is_named() -> None:
    with pytest.raises(InfeasiblePlan, match="A, even without B: no plan fits: memory is short by"):
        solve_joint(two_models(memory=(900, 0)))


def test_models_for_different_devices_are_refused() -> None:
    problem = two_models()
    other = replace(
        problem.problems[1],
        devices=tuple(replace(d, name=f"x{d.name}") for d in problem.problems[1].devices),
    )
    for change, message in (
        ({"problems": (problem.problems[0], other)}, "A and B are planned for different devices"),
        ({"weights": (1.0, 0.0)}, "weights: expected a number from 1e-6"),
        ({"names": ("A", "A")}, "a model is named twice"),
        ({"names": ("A",)}, "each model needs"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(problem, **change)


def test_saved_plans_are_read_again(tmp_path: Path) -> None:
    problem = replace(two_models(), weights=(2.0, 1.0))
    plan = solve_joint(problem)
    path = tmp_path / "plans.json"
    path.write_text(plans_text(plan, problem.weights, slots=(1, 1), context_tokens=(64, 64)))
    assert holds_several(path)
    saved = read_plans(path)
    assert saved.weights == (2.0, 1.0)
    again = saved.to_plan(problem)
    assert again.together_s == pytest.approx(plan.together_s)
    assert [one.placements for one in again.plans] == [one.placements for one in plan.plans]
    swapped = JointProblem(("B", "A"), problem.problems, problem.weights)
    with pytest.raises(PlanError, match="its plans are of A, B, not of B, A"):
        saved.to_plan(swapped)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shoal_plans": 2}, "shoal_plans: 2, this program reads 1"),
        ({"weights": [1.0]}, "weights: expected a number from 1e-6 to 1e6 for each plan"),
        ({"weights": [1.0, -1]}, "weights: expected a number from 1e-6 to 1e6 for each plan"),
        ({"weights": [1.0, 10**400]}, "weights: expected a number from 1e-6 to 1e6 for each plan"),
        ({"weights": [1.0, True]}, "weights: expected a number from 1e-6 to 1e6 for each plan"),
        ({"plans": []}, "plans: expected a list of 1 to 16 plans"),
        ({"plans": [{}, {}]}, r"plans\[0\]: "),
        ({"more": 1}, "'more': known are shoal_plans, weights, plans"),
    ],
)
def test_wrong_files_are_refused(change: dict[str, object], message: str) -> None:
    problem = two_models()
    plan = solve_joint(problem)
    text = plans_text(plan, problem.weights, slots=(1, 1), context_tokens=(64, 64))
    values = json.loads(text) | change
    with pytest.raises(PlanError, match=message):
        parse_plans(json.dumps(values), "plans.json")
    twice = json.loads(text)
    twice["plans"][1] = twice["plans"][0]
    with pytest.raises(PlanError, match="a model has two plans: A, A"):
        parse_plans(json.dumps(twice), "plans.json")
    for wrong in ("[1]", "{", '{"stages": []}'):
        with pytest.raises(PlanError, match=r"plans\.json"):
            parse_plans(wrong, "plans.json")


def test_a_joint_plan_is_described_and_drawn() -> None:
    problem = two_models(speeds=(0.010, 0.050))
    plan = solve_joint(problem)
    described = json.loads(json.dumps(describe_joint(problem, plan, (1, 1))))
    assert [entry["model"] for entry in described["models"]] == ["A", "B"]
    assert described["planned_mean_s"] == pytest.approx(0.060)
    assert described["predicted_mean_s"] == pytest.approx(0.060, rel=0.02)
    (device,) = described["devices"]
    assert device["device"] == "d0"
    assert device["wait_s"] == pytest.approx([0.030, 0.030])
    specs = [one.spec for one in problem.problems]
    picture = joint_svg(plan, specs, "lab", ["d0", "d1"])
    assert picture.count("<svg ") == 3
    assert "A: 0.03 s alone, 0.0" in picture
    assert " s beside the others (lab)" in picture


def test_users_times_are_simulated() -> None:
    """On one device passes alternate, and a model that goes round there gets half of the time."""
    shared = solve_joint(two_models(speeds=(0.010, 0.050)))
    assert simulated_s(shared) == pytest.approx((0.060, 0.060), rel=0.02)
    apart = solve_joint(two_models())
    assert simulated_s(apart) == apart.alone_s
    assert simulated_s(shared) == simulated_s(shared)
    assert simulated_s(shared, seed=1) != simulated_s(shared)


@pytest.mark.parametrize("teams", [False, True])
def test_simulated_times_are_those_alone_unless_devices_are_shared(teams: bool) -> None:
    compared = slower = 0
    for seed in range(60):
        problem = random_joint(seed, teams=teams)
        if problem.problems[0].objective.kind not in ("request", "latency"):
            continue
        plan = in_turn(problem, (0, 1), time_limit_s=10)
        if plan is None:
            continue
        one, other = ({n for s in own.stages for n in s.devices} for own in plan.plans)
        for alone_s, together_s in zip(plan.alone_s, simulated_s(plan), strict=True):
            compared += 1
            slower += together_s > 1.01 * alone_s
            assert alone_s <= together_s < math.inf, seed
            if not one & other:
                assert together_s == alone_s, seed
    assert compared >= slower > 5


def test_one_model_is_the_plan_alone() -> None:
    problem = two_models().only([1])
    plan = solve_joint(problem)
    assert plan.names == ("B",)
    assert plan.together_s == plan.alone_s
    assert plan.value == pytest.approx(solve(problem.problems[0]).value)


def test_plans_of_less_memory_get_their_own_limits_back() -> None:
    problem = two_models(memory=(3_600, 3_000))
    first = solve(problem.problems[0])
    second: Plan = solve(problem.left(1, [first]))
    assert second.stages[0].memory_limit_bytes < 3_600
    assert replanned(problem.problems[1], second).stages[0].memory_limit_bytes in (3_600, 3_000)
    assert replanned(problem.problems[1], second).proof == Proof(
        second.proof.solver, second.proof.solve_s, second.proof.bound
    )
