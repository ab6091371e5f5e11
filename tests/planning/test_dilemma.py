"""The paper's program against brute force over every x, its oddities, and its Table 1."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from model.quantize import Format, weight_error
from paper import dilemma, study
from paper.dilemma import ALL_REPAIRS, Choice, Instance, Repairs, solve
from paper.study_log import ForeignFile, StudyLog
from planning.labs.lab_file import parse_lab
from planning.plan import PlanError
from tests.planning.described import described_problem

PRINTED = Repairs()


def make_instance(
    devices: int,
    layers: int,
    bits: tuple[int, ...],
    *,
    source: random.Random,
    storage: Sequence[float] | None = None,
    links: bool = True,
) -> Instance:
    def by_width() -> dict[int, float]:
        return {b: source.randint(1, 9) * b / 4 for b in bits}

    pairs = itertools.permutations(range(devices), 2)
    return Instance(
        devices=tuple(f"d{i}" for i in range(devices)),
        bits=bits,
        compute_s=tuple(tuple(by_width() for _ in range(layers)) for _ in range(devices)),
        transfer_s={
            pair: tuple(by_width() for _ in range(layers))
            for pair in pairs
            if links or source.random() < 0.7
        },
        stored_bytes=tuple({b: 10 * b for b in bits} for _ in range(layers)),
        storage_bytes=tuple(storage or (math.inf,) * devices),
        errors=tuple({b: source.choice((0.5, 1.5)) * 2.0**-b for b in bits} for _ in range(layers)),
    )


def all_choices(instance: Instance) -> Iterator[tuple[Choice, ...]]:
    """Every x there is: each subset of (layer, device, bits)."""
    cells = [
        Choice(layer, i, b)
        for layer in range(instance.layers)
        for i in range(len(instance.devices))
        for b in instance.bits
    ]
    for size in range(len(cells) + 1):
        yield from itertools.combinations(cells, size)


def price(instance: Instance, repairs: Repairs, x: tuple[Choice, ...]) -> float | None:
    """T straight from the paper's equations with all y at their least; None: x is not allowed."""
    devices, layers = range(len(instance.devices)), range(instance.layers)

    def placed(i: int, layer: int, b: int) -> bool:
        return Choice(layer, i, b) in x

    if repairs.coverage:
        covered = [sum(c.layer == layer for c in x) for layer in layers]
    else:
        covered = [sum(c.bits == b for c in x) for b in instance.bits]
    if any(count != 1 for count in covered):
        return None
    if not repairs.sharing and any(sum(c.device == i for c in x) > 1 for i in devices):
        return None
    for i in devices:
        sizes = [instance.stored_bytes[c.layer][c.bits] for c in x if c.device == i]
        used = sum(sizes) if repairs.storage else max(sizes, default=0)
        if used > instance.storage_bytes[i]:
            return None
    if any(instance.errors[c.layer][c.bits] > instance.delta for c in x):
        return None
    total = sum(instance.compute_s[c.device][c.layer][c.bits] for c in x)
    for i, j in itertools.permutations(devices, 2):
        charged = set()
        for layer in layers[:-1]:
            for b, other in itertools.product(instance.bits, repeat=2):
                same_width = b == other or repairs.widths
                if same_width and placed(i, layer, b) and placed(j, layer + 1, other):
                    charged.add((layer, b))
        if not charged:
            continue
        if (i, j) not in instance.transfer_s:
            return None
        way = instance.transfer_s[i, j]
        if repairs.transfers:
            total += sum(way[layer][b] for layer, b in charged)
        else:
            total += sum(row[max(instance.bits)] for row in way)
    return total


def brute_force(instance: Instance, repairs: Repairs) -> float:
    prices = (price(instance, repairs, x) for x in all_choices(instance))
    return min((value for value in prices if value is not None), default=math.inf)


@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=5)))
def test_every_mix_of_repairs_is_solved_to_the_optimum(flags: tuple[bool, ...]) -> None:
    repairs = Repairs(*flags)
    source = random.Random(hash(flags))
    for devices, layers, bits in ((2, 2, (4, 8)), (3, 2, (4, 8)), (2, 3, (4, 8))):
        instance = make_instance(
            devices,
            layers,
            bits,
            source=source,
            storage=[source.choice((40, 90, 130, 250)) for _ in range(devices)],
            links=source.random() < 0.7,
        )
        instance = replace(instance, delta=source.choice((0.05, math.inf)))
        expected = brute_force(instance, repairs)
        if expected == math.inf:
            with pytest.raises(PlanError, match="no solution"):
                solve(instance, repairs)
            continue
        solution = solve(instance, repairs)
        assert solution.proven_optimal
        assert solution.objective_s == pytest.approx(expected)
        assert price(instance, repairs, solution.choices) == pytest.approx(expected)


def test_without_dominated_widths_the_optimum_is_the_same() -> None:
    source = random.Random(5)
    for _ in range(6):
        instance = make_instance(3, 4, (4, 8, 16), source=source, storage=(300, 300, 300))
        instance = replace(instance, delta=0.05)
        fewer = dilemma.without_dominated(instance)
        assert solve(fewer).objective_s == pytest.approx(solve(instance).objective_s)
    ordered = replace(
        instance,
        compute_s=tuple(tuple({4: 1.0, 8: 2.0, 16: 4.0} for _ in range(4)) for _ in range(3)),
        transfer_s={pair: ({4: 1.0, 8: 2.0, 16: 4.0},) * 4 for pair in instance.transfer_s},
        delta=math.inf,
    )
    assert {len(row) for rows in dilemma.without_dominated(ordered).compute_s for row in rows} == {
        1
    }


# ---- the oddities ------------------------------------------------------------------------------


def even_instance(devices: int, layers: int, transfer_s: float = 10.0) -> Instance:
    """All alike: a layer takes b seconds at b bits, a transfer ``transfer_s`` at any width."""
    bits = (4, 6)
    return Instance(
        devices=tuple(f"d{i}" for i in range(devices)),
        bits=bits,
        compute_s=tuple(({4: 4.0, 6: 6.0},) * layers for _ in range(devices)),
        transfer_s={
            pair: (dict.fromkeys(bits, transfer_s),) * layers
            for pair in itertools.permutations(range(devices), 2)
        },
        stored_bytes=({4: 40, 6: 60},) * layers,
        storage_bytes=(60.0,) * devices,
        errors=({4: 0.1, 6: 0.1},) * layers,
    )


def test_2c_as_printed_places_one_layer_per_width() -> None:
    solution = solve(even_instance(4, 4), Repairs.of(["2d", "2f", "cm"]))
    assert sorted(choice.bits for choice in solution.choices) == [4, 6]
    assert solution.honest_s is None
    repaired = solve(even_instance(4, 4), Repairs.of(["2c", "2d", "2f", "cm"]))
    assert [choice.layer for choice in repaired.choices] == [0, 1, 2, 3]


def test_2d_needs_a_device_for_every_layer() -> None:
    repairs = Repairs.of(["2c", "2f", "cm"])
    with pytest.raises(PlanError, match=r"\(2d\) gives each device one layer, and 4 need as many"):
        solve(even_instance(3, 4), repairs)
    solution = solve(even_instance(4, 4), repairs)
    assert len({choice.device for choice in solution.choices}) == 4
    assert solution.objective_s == pytest.approx(4 * 4 + 3 * 10)


def test_2e_as_printed_lets_one_device_hold_everything() -> None:
    instance = even_instance(4, 4)
    printed = solve(instance, Repairs.of(["2c", "2d", "2f", "cm"]))
    assert len({choice.device for choice in printed.choices}) == 1
    used = sum(instance.stored_bytes[c.layer][c.bits] for c in printed.choices)
    assert used > instance.storage_bytes[printed.choices[0].device]
    assert len({choice.device for choice in solve(instance).choices}) == 4


def test_2f_as_printed_is_free_for_alternating_widths_and_repaired_is_not() -> None:
    instance = even_instance(4, 4)
    printed = solve(instance, Repairs.of(["2c", "2e", "2d", "cm"]))
    widths = [choice.bits for choice in printed.choices]
    assert all(a != b for a, b in itertools.pairwise(widths))
    # Two seconds more for each wider layer, and none of three transfers of ten.
    assert printed.objective_s == pytest.approx(4 + 6 + 4 + 6)
    assert printed.honest_s == pytest.approx(4 + 6 + 4 + 6 + 30)
    repaired = solve(instance)
    assert {choice.bits for choice in repaired.choices} == {4}
    assert repaired.objective_s == repaired.honest_s == pytest.approx(16 + 30)


def test_transfers_as_printed_charge_the_outputs_of_all_layers_once_per_pair() -> None:
    instance = replace(even_instance(2, 4), storage_bytes=(80.0, 80.0))
    printed = solve(instance, Repairs.of(["2c", "2d", "2e", "2f"]))
    assert printed.objective_s == pytest.approx(16 + 4 * 10)
    assert printed.honest_s == pytest.approx(16 + 10)


def test_2c_as_printed_wants_a_layer_for_a_width_that_delta_forbids() -> None:
    instance = replace(even_instance(4, 4), errors=({4: 0.3, 6: 0.1},) * 4, delta=0.2)
    with pytest.raises(PlanError, match=r"allow 4 bits for no layer, and \(2c\) wants one"):
        solve(instance, Repairs.of(["2d"]))


def test_repairs_are_named_by_equation() -> None:
    assert Repairs.of([]) == PRINTED
    assert Repairs.of(["2c", "2d", "2e", "2f", "cm"]) == ALL_REPAIRS
    with pytest.raises(ValueError, match="'2g' is no repair"):
        Repairs.of(["2g"])


def test_a_delta_that_nothing_meets_is_said() -> None:
    instance = replace(even_instance(2, 2), delta=0.01)
    with pytest.raises(PlanError, match="allow layer 0 at no width; raise delta"):
        solve(instance)


# ---- costs and the study -----------------------------------------------------------------------


def ccs(outputs_in_compute: bool) -> Instance:
    return dilemma.ccs_instance(
        study.opt_350m(2),
        clocks_hz=(1e9, 2e9),
        links_bit_per_s={(0, 1): 1e6, (1, 0): 2e6},
        storage_bytes=(1e9, 1e9),
        bits=(4, 8),
        errors=({4: 0.0, 8: 0.0},) * 2,
        tokens=10,
        batch=2,
        outputs_in_compute=outputs_in_compute,
    )


def test_ccs_costs_by_hand() -> None:
    instance = ccs(outputs_in_compute=False)
    # Two per weight of 4 * 1024^2 + 2 * 1024 * 4096, and attention over 10 positions; batch 2.
    flops = 2 * (2 * 12 * 1024**2 + 4 * 1024 * 10)
    assert instance.compute_s[0][0][8] == pytest.approx(10 * flops / 1e9 * 8 / 32)
    assert instance.compute_s[1][1][4] == pytest.approx(10 * flops / 2e9 * 4 / 32)
    assert instance.transfer_s[0, 1][0][4] == pytest.approx(10 * 2 * 1024 * 4 / 1e6)
    assert instance.stored_bytes[0] == {4: 6 * 1024**2, 8: 12 * 1024**2}
    printed = ccs(outputs_in_compute=True)
    ratio = printed.compute_s[0][0][8] / instance.compute_s[0][0][8]
    assert ratio == pytest.approx(2 * 1024)


def test_measured_costs_come_from_the_planners_problem() -> None:
    text = (
        "devices: [{name: a, memory: 1G, storage: 1G, layer_ms: {decode: {4: 2, 8: 3}},"
        " embed_ms: 1, head_ms: 5}, {name: b, memory: 1G, storage: 1G, layer_ms: {decode: {8: 1}},"
        " embed_ms: 1, head_ms: 1}]\ndefault_link: {rtt_ms: 2, mbit_per_s: 8}"
    )
    problem = described_problem(parse_lab(text, "x"), study.opt_350m(2), context_tokens=64)
    instance = dilemma.measured_instance(problem)
    assert instance.layers == 4
    assert instance.compute_s[0][1] == {4: 0.002, 8: 0.003}
    assert instance.compute_s[1][1] == {8: 0.001}
    assert instance.transfer_s[0, 1][2][4] == pytest.approx(0.001 + (1024 * 2 + 4) / 1e6)
    assert solve(instance).objective_s == pytest.approx(0.001 * 4)


def test_truncation_is_that_of_the_storage_format() -> None:
    weights = np.random.default_rng(1).standard_normal((16, 64))
    for bits in (4, 6, 8):
        expected = weight_error(weights.astype(np.float32), Format.of(bits, "truncate", 32))
        assert study.truncation_error(weights, bits) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_table_1_follows_from_the_weights_window(seed: int) -> None:
    errors = study.synthetic_errors(24, seed)
    for delta, bits in study.PAPER_BITS.items():
        for layer in errors:
            assert min(b for b, error in layer.items() if error <= delta) == bits


@pytest.mark.parametrize("largest", [0.19, 0.35])
def test_outside_the_window_table_1_does_not_follow(largest: float) -> None:
    weights = np.random.default_rng(0).standard_normal(1 << 14)
    weights *= largest / np.abs(weights).max()
    found = {
        delta: min(
            b for b in study.STUDY_BITS if study.truncation_error(weights, b) / 2.0**b <= delta
        )
        for delta in study.DELTAS
    }
    assert found != study.PAPER_BITS


def test_dynamic_programming_finds_the_optimum_of_the_repaired_program() -> None:
    """Of the study's own instances, of layers that differ, and of all widths."""
    rng = random.Random(3)
    spec = study.opt_350m(5)
    errors = study.synthetic_errors(5, 1)
    for turn in range(12):
        links = study._links(10 ** rng.uniform(5, 9))
        instance = study._instance(spec, errors, 1e-3, study._SERVER_CLOCKS_HZ, links)
        if turn % 2:
            sizes = [
                {b: s + rng.randrange(s) for b, s in row.items()} for row in instance.stored_bytes
            ]
            instance = replace(instance, stored_bytes=tuple(sizes))
            wide = tuple(2.2 * limit for limit in instance.storage_bytes)
            instance = replace(instance, storage_bytes=wide)
        if turn % 3 == 0:
            missing = {pair: way for pair, way in instance.transfer_s.items() if pair != (0, 1)}
            instance = replace(instance, transfer_s=missing)
        few = dilemma.without_dominated(instance)
        quick = dilemma.solve_by_stages(few)
        assert quick is not None
        assert quick.proven_optimal
        exact = dilemma.solve(few, dilemma.ALL_REPAIRS)
        assert quick.objective_s == pytest.approx(exact.objective_s, rel=1e-6)
    impossible = replace(few, storage_bytes=(1.0,) * 3)
    with pytest.raises(PlanError, match="no solution"):
        dilemma.solve_by_stages(impossible)


def test_a_study_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "results.jsonl"
    whole = study.study_dilemma(runs=3, layers=5)
    solved = []
    real = dilemma.solve_by_stages

    def counted(instance: dilemma.Instance) -> dilemma.Solution | None:
        solved.append(instance)
        if len(solved) == 8:
            raise KeyboardInterrupt
        return real(instance)

    monkeypatch.setattr(dilemma, "solve_by_stages", counted)
    with pytest.raises(KeyboardInterrupt):
        study.study_dilemma(runs=3, layers=5, log=log)
    kept = log.read_text().splitlines()
    assert len(kept) == 1 + 7
    # The power went while a line was written.
    log.write_text("\n".join([*kept[:-1], kept[-1][:9]]))
    assert study.study_dilemma(runs=3, layers=5, log=log) == whole
    # 3 runs x 9 values; six were kept, and one was computed before it was cut off.
    assert len(solved) == 8 + 27 - 6
    study.study_dilemma(runs=3, layers=5, log=log)
    assert len(solved) == 8 + 27 - 6
    # Another seed is another study.
    study.study_dilemma(runs=1, seed=5, layers=5, log=log)
    assert len(solved) == 8 + 27 - 6 + 9


STUDY = {"name": "dilemma", "seed": 0}


def test_a_file_of_another_command_is_not_begun_anew(tmp_path: Path) -> None:
    """Commands name their files alike, so one with another's --out wiped out what that had done."""
    log = tmp_path / "results.jsonl"
    text = '{"shoal_study_table1": 1}\n{"run": "a", "kind": "loss", "item": 0}\n'
    log.write_text(text)
    with pytest.raises(ForeignFile, match="not a file of this study: name another --out"):
        StudyLog(log, STUDY)
    assert log.read_text() == text


@pytest.mark.parametrize(
    "text",
    ["", '{"st', '{"study": {"na', '{"study": 5}\n', '{"study": {"name": "dilemma", "seed": 1}}\n'],
)
def test_a_heading_that_was_cut_off_or_is_another_begins_anew(text: str, tmp_path: Path) -> None:
    log = tmp_path / "results.jsonl"
    log.write_text(text)
    with StudyLog(log, STUDY) as kept:
        assert kept.result("a", lambda: 1) == 1
    assert [*map(json.loads, log.read_text().splitlines())] == [
        {"study": STUDY},
        {"name": "a", "result": 1},
    ]


def test_damaged_lines_are_computed_again(tmp_path: Path) -> None:
    log = tmp_path / "results.jsonl"
    damaged = ['{"name": ["b"], "result": 1}', "[" * 100_000, "5", "", '{"name": "a", "result": 1}']
    log.write_text("\n".join([json.dumps({"study": STUDY}), *damaged]))
    with StudyLog(log, STUDY) as kept:
        assert kept.result("a", lambda: 2) == 1
        assert kept.result("b", lambda: 2) == 2


def test_the_study_gives_the_papers_table_and_figures() -> None:
    steps = []
    result = study.study_dilemma(
        runs=2, layers=5, on_step=lambda what, done, total: steps.append((what, done, total))
    )
    for row in result.table:
        assert row.bits == (row.paper_bits,)
        assert row.quantization_ratio == pytest.approx(row.paper_bits / 32)
        assert row.proven
    objectives = [row.objective_s for row in result.table]
    assert objectives == sorted(objectives, reverse=True)
    for sweep in (result.links, result.clocks):
        medians = [spread.median for spread in sweep.spreads]
        assert medians == sorted(medians, reverse=True)
        assert sweep.unproven == 0
    assert result.to_dict()["table"][0]["delta"] == 1e-7
    figures = result.figures()
    assert sorted(figures) == ["figure-3-delta.svg", "figure-5-links.svg", "figure-6-clock.svg"]
    for text in figures.values():
        assert "computed, not measured" in text
        ElementTree.fromstring(text)  # noqa: S314 - our own
    assert steps[-1] == ("figure 6", 8, 8)
    oddities = {row.left_out: row for row in result.oddities}
    best = oddities["nothing"].objective_s
    assert best is not None
    assert oddities["2c"].verdict.startswith("no solution")
    assert set(oddities) == {"nothing", "2c", "2d", "2e", "2f", "cm", "all five"}
    for left_out, lower in (("2d", False), ("2e", True), ("2f", True), ("cm", False)):
        objective_s = oddities[left_out].objective_s
        assert objective_s is not None
        assert (objective_s < best) == lower
    free = oddities["2f"]
    assert free.honest_s is not None
    assert free.objective_s is not None
    assert free.honest_s > best > free.objective_s
    assert set(free.bits) == {6, 8}


def test_a_budget_of_losses_bounds_their_sum() -> None:
    """The paper has no such bound. Against all choices of small instances."""
    rng = random.Random(8)
    for _ in range(12):
        instance = make_instance(2, 3, (4, 6, 8), source=rng)
        losses = tuple({b: rng.uniform(0.5, 1.5) * 2.0**-b for b in (4, 6, 8)} for _ in range(3))
        budget = rng.uniform(0.05, 0.12)
        bounded = replace(instance, losses=losses, budget=budget)
        options = [[Choice(layer, i, b) for i in range(2) for b in (4, 6, 8)] for layer in range(3)]
        fitting = [
            choices
            for choices in itertools.product(*options)
            if math.fsum(losses[c.layer][c.bits] for c in choices) <= budget
        ]
        best = min(dilemma.charge(instance, ALL_REPAIRS, choices) for choices in fitting)
        found = solve(bounded)
        assert found.objective_s == pytest.approx(best, rel=1e-6)
        few = dilemma.without_dominated(bounded)
        assert solve(few).objective_s == pytest.approx(best, rel=1e-6)
        assert dilemma.solve_by_stages(bounded) is None
        total = math.fsum(losses[c.layer][c.bits] for c in found.choices)
        with pytest.raises(PlanError, match="the budget is"):
            dilemma.check(replace(bounded, budget=0.99 * total), ALL_REPAIRS, found.choices)
    with pytest.raises(PlanError, match="allow layer 0 at no width; raise the budget"):
        solve(replace(bounded, budget=1e-9))
