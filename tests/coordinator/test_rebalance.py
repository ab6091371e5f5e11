"""The rule that says when a model moves to a better plan, over hours of a clock of our own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from coordinator.loading.rebalance import (
    AS_FAST,
    GAIN,
    HORIZON_S,
    LOSS_GAIN,
    PAUSE_S,
    REFUSED_S,
    STEADY_S,
    WORSE,
    Choice,
    Key,
    Memory,
    choice_of,
    is_worse,
    judge,
    revalued,
    slowed,
)
from planning.plan import Plan, PlanError, Proof, assess
from planning.planner import solve
from planning.problem import Objective, PlanningProblem
from tests.planning.test_advice import problem_of
from tests.planning.test_teams import shoal
from wire.profile import LinkProfile

FAST, SLOW = ("fast",), ("slow",)
LOOK_S = 5.0


def choice(gain: float = 0.5, move_s: float = 3.0, key: Key = FAST) -> Choice:
    return Choice(key, 1.0, 1.0 - gain, None, None, move_s)


def looks(
    gains: Callable[[float], float], last_s: float, memory: Memory | None = None
) -> list[float]:
    """Look each LOOK_S, move whenever the rule says so, and return when that was.

    ``gains`` has the gain of being on the other side of a link, or of two plans, at a time. A move
    changes sides.
    """
    memory, moves, side, now_s = memory or Memory(), [], 1.0, 0.0
    while now_s < last_s:
        memory, verdict = judge(memory, choice(side * gains(now_s)), now_s)
        if verdict.moves:
            moves.append(now_s)
            memory, side = memory.moved(now_s), -side
        now_s += LOOK_S
    return moves


def test_a_plan_that_stays_better_is_taken_once() -> None:
    assert looks(lambda now_s: 0.5, 3600) == [STEADY_S]


def test_a_cause_that_passes_moves_nothing() -> None:
    assert looks(lambda now_s: 0.5 if now_s < STEADY_S - LOOK_S else 0.0, 3600) == []


@pytest.mark.parametrize("period_s", [20.0, 60.0, 90.0, 130.0, 200.0, 400.0])
def test_what_toggles_causes_two_moves_in_ten_minutes_at_most(period_s: float) -> None:
    moves = looks(lambda now_s: 0.5 if now_s // period_s % 2 else -0.5, 4 * 3600)
    for first_s in moves:
        assert sum(first_s <= moved_s < first_s + 600 for moved_s in moves) <= 2
    if period_s <= STEADY_S:
        assert moves == []


def test_the_last_move_or_load_is_long_enough_ago() -> None:
    loaded = Memory().moved(0.0)
    assert looks(lambda now_s: 0.5, 3600, loaded) == [PAUSE_S]


def verdict(memory: Memory, choice: Choice, now_s: float) -> str:
    """The reason against a move, or empty."""
    _, verdict = judge(memory, choice, now_s)
    return "" if verdict.moves else verdict.why


def test_each_reason_against_a_move_is_told() -> None:
    ready, now_s = Memory(better_since_s=0.0, moved_s=0.0), PAUSE_S
    assert verdict(ready, choice(), now_s) == ""
    assert verdict(ready, choice(-0.1), now_s) == "no plan is better by the present figures"
    assert verdict(ready, choice(GAIN - 0.05), now_s).startswith("it saves only 10%")
    assert "longer than what it saves" in verdict(ready, choice(move_s=HORIZON_S / 2 + 1), now_s)
    assert "has been better for 0 s" in verdict(Memory(), choice(), now_s)
    assert "the last move was 1 s ago" in verdict(
        replace(ready, moved_s=now_s - 1), choice(), now_s
    )
    refused = replace(ready.rolled_back(FAST, 0.0), better_since_s=0.0)
    assert "it measured worse before" in verdict(refused, choice(), now_s)
    assert verdict(refused, choice(key=SLOW), now_s) == ""


def test_a_plan_that_measured_worse_is_left_alone_longer_each_time() -> None:
    memory, now_s = Memory(), 0.0
    for times in range(3):
        memory = replace(memory.rolled_back(FAST, now_s), better_since_s=now_s)
        end_s = now_s + REFUSED_S * 2**times
        assert verdict(memory, choice(), end_s - 1)
        assert verdict(memory, choice(), end_s) == ""
        now_s = end_s
    assert not is_worse(1.0, WORSE)
    assert is_worse(1.0, WORSE + 0.01)


def test_less_loss_in_about_the_same_time_is_better_too() -> None:
    ready, now_s = Memory(better_since_s=0.0), STEADY_S
    truer = Choice(FAST, 1.0, AS_FAST, 0.1, 0.099 * (1 - LOSS_GAIN), 3.0)
    assert verdict(ready, truer, now_s) == ""
    assert verdict(ready, replace(truer, then=AS_FAST + 0.01), now_s)
    assert verdict(ready, replace(truer, loss_then=0.09), now_s)
    for unknown in (replace(truer, loss_now=None), replace(truer, loss_then=None)):
        assert verdict(ready, unknown, now_s)
    assert verdict(ready, replace(truer, loss_now=0.0, loss_then=0.0), now_s)


# ---- what is compared, with real problems and the real planner ---------------------------------


def split(problem: PlanningProblem) -> Plan:
    """The plan that has half of the model on each of two devices."""
    count = problem.spec.block_count
    half = count // 2
    stages = [(0, 0, [8] * half), (1, half, [8] * (count - half))]
    return assess(problem, stages, Proof("test", 0.0, 0.0))


def with_link(problem: PlanningProblem, bytes_per_s: float) -> PlanningProblem:
    links = {
        pair: LinkProfile(link.source, link.target, link.rtt_s, bytes_per_s)
        for pair, link in problem.links.items()
    }
    return replace(problem, links=links)


def test_a_device_that_became_slow_makes_another_plan_better() -> None:
    problem = problem_of(bits=(8,))
    present = split(problem)
    throttled = slowed(problem, {"pi-2": 1 / 0.3})
    other = solve(throttled)
    assert [stage.device for stage in other.stages] == ["pi-1"]
    compared = choice_of(throttled, present, other, load_s=2.0)
    assert compared.key == other.layout
    assert compared.is_better
    assert compared.move_s == 2.0
    assert compared.now > present.value
    # The plan on both devices has the time of each and of the links.
    stages = revalued(present, throttled).stages
    assert stages[0].compute_s == present.stages[0].compute_s
    assert stages[1].compute_s == pytest.approx(present.stages[1].compute_s / 0.3)
    assert revalued(present, problem) == present


def test_a_link_that_became_slow_makes_another_plan_better_until_it_heals() -> None:
    problem = problem_of(bits=(8,))
    present = split(problem)
    slow = with_link(problem, 1e4)
    alone = solve(slow)
    assert choice_of(slow, present, alone).is_better
    assert not choice_of(slow, alone, solve(slow)).is_better


def test_loading_counts_as_a_pause_and_not_as_time_of_answers() -> None:
    patient = replace(Objective("latency", 0, 1), migration_weight=1.0)
    problem = problem_of(bits=(8,), objective=patient)
    devices = tuple(replace(device, load_bytes_per_s=1e7) for device in problem.devices)
    problem = replace(problem, devices=devices)
    present = split(problem)
    assert present.load_s > 0
    same = choice_of(problem, present, present, load_s=1.0)
    assert same.now == same.then == pytest.approx(present.decode_s)
    assert same.move_s == pytest.approx(present.load_s + 1.0)
    assert same.gain == 0


def test_a_plan_whose_device_is_gone_cannot_be_compared() -> None:
    problem = problem_of(bits=(8,))
    present = split(problem)
    left = replace(problem, devices=problem.devices[:1], links={})
    with pytest.raises(PlanError, match="unknown device pi-2"):
        choice_of(left, present, solve(left))


def test_what_the_user_asked_for_is_taken_though_it_is_slower() -> None:
    ready, now_s = Memory(better_since_s=0.0), STEADY_S
    wished = replace(choice(-0.5, move_s=HORIZON_S), is_wished=True)
    assert verdict(ready, wished, now_s) == ""
    assert "better for 0 s" in verdict(Memory(), wished, now_s)
    problem = problem_of(bits=(8,))
    present = split(problem)
    assert choice_of(problem, present, solve(problem), is_wished=True).is_wished
    # It is there already.
    assert not choice_of(problem, present, present, is_wished=True).is_wished


def test_a_team_is_another_plan_than_its_lead_alone() -> None:
    """Both have the same blocks on the same first device, at the same bits."""
    problem = shoal({"pi-1": 10.0, "pi-2": 10.0})
    alone, team = solve(replace(problem, no_teams=True)), solve(problem)
    assert [stage.devices for stage in team.stages] == [("pi-1", "pi-2")]
    assert [stage.devices for stage in alone.stages] == [("pi-1",)]
    assert alone.placements == team.placements
    assert alone.layout != team.layout
    assert choice_of(problem, alone, team, is_wished=True).is_wished
    keys = [choice_of(problem, team, to).key for to in (alone, team)]
    assert keys[0] != keys[1]


def test_after_two_failures_the_pause_between_moves_doubles() -> None:
    memory = Memory().rolled_back(FAST, 0.0)
    assert memory.pause_s == PAUSE_S
    memory = memory.rolled_back(SLOW, 0.0)
    assert memory.pause_s == 2 * PAUSE_S
    assert memory.kept().pause_s == PAUSE_S


def alone_on(problem: PlanningProblem, name: str) -> Plan:
    """All blocks on one device."""
    index = [device.name for device in problem.devices].index(name)
    return assess(problem, [(index, 0, [8] * problem.spec.block_count)], Proof("", 0.0, 0.0))


def test_the_time_of_other_models_counts() -> None:
    """Two devices are alike, and another model answers on the first one."""
    problem = problem_of(bits=(8,))
    first, second = alone_on(problem, "pi-1"), alone_on(problem, "pi-2")
    assert choice_of(problem, first, second).gain == pytest.approx(0.0)
    assert choice_of(problem, first, second, others=[first]).is_better
    assert not choice_of(problem, second, first, others=[first]).is_better
    # A faster device is no better if the other model needs it.
    faster = slowed(problem, {"pi-2": 1.3})
    first, second = revalued(first, faster), revalued(second, faster)
    assert choice_of(faster, second, first).is_better
    assert not choice_of(faster, second, first, others=[first]).is_better
    # One that answers elsewhere changes nothing.
    free = choice_of(faster, second, first, others=[alone_on(problem, "pi-2")])
    assert free.is_better
