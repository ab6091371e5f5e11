"""Accelerators with memory of their own: the layers that a plan gives them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from calibration.shapes import shape_spec
from cli.main import main
from model.checkpoint import Checkpoint
from model.costs import on_chip_layer_bytes
from model.spec import ModelSpec
from planning.insight.unused import idle_reasons
from planning.labs.lab import Lab, LabError
from planning.labs.lab_file import parse_lab, read_lab
from planning.plan import InfeasiblePlan, Plan, verify
from planning.planner import solve
from planning.problem import PlanningProblem
from tests.planning.described import described_problem

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def tiny_opt() -> ModelSpec:
    return Checkpoint.open(EXAMPLES / "tiny-opt" / "model").spec


def coral(on_chip: str, layer_ms: float = 1.0) -> Lab:
    """A chip, and two boards that are slower but hold everything, each for itself."""
    return parse_lab(
        f"""
devices:
  - name: coral
    memory: 1G
    storage: 1G
    {on_chip}
    bits: [8]
    layer_ms: {{decode: {{8: {layer_ms}}}}}
    embed_ms: 100
    head_ms: 100
  - &board
    name: front
    memory: 1G
    storage: 1G
    bits: [8]
    layer_ms: {{decode: {{8: 9}}}}
    embed_ms: 0.1
    head_ms: 0.1
    shares: false
  - {{<<: *board, name: back}}
default_link: {{rtt_ms: 0, mbit_per_s: 100000}}
""",
        "lab.yaml",
    )


def solved(lab: Lab, spec: ModelSpec) -> tuple[Plan, PlanningProblem]:
    problem = described_problem(lab, spec, context_tokens=256)
    plan = solve(problem, time_limit_s=20)
    verify(plan, problem)
    assert plan.proven_optimal
    return plan, problem


def layers_on(plan: Plan, name: str) -> int:
    return sum(len(stage.bits) for stage in plan.stages if stage.device == name)


def test_a_layers_bytes_are_its_weights(tiny_opt: ModelSpec) -> None:
    assert on_chip_layer_bytes(tiny_opt.layers[0]) == 4 * 128 * 128 + 2 * 128 * 512
    llama = shape_spec("llama-1b").layers[0]
    assert on_chip_layer_bytes(llama) == 2 * 2048 * 2048 + 2 * 512 * 2048 + 3 * 2048 * 8192


@pytest.mark.parametrize("layers", [1, 3, 7])
def test_a_stage_stays_on_the_chip(layers: int, tiny_opt: ModelSpec) -> None:
    room = (layers + 1) * on_chip_layer_bytes(tiny_opt.layers[0]) - 1
    plan, problem = solved(coral(f"on_chip: {room}"), tiny_opt)
    # Nine times as fast as the boards: it gets all that the chip holds.
    assert layers_on(plan, "coral") == layers
    coral_device = problem.devices[0]
    a_layer = coral_device.options[1][0].executed_bytes + problem.kv_bytes[1]
    assert coral_device.memory_bytes == coral_device.stage_bytes + layers * a_layer


def test_more_of_the_boards_memory_is_no_advice_for_a_full_chip(tiny_opt: ModelSpec) -> None:
    lab = coral(f"on_chip: {2 * on_chip_layer_bytes(tiny_opt.layers[0])}")
    alone = replace(lab, devices=lab.devices[:1], links=())
    problem = described_problem(alone, tiny_opt, context_tokens=256)
    with pytest.raises(InfeasiblePlan) as caught:
        solve(problem, time_limit_s=20)
    assert caught.value.advice.whole_memory is None
    assert caught.value.advice.more_devices is not None


def test_without_a_chip_memory_is_the_only_limit(tiny_opt: ModelSpec) -> None:
    _, problem = solved(coral("watts: 5"), tiny_opt)
    assert problem.devices[0].memory_bytes == 1 << 30


def test_layers_too_large_for_the_chip_are_timed_as_they_are(tiny_opt: ModelSpec) -> None:
    """Every call brings the weights: as slow for one layer as for each of many."""
    lab = coral(f"on_chip: {on_chip_layer_bytes(tiny_opt.layers[0]) - 1}")
    _, problem = solved(lab, tiny_opt)
    assert problem.devices[0].memory_bytes == 1 << 30


def test_the_demo_model_uses_a_coral(tiny_opt: ModelSpec) -> None:
    plan, problem = solved(read_lab(EXAMPLES / "labs" / "coral-and-pi.yaml"), tiny_opt)
    assert layers_on(plan, "coral") > 1
    assert idle_reasons(plan, problem) == []


def test_a_billion_parameters_do_not() -> None:
    spec = replace(shape_spec("llama-1b"), max_context=4096)
    problem = described_problem(
        read_lab(EXAMPLES / "labs" / "jetson-pis-coral.yaml"), spec, context_tokens=2048
    )
    plan = solve(problem, time_limit_s=20)
    verify(plan, problem)
    assert layers_on(plan, "coral-1") == 0
    (line,) = idle_reasons(plan, problem)
    assert line.startswith("coral-1 is left out: its fastest layer takes 190.00 ms at 8 bits")


def test_reasons_name_what_keeps_a_device_out(tiny_opt: ModelSpec) -> None:
    lab = coral("on_chip: 7.5MB", layer_ms=500)
    problem = described_problem(lab, tiny_opt, context_tokens=256)
    cases = {
        "coral is left out: its fastest layer takes 500.00 ms at 8 bits, those of": problem,
        "coral is left out: it is excluded": replace(problem, excluded=frozenset({0})),
    }
    small = replace(problem.devices[0], memory_bytes=problem.devices[0].stage_bytes + 1000)
    cases["coral is left out: a layer takes"] = replace(
        problem, devices=(small, *problem.devices[1:])
    )
    none = replace(problem.devices[0], options=tuple(() for _ in range(tiny_opt.block_count)))
    cases["coral is left out: it runs no layer"] = replace(
        problem, devices=(none, *problem.devices[1:])
    )
    for wanted, case in cases.items():
        plan = solve(case, time_limit_s=20)
        assert any(line.startswith(wanted) for line in idle_reasons(plan, case))


def test_sensitivities_are_to_be_measured_as_the_chip_computes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_opt: ModelSpec
) -> None:
    blocks = [
        {"block": block, "bits": bits, "kl": 1e-5, "normalized_weight_error": 1e-6}
        for block in range(tiny_opt.block_count)
        for bits in (4, 8)
    ]
    path = tmp_path / "sensitivities.json"
    path.write_text(json.dumps({"blocks": blocks}))
    labs, model = EXAMPLES / "labs", str(EXAMPLES / "tiny-opt" / "model")
    for lab, noted in (("coral-and-pi", True), ("home-4-pis", False)):
        devices = f"--devices={labs / lab}.yaml"
        assert main(["plan", model, devices, f"--sensitivities={path}", "--json"]) == 0
        said = capsys.readouterr().err
        assert ("no sensitivities for the arithmetic of coral" in said) == noted


def test_a_wrong_capacity_is_refused() -> None:
    with pytest.raises(LabError, match="on_chip: "):
        coral("on_chip: much")
