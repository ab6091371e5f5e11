"""Explanations: each statement is what solving the changed problem says."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from paper.study import opt_350m, simulate
from planning.insight.explain import MORE_MEMORY_BYTES, Kind, Marginal, MarginalProof, explain
from planning.labs.lab import Lab
from planning.labs.lab_file import parse_lab
from planning.plan import InfeasiblePlan, Plan, PlanError
from planning.planner import solve
from planning.problem import Objective, PlanningProblem
from tests.planning.described import described_problem

LAB = """\
devices:
  - &fast
    name: fast
    memory: 70M
    storage: 1G
    layer_ms: {decode: {4: 2, 8: 3}}
    embed_ms: 1
    head_ms: 1
    watts: 10
  - {<<: *fast, name: slow, memory: 300M, layer_ms: {decode: {4: 8, 8: 9}}}
  - <<: *fast
    name: lame
    memory: 300M
    layer_ms: {decode: {4: 80, 8: 90}}
    embed_ms: 50
    head_ms: 90
links:
  - {from: fast, to: slow, rtt_ms: 8, mbit_per_s: 10}
default_link: {rtt_ms: 0.5, mbit_per_s: 1000}
"""


def make_problem(text: str = LAB) -> tuple[Lab, PlanningProblem]:
    lab = parse_lab(text, "lab.yaml")
    return lab, described_problem(lab, opt_350m(6), context_tokens=64)


def test_a_plan_is_taken_apart() -> None:
    _, problem = make_problem()
    plan = solve(problem)
    explanation = explain(plan, problem)
    assert [view.device for view in explanation.stages] == [s.device for s in plan.stages]
    assert math.fsum(view.share for view in explanation.stages) == pytest.approx(1.0)
    total_s = math.fsum(view.compute_s + view.hop_s for view in explanation.stages)
    assert total_s == pytest.approx(plan.decode_s)
    for view in explanation.stages:
        assert view.energy_j == pytest.approx(10 * view.compute_s)
        assert view.worst_weight_error is None
    longest = max(plan.stages, key=lambda stage: stage.compute_s)
    assert explanation.bottleneck.startswith(f"computing on {longest.device}: ")
    assert explanation.complete


def test_every_statement_is_what_solving_says() -> None:
    _, problem = make_problem()
    plan = solve(problem)
    marginals = {item.what: item for item in explain(plan, problem).marginals}
    devices = [device.name for device in problem.devices]
    used = {stage.device for stage in plan.stages}
    assert used == {"fast", "slow"}
    for index, name in enumerate(devices[:2]):
        changed = list(problem.devices)
        more = changed[index].memory_bytes + MORE_MEMORY_BYTES
        changed[index] = replace(changed[index], memory_bytes=more)
        best = solve(replace(problem, devices=tuple(changed)))
        stated = marginals[f"1 GiB more on {name}"]
        assert stated.proof == "exact"
        assert stated.after == pytest.approx(best.value)
    links = {
        pair: replace(link, rtt_s=0.0005, bytes_per_s=125e6) if set(pair) == {0, 1} else link
        for pair, link in problem.links.items()
    }
    (stated,) = (item for item in marginals.values() if item.kind == "link")
    assert stated.what.startswith("a 1 Gbit/s, 0.5 ms link ")
    assert {"fast", "<->", "slow"} <= set(stated.what.split())
    assert stated.after == pytest.approx(solve(replace(problem, links=links)).value)
    for index, name in enumerate(devices):
        stated = marginals[f"dropping {name}"]
        best = solve(replace(problem, excluded=frozenset([index])))
        assert stated.after == pytest.approx(best.value)
    assert str(marginals["1 GiB more on fast"]).startswith("1 GiB more on fast: -")
    assert str(marginals["1 GiB more on all others"]) == "1 GiB more on all others: changes nothing"
    assert str(marginals["dropping lame"]) == "dropping lame: changes nothing"
    assert not marginals["dropping lame"].solved


def test_one_more_device_is_worth_what_solving_with_it_says() -> None:
    _, problem = make_problem()
    plan = solve(problem)
    marginals = {item.what: item for item in explain(plan, problem).marginals}
    # The same lab with a second "fast", whose links are those of the first.
    _, larger = make_problem(
        LAB.replace(
            "  - <<: *fast\n    name: lame",
            "  - {<<: *fast, name: new}\n  - <<: *fast\n    name: lame",
        )
        .replace("links:\n", "links:\n  - {from: new, to: slow, rtt_ms: 8, mbit_per_s: 10}\n")
        .replace("links:\n", "links:\n  - {from: new, to: fast, rtt_ms: 8, mbit_per_s: 10}\n")
    )
    best = solve(larger)
    stated = marginals["one more device like fast"]
    assert stated.after == pytest.approx(min(best.value, plan.value))
    assert stated.after is not None
    assert "one more device like lame" not in marginals


def test_a_second_device_is_worth_buying() -> None:
    _, problem = make_problem(LAB.split("  - {<<")[0])
    more = replace(problem.devices[0], memory_bytes=10**9)
    alone = replace(problem, devices=(more,), objective=Objective("throughput"))
    plan = solve(alone)
    (stated,) = (item for item in explain(plan, alone).marginals if item.kind == "device")
    assert stated.change is not None
    assert -0.6 < stated.change < -0.3
    assert str(stated).startswith("one more device like fast: -")


def test_what_helps_somewhere_else_is_found_there() -> None:
    _, problem = make_problem(
        LAB.replace(
            "memory: 300M\n    layer_ms: {decode: {4: 80, 8: 90}}",
            "memory: 1M\n    layer_ms: {decode: {4: 1, 8: 1}}",
        )
        .replace("embed_ms: 50", "embed_ms: 1")
        .replace("head_ms: 90", "head_ms: 1")
        .replace("default_link: {rtt_ms: 0.5", "default_link: {rtt_ms: 9")
    )
    plan = solve(problem)
    assert "lame" not in {stage.device for stage in plan.stages}
    marginals = {item.what: item for item in explain(plan, problem).marginals}
    assert "1 GiB more on all others" not in marginals
    more = [*problem.devices[:2], replace(problem.devices[2], memory_bytes=(1 << 30) + (1 << 20))]
    best = solve(replace(problem, devices=tuple(more)))
    assert marginals["1 GiB more on lame"].after == pytest.approx(best.value)
    assert best.value < plan.value
    assert str(marginals["a 1 Gbit/s, 0.5 ms link between all others"]).endswith("changes nothing")


def test_a_device_that_cannot_be_missed_is_said() -> None:
    _, problem = make_problem(LAB.replace("memory: 300M", "memory: 40M"))
    plan = solve(problem)
    assert len(plan.stages) >= 2
    lines = [str(item) for item in explain(plan, problem).marginals]
    assert "dropping fast: no plan fits any more" in lines


def test_time_that_ends_is_said() -> None:
    _, problem = make_problem()
    plan = solve(problem)
    ticks = iter([0.0, 0.0, 100.0])
    explanation = explain(plan, problem, time_limit_s=50.0, now_s=lambda: next(ticks))
    assert not explanation.complete
    assert len([item for item in explanation.marginals if item.solved]) == 1


def test_a_search_that_fails_states_nothing() -> None:
    _, problem = make_problem()
    plan = solve(problem)

    def never(changed: PlanningProblem, limit_s: float) -> Plan:
        raise PlanError("no time")

    explanation = explain(plan, problem, solve_again=never)
    assert not explanation.complete
    assert not [item for item in explanation.marginals if item.solved]


def test_an_unproven_search_is_not_worse_than_the_plan_at_hand() -> None:
    _, problem = make_problem()
    best = solve(problem)
    plan = replace(best, proof=replace(best.proof, bound=0.0))
    poor = solve(replace(problem, excluded=frozenset([0])))
    explanation = explain(plan, problem, solve_again=lambda changed, limit_s: poor)
    stated = {item.what: str(item) for item in explanation.marginals}
    assert stated["1 GiB more on slow"] == "1 GiB more on slow: no better plan was found"
    assert stated["dropping fast"].endswith("% ms/token between the plans found")


@pytest.mark.parametrize(
    ("kind", "after", "proof", "text"),
    [
        ("drop", 1.2, "exact", "dropping x: +20.0 % ms/token"),
        ("drop", 1.2, "bound", "dropping x: +20.0 % ms/token at most"),
        ("drop", 1.2, "found", "dropping x: +20.0 % ms/token between the plans found"),
        ("drop", 1.0, "found", "dropping x: as good a plan was found"),
        ("drop", None, "exact", "dropping x: no plan fits any more"),
        ("memory", 0.93, "exact", "1 GiB more on x: -7.0 % ms/token"),
        ("memory", 0.5, "bound", "1 GiB more on x: -50.0 % ms/token or more"),
        ("memory", 0.9999, "exact", "1 GiB more on x: less than -0.1 % ms/token"),
        ("link", 1.0, "exact", "a 1 Gbit/s, 0.5 ms link x: changes nothing"),
        ("link", 1.0, "bound", "a 1 Gbit/s, 0.5 ms link x: no better plan was found"),
    ],
)
def test_lines(kind: Kind, after: float | None, proof: MarginalProof, text: str) -> None:
    assert str(Marginal(kind, "x", "ms/token", 1.0, after, proof)) == text


def test_an_equal_plan_with_a_device_less_is_optimal_even_if_not_proved() -> None:
    _, problem = make_problem(
        LAB.replace("name: lame", "name: slow-2")
        .replace("memory: 70M", "memory: 95M")
        .replace("80, 8: 90", "8, 8: 9")
        .replace("embed_ms: 50", "embed_ms: 1")
        .replace("head_ms: 90", "head_ms: 1")
        .replace("rtt_ms: 8, mbit_per_s: 10", "rtt_ms: 0.5, mbit_per_s: 1000")
    )
    plan = solve(problem)

    def unproved(changed: PlanningProblem, limit_s: float) -> Plan:
        found = solve(changed)
        return replace(found, proof=replace(found.proof, bound=0.0))

    lines = [str(item) for item in explain(plan, problem, solve_again=unproved).marginals]
    assert "dropping slow: changes nothing" in lines
    assert "dropping slow-2: changes nothing" in lines


def test_an_explanation_is_plain_data() -> None:
    _, problem = make_problem()
    values = explain(solve(problem), problem).to_dict()
    assert {"change", "text", "proof", "after", "what"} <= set(values["marginals"][0])


# ---- drawn links ---------------------------------------------------------------------------------


def test_faster_links_never_hurt_and_planning_anew_never_loses() -> None:
    _, problem = make_problem()
    plan = solve(problem)
    result = simulate(plan, problem, 8, seed=1)
    assert result.replanned is not None
    assert result.kept.high <= plan.value * (1 + 1e-9)
    assert result.replanned.median <= result.kept.median * (1 + 1e-9)
    assert (result.kept.runs, result.unsolved, result.unproven) == (8, 0, 0)
    assert simulate(plan, problem, 8, seed=1) == result
    assert simulate(plan, problem, 8, seed=2) != result


def test_draws_without_a_plan_are_counted() -> None:
    _, problem = make_problem()

    def never(changed: PlanningProblem, limit_s: float) -> Plan:
        raise InfeasiblePlan("no")

    result = simulate(solve(problem), problem, 3, solve_again=never)
    assert result.replanned is None
    assert result.unsolved == 3
