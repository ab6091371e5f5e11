"""Margins, budgets and kept sensitivities, on a real model where possible."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.quality.blocks import check_plans, measure_plan_kl, measure_quality, random_plans
from coordinator.quality.measuring import Missing
from coordinator.quality.store import KnownQuality, QualityRequest, QualityStore
from model.checkpoint import Checkpoint
from model.quantize import Format
from planning.build import DeviceInput, RequestInput, build_problem
from planning.errors import RequestInvalid
from planning.plan import Plan, verify
from planning.planner import solve
from planning.problem import PlanningProblem
from planning.request import LoadRequest
from planning.sensitivity import (
    ASSUMED_MARGIN,
    budget_margin,
    choose_hops,
    scaled,
    scaled_own,
    tightened,
    with_lossless,
)
from wire.messages import HopMeasured, QualityMeasured
from wire.profile import BlockTiming, DeviceProfile

CHECKPOINT = Checkpoint.open(Path(__file__).parents[1] / "fixtures" / "opt-pre")
SPEC = CHECKPOINT.spec
BITS = (2, 3, 4, 8)
TEXT = tuple(
    tuple(int(token) for token in tokens)
    for tokens in np.random.default_rng(0).integers(0, SPEC.vocab, (4, 16))
)


def test_the_margin_is_the_largest_ratio_and_never_below_one() -> None:
    assert budget_margin([]) == budget_margin([(0.0, 0.0)]) == ASSUMED_MARGIN
    assert budget_margin([(1.0, 0.8), (2.0, 1.9)]) == 1.0
    assert budget_margin([(1.0, 0.8), (2.0, 2.6), (0.0, 0.0), (1e-9, 1e-8)]) == 1.3


def test_a_width_that_keeps_the_weights_adds_nothing() -> None:
    rows: list[dict[int, float]] = [{8: 0.1} for _ in range(SPEC.block_count)]
    least = CHECKPOINT.lossless_format(0).bits
    known = with_lossless(rows, CHECKPOINT)
    assert known[0][32] == 0.0
    assert (16 in known[0]) == (least == 16)
    assert known[0][8] == 0.1
    assert with_lossless([{}], CHECKPOINT) == ({},)
    assert with_lossless([{32: 0.2}] * SPEC.block_count, CHECKPOINT)[0][32] == 0.2


def problem_of(rows: Any, margin: float, budget: float) -> PlanningProblem:
    """One device that is slower with each bit, so that a plan spends all of its budget."""
    profile = DeviceProfile(
        "x", "x", 1, 1, "described", "", tuple((bits, bits) for bits in BITS),
        1 << 30, 1 << 30, 1 << 30, 0.0, 0.0,
    )  # fmt: skip
    timings = [
        BlockTiming(kind, 0, bits, bits * 1e-3, bits * 1e-3)
        for kind in ("embedding", "layer", "head")
        for bits in BITS
    ]
    request = RequestInput(
        SPEC,
        BITS,
        context_tokens=32,
        chunk_tokens=32,
        sensitivities=scaled(rows, margin),
        quality_budget=budget,
    )
    devices = [DeviceInput(name, profile, timings) for name in ("a",)]
    return build_problem(request, devices, [])


def test_budgets_are_kept_by_the_model_that_was_planned(tmp_path: Path) -> None:
    found = measure_quality(CHECKPOINT, BITS, TEXT, directory=tmp_path)
    rows: list[dict[int, float]] = [{} for _ in range(SPEC.block_count)]
    for one in found:
        rows[one.block][one.bits] = one.kl
    plans = random_plans(SPEC.block_count, BITS, 4)
    checks = check_plans(CHECKPOINT, found, plans, TEXT, directory=tmp_path)
    margin = budget_margin((check.predicted_kl, check.measured_kl) for check in checks)

    def measured(plan: Plan) -> float:
        formats = [Format.of(placement.bits) for placement in plan.placements]
        return measure_plan_kl(CHECKPOINT, formats, TEXT, directory=tmp_path)

    low, high = (sum(kl[bits] for kl in rows) for bits in (8, 2))
    spent = []
    for budget in np.geomspace(3 * low * margin, 0.7 * high, 4):
        problem = problem_of(rows, margin, float(budget))
        plan, kl = solve(problem), None
        for _ in range(4):
            kl = measured(plan)
            if kl <= budget:
                break
            plan = solve(tightened(problem, plan, kl))
        assert kl is not None
        assert kl <= budget
        verify(plan, problem)
        spent.append(kl / budget)
    assert max(spent) > 0.4  # What is kept is a budget, not a ban.


def test_a_hop_counts_once_all_boundaries_are_known() -> None:
    known = KnownQuality(TEXT, "rtn", 32, {}, {})
    assert known.worst_hops(SPEC.block_count) == {}
    known.hops = {(boundary, 8): boundary / 10 for boundary in range(SPEC.head_block)}
    known.hops[0, 16] = 0.1
    assert known.worst_hops(SPEC.block_count) == {8: (SPEC.head_block - 1) / 10}


def test_hops_are_chosen_by_wish_budget_and_what_is_known() -> None:
    known = {8: 0.5, 16: 0.25}

    def chosen(asked: Any, sensitivities: Any, budget: float | None) -> dict[int, float | None]:
        forms = choose_hops(asked, sensitivities, budget)
        return {form.bits: form.sensitivity for form in forms}

    assert chosen(None, {}, None) == {16: 0.0}
    assert chosen(None, known, None) == {16: 0.25}
    assert chosen(None, {}, 1.0) == {16: 0.0, 32: 0.0}
    assert chosen(None, known, 1.0) == {8: 0.5, 16: 0.25, 32: 0.0}
    for budget in (None, 1.0):
        assert chosen((32, 8), {}, budget) == {8: None, 32: 0.0}
        assert chosen((8,), known, budget) == {8: 0.5}


def test_only_what_was_asked_for_is_kept_of_an_agents_answers() -> None:
    request = QualityRequest(Path("/m"), (4,), TEXT, ((8,) * SPEC.block_count,))
    known = KnownQuality(TEXT, "rtn", 32, {}, {})
    missing = Missing.of(request, SPEC, known)
    assert missing.hops == dict.fromkeys(range(SPEC.head_block), (16, 8))
    for stranger in (
        HopMeasured(1, SPEC.head_block, 8, 0.1),
        HopMeasured(1, 0, 32, 0.1),
        HopMeasured(1, 0, 8, float("nan")),
        HopMeasured(1, 0, 8, float("inf")),
        QualityMeasured(1, 0, (8,), 0.1, 0.1),
        QualityMeasured(1, None, (4,), 0.1, 0.0),
        QualityMeasured(1, 0, (4,), float("inf"), 0.1),
        QualityMeasured(1, None, request.plans[0], float("inf"), 0.0),
    ):
        missing.keep(stranger, known)
    assert known == KnownQuality(TEXT, "rtn", 32, {}, {})
    for block in range(SPEC.block_count):
        missing.keep(QualityMeasured(1, block, (4,), 0.1, 0.2), known)
    missing.keep(QualityMeasured(1, None, request.plans[0], 0.3, 0.0), known)
    for boundary in range(SPEC.head_block):
        assert not missing.answered(known)
        assert Missing.of(request, SPEC, known)
        missing.keep(HopMeasured(1, boundary, 16, 0.0), known)
        missing.keep(HopMeasured(1, boundary, 8, boundary / 10), known)
    assert missing.answered(known)
    assert not Missing.of(request, SPEC, known)


def test_an_arithmetic_of_its_own_is_kept_apart() -> None:
    known = KnownQuality(TEXT, "rtn", 32, {(1, 8): (0.1, 0.2)}, {})
    missing = Missing.own("tflite_cpu", (8,), SPEC, known)
    assert missing.blocks == dict.fromkeys(range(1, SPEC.head_block), (8,))
    for block in missing.blocks:
        assert not missing.answered(known)
        missing.keep(QualityMeasured(1, block, (4,), 0.3, 0.2), known)
        missing.keep(QualityMeasured(1, block, (8,), 0.3, 0.2), known)
    missing.keep(QualityMeasured(1, 0, (8,), 0.3, 0.2), known)
    assert missing.answered(known)
    assert not Missing.own("tflite_cpu", (8,), SPEC, known)
    assert Missing.own("another", (8,), SPEC, known)
    assert known.blocks == {(1, 8): (0.1, 0.2)}
    assert set(known.own) == {("tflite_cpu", block, 8) for block in missing.blocks}
    margin = scaled_own(known.own_sensitivities(), 2.0)
    assert margin["tflite_cpu"][1] == {8: 0.6}


def test_a_plan_above_its_budget_is_followed_by_one_below() -> None:
    rows = [{2: 0.08, 3: 0.04, 4: 0.02, 8: 0.001} for _ in range(SPEC.block_count)]
    problem = problem_of(rows, 1.0, 0.2)
    plan = solve(problem)
    for times in (1.0001, 1.5, 4.0):
        # As if blocks together did so many times what they do alone.
        kl = times * (plan.total_sensitivity or 0) if times > 1.01 else 0.2 * times
        again = solve(tightened(problem, plan, kl))
        assert again.total_sensitivity is not None
        assert plan.total_sensitivity is not None
        assert again.total_sensitivity < plan.total_sensitivity
        assert again.total_sensitivity * kl / plan.total_sensitivity <= 0.2 * 1.0001
    with pytest.raises(ValueError, match="no budget"):
        tightened(replace(problem, quality_budget=None), plan, 1.0)


def test_what_is_known_is_kept_by_checkpoint_text_and_format(tmp_path: Path) -> None:
    store = QualityStore(tmp_path)
    assert store.latest(CHECKPOINT, "rtn", 32) is None
    known = store.open(CHECKPOINT, TEXT, "rtn", 32)
    assert known == KnownQuality(TEXT, "rtn", 32, {}, {})
    plan = (8,) * SPEC.block_count
    known.blocks.update({(block, 8): (0.5, 0.1) for block in range(SPEC.block_count)})
    known.plans[plan] = 0.5 * SPEC.block_count * 1.2
    known.hops[0, 8] = 0.25
    known.own["tflite_cpu", 1, 8] = (0.75, 0.1)
    assert known.own_sensitivities() == {"tflite_cpu": {1: {8: 0.75}}}
    store.save(CHECKPOINT, known)
    assert store.open(CHECKPOINT, TEXT, "rtn", 32) == known
    assert store.latest(CHECKPOINT, "rtn", 32) == known
    assert known.margin == pytest.approx(1.2)
    assert known.sensitivities(SPEC.block_count)[3] == {8: 0.5}
    (path,) = (tmp_path / "quality").iterdir()
    written = json.loads(path.read_text())
    older = {key: value for key, value in written.items() if key not in ("hops", "own")}
    path.write_text(json.dumps(older))
    assert store.latest(CHECKPOINT, "rtn", 32) == replace(known, hops={}, own={})
    for bad_own in (["a", 0, 8, 0.1, 0.1], ["a", 1, 8, -0.1, 0.1], ["a", 1, 8, 0.1], [1]):
        path.write_text(json.dumps(older | {"own": [bad_own]}))
        assert store.latest(CHECKPOINT, "rtn", 32) is None
    for bad_block in ([0, 8, math.nan, 0.1], [0, 8, -0.1, 0.1], [0, 8, 0.1, math.inf], [1e999] * 4):
        path.write_text(json.dumps(older | {"blocks": [bad_block]}))
        assert store.latest(CHECKPOINT, "rtn", 32) is None
    path.write_text(json.dumps(older | {"plans": [[plan, math.nan]]}))
    assert store.latest(CHECKPOINT, "rtn", 32) is None
    for bad in ([SPEC.head_block, 8, 0.1], [0, 4, 0.1], [0, 8, -0.1], [0, 8]):
        path.write_text(json.dumps(older | {"hops": [bad]}))
        assert store.latest(CHECKPOINT, "rtn", 32) is None
    store.save(CHECKPOINT, known)
    assert store.latest(CHECKPOINT, "rtn", 64) is None
    assert store.latest(CHECKPOINT, "truncate", 32) is None
    other = store.open(CHECKPOINT, TEXT[:2], "rtn", 32)
    assert other.blocks == {}
    store.save(CHECKPOINT, other)
    first, second = sorted((tmp_path / "quality").iterdir(), key=lambda path: path.stat().st_size)
    os.utime(first, ns=(2, 2))
    os.utime(second, ns=(1, 1))
    assert store.latest(CHECKPOINT, "rtn", 32) == other
    first.write_text("{")
    assert store.latest(CHECKPOINT, "rtn", 32) == known


GOOD: dict[str, Any] = {"model": "/m", "bits": [4], "sequences": [[1, 2]]}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model": "m"}, "model"),
        ({"bits": []}, "bits"),
        ({"bits": [7]}, "bits"),
        ({"sequences": []}, "sequences"),
        ({"sequences": [[-1]]}, "sequences"),
        ({"sequences": [[0] * (1 << 16), [0]]}, "sequences"),
        ({"plans": [[4]] * 65}, "plans"),
        ({"plans": [["4"]]}, "plans"),
        ({"on": 3}, "on"),
        ({"scheme": "magic"}, "scheme"),
        ({"more": 1}, "unknown fields: more"),
    ],
)
def test_a_request_that_makes_no_sense_names_the_field(change: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestInvalid, match=field):
        QualityRequest.from_dict(GOOD | change)


def test_a_request_must_fit_the_model() -> None:
    QualityRequest.from_dict(GOOD).check(SPEC)
    for change in (
        {"sequences": [[1]]},
        {"sequences": [[1, SPEC.vocab]]},
        {"sequences": [[1] * (SPEC.max_context + 1)]},
        {"plans": [[4, 4]]},
    ):
        with pytest.raises(RequestInvalid):
            QualityRequest.from_dict(GOOD | change).check(SPEC)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quality_margin": 0.5}, "quality_margin"),
        ({"check_quality": 1}, "check_quality"),
        ({"check_quality": True}, "check_quality needs a quality_budget"),
        ({"with_problem": None}, "with_problem"),
        ({"hop_bits": []}, "hop_bits: a list out of"),
        ({"hop_bits": [4]}, "hop_bits: a list out of"),
        ({"hop_bits": 8}, "hop_bits: a list out of"),
        ({"sensitivities": [{"4": float("nan")}]}, "sensitivities"),
        ({"sensitivities": [{"4": -0.1}]}, "sensitivities"),
        ({"hop_sensitivities": {"4": 0}}, "hop_sensitivities"),
        ({"hop_sensitivities": {"8": -1}}, "hop_sensitivities"),
        ({"hop_sensitivities": [8]}, "hop_sensitivities"),
        ({"own_sensitivities": []}, "own_sensitivities"),
        ({"own_sensitivities": {"tflite_cpu": [{"8": 1}]}}, "own_sensitivities"),
        ({"own_sensitivities": {"tflite_cpu": {"1": {"8": -1}}}}, "own_sensitivities"),
        ({"plan": 3}, "plan: expected an object"),
        ({"plan": {"source": "a.json", "model": "m", "stages": []}}, "at least one stage"),
    ],
)
def test_a_plan_request_that_makes_no_sense_names_the_field(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestInvalid, match=message):
        LoadRequest.from_dict({"model": "/m"} | change)
