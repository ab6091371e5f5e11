"""Plans of models with experts: memory for all, time for those used, whole experts per member."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from calibration.shapes import shape_spec
from model.experts import ExpertCounts, busiest
from model.share import Share, share_spec
from model.spec import ExpertSpec, ModelSpec
from planning.build import RequestInput
from planning.labs.lab import lab_problem
from planning.labs.lab_file import read_lab
from planning.planner import solve
from planning.problem import PlanningProblem
from planning.teams import with_team

LABS = Path(__file__).parents[2] / "examples" / "labs"


def routed(layers: int = 4) -> ModelSpec:
    spec = shape_spec("qwen3-30b-a3b")
    return replace(spec, layers=spec.layers[:layers], vocab=32000)


def problem_of(spec: ModelSpec) -> PlanningProblem:
    return lab_problem(read_lab(LABS / "four-pis-8b.yaml"), RequestInput(spec, (4,), 512))


def test_a_layer_takes_the_time_of_the_experts_of_a_token() -> None:
    spec = routed()
    layer = spec.layers[0]
    dense = replace(spec, layers=(replace(layer, ffn=layer.used_ffn, experts=None),) * 4)
    all_used = replace(spec, layers=(replace(layer, ffn=128 * layer.ffn, experts=None),) * 4)
    own, same, wide = (problem_of(one).devices[0].options[1][0] for one in (spec, dense, all_used))
    assert own.decode_s == same.decode_s
    assert own.executed_bytes > 0.99 * wide.executed_bytes > 10 * same.executed_bytes


def test_a_chunk_of_a_prompt_reads_the_experts_of_all_its_rows() -> None:
    """However fast a device multiplies, a row costs a part of what the chunk reads."""
    lab = read_lab(LABS / "four-pis-8b.yaml")
    fast = [
        replace(device, layer_prefill_s_per_token=dict.fromkeys(device.bits, 1e-9))
        for device in lab.devices
    ]
    problem = lab_problem(replace(lab, devices=tuple(fast)), RequestInput(routed(), (4,), 512))
    option = problem.devices[0].options[1][0]
    assert 0.15 < option.prefill_s_per_token / option.decode_s < 0.18


def test_members_of_a_team_have_whole_experts() -> None:
    problem = problem_of(routed())
    plan = solve(problem)
    (team,) = (stage.members for stage in plan.stages if stage.members)
    spans = [member.share.columns for member in team]
    assert spans[0][0] == 0
    assert spans[-1][1] == 128
    assert [begin for begin, _ in spans[1:]] == [end for _, end in spans[:-1]]
    for member in team:
        experts = share_spec(problem.spec, member.share).layers[0].experts
        assert experts is not None
        assert (experts.first, experts.first + experts.stored) == member.share.columns


def test_a_team_waits_for_the_member_with_most_of_the_chosen_experts() -> None:
    spec = routed()
    problem = problem_of(spec)
    halves = [
        Share((0, 2), (0, 64), (0, spec.vocab // 2)),
        Share((2, 4), (64, 128), (spec.vocab // 2, spec.vocab)),
    ]
    made, index = with_team(problem, (0, 1), halves, 16)
    crowded = made.devices[index].options[1][0].decode_s
    one = replace(spec.layers[0], experts=ExpertSpec(128, 128))
    full = problem_of(replace(spec, layers=(one,) * 4))
    whole = made.devices[0].options[1][0].decode_s, full.devices[0].options[1][0].decode_s
    even = with_team(full, (0, 1), halves, 16)[0].devices[-1].options[1][0].decode_s
    assert busiest((64, 64), 8, 1) > 1.2
    # Where every expert is chosen, the members have equally much to do.
    assert crowded / whole[0] > even / whole[1] * 1.1


def test_shares_that_leave_out_an_expert_are_refused() -> None:
    spec = routed()
    halves = [
        Share((0, 2), (0, 60), (0, spec.vocab // 2)),
        Share((2, 4), (64, 128), (spec.vocab // 2, spec.vocab)),
    ]
    with pytest.raises(ValueError, match=r"the shares of experts do not follow"):
        with_team(problem_of(spec), (0, 1), halves, 16)


def test_a_team_whose_experts_are_wanted_unevenly_is_slower() -> None:
    spec = routed()
    halves = [
        Share((0, 2), (0, 64), (0, spec.vocab // 2)),
        Share((2, 4), (64, 128), (spec.vocab // 2, spec.vocab)),
    ]
    problem = problem_of(spec)
    even, skewed = (1,) * 128, (100,) * 64 + (0,) * 64

    def seconds(experts: ExpertCounts | None) -> float:
        made, index = with_team(replace(problem, experts=experts), (0, 1), halves, 16)
        return made.devices[index].options[1][0].decode_s

    uniform = seconds(None)
    assert seconds(ExpertCounts((even,) * 4)) == pytest.approx(uniform, rel=0.03)
    assert seconds(ExpertCounts((skewed,) * 4)) > 1.2 * uniform
