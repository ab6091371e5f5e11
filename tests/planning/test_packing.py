"""First plans where nearly every device is needed, and proofs that none exists."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from calibration.shapes import shape_spec
from planning.candidates import with_teams
from planning.labs.lab_file import read_lab
from planning.plan import InfeasiblePlan, Proof, assess, keeps_budget, verify
from planning.planner import solve
from planning.problem import Objective, ObjectiveKind, PlanningProblem
from planning.search.packing import pack
from planning.search.search import search
from planning.search.tables import Tables
from planning.sensitivity import DEFAULT_QUALITY_BUDGET, assumed_losses
from planning.time_limit import now_s
from tests.planning.described import described_problem
from tests.planning.exhaustive_teams import exhaustive, random_teams
from tests.planning.test_planner import random_extras, random_problem
from tests.thorough import some

LAB = Path(__file__).parents[2] / "examples" / "labs" / "mixed-32.yaml"
KINDS = some(["latency", "throughput", "request"], "latency")


def routed(folder: Path, more: int, kind: ObjectiveKind) -> PlanningProblem:
    """A model of 48 layers with experts, on 32 mixed devices and so many more Jetsons.

    A Jetson holds two layers at 4 bits or one at 8. The budget allows 24 layers at 4 bits.
    """
    before, after = LAB.read_text().split("  - {<<: *x86, name: x86-1}\n")
    added = "".join(f"  - {{<<: *orin, name: copy-{at}}}\n" for at in range(more))
    path = folder / "lab.yaml"
    path.write_text(f"{before}{added}  - {{<<: *x86, name: x86-1}}\n{after}")
    spec = shape_spec("qwen3-30b-a3b")
    problem = described_problem(
        read_lab(path),
        spec,
        context_tokens=2048,
        quality_budget=DEFAULT_QUALITY_BUDGET,
        sensitivities=assumed_losses(spec),
    )
    return replace(problem, objective=Objective(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_is_found_at_once_if_only_teams_have_room(
    tmp_path: Path, kind: ObjectiveKind
) -> None:
    problem = next(iter(with_teams(routed(tmp_path, 16, kind)).variants[-1:]))
    found = search(problem, deadline_s=now_s(), gap=0.01)
    assert found.choice is not None
    plan = assess(problem, found.choice.stages, Proof("search", 0.0, 0.0), found.choice.hop_bits)
    verify(plan, problem)
    assert keeps_budget(plan, problem)


@pytest.mark.parametrize("kind", KINDS)
def test_devices_that_hold_a_layer_too_little_are_refused_and_not_given_up(
    tmp_path: Path, kind: ObjectiveKind
) -> None:
    # Without teams they hold 47 layers within the budget, although their bytes are enough.
    problem = replace(routed(tmp_path, 16, kind), no_teams=True)
    with pytest.raises(InfeasiblePlan):
        solve(problem, time_limit_s=30.0, advise=False)


@pytest.mark.parametrize("kind", KINDS)
def test_one_more_device_makes_a_plan_possible(tmp_path: Path, kind: ObjectiveKind) -> None:
    problem = replace(routed(tmp_path, 17, kind), no_teams=True)
    found = search(problem.variants[-1], deadline_s=now_s(), gap=0.01)
    assert found.choice is not None


@pytest.mark.parametrize("first_seed", some(range(0, 200, 20), 0))
def test_what_an_exhaustive_search_can_plan_is_never_called_impossible(first_seed: int) -> None:
    found: Counter[tuple[bool, bool]] = Counter()
    for seed in range(first_seed, first_seed + 20):
        for make in (random_problem, random_extras, random_teams):
            for share in (1.0, 0.65):
                problem = with_less_memory(make(seed), share)
                all_tables = [Tables(variant) for variant in with_teams(problem).variants]
                some_tables = [
                    tables
                    for tables in all_tables
                    if tables.longest and np.isfinite(tables.cost).any((0, 2)).all()
                ]
                impossible = all(pack(one, limit_s=60.0).impossible for one in some_tables)
                has_plan = exhaustive(problem) < math.inf
                assert not (impossible and has_plan), (make.__name__, seed, share)
                found[impossible, has_plan] += bool(some_tables)
    assert min(found[True, False], found[False, True]) > 10


def with_less_memory(problem: PlanningProblem, share: float) -> PlanningProblem:
    devices = tuple(
        replace(device, memory_bytes=int(share * device.memory_bytes)) for device in problem.devices
    )
    return replace(problem, devices=devices)
