"""A draft model takes room on the device of the first stage, and nothing else changes."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from model.quantize import Format
from planning.draft import ASSUMED_ACCEPTANCE, DraftInput, DraftOn, gain, missing_bytes, with_draft
from planning.errors import RequestInvalid
from planning.plan import InfeasiblePlan, Plan, PlanError, verify
from planning.planner import solve
from planning.problem import PlanningProblem
from planning.request import LoadRequest
from planning.saved import parse_plan, plan_text
from tests.planning.shapes import llama_8b
from tests.planning.test_planner import random_extras, random_problem
from wire.profile import BlockTiming

SMALL = llama_8b(2, hidden=256, ffn=512)


def draft_of(slots: int = 1, bits: int = 4) -> DraftInput:
    return DraftInput(SMALL, bits, [Format.of(bits)] * SMALL.block_count, 128, slots)


def value_of(problem: PlanningProblem) -> float:
    try:
        return solve(problem).value
    except PlanError:
        return math.inf


def no_files(draft: DraftInput) -> DraftInput:
    """A draft model without files, so that only its memory decides."""
    return replace(draft, formats=())


@pytest.mark.parametrize("seed", range(12))
def test_the_best_plan_is_that_of_the_best_first_device_with_less_memory(seed: int) -> None:
    rng = random.Random(seed)
    problem = (random_extras if seed % 2 else random_problem)(seed)
    if 0 in problem.pins or problem.teams:
        problem = replace(problem, pins={}, teams=())
    places = {
        device.name: DraftOn(round(device.memory_bytes * rng.uniform(0.0, 0.6)), 1e-3)
        for device in problem.devices
        if rng.random() < 0.8
    }
    expected = math.inf
    for index, device in enumerate(problem.devices):
        place = places.get(device.name)
        if place is not None:
            less = replace(device, memory_bytes=device.memory_bytes - place.memory_bytes)
            devices = list(problem.devices)
            devices[index] = less
            alone = replace(problem, devices=tuple(devices), pins={**problem.pins, 0: index})
            expected = min(expected, value_of(alone))
    charged = with_draft(problem, no_files(draft_of()), places)
    if math.isinf(expected):
        with pytest.raises(PlanError):
            solve(charged)
        return
    plan = solve(charged)
    assert plan.value == pytest.approx(expected, rel=1e-6)
    verify(plan, charged)
    assert plan.stages[0].devices[0] in places


def first_plan() -> tuple[PlanningProblem, Plan]:
    """A problem that has a plan, and its plan."""
    for seed in range(100):
        problem = replace(random_problem(seed), pins={}, teams=())
        try:
            return problem, solve(problem, advise=False)
        except InfeasiblePlan:
            continue
    raise AssertionError("no problem has a plan")


def test_what_the_first_device_lacks_is_told() -> None:
    problem, plan = first_plan()
    stage = plan.stages[0]
    left = stage.memory_limit_bytes - stage.memory_bytes
    none = no_files(draft_of())
    assert missing_bytes(plan, none, {stage.device: DraftOn(left + 5, 1e-3)}) == (5, 0)
    assert missing_bytes(plan, none, {}) is None
    # Memory may be enough where storage is not.
    files = draft_of().stored_bytes
    full = replace(stage, storage_limit_bytes=stage.storage_bytes + files - 7)
    small = replace(plan, stages=(full, *plan.stages[1:]))
    assert missing_bytes(small, draft_of(), {stage.device: DraftOn(left, 1e-3)}) == (0, 7)
    places = {device.name: DraftOn(1 << 50, 1e-3) for device in problem.devices}
    with pytest.raises(InfeasiblePlan):
        solve(with_draft(problem, draft_of(), places))


def test_memory_grows_with_slots_and_containers_and_files_count() -> None:
    one, two = draft_of(1), draft_of(2)
    cache = 2 * 2 * 8 * (256 // 32) * 128 * 4
    assert two.memory_bytes(4) - one.memory_bytes(4) == cache
    assert one.memory_bytes(8) > one.memory_bytes(4) > one.stored_bytes > 0
    problem, _ = first_plan()
    before, after = problem.stored_bytes, with_draft(problem, one, {}).stored_bytes
    assert all(after[0][bits] - before[0][bits] == one.stored_bytes for bits in before[0])
    assert after[1:] == before[1:]


def test_a_guess_takes_all_blocks_and_none_may_be_unmeasured() -> None:
    draft = draft_of()
    timings = [
        BlockTiming("embedding", 0, 4, 1e-3, 1e-3),
        BlockTiming("layer", 0, 4, 2e-3, 1e-3),
        BlockTiming("head", 0, 4, 4e-3, 1e-3),
    ]
    assert draft.token_s(timings) == pytest.approx(9e-3)
    assert draft.token_s(timings[:2]) is None


def test_a_quick_and_right_model_gains_and_another_one_loses_nothing() -> None:
    assert gain(0.1, 0.001, ASSUMED_ACCEPTANCE) > 2.5
    assert gain(0.1, 0.001, 1.0) > 10
    assert gain(0.1, 0.2, 0.9) == 1.0
    assert gain(0.1, 0.001, 0.0) == 1.0


def test_a_request_and_a_saved_plan_keep_the_draft_model() -> None:
    request = LoadRequest.from_dict({"model": "/m/big", "draft": "/m/small", "draft_bits": 8})
    assert LoadRequest.from_dict(request.to_dict()) == request
    for wrong in ({"draft": "small/"}, {"draft": "/m/small", "draft_bits": 7}):
        with pytest.raises(RequestInvalid, match="draft"):
            LoadRequest.from_dict({"model": "/m/big", **wrong})
    _, plan = first_plan()
    text = plan_text(plan, "big", draft=("/m/small", 3))
    assert parse_plan(text, "p.json").draft == ("/m/small", 3)
    assert parse_plan(plan_text(plan, "big"), "p.json").draft is None
    for damaged in ('"/m/small"', '{"model": 1, "bits": 3}', '{"model": "/m", "bits": 7}'):
        with pytest.raises(PlanError, match="draft"):
            parse_plan(text.replace('{"model": "/m/small", "bits": 3}', damaged), "p.json")
