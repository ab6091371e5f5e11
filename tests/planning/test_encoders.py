"""Plans of encoders: whole texts in a pass, no KV cache, no teams."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from model import costs
from model.families import load_spec
from model.quantize import Format
from model.share import unshared
from planning.build import DeviceInput, RequestInput, build_problem
from planning.plan import verify
from planning.planner import solve
from planning.problem import Objective, PlanningProblem
from planning.request import DEFAULT_BITS, LoadRequest
from tests.encoder_cases import ENCODERS
from tests.planning.test_advice import profile
from wire.profile import BlockTiming, LinkProfile

SPEC = load_spec(ENCODERS / "bert-class")


def timings(factor: float) -> list[BlockTiming]:
    """A row takes 1 ms and each further one 0.1 ms, in every layer."""
    return [
        BlockTiming("embedding", 0, 8, 1e-5 * factor, 1e-6 * factor),
        BlockTiming("layer", 0, 8, 1e-3 * factor, (0.9e-3 + 64e-4) / 64 * factor),
        BlockTiming("head", 0, 8, 1e-5 * factor, 1e-6 * factor),
    ]


def problem(objective: Objective, memory: tuple[int, int] = (1 << 30, 1 << 30)) -> PlanningProblem:
    devices = [
        DeviceInput(name, replace(profile(size, 1 << 30), call_s=1e-4), timings(factor))
        for name, size, factor in (("fast", memory[0], 1.0), ("slow", memory[1], 2.0))
    ]
    links = [
        LinkProfile(source, target, 1e-3, 1e7)
        for source, target in (("fast", "slow"), ("slow", "fast"))
    ]
    request = RequestInput(SPEC, [8], 48, slots=4, objective=objective)
    return build_problem(request, devices, links)


def test_a_pass_of_whole_texts_counts_as_one_token() -> None:
    found = problem(Objective("request", prompt_tokens=512))
    assert found.pass_tokens == 48
    assert found.objective == Objective("latency", 48, 1)
    layer = found.devices[0].options[1][0]
    assert layer.decode_s == pytest.approx(0.9e-3 + 48e-4)
    assert layer.prefill_s_per_token == pytest.approx(layer.decode_s / 48)
    assert found.hop_bytes(16) == 48 * (2 * SPEC.hidden + 4)
    assert found.kv_bytes == (0,) * SPEC.block_count


def test_short_passes_are_asked_for_by_prompt_tokens() -> None:
    assert problem(Objective("request", prompt_tokens=16)).pass_tokens == 16


def test_the_fast_device_takes_all_if_it_can() -> None:
    found = problem(Objective())
    plan = solve(found)
    verify(plan, found)
    assert [stage.device for stage in plan.stages] == ["fast"]
    assert plan.decode_s == pytest.approx(1e-4 + 3 * (0.9e-3 + 48e-4), rel=0.05)


def test_a_lack_of_memory_divides_the_layers() -> None:
    stage = costs.stage_buffer_bytes(SPEC, range(SPEC.block_count), 512, 48)
    layer = costs.executed_bytes(SPEC, 1, Format.of(8), 8)
    embedding = costs.executed_bytes(SPEC, 0, Format.of(8), 8)
    found = problem(Objective(), (stage + embedding + 2 * layer, 1 << 30))
    plan = solve(found)
    verify(plan, found)
    assert {stage.device for stage in plan.stages} == {"fast", "slow"}


def test_no_team_shares_an_encoder() -> None:
    reason = unshared(SPEC)
    assert reason is not None
    assert "whole texts" in reason


def test_eight_bits_are_the_default_of_encoders() -> None:
    request = LoadRequest(ENCODERS / "bert")
    assert request.bits == DEFAULT_BITS
    assert request.for_model(SPEC).bits == (8,)
    assert replace(request, bits=(4, 8)).for_model(SPEC).bits == (4, 8)
    decoder = load_spec(Path(__file__).parents[1] / "fixtures" / "llama")
    assert request.for_model(decoder) is request
