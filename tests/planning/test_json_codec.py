"""Problems as plain values: through JSON and back, and what is refused on the way."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planning.planner import solve
from planning.problem import Objective, PlanningProblem
from tests.planning.test_plan import problem
from tests.planning.test_planner import random_extras


def through_json(given: PlanningProblem) -> PlanningProblem:
    return PlanningProblem.from_dict(json.loads(json.dumps(given.to_dict(), allow_nan=False)))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_problem_survives_json(seed: int) -> None:
    given = random_extras(seed)
    assert through_json(given) == given
    assert through_json(replace(given, quality_budget=math.inf)).quality_budget == math.inf


def test_a_problem_from_json_has_the_same_plan() -> None:
    built = problem()
    assert through_json(built) == built
    assert solve(through_json(built)).placements == solve(built).placements


def test_what_has_a_default_may_be_left_out() -> None:
    plain = problem().to_dict()
    for key in ("objective", "pins", "excluded", "sensitivities", "quality_budget"):
        del plain[key]
    assert PlanningProblem.from_dict(plain) == problem()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d.pop("spec"), "problem.spec: missing"),
        (lambda d: d["spec"].pop("layers"), "problem.spec: malformed model description"),
        (lambda d: d.update(extra=1), "problem.extra: unknown"),
        (lambda d: d["devices"][0].update(call_s="0"), "problem.devices[0].call_s: expected float"),
        (lambda d: d["devices"][0]["options"].pop(), "problem.devices[0].options: 4 blocks, not 5"),
        (lambda d: d.update(kv_bytes=[0]), "problem.kv_bytes: 1 blocks, not 5"),
        (lambda d: d.update(quality_budget=1.0), "problem.sensitivities: 0 blocks, not 5"),
        (lambda d: d.update(links=[]), "problem.links: expected an object"),
        (lambda d: d["links"].update({"0": {}}), "problem.links: '0' is no key"),
        (lambda d: d["links"].update({"0 7": d["links"]["0 1"]}), "problem.links: there is no 7"),
        (lambda d: d["pins"].update({"9": 0}), "problem.pins: there is no 9"),
        (lambda d: d["pins"].update({"x": 0}), "problem.pins: 'x' is no key"),
        (lambda d: d.update(excluded=[2]), "problem.excluded: there is no 2"),
        (lambda d: d["objective"].update(output_tokens=-1), "problem.objective: cannot minimise"),
        (lambda d: d["objective"].update(kind="price"), "problem.objective.kind: expected one of"),
    ],
)
def test_reading_a_problem_is_strict(
    damage: Callable[[dict[str, Any]], object], message: str
) -> None:
    plain = replace(problem(), objective=Objective("throughput")).to_dict()
    damage(plain)
    with pytest.raises(ValueError, match="problem") as caught:
        PlanningProblem.from_dict(plain)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
