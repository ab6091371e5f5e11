"""Every advice of an infeasible plan, tried on a case that needs it, read, and followed."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection
from dataclasses import fields, replace
from typing import Any

import pytest

from model import costs
from paper.study import opt_350m
from planning import planner
from planning.build import DeviceInput, RequestInput, build_problem
from planning.candidates import with_teams
from planning.exact.program import PlanProgram
from planning.exact.solver import run
from planning.insight.unused import idle_reasons
from planning.plan import Advice, InfeasiblePlan, PlanError, Proof, assess, verify
from planning.planner import solve
from planning.problem import HopFormat, NoLink, Objective, PlanningProblem
from planning.shortage import shortage
from tests.planning.test_planner import make_device, make_problem, random_problem
from wire.profile import BlockTiming, DeviceProfile, LinkProfile

MB = 1_000_000
WIDTHS = (4, 8)
SPEC = opt_350m(4)
BLOCKS = range(SPEC.block_count)
ERRORS = {4: 2e-3, 8: 1e-4}
LOSSES = {4: 0.02, 8: 0.001}


def profile(memory_bytes: int, storage_bytes: int) -> DeviceProfile:
    return DeviceProfile(
        "x", "x", 1, 1, "described", "", tuple((bits, bits) for bits in WIDTHS),
        memory_bytes, memory_bytes, storage_bytes, 0.0, 0.0,
    )  # fmt: skip


def problem_of(memory: int = 900, storage: int = 900, **changes: Any) -> PlanningProblem:
    """Two alike devices of so many MB that hold the model with ease, and both widths."""
    timings = [
        BlockTiming(kind, 0, bits, bits * 1e-3, bits * 1e-4)
        for kind in ("embedding", "layer", "head")
        for bits in WIDTHS
    ]
    request = RequestInput(
        SPEC,
        WIDTHS,
        context_tokens=128,
        chunk_tokens=64,
        weight_errors=[ERRORS for _ in BLOCKS],
        sensitivities=[LOSSES for _ in BLOCKS],
    )
    own = profile(memory * MB, storage * MB)
    problem = build_problem(
        request,
        [DeviceInput(name, own, timings) for name in ("pi-1", "pi-2")],
        [LinkProfile("pi-1", "pi-2", 1e-3, 1e8), LinkProfile("pi-2", "pi-1", 1e-3, 1e8)],
    )
    return replace(problem, **changes)


def bounded(bound: float, **changes: Any) -> PlanningProblem:
    return problem_of(max_weight_error=(bound,) * len(BLOCKS), **changes)


Ease = Callable[[PlanningProblem, Advice], PlanningProblem]


def more_room(problem: PlanningProblem, advice: Advice) -> PlanningProblem:
    memory, storage = dict(advice.memory_short_bytes), dict(advice.storage_short_bytes)
    return replace(
        problem,
        devices=tuple(
            replace(
                device,
                memory_bytes=device.memory_bytes + memory.get(device.name, 0),
                storage_bytes=device.storage_bytes + storage.get(device.name, 0),
            )
            for device in problem.devices
        ),
    )


def other_bits(problem: PlanningProblem, advice: Advice) -> PlanningProblem:
    assert advice.allow_bits is not None
    return replace(problem, bits=tuple(sorted((*problem.bits, advice.allow_bits))))


def larger_error(problem: PlanningProblem, advice: Advice) -> PlanningProblem:
    assert advice.max_weight_error is not None
    bound = advice.max_weight_error
    return replace(problem, max_weight_error=tuple(max(b, bound) for b in problem.max_weight_error))


def larger_budget(problem: PlanningProblem, advice: Advice) -> PlanningProblem:
    return replace(problem, quality_budget=advice.quality_budget)


def free_placement(problem: PlanningProblem, advice: Advice) -> PlanningProblem:
    assert advice.free_placement
    return replace(problem, pins={}, excluded=frozenset())


def with_watts(problem: PlanningProblem, advice: Advice) -> PlanningProblem:
    return replace(
        problem,
        devices=tuple(
            replace(device, watts=5.0) if device.name in advice.declare_watts else device
            for device in problem.devices
        ),
    )


def with_links(problem: PlanningProblem, advice: Advice) -> PlanningProblem:
    indices = {device.name: index for index, device in enumerate(problem.devices)}
    added = {
        (indices[source], indices[target]): LinkProfile(source, target, 1e-3, 1e8)
        for source, target in advice.missing_links
    }
    return replace(problem, links={**problem.links, **added})


def more_devices(problem: PlanningProblem, advice: Advice) -> PlanningProblem:
    """A lab with so many more of the named device, on the same switch."""
    assert advice.more_devices is not None
    name, count = advice.more_devices
    (own,) = (device for device in problem.devices if device.name == name)
    new = tuple(replace(own, name=f"new {number}") for number in range(count))
    devices = (*problem.devices, *new)
    links = dict(problem.links)
    for pair in itertools.permutations(range(len(devices)), 2):
        source, target = (devices[index].name for index in pair)
        links.setdefault(pair, LinkProfile(source, target, 1e-3, 1e8))
    return replace(problem, devices=devices, links=links)


def shorter_context(problem: PlanningProblem, advice: Advice) -> PlanningProblem:
    """As ``problem_of`` makes it with fewer tokens."""
    assert advice.context_tokens is not None
    sizes = tuple(costs.kv_bytes(problem.spec, block, advice.context_tokens) for block in BLOCKS)
    return replace(problem, kv_bytes=sizes)


def whole_memory(problem: PlanningProblem, advice: Advice) -> PlanningProblem:
    return replace(
        problem,
        devices=tuple(
            replace(device, memory_bytes=device.memory_total_bytes or 0)
            if device.name == advice.whole_memory
            else device
            for device in problem.devices
        ),
    )


def free_device(problem: PlanningProblem, advice: Advice) -> PlanningProblem:
    (index,) = (i for i, one in enumerate(problem.devices) if one.name == advice.free_device)
    pins = {block: i for block, i in problem.pins.items() if i != index}
    return replace(problem, pins=pins, excluded=problem.excluded - {index})


def free_teams(problem: PlanningProblem, advice: Advice) -> PlanningProblem:
    assert advice.free_teams
    return replace(problem, teams=(), no_teams=False)


FOLLOW: dict[str, Ease] = {
    "free_teams": free_teams,
    "more_devices": more_devices,
    "context_tokens": shorter_context,
    "whole_memory": whole_memory,
    "free_device": free_device,
    "memory_short_bytes": more_room,
    "storage_short_bytes": more_room,
    "allow_bits": other_bits,
    "max_weight_error": larger_error,
    "quality_budget": larger_budget,
    "free_placement": free_placement,
    "declare_watts": with_watts,
    "missing_links": with_links,
}
"""How each field of Advice is followed; one without a way here fails a test below."""

TRIED = NoLink(
    "pi-1", "pi-2", "cannot connect to 10.0.0.2:4100: no answer in time", ("10.0.0.2:4100",)
)


def cut(problem: PlanningProblem, *pairs: tuple[int, int]) -> PlanningProblem:
    """Without these links, which were tried."""
    names = [device.name for device in problem.devices]
    return replace(
        problem,
        links={pair: link for pair, link in problem.links.items() if pair not in pairs},
        no_links={(i, j): replace(TRIED, source=names[i], target=names[j]) for i, j in pairs},
    )


def long_context() -> PlanningProblem:
    """Two devices that hold the model at 4 bits, and not with this context."""
    problem = problem_of(memory=60, bits=(4,))
    sizes = tuple(costs.kv_bytes(SPEC, block, 2048) for block in BLOCKS)
    return replace(problem, kv_bytes=sizes)


def with_total(problem: PlanningProblem) -> PlanningProblem:
    """Devices with memory that shoal may not use."""
    return replace(
        problem,
        devices=tuple(replace(device, memory_total_bytes=900 * MB) for device in problem.devices),
    )


CASES: dict[str, tuple[PlanningProblem, set[str]]] = {
    "memory": (problem_of(memory=20), {"memory_short_bytes"}),
    "storage": (problem_of(storage=20), {"storage_short_bytes"}),
    "memory and storage": (
        problem_of(memory=20, storage=20),
        {"memory_short_bytes", "storage_short_bytes"},
    ),
    "narrower bits": (
        problem_of(memory=60, bits=(8,)),
        {"memory_short_bytes", "allow_bits", "more_devices"},
    ),
    "wider bits": (bounded(1e-3, bits=(4,)), {"allow_bits", "max_weight_error"}),
    "bits that devices run": (problem_of(bits=(3,)), {"allow_bits"}),
    "weight error": (bounded(1e-5), {"max_weight_error"}),
    "weight error, for want of memory": (
        bounded(1e-3, memory=60),
        {"max_weight_error", "memory_short_bytes", "more_devices"},
    ),
    "budget": (problem_of(quality_budget=0.003), {"quality_budget"}),
    "budget, for want of memory": (
        problem_of(memory=60, quality_budget=0.02),
        {"quality_budget", "memory_short_bytes", "more_devices"},
    ),
    "pins": (
        problem_of(memory=60, bits=(4,), pins=dict.fromkeys(BLOCKS, 0)),
        {"memory_short_bytes", "free_device"},
    ),
    "a pin on an excluded device": (
        problem_of(pins={0: 0}, excluded=frozenset({0})),
        {"free_device"},
    ),
    "an exclusion": (
        problem_of(memory=60, bits=(4,), excluded=frozenset({1})),
        {"memory_short_bytes", "free_device", "more_devices"},
    ),
    "exclusions": (
        problem_of(memory=60, bits=(4,), excluded=frozenset({0, 1})),
        {"free_placement"},
    ),
    "a team that cannot be": (replace(problem_of(), teams=((0, 1),)), {"free_teams"}),
    "a context": (long_context(), {"context_tokens", "memory_short_bytes", "more_devices"}),
    "memory that is kept from shoal": (
        with_total(problem_of(memory=20)),
        {"whole_memory", "memory_short_bytes"},
    ),
    "watts": (problem_of(objective=Objective("energy")), {"declare_watts"}),
    "a link": (cut(problem_of(memory=60, bits=(4,)), (0, 1)), {"missing_links"}),
    "links both ways": (cut(problem_of(memory=60, bits=(4,)), (0, 1), (1, 0)), {"missing_links"}),
    "a link, for want of bits": (
        cut(problem_of(memory=60, bits=(8,)), (0, 1)),
        {"memory_short_bytes", "more_devices"},
    ),
    "a link that pins need": (
        cut(problem_of(pins={0: 0, len(BLOCKS) - 1: 1}), (1, 0)),
        {"missing_links", "free_device"},
    ),
    "a link, by energy": (
        cut(
            with_watts(
                problem_of(memory=60, bits=(4,), objective=Objective("energy")),
                Advice(declare_watts=("pi-1", "pi-2")),
            ),
            (0, 1),
        ),
        {"missing_links"},
    ),
    "two bounds of which each is enough": (
        bounded(1e-3, memory=60, bits=(8,)),
        {"memory_short_bytes", "more_devices"},
    ),
}


def given(advice: Advice) -> set[str]:
    """The fields that say something."""
    return {item.name for item in fields(advice) if getattr(advice, item.name) != item.default}


def read(message: str) -> Advice:
    """The advice that the words of a message give, for comparison with its numbers."""

    def number(pattern: str) -> float | None:
        found = re.search(pattern + r" ([\d.e+-]+)", message)
        return float(found[1]) if found else None

    bits = number("allow")
    watts = re.search(r"declare the watts of ([^:]+):", message)
    context = number("shorten the context to")
    more = re.search(r"add (one|\d) more devices? like (\S+)$", message)
    freed = re.search(
        r"drop the (?:exclusion of and the pins to|exclusion of|pins to) ([\w-]+)", message
    )
    whole = re.search(r"let shoal use more of (\S+)'s memory", message)
    return Advice(
        allow_bits=None if bits is None else int(bits),
        max_weight_error=number("raise --max-weight-error to"),
        quality_budget=number("raise the quality budget to"),
        free_placement="drop the pins and exclusions" in message,
        declare_watts=tuple(watts[1].split(", ")) if watts else (),
        missing_links=tuple(re.findall(r"(pi-\d) cannot reach (pi-\d) \(", message)),
        more_devices=(more[2], 1 if more[1] == "one" else int(more[1])) if more else None,
        context_tokens=None if context is None else int(context),
        whole_memory=whole[1] if whole else None,
        free_device=freed[1] if freed else None,
        free_teams=re.search("drop --(no-)?teams?", message) is not None,
    )


def short_mb(message: str) -> dict[str, float]:
    """What the message says is short, by kind."""
    found = re.findall(r"(memory|storage) is short by ([\d.]+) MB in all", message)
    return {kind: float(size) for kind, size in found}


@pytest.mark.parametrize("case", CASES)
def test_advice_is_read_and_followed(case: str) -> None:
    problem, expected = CASES[case]
    with pytest.raises(InfeasiblePlan) as caught:
        solve(problem)
    advice = caught.value.advice
    assert given(advice) == expected
    message = str(caught.value)
    assert read(message) == replace(advice, memory_short_bytes=(), storage_short_bytes=())
    lacking = {"memory": advice.memory_short_bytes, "storage": advice.storage_short_bytes}
    assert short_mb(message) == {
        kind: pytest.approx(sum(size for _, size in short) / MB)
        for kind, short in lacking.items()
        if short
    }
    for kind in expected:
        eased = FOLLOW[kind](problem, advice)
        verify(solve(eased), eased)


def test_every_kind_of_advice_has_a_case() -> None:
    kinds = {item.name for item in fields(Advice)}
    assert set(FOLLOW) == kinds
    assert set().union(*(expected for _, expected in CASES.values())) == kinds


@pytest.mark.parametrize("case", ["memory", "storage", "weight error", "budget"])
def test_little_less_than_advised_is_not_enough(case: str) -> None:
    problem, _ = CASES[case]
    with pytest.raises(InfeasiblePlan) as caught:
        solve(problem)
    advice = caught.value.advice
    short = [dict(advice.memory_short_bytes), dict(advice.storage_short_bytes)]
    # Each device's part is rounded up to 0.1 MB.
    less = [
        tuple((name, size - 200_000) for name, size in sizes.items() if size) for sizes in short
    ]
    fewer = replace(
        advice,
        memory_short_bytes=less[0],
        storage_short_bytes=less[1],
        max_weight_error=0.98 * (advice.max_weight_error or 0),
        quality_budget=0.98 * (advice.quality_budget or 0),
    )
    for kind in given(advice):
        with pytest.raises(InfeasiblePlan):
            solve(FOLLOW[kind](problem, fewer))


def test_missing_links_and_unknown_hops_are_named() -> None:
    two_needed = problem_of(memory=60, bits=(4,))
    solve(two_needed)
    with pytest.raises(InfeasiblePlan) as caught:
        solve(replace(two_needed, links={}))
    # More memory on one of them needs no link, and so would a device that is linked.
    assert given(caught.value.advice) == {"memory_short_bytes", "more_devices"}
    eased = more_room(replace(two_needed, links={}), caught.value.advice)
    assert len(solve(eased).stages) == 1

    apart = replace(two_needed, pins={0: 0, len(BLOCKS) - 1: 1})
    solve(apart)
    with pytest.raises(InfeasiblePlan, match="drop the pins to pi-1"):
        solve(problem_of(pins=apart.pins, links={}))
    halves = tuple(
        replace(
            device,
            options=tuple(
                row if (block < 3) == (index == 0) else ()
                for block, row in enumerate(device.options)
            ),
        )
        for index, device in enumerate(two_needed.devices)
    )
    with pytest.raises(InfeasiblePlan, match=r"are links missing\?: .*from pi-1 to pi-2") as caught:
        solve(replace(two_needed, devices=halves, links={}))
    assert caught.value.advice == Advice()
    solve(replace(two_needed, devices=halves))
    unknown = replace(
        two_needed,
        devices=halves,
        quality_budget=10.0,
        hop_formats=(HopFormat(8, None),),
    )
    with pytest.raises(InfeasiblePlan, match="no width of hops has a known sensitivity"):
        solve(unknown)
    solve(replace(unknown, hop_formats=(HopFormat(8, 0.001),)))


def test_a_link_that_was_tried_is_named_and_memory_is_not() -> None:
    problem = cut(problem_of(memory=60, bits=(4,)), (0, 1))
    with pytest.raises(InfeasiblePlan) as caught:
        solve(problem)
    assert str(caught.value) == (
        "no plan fits: pi-1 cannot reach pi-2 (cannot connect to 10.0.0.2:4100: no answer in time):"
        " let pi-1 connect to TCP port 4100 of pi-2 (firewall, NAT, cable; `shoal agent --port"
        " PORT` fixes an agent's port)"
    )
    again = PlanningProblem.from_dict(problem.to_dict())
    assert again == problem
    with pytest.raises(InfeasiblePlan, match=r"pi-1 cannot reach pi-2 .*10\.0\.0\.2:4100"):
        solve(again)


def test_of_many_missing_links_only_those_that_are_enough_are_named() -> None:
    timings = [BlockTiming(kind, 0, 4, 4e-3, 4e-4) for kind in ("embedding", "layer", "head")]
    three = build_problem(
        RequestInput(SPEC, (4,), context_tokens=128, chunk_tokens=64),
        [
            DeviceInput(name, profile(45 * MB, 900 * MB), timings)
            for name in ("pi-1", "pi-2", "pi-3")
        ],
        [
            LinkProfile(f"pi-{i}", f"pi-{j}", 1e-3, 1e8)
            for i, j in itertools.permutations((1, 2, 3), 2)
        ],
    )
    assert len(solve(three).stages) == 3
    # One ring needs one of the links, the other both of the others.
    with pytest.raises(InfeasiblePlan) as caught:
        solve(cut(three, (0, 1), (1, 0), (0, 2)))
    assert caught.value.advice.missing_links == (("pi-1", "pi-2"),)


def test_a_given_plan_over_a_link_that_was_tried_says_why() -> None:
    problem = problem_of(memory=60, bits=(4,))
    stages = [(stage.device == "pi-2", stage.first, stage.bits) for stage in solve(problem).stages]
    with pytest.raises(PlanError, match=r"pi-1 cannot reach pi-2 .*10\.0\.0\.2:4100"):
        assess(cut(problem, (0, 1)), stages, Proof("test", 0.0, 0.0))


def test_a_device_that_the_plan_cannot_reach_is_left_out_for_that_reason() -> None:
    problem = cut(problem_of(), (0, 1))
    (line,) = idle_reasons(solve(problem), problem)
    assert line == (
        "pi-2 is left out: pi-1 cannot reach pi-2 (cannot connect to 10.0.0.2:4100: no answer in"
        " time)"
    )
    (line,) = idle_reasons(solve(problem_of()), problem_of())
    assert "its fastest layer takes" in line


@pytest.mark.parametrize(
    ("pins", "excluded", "message"),
    [
        ({0: 0}, {0}, "embedding is pinned to d0, which is excluded"),
        (
            {1: 0, 2: 1, 3: 0},
            (),
            "layer 0 and layer 2 are pinned to d0, and layer 1 between them to d1",
        ),
    ],
)
def test_pins_that_contradict_are_named(
    pins: dict[int, int], excluded: Collection[int], message: str
) -> None:
    problem = make_problem(3, [make_device(f"d{i}", 5, 9_000, {8: 0.001}) for i in range(3)])
    asked = replace(problem, pins=pins, excluded=frozenset(excluded))
    with pytest.raises(InfeasiblePlan, match=message) as caught:
        solve(asked)
    assert caught.value.advice.free_device == "d0"
    solve(free_device(asked, caught.value.advice))


def test_a_pin_on_a_device_that_lacks_the_width_is_named() -> None:
    devices = [make_device("a", 5, 9_000, {4: 0.001}), make_device("b", 5, 9_000, {8: 0.001})]
    problem = replace(make_problem(3, devices, bits=(8,)), pins={0: 0})
    with pytest.raises(InfeasiblePlan, match="embedding is pinned to a, which runs it at 4 bit"):
        solve(problem)


def test_equal_devices_are_left_out_in_one_line_with_a_reason() -> None:
    """That a device is as fast as those that are used is no reason to leave it out."""
    devices = [make_device(f"d{i}", 5, 2_500, {8: 0.0029}) for i in range(14)]
    problem = make_problem(3, devices)
    plan = solve(problem)
    lines = idle_reasons(plan, problem)
    assert len(lines) == 1
    names = [f"d{i}" for i in range(14) if f"d{i}" not in {s.device for s in plan.stages}]
    assert lines[0] == (
        f"{', '.join(names)} are left out, each because its fastest layer takes 2.90 ms at 8 bits,"
        " those of the plan 2.90 ms, and a stage there would add at least 2.01 ms of links and call"
    )


def test_a_device_that_no_link_leads_to_is_left_out_for_that() -> None:
    problem = make_problem(3, [make_device(name, 5, 9_000, {8: 0.001}) for name in "ab"])
    alone = replace(problem, links={})
    assert idle_reasons(solve(alone), alone) == [
        "b is left out: no link leads there and on to the rest"
    ]


def crowd(devices: int) -> PlanningProblem:
    """28 layers with embedding and head at 8 bits, and devices that hold one block each."""
    own = [
        make_device(f"pi-{number}", 30, 1_000_000, {8: 0.001}, size_per_bit=100_000)
        for number in range(1, devices + 1)
    ]
    return make_problem(28, own, bits=(8,))


def test_what_many_devices_lack_is_known_without_a_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "_SHORTAGE_S", 0.0)
    with pytest.raises(InfeasiblePlan) as caught:
        solve(crowd(20))
    assert str(caught.value) == (
        "no plan fits: all devices together hold at most 20 of 28 layers:"
        " add 10 more devices like pi-1"
    )
    assert caught.value.advice.more_devices == ("pi-1", 10)
    solve(crowd(30))


def test_bytes_that_all_devices_lack_are_a_lower_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    # Three blocks of 0.8 MB take 2.4 of the first device's 2.4 MB. The head does not fit anywhere.
    monkeypatch.setattr(planner, "_SHORTAGE_S", 0.0)
    own = make_device("pi-1", 4, 2_400_000, {8: 0.001}, size_per_bit=100_000)
    with pytest.raises(InfeasiblePlan, match=r"memory is short by at least 0\.8 MB in all"):
        solve(make_problem(2, [own], bits=(8,)))


@pytest.mark.parametrize("seed", range(0, 200, 5))
def test_a_shortage_is_proved_only_where_no_plan_exists(seed: int) -> None:
    problem = random_problem(seed, tightness=0.5 + 0.004 * seed)
    found = shortage(with_teams(problem))
    outcome = run(PlanProgram(problem, aim="any").program, time_limit_s=60)
    assert found is None or outcome.status == "infeasible"


def test_a_least_shortage_is_called_so_whatever_the_advice_leaves_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The advice solves further programs, and the last of them may run out of time."""
    advise = planner._advice

    def cut_short(problem: PlanningProblem, reason: Any, runner: Any, links: Any) -> Advice:
        found = advise(problem, reason, runner, links)
        runner.closed = False
        return found

    monkeypatch.setattr(planner, "_advice", cut_short)
    told = []
    for seed in range(60):
        problem = random_problem(seed)
        if shortage(with_teams(problem)) is None:
            try:
                solve(problem)
            except InfeasiblePlan as error:
                told += [str(error)] if "is short by" in str(error) else []
        if told:
            break
    assert told
    assert "at most" not in told[0]
