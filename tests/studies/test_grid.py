"""A grid of problems: its cells, what they change, and what their plans say."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import asdict, replace
from xml.etree import ElementTree

import pytest

from evaluation.bootstrap import Estimate
from paper.study import opt_350m
from planning.labs.lab_file import parse_lab
from planning.problem import PlanningProblem
from studies.grid import (
    OWN,
    Amount,
    Axis,
    Cell,
    Outcome,
    cells_of,
    outcome_of,
    problem_of,
    sweep_csv,
)
from studies.grid_picture import sweep_svg
from tests.planning.described import described_problem

LAB = """
devices:
  - {name: a, memory: 200M, storage: 1G, layer_ms: {decode: {4: 2, 8: 3}}, embed_ms: 1, head_ms: 5}
  - {name: b, memory: 300M, storage: 1G, layer_ms: {decode: {4: 1, 8: 2}}, embed_ms: 1, head_ms: 1}
default_link: {rtt_ms: 2, mbit_per_s: 8}
"""
PLAIN = Cell("latency", (4, 8), OWN, OWN, None, None)


@pytest.fixture
def base() -> PlanningProblem:
    problem = described_problem(parse_lab(LAB, "lab"), opt_350m(6), context_tokens=64)
    blocks = problem.spec.block_count
    return replace(
        problem,
        sensitivities=({4: 0.01, 8: 0.001},) * blocks,
        weight_errors=({4: 1e-2, 8: 1e-4},) * blocks,
    )


def test_a_grid_has_every_combination_in_order() -> None:
    values: dict[Axis, list[object]] = {
        "objective": ["latency"],
        "bits": [(4,), (4, 8)],
        "memory": [OWN],
        "links": [Amount(1e6), Amount(2e6)],
        "max_weight_error": [None],
        "quality_budget": [0.1, None],
    }
    cells = cells_of(values)
    assert len(cells) == 8
    assert cells[0].key == (
        "objective=latency bits=4 memory=x1 links=8 max_weight_error=none quality_budget=0.1"
    )
    assert [cell.quality_budget for cell in cells[:4]] == [0.1, None, 0.1, None]
    assert (cells[0].number("links"), cells[1].number("quality_budget")) == (8, None)
    assert cells[0].number("bits") is None


def test_a_cell_changes_what_it_names_and_nothing_else(base: PlanningProblem) -> None:
    same = replace(base, bits=(4, 8), max_weight_error=(math.inf,) * base.spec.block_count)
    assert problem_of(base, PLAIN) == same
    changed = problem_of(
        base,
        Cell("throughput", (8,), Amount(0.5, True), Amount(5e6), 1e-3, 0.2),
    )
    assert [device.memory_bytes for device in changed.devices] == [
        device.memory_bytes // 2 for device in base.devices
    ]
    assert {link.bytes_per_s for link in changed.links.values()} == {5e6}
    assert {link.rtt_s for link in changed.links.values()} == {
        link.rtt_s for link in base.links.values()
    }
    assert changed.bits == (8,)
    assert changed.max_weight_error == (1e-3,) * base.spec.block_count
    assert changed.quality_budget == 0.2
    assert changed.objective.kind == "throughput"
    absolute = problem_of(base, replace(PLAIN, memory=Amount(1e8)))
    assert {device.memory_bytes for device in absolute.devices} == {10**8}


def test_a_bound_needs_its_figures(base: PlanningProblem) -> None:
    blocks = base.spec.block_count
    with pytest.raises(ValueError, match="needs sensitivities"):
        problem_of(replace(base, sensitivities=()), replace(PLAIN, quality_budget=0.1))
    with pytest.raises(ValueError, match="needs the model's weights"):
        problem_of(
            replace(base, weight_errors=({},) * blocks), replace(PLAIN, max_weight_error=0.1)
        )


def test_outcomes_say_what_a_plan_is_or_why_there_is_none(base: PlanningProblem) -> None:
    free = outcome_of(problem_of(base, PLAIN), 5)
    # The embedding takes as long at both widths, so it has the finer one.
    assert (free.status, free.devices, free.bits) == ("optimal", ("b",), (8, *[4] * 7))
    assert free.decode_ms == pytest.approx(8.0)
    assert free.value == pytest.approx(0.008)
    assert free.kl == pytest.approx(7 * 0.01 + 0.001)
    assert free.weight_error == 1e-2
    assert free.bits_per_weight is not None
    assert 4 < free.bits_per_weight < 8
    strict = outcome_of(problem_of(base, replace(PLAIN, max_weight_error=1e-3)), 5)
    assert set(strict.bits) == {8}
    mixed = outcome_of(problem_of(base, replace(PLAIN, quality_budget=0.03)), 5)
    assert set(mixed.bits) == {4, 8}
    none = outcome_of(problem_of(base, replace(PLAIN, memory=Amount(1e6))), 5)
    assert none.status == "infeasible"
    assert "memory" in none.why
    assert none.decode_ms is None
    for outcome in (free, none):
        assert Outcome.from_json(json.loads(json.dumps(asdict(outcome)))) == outcome


def test_a_table_and_a_picture_grow_with_the_grid(base: PlanningProblem) -> None:
    cells = [replace(PLAIN, quality_budget=budget) for budget in (0.01, 0.03, 0.1, None)]
    cells += [replace(cell, memory=Amount(1e6)) for cell in cells[:1]]
    assert sweep_csv(cells, {}, {}).count("\n") == 1
    ElementTree.fromstring(sweep_svg("nothing yet", cells, {}, {}))  # noqa: S314 - our own
    outcomes = {cell: outcome_of(problem_of(base, cell), 5) for cell in cells}
    figures = {cells[0]: {"loss": Estimate(0.5, 0.4, 0.6, 9), "kl": Estimate(0.1, 0.1, 0.2, 9)}}
    rows = list(csv.DictReader(sweep_csv(cells, outcomes, figures).splitlines()))
    assert [row["quality_budget"] for row in rows] == ["0.01", "0.03", "0.1", "none", "0.01"]
    assert rows[0]["measured_loss"] == "0.5"
    assert rows[1]["measured_loss"] == ""
    assert rows[4]["status"] == "infeasible"
    assert rows[4]["why"]
    text = sweep_svg("grid", cells, outcomes, figures)
    ElementTree.fromstring(text)  # noqa: S314 - our own
    for words in ("4 plans of 5 cells", "by quality budget", "predicted KL", "measured loss"):
        assert words in text
