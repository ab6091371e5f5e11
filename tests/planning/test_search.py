"""The parts of the search, each against what it stands for, counted in another way."""

from __future__ import annotations

import math
import random
import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from benchmarks.planner import instance
from planning.candidates import with_teams
from planning.plan import InfeasiblePlan, verify
from planning.planner import solve
from planning.problem import HopFormat, Objective, ObjectiveKind, PlanningProblem
from planning.search import slowest
from planning.search.bounds import Joint, Pricer, Separate
from planning.search.orders import Orders
from planning.search.search import search
from planning.search.slowest import Fastest
from planning.search.tables import InMemory, Knapsack, Tables
from planning.usable import Usable

KINDS: tuple[ObjectiveKind, ...] = ("latency", "throughput", "request")


def varied(seed: int, kind: ObjectiveKind = "latency") -> PlanningProblem:
    """A small problem with missing links, pins, exclusions and several formats of hops."""
    rng = random.Random(seed)
    problem = instance(6, 5, seed, Objective(kind, 256, 128), rng.choice(["kl", "delta"]))
    links = {pair: link for pair, link in problem.links.items() if rng.random() < 0.9}
    return replace(
        problem,
        links=links,
        pins={rng.randrange(8): rng.randrange(5)},
        excluded=frozenset({4}) - {rng.randrange(5)},
        hop_formats=(HopFormat(8, 1e-3), HopFormat(16, 1e-5)),
    )


@pytest.mark.parametrize("seed", range(20))
def test_usable_options_are_those_that_the_problem_allows(seed: int) -> None:
    problem = varied(seed, random.Random(seed).choice(KINDS))
    usable = Usable(problem)
    for i, device in enumerate(problem.devices):
        for k in range(problem.spec.block_count):
            allowed = {bits for bits in problem.bits if problem.allows(i, k, bits)}
            found = usable.allowed[i, k]
            assert {bits for bits, own in zip(usable.widths, found, strict=True) if own} == allowed
            for option in usable.options(i, k):
                assert option in device.options[k]
                assert option.bits in allowed
                assert option.executed_bytes <= device.memory_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_links_are_counted_as_the_problem_counts_them(kind: ObjectiveKind) -> None:
    problem = varied(3, kind)
    tables = Tables(problem)
    for i in range(5):
        for j in range(5):
            if i == j:
                continue
            for f, bits in enumerate(tables.hop_bits):
                hop = i, j, bits
                assert tables.hop[f, i, j] == pytest.approx(problem.hop_cost(*hop))
                assert tables.hop_s[f, i, j] == pytest.approx(problem.hop_s(*hop))
                assert tables.hop_turn[f, i, j] == pytest.approx(problem.hop_turn_s(*hop))
            assert tables.back[i, j] == pytest.approx(problem.return_cost(i, j))
            assert tables.back_s[i, j] == pytest.approx(problem.return_s(i, j))


def cost_of(arcs: Joint | Separate, entry: np.ndarray, order: list[int]) -> float:
    """The least cost of an order of devices over all cuts, one after the other."""
    blocks, longest = arcs.blocks, arcs.ends.shape[1]
    before = {0: 0.0}
    for i, j in pairwise(order):
        now: dict[int, float] = {}
        for k, cost in before.items():
            for length in range(1, min(longest, blocks - k) + 1):
                total = cost + float(arcs.at(k)[i, length - 1, j]) + entry[i]
                now[k + length] = min(now.get(k + length, math.inf), total)
        before = now
    last = order[-1]
    ways = [
        cost + float(arcs.ends[last, blocks - k - 1, order[0]]) + entry[last]
        for k, cost in before.items()
        if 0 < blocks - k <= longest
    ]
    return min(ways, default=math.inf)


def test_a_room_of_whole_units_is_used_whole() -> None:
    """Three blocks have 120 units of 2.075 to spare, which division by the unit falls short of."""
    sizes = np.tile([275.0, 358.0], (3, 1))
    knapsack = Knapsack(sizes, 1496.0, 3, 320)
    costs = np.tile([3.0, 1.0], (3, 1))
    column = int(knapsack.index(1496.0 - 3 * 275.0))
    assert knapsack.profiles(costs)[2, 0, column] == 3.0


@pytest.mark.parametrize("seed", range(30))
def test_a_short_cut_of_a_knapsack_finds_what_its_table_has(seed: int) -> None:
    """The least costs at the limit, and those of single stages, where some fit whole."""
    random = np.random.default_rng(seed)
    blocks, options = int(random.integers(1, 9)), int(random.integers(2, 5))
    missing = random.random((blocks, options)) < 0.1
    missing[:, 0] = False
    sizes = np.where(missing, np.inf, random.choice([1.0, 2.0, 3.7, 8.0], (blocks, options)))
    # Whole numbers, so that some options cost the same.
    cost = np.where(missing, np.inf, random.integers(0, 9, (blocks, options)).astype(float))
    for limit in np.array([0.3, 0.6, 0.9, 1.2]) * float(sizes.min(1).sum()) * 2:
        memory = InMemory(sizes, limit, blocks)
        wanted = random.random((blocks, blocks)) < 0.8
        table, least = memory.profiles(cost), memory.least_costs(cost, wanted)
        for first in range(blocks):
            for length in range(1, blocks - first + 1):
                if memory.least[first, length - 1] > limit:
                    continue
                column = int(memory.columns[first, length - 1])
                best = table[length - 1, first, column]
                assert least[first, length - 1] == best or not wanted[first, length - 1]
                part = cost[first : first + length]
                chosen, total = memory.choices(first, part[None], np.array([column]))
                assert total[0] == best == part[np.arange(length), chosen[0]].sum()
                taken = memory._shifts[first + np.arange(length), chosen[0]].sum()
                assert taken <= column


def test_an_order_that_leaves_blocks_out_is_none() -> None:
    """Where blocks cost nothing, a block left out differs from others by rounding alone."""
    for blocks in range(3, 9):
        devices = blocks - 1
        segments = np.zeros((devices, blocks, 1))
        # The last device has no room for block 1, nor for any two.
        segments[-1, 1] = np.inf
        arcs = Separate(segments, np.zeros((devices, devices)), np.zeros((devices, devices)))
        random = np.random.default_rng(blocks)
        orders = Orders([(arcs, 0.0)], np.zeros(devices), math.inf, random)
        assert orders.improve(range(devices), -math.inf)[0] is None


@pytest.mark.parametrize("seed", range(20))
def test_the_shortest_walk_through_each_stage_is_that_of_all_walks(seed: int) -> None:
    random = np.random.default_rng(seed)
    devices, blocks, longest = 3, 5, int(random.integers(2, 6))
    segments = random.uniform(1, 9, (devices, blocks, longest))
    firsts, lengths = np.indices((blocks, longest))
    segments[:, firsts + lengths >= blocks] = np.inf
    segments[random.random(segments.shape) < 0.2] = np.inf
    links, back = random.uniform(0, 3, (2, devices, devices))
    arcs = Separate(segments, links, back)
    pricer = Pricer(random.uniform(0, 1, devices), math.inf, np.eye(devices, dtype=bool))
    priced = pricer.relaxation(arcs, 0.5, random.uniform(0, 2, 2 * devices))
    shortest = np.full(segments.shape, np.inf)

    def extend(walk: list[tuple[int, int, int]], length: float) -> None:
        """Try all ways on from the end of ``walk``, and note where it ends for good."""
        device, first, end = walk[-1]
        here = length + priced.fixed[device]
        if end == blocks:
            here += priced.sink[device, end - first - 1] - priced.constant
            for at, begin, until in walk:
                cell = at, begin, until - begin - 1
                shortest[cell] = min(shortest[cell], here)
            return
        here += segments[device, first, end - first - 1]
        for target in range(devices):
            for until in range(end + 1, min(blocks, end + longest) + 1):
                extend([*walk, (target, end, until)], here + links[device, target])

    for device in range(devices):
        for end in range(1, longest + 1):
            extend([(device, 0, end)], priced.enter[device])
    found = arcs.through(priced)
    np.testing.assert_allclose(found, shortest, rtol=1e-9)
    assert found.min() == pytest.approx(priced.bound)


@pytest.mark.parametrize("seed", range(10))
def test_one_more_device_is_judged_as_if_the_order_were_counted_anew(seed: int) -> None:
    tables = Tables(instance(8, 6, seed, Objective()))
    mu = 1e-2
    segments = tables.segments(tables.cost + mu * tables.loss)
    arcs = Separate(segments, tables.links(mu), tables.back)
    orders = Orders([(arcs, 0.0)], tables.entry, math.inf, np.random.default_rng(seed))
    order = [int(i) for i in np.random.default_rng(seed).permutation(6)[:4]]
    unused = np.setdiff1d(np.arange(6), order)
    found = orders._with_one_more(order, unused)
    counted = 0
    for place in range(len(order) + 1):
        for at, device in enumerate(unused.tolist()):
            cost = cost_of(arcs, tables.entry, [*order[:place], device, *order[place:]])
            if cost < math.inf:
                counted += 1
                assert found[place, at] == pytest.approx(cost)
            else:
                assert found[place, at] >= orders.penalty
    assert counted


@pytest.mark.thorough
def test_walks_for_throughput_are_looked_for_near_the_bound() -> None:
    """Near the time of a poor plan all prices allow, and a beam follows the wrong walks."""
    problem = instance(32, 16, 3, Objective("throughput"))
    found = search(problem, deadline_s=time.monotonic() + 300, gap=0.03)
    assert found.choice is not None
    plan = solve(problem, time_limit_s=300, gap=0.03)
    verify(plan, problem)
    assert plan.gap <= 0.03


@pytest.mark.parametrize("seed", range(4))
def test_many_devices_are_planned_in_part_and_bounded_as_a_whole(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = instance(8, 8, seed, Objective("throughput"))
    exact = solve(problem, gap=1e-3, time_limit_s=300)
    monkeypatch.setattr(slowest, "_MANY", 5)
    arcs, priced = Fastest._arcs, list[int]()

    def counted(self: Fastest, limit: float) -> Joint:
        priced.append(self.tables.shape[0])
        return arcs(self, limit)

    monkeypatch.setattr(Fastest, "_arcs", counted)
    found = search(problem, deadline_s=time.monotonic() + 300, gap=0.01)
    assert found.choice is not None
    assert 0 < found.bound <= exact.value * (1 + 1e-9)
    # With hundreds of devices one bound with every hop takes seconds.
    assert max(priced) < 8
    plan = solve(problem, gap=0.5, time_limit_s=300)
    verify(plan, problem)
    assert plan.proof.bound <= exact.value * (1 + 1e-9)


def test_a_part_of_many_devices_may_be_large_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The leads of its teams are added, and it is not taken apart again, for ever."""
    monkeypatch.setattr(slowest, "_MANY", 3)
    problem = with_teams(instance(8, 6, 2, Objective("throughput"), "teams"))
    found = search(problem, deadline_s=time.monotonic() + 1, gap=0.01, known=0.02)
    assert found.bound > 0


def tight(layers: int, count: int, seed: int, share: float) -> PlanningProblem:
    """As ``instance``, with a share of its memory on each device."""
    problem = instance(layers, count, seed, Objective())
    devices = tuple(
        replace(device, memory_bytes=int(share * device.memory_bytes)) for device in problem.devices
    )
    return replace(problem, devices=devices)


def test_prices_prove_that_nothing_fits() -> None:
    """What a single device lacks is found elsewhere: here all together have too little."""
    problem = tight(60, 40, 0, 0.4)
    tables = Tables(problem)
    assert np.isfinite(tables.cost).any((0, 2)).all()
    found = search(problem, deadline_s=time.monotonic() + 300, gap=0.01)
    assert found.choice is None
    assert found.impossible
    with pytest.raises(InfeasiblePlan):
        solve(problem, time_limit_s=2.0)


@pytest.mark.parametrize("seed", range(3))
def test_what_the_program_can_plan_is_never_called_impossible(seed: int) -> None:
    for share in (0.5, 0.6):
        problem = tight(5, 3, seed, share)
        found = search(problem, deadline_s=time.monotonic() + 300, gap=0.2)
        try:
            plan = solve(problem, time_limit_s=300)
        except InfeasiblePlan:
            assert found.choice is None
        else:
            assert not found.impossible
            assert found.bound <= plan.value * (1 + 1e-9)


def test_hundreds_of_devices_have_a_plan_when_the_limit_has_passed() -> None:
    problem = instance(24, 200, 0, Objective("throughput"))
    plan = solve(problem, time_limit_s=1e-3)
    verify(plan, problem)


def test_devices_that_hold_too_few_blocks_together_are_proved_by_counting() -> None:
    """Without a step of prices. Seven blocks, and devices that take three, two and one."""
    most = (3, 2, 1)
    segments = np.full((3, 7, 3), math.inf)
    for i, count in enumerate(most):
        segments[i, :, :count] = 0.0
    links = np.zeros((3, 3))
    for blocks, provable in ((7, True), (6, False)):
        arcs = Separate(segments[:, :blocks], links, links)
        pricer = Pricer(np.zeros(3), math.inf, np.eye(3, dtype=bool))
        priced, _ = pricer.price(arcs, 0.0, pricer.nothing(), target=1e-6, reach=1.0, rounds=0)
        assert (priced.bound > 0.5) == provable


@pytest.mark.parametrize("seed", range(8))
def test_prices_by_count_bound_what_devices_cost(seed: int) -> None:
    """They bound any choice of runs, which the walks of a plan are. Teams cost their members."""
    rng = np.random.default_rng(seed)
    devices, blocks, longest = 4, 6, 4
    segments = rng.uniform(0.1, 1.0, (devices, blocks, longest)).cumsum(axis=2)
    segments[rng.random(segments.shape) < 0.2] = math.inf
    links = rng.uniform(0.0, 0.3, (devices, devices))
    members = np.eye(devices, dtype=bool)
    members[3, :2] = [True, True]
    members = np.delete(members, 3, axis=1)
    arcs = Separate(segments, links, links)
    pricer = Pricer(np.zeros(devices), math.inf, members)
    prices = np.concatenate([pricer.counted(arcs), np.zeros(devices)])
    assert (prices >= 0).all()
    bound = pricer.relaxation(arcs, 0.0, prices).bound
    best = math.inf

    def extend(k: int, walk: list[int], cost: float) -> None:
        nonlocal best
        for device in range(devices):
            used = members[walk].any(0) if walk else np.zeros(members.shape[1], dtype=bool)
            if (used & members[device]).any():
                continue
            hop = links[walk[-1], device] if walk else 0.0
            for length in range(1, min(longest, blocks - k) + 1):
                total = cost + hop + float(segments[device, k, length - 1])
                if k + length == blocks:
                    back = links[device, walk[0]] if walk else 0.0
                    best = min(best, total + back)
                elif total < best:
                    extend(k + length, [*walk, device], total)

    extend(0, [], 0.0)
    assert bound <= best + 1e-9
