"""Teams in explanations, simulations and saved plans: each figure is computed anew here."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from benchmarks.team_simulation import LAB, parts_of, simulate
from model.spec import ModelSpec
from paper.study import simulate as simulate_links
from planning.insight.explain import explain
from planning.insight.team import layer_fraction, no_team_text, reassessed, team_views
from planning.insight.unused import idle_reasons
from planning.insight.view import describe_plan
from planning.labs.lab import Lab, LabDevice
from planning.labs.lab_file import parse_lab, read_lab
from planning.plan import Plan, PlanError, of_plan, verify
from planning.planner import solve
from planning.problem import Objective, PlanningProblem
from planning.saved import SavedPlan, parse_plan, plan_text
from tests.planning.described import described_problem
from tests.planning.shapes import llama_8b

TOKEN = Objective("latency", 512, 128)


def pis(*changes: tuple[str, str]) -> Lab:
    """Four Pis that share layers, with changes in the text of their lab."""
    text = LAB.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return parse_lab(text, "lab.yaml")


LINK = "{rtt_ms: 0.3, mbit_per_s: 940}"
WIFI = LINK, "{rtt_ms: 5, mbit_per_s: 60}"
SHARES = "shares: {0.25: 0.28, 0.5: 0.56}"


def problem_of(lab: Lab, spec: ModelSpec | None = None, **request: Any) -> PlanningProblem:
    return described_problem(
        lab, spec or llama_8b(), context_tokens=2048, bits=(4,), objective=TOKEN, **request
    )


@cache
def four_pis() -> tuple[PlanningProblem, Plan]:
    problem = problem_of(read_lab(LAB))
    return problem, solve(problem)


def test_four_pis_share_every_layer_as_the_simulation_says() -> None:
    """The simulation has its own arithmetic, and agrees with the planner's."""
    _, plan = four_pis()
    (stage,) = plan.stages
    assert len(stage.members) == 4
    parts = parts_of(LAB, bits=4, layers=32, kv_heads=8)
    assert plan.decode_s == pytest.approx(simulate(parts, 4).token_s, rel=0.01)
    alone_s = simulate(parts, 1).token_s
    assert alone_s / plan.decode_s > 2.5


@pytest.mark.parametrize("members", [2, 3])
def test_smaller_teams_cost_what_the_simulation_says(members: int) -> None:
    lab = read_lab(LAB)
    names = [device.name for device in lab.devices]
    others = names[members:]
    problem = problem_of(lab, teams=[names[:members]], excluded=others)
    simulated = simulate(parts_of(LAB, bits=4, layers=32, kv_heads=8), members)
    assert solve(problem).decode_s == pytest.approx(simulated.token_s, rel=0.01)


def test_the_gain_is_against_the_fastest_member_alone() -> None:
    problem, plan = four_pis()
    (view,) = team_views(plan, problem)
    alone = problem.devices[0]
    alone_s = alone.call_s + sum(row[0].decode_s for row in alone.options)
    assert view.alone_s == pytest.approx(alone_s)
    assert view.gain == pytest.approx(alone_s / plan.stages[0].compute_s)
    assert view.fits
    text = str(view)
    assert text.startswith("sharing layers between pi-1, pi-2, pi-3 and pi-4 gains 2.8 x: ")
    assert f"{1e3 * plan.stages[0].sums_s:.1f} ms" in text
    assert text.endswith("over Wi-Fi (5 ms, 60 Mbit/s, assumed) it would lose (1.2 x as long)")


def test_what_a_team_would_take_over_wifi_is_what_it_takes_there() -> None:
    problem, plan = four_pis()
    (view,) = team_views(plan, problem)
    wifi = problem_of(pis(WIFI))
    assert view.wifi_s == pytest.approx(reassessed(plan, wifi).stages[0].compute_s)
    # Over Wi-Fi there is nothing to compare with.
    (there,) = team_views(reassessed(plan, wifi), wifi)
    assert there.wifi_s is None
    assert there.gain < 1
    assert "loses (1.2 x as long): " in str(there)


def test_a_member_without_the_memory_is_said() -> None:
    problem = problem_of(pis(("memory: 6G", "memory: 2G")))
    plan = solve(problem)
    (view,) = team_views(plan, problem)
    assert not view.fits
    assert "on pi-1 alone, which has too little memory for them" in str(view)


def test_without_a_team_the_costs_of_the_best_one_are_said() -> None:
    problem = problem_of(pis(WIFI))
    plan = solve(problem)
    assert not any(stage.members for stage in plan.stages)
    text = no_team_text(plan, problem)
    stage = plan.stages[0]
    layers = sum(0 < block <= 32 for block in range(stage.first, stage.last))
    one_sum_s = 2.5e-3 + 8196 / 7.5e6 + 0.15e-3
    saved_s = layers * 12.3e-3 * (1 - 0.56)
    assert text == (
        f"no devices share layers: between pi-1 and pi-2 sums would cost"
        f" {1e3 * 2 * layers * one_sum_s:.3g} ms a token, and sharing would save"
        f" {1e3 * saved_s:.3g} ms of computing (predicted)"
    )


@pytest.mark.parametrize(
    ("lab", "request_fields", "reason"),
    [
        (pis(), {"no_teams": True}, "it was asked for (--no-teams)"),
        (pis((SHARES, "shares: false")), {}, "pi-1, pi-2, pi-3 and pi-4 can only run whole layers"),
        (pis((LINK, "none")), {}, "there is no link from pi-1 to pi-2"),
    ],
)
def test_other_reasons_for_no_team(lab: Lab, request_fields: dict[str, Any], reason: str) -> None:
    problem = problem_of(lab, **request_fields)
    assert no_team_text(solve(problem), problem) == f"no devices share layers: {reason}"


def test_a_model_with_one_kv_head_is_not_shared() -> None:
    spec = llama_8b()
    layers = tuple(replace(layer, kv_heads=1) for layer in spec.layers)
    problem = problem_of(pis(), replace(spec, layers=layers))
    assert "can be divided into 1 part" in no_team_text(solve(problem), problem)


def test_one_device_needs_no_word_on_teams() -> None:
    lab = read_lab(LAB)
    problem = problem_of(lab, excluded=[device.name for device in lab.devices[1:]])
    assert no_team_text(solve(problem), problem) == ""


def test_an_explanation_takes_teams_apart_and_tries_without_them() -> None:
    problem, plan = four_pis()
    explanation = explain(plan, problem)
    (stage,) = explanation.stages
    assert stage.members == ("pi-1", "pi-2", "pi-3", "pi-4")
    assert stage.sums_s == plan.stages[0].sums_s
    assert explanation.teams == tuple(map(str, team_views(plan, problem)))
    found = {item.what: item for item in explanation.marginals}
    apart = found["pi-1, pi-2, pi-3 and pi-4 sharing no layers"]
    assert apart.after == pytest.approx(solve(replace(problem, no_teams=True)).value)
    dropped = found["dropping pi-3"]
    without = solve(replace(problem, excluded=frozenset([2])))
    assert dropped.after == pytest.approx(without.value)
    assert json.loads(json.dumps(explanation.to_dict()))["teams"] == list(explanation.teams)
    assert idle_reasons(plan, problem) == []


def test_a_team_with_slow_links_is_tried_with_faster_ones() -> None:
    problem = problem_of(pis((LINK, "{rtt_ms: 2, mbit_per_s: 90}")), teams=[["pi-1", "pi-2"]])
    plan = solve(problem)
    explanation = explain(plan, problem)
    found = {item.what: item for item in explanation.marginals}
    faster = found["a 1 Gbit/s, 0.5 ms link pi-1 <-> pi-2"]
    assert faster.after is not None
    assert faster.after < faster.before
    # A device of a team that was asked for can still be dropped, with the wish.
    assert found["dropping pi-1"].after is not None


def test_draws_of_links_change_the_sums() -> None:
    problem, plan = four_pis()
    simulation = simulate_links(plan, problem, 3, seed=1)
    assert simulation.kept.low < plan.value
    assert simulation.kept.runs == 3


def test_json_has_members_and_shares() -> None:
    problem, plan = four_pis()
    shown = json.loads(json.dumps(describe_plan(problem.spec, plan, 1)))
    assert shown["shares"] == {f"pi-{i}": pytest.approx(0.25) for i in (1, 2, 3, 4)}
    assert [one["device"] for one in shown["stages"][0]["members"]] == list(shown["shares"])
    first = plan.stages[0].members[0]
    assert layer_fraction(problem.spec, first.share) == pytest.approx(0.25)


def test_a_saved_team_is_the_same_plan_and_can_be_edited(tmp_path: Path) -> None:
    problem, plan = four_pis()
    saved = parse_plan(plan_text(plan, "llama"), "p.json")
    again = saved.to_plan(problem)
    assert again.stages == plan.stages
    sent = SavedPlan.from_dict(json.loads(json.dumps(saved.to_dict())))
    assert sent.to_plan(problem).stages == plan.stages
    # A member gives 512 columns to another: the layer now takes as long as its share.
    text = plan_text(plan, "llama").replace('"columns": 3584', '"columns": 3072', 1)
    text = text.replace('"columns": 3584', '"columns": 4096', 1)
    edited = parse_plan(text, "p.json").to_plan(problem)
    assert edited.decode_s > plan.decode_s
    verify(edited, problem)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"kv_heads": 2', '"kv_heads": 3', "has 9 KV heads and the model 8: change the counts"),
        ('"columns": 3584', '"columns": 3583', "has 14335 MLP columns and the model 14336"),
        ('"vocab": 32064', '"vocab": 1', "has 96193 tokens of the vocabulary and the model"),
        ('{"device": "pi-3"', '{"device": "pi-9"', "unknown device pi-9: there are pi-1"),
        ('{"device": "pi-3"', '{"device": "pi-1"', "pi-1 has more than one stage"),
        ('"sum_bits": 16', '"sum_bits": 8', "partial rows cannot be sent at 8 bit here"),
    ],
)
def test_mistakes_in_the_shares_of_a_saved_team(old: str, new: str, message: str) -> None:
    problem, plan = four_pis()
    text = plan_text(plan, "llama")
    assert old in text
    with pytest.raises(PlanError) as caught:
        parse_plan(text.replace(old, new, 1), "p.json").to_plan(problem)
    assert message in str(caught.value)
    assert str(caught.value).startswith("p.json: ")


def test_a_saved_team_is_refused_where_teams_are_forbidden() -> None:
    problem, plan = four_pis()
    with pytest.raises(PlanError, match="cannot share layers: teams are forbidden"):
        parse_plan(plan_text(plan, "llama"), "p.json").to_plan(replace(problem, no_teams=True))


def test_devices_that_only_run_whole_layers_have_no_times_of_shares() -> None:
    device: LabDevice = pis((SHARES, "shares: false")).devices[0]
    assert not device.shares
    problem = problem_of(pis((SHARES, "shares: true")))
    assert problem.devices[0].shares
    assert problem.devices[0].options[1][0].shares_s == ()
    measured = problem_of(read_lab(LAB)).devices[0].options[1][0].shares_s
    assert [share for share, _, _ in measured] == [0.25, 0.5, 1.0]
    assert measured[0][1] == pytest.approx(0.28 * 12.3e-3)


def test_a_device_that_is_left_out_of_a_team_is_compared_with_it() -> None:
    slow = "  - {<<: *pi-5, name: pi-4, layer_ms: {decode: {4: 150, 8: 300}}}"
    lab = pis(("  - {<<: *pi-5, name: pi-4}", slow))
    problem = problem_of(lab)
    plan = solve(problem)
    assert sorted(plan.stages[0].devices) == ["pi-1", "pi-2", "pi-3"]
    (line,) = idle_reasons(plan, problem)
    assert line.startswith("pi-4 is left out: its fastest layer takes 150.00 ms at 4 bits")
    found = re.search(r"a layer would take ([0-9.]+) ms, and without it ([0-9.]+) ms", line)
    assert found is not None
    assert float(found[1]) > float(found[2])
    layer = of_plan(problem, plan)[0].devices[-1].options[1][0]
    assert float(found[2]) == pytest.approx(1e3 * layer.decode_s, rel=0.01)
    whole = pis(
        ("  - {<<: *pi-5, name: pi-4}", slow.replace("name: pi-4,", "name: pi-4, shares: false,"))
    )
    problem = problem_of(whole)
    (line,) = idle_reasons(solve(problem), problem)
    assert "; it cannot share layers with pi-1: the backend of pi-4 loads no shares" in line


def test_a_plan_of_the_coordinator_is_explained_here_as_there() -> None:
    """The command line gets plan and problem as JSON, and explains, draws and saves them."""
    problem, plan = four_pis()
    sent = json.loads(json.dumps({"plan": describe_plan(problem.spec, plan, 1)}))["plan"]
    got = Plan.from_dict({item.name: sent[item.name] for item in fields(Plan)})
    here = PlanningProblem.from_dict(json.loads(json.dumps(problem.to_dict())))
    verify(got, here)
    assert got == plan
    assert team_views(got, here) == team_views(plan, problem)
    assert plan_text(got, "llama") == plan_text(plan, "llama")
