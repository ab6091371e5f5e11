"""Devices whose arithmetic rounds are charged their own sensitivities."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from paper.study import opt_350m
from planning.build import DeviceInput, RequestInput, own_rows
from planning.insight.explain import explain
from planning.insight.unused import idle_reasons
from planning.labs.lab import LabError
from planning.labs.lab_file import parse_lab
from planning.labs.sensitivity_file import SensitivityError, read_sensitivities
from planning.plan import Plan, PlanError, verify
from planning.planner import solve
from planning.problem import PlanningProblem
from planning.sensitivity import Own, own_share
from tests.planning.described import described_problem
from tests.planning.test_plan import PROFILE

LAYERS = 6
SPEC = opt_350m(LAYERS)
LAB = """
devices:
  - name: coral
    memory: 1G
    storage: 1G
    bits: [8]
    layer_ms: {{decode: {{8: 1}}}}
    embed_ms: 50
    head_ms: 50
    {own}
  - name: board
    memory: 1G
    storage: 1G
    layer_ms: {{decode: {{4: 8, 8: 9}}}}
    embed_ms: 1
    head_ms: 1
  - name: other
    memory: 1G
    storage: 1G
    layer_ms: {{decode: {{4: 80, 8: 90}}}}
    embed_ms: 0.5
    head_ms: 0.5
default_link: {{rtt_ms: 0.1, mbit_per_s: 1000}}
hops: [32]
"""
COMMON = [{4: 1e-3, 8: 1e-5}] * SPEC.block_count
CORAL_KL = 2e-4
OWN: Own = {"tflite_cpu": {block: {8: CORAL_KL} for block in range(1, LAYERS + 1)}}
NAMED, STATED = "arithmetic: tflite_cpu", f"layer_kl: {{8: {CORAL_KL:f}}}"
TIGHT = 8.5 * 1e-5
"""All blocks at 8 bits, and no layer on the Coral."""


def problem_of(budget: float | None, named: str = NAMED, own: Own | None = OWN) -> PlanningProblem:
    lab = parse_lab(LAB.format(own=named), "lab.yaml")
    return described_problem(
        lab,
        SPEC,
        context_tokens=64,
        sensitivities=COMMON,
        quality_budget=budget,
        own_sensitivities=own or {},
    )


def solved(problem: PlanningProblem) -> Plan:
    plan = solve(problem)
    verify(plan, problem)
    assert plan.proven_optimal
    return plan


def layers_on(plan: Plan, name: str) -> int:
    return sum(place.device == name for place in plan.placements if 0 < place.block <= LAYERS)


@pytest.mark.parametrize("named", [NAMED, STATED])
def test_each_device_is_charged_its_own(named: str) -> None:
    own = OWN if named is NAMED else None
    roomy = solved(problem_of(1.0, named, own))
    assert layers_on(roomy, "coral") == LAYERS
    # Embedding and head take as long at both widths: the budget is better spent on fewer bytes.
    assert roomy.total_sensitivity == pytest.approx(LAYERS * CORAL_KL + 2 * 1e-3)
    assert own_share(problem_of(1.0, named, own), roomy) == pytest.approx(LAYERS * 19e-5)
    # A budget for two layers there.
    some = solved(problem_of(TIGHT + 2 * (CORAL_KL - 1e-5), named, own))
    assert layers_on(some, "coral") == 2
    tight = solved(problem_of(TIGHT, named, own))
    assert layers_on(tight, "coral") == 0
    assert own_share(problem_of(TIGHT, named, own), tight) == 0
    assert tight.value > some.value > roomy.value


def test_a_plan_that_charges_too_little_is_refused() -> None:
    cheap = solved(problem_of(TIGHT, "call_ms: 0"))
    assert layers_on(cheap, "coral") == LAYERS
    with pytest.raises(PlanError, match=r"add up to .* above the budget"):
        verify(cheap, problem_of(TIGHT))
    with pytest.raises(PlanError, match="total_sensitivity"):
        verify(cheap, problem_of(1.0))


def test_it_is_said_when_a_device_loses_by_its_own_quality() -> None:
    problem = problem_of(TIGHT)
    plan = solved(problem)
    (line,) = [line for line in idle_reasons(plan, problem) if line.startswith("coral")]
    assert "all layers there at 8 bits would lose 0.0012 of KL, elsewhere 6e-05" in line
    (change,) = [one for one in explain(plan, problem).marginals if one.kind == "quality"]
    assert change.subject == "coral"
    assert change.change is not None
    without = solved(problem_of(TIGHT, "call_ms: 0"))
    assert change.change == pytest.approx(without.value / plan.value - 1)
    assert str(change).startswith("coral losing no more quality than the others at equal bits: -")
    # Where nothing counts it, nothing is said of it.
    free = problem_of(None)
    assert not [one for one in explain(solved(free), free).marginals if one.kind == "quality"]


def test_what_was_not_measured_is_not_used_under_a_budget() -> None:
    unknown = problem_of(1.0, own=None)
    plan = solved(unknown)
    assert layers_on(plan, "coral") == 0
    (line,) = [line for line in idle_reasons(plan, unknown) if line.startswith("coral")]
    assert "what they are was not measured" in line
    # Embedding and head are computed alike everywhere.
    assert unknown.sensitivity(0, 0, 8) == 1e-5
    assert unknown.sensitivity(0, 1, 8) is None
    again = PlanningProblem.from_dict(json.loads(json.dumps(unknown.to_dict())))
    assert again == unknown
    free = solved(replace(unknown, quality_budget=None))
    assert layers_on(free, "coral") == LAYERS
    assert free.total_sensitivity is None


def test_rows_of_devices() -> None:
    def rows(
        arithmetic: str, *, common: Any = COMMON, layer_kl: Any = None
    ) -> tuple[Mapping[int, float], ...] | None:
        profile = replace(PROFILE, arithmetic=arithmetic)
        request = RequestInput(SPEC, (8,), 64, sensitivities=common, own_sensitivities=OWN)
        return own_rows(request, DeviceInput("a", profile, layer_kl=layer_kl))

    assert rows("tflite_cpu", common=None) is None
    assert rows("") is None
    assert rows("tflite_cpu") == (COMMON[0], *[{8: CORAL_KL}] * LAYERS, COMMON[-1])
    assert rows("other") == (COMMON[0], *[{}] * LAYERS, COMMON[-1])
    # What a device says itself goes before what was measured of its arithmetic.
    assert rows("tflite_cpu", layer_kl={8: 0.5}) == (
        COMMON[0], *[{8: 0.5}] * LAYERS, COMMON[-1],
    )  # fmt: skip
    assert rows("", layer_kl={8: 0.5}) == rows("tflite_cpu", layer_kl={8: 0.5})


@pytest.mark.parametrize(
    ("named", "reason"),
    [
        ("layer_kl: {4: 0.1}", "layer_kl: expected a number at each of 8 bit"),
        ("layer_kl: {8: -1}", "layer_kl: expected a number from 0 up"),
        ("layer_kl: 3", "layer_kl: expected `key: value` pairs"),
        ("arithmetic: [a]", "expected a plain word"),
    ],
)
def test_a_description_that_makes_no_sense_is_refused(named: str, reason: str) -> None:
    with pytest.raises(LabError) as caught:
        parse_lab(LAB.format(own=named), "lab.yaml")
    assert reason in str(caught.value)


def test_a_file_may_know_of_arithmetics(tmp_path: Path) -> None:
    def entry(block: int, **more: object) -> Mapping[str, object]:
        return {"block": block, "bits": 8, "kl": 1e-5, "normalized_weight_error": 0.1} | more

    path = tmp_path / "quality.json"
    own = entry(2, kl=CORAL_KL, arithmetic="tflite_cpu")
    path.write_text(json.dumps({"blocks": [entry(0), entry(2), own]}))
    known = read_sensitivities(path, SPEC)
    assert known.kl[0] == known.kl[2] == {8: 1e-5}
    assert known.kl[1] == {}
    assert known.own["tflite_cpu"][2] == {8: CORAL_KL}
    for wrong in (entry(0, arithmetic="tflite_cpu"), entry(1, arithmetic=8)):
        path.write_text(json.dumps({"blocks": [wrong]}))
        with pytest.raises(
            SensitivityError, match=r"blocks\[0\]: arithmetic: expected a backend's name"
        ):
            read_sensitivities(path, SPEC)
