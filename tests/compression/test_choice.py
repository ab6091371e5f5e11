"""The choice of model, widths and devices is the best of all, by trying every one."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from compression.choice import Choice, Rows, Variant, fastest, least_loss
from compression.cuts import cut_spec, whole
from compression.latency import plan_on
from model.checkpoint import Checkpoint
from model.quantize import Format
from model.spec import ModelSpec
from planning.build import RequestInput
from planning.labs.lab import Lab, lab_problem
from planning.labs.lab_file import read_lab
from planning.plan import Plan, PlanError, Proof, assess, verify

LLAMA = Path(__file__).parents[1] / "fixtures" / "llama"
BITS = (4, 8, 16)
CONTEXT = 32
LAB = """
devices:
  - {name: near, memory: NEAR, storage: 64M, bits: [4, 8, 16], container: {4: 16, 8: 16},
     layer_ms: {decode: {4: 0.7, 8: 0.9, 16: 1.6}}, embed_ms: 0.1,
     head_ms: {4: 0.3, 8: 0.5, 16: 0.9}, call_ms: 0.2}
  - {name: far, memory: 64M, storage: 64M, bits: [8, 16],
     layer_ms: {decode: {8: 0.4, 16: 0.8}}, embed_ms: 0.1, head_ms: {8: 0.2, 16: 0.3}, call_ms: 0.1}
default_link: {rtt_ms: 3, mbit_per_s: 25}
"""


def lab_of(tmp_path: Path, near: str) -> Lab:
    path = tmp_path / "lab.yaml"
    path.write_text(LAB.replace("NEAR", near), encoding="utf-8")
    return read_lab(path)


def specs() -> list[ModelSpec]:
    """The fixture with all its layers, with two, and with one."""
    spec = Checkpoint.open(LLAMA).spec
    every = whole(spec)
    return [
        cut_spec(spec, replace(every, **{f: getattr(every, f)[:count] for f in every.__slots__}))
        for count in (len(spec.layers), 2, 1)
    ]


def rows_of(spec: ModelSpec, rng: random.Random) -> Rows:
    """Made-up losses, which grow as bits fall."""
    return [
        {16: 0.0, 8: 0.01 * rng.random(), 4: 0.02 + 0.1 * rng.random()}
        for _ in range(spec.block_count)
    ]


def variants_of(lab: Lab, rng: random.Random) -> list[tuple[ModelSpec, Rows, Variant]]:
    formats = [Format.of(bits) for bits in BITS]
    made = []
    for base, spec in zip((0.0, 0.05, 0.11), specs(), strict=True):
        rows = rows_of(spec, rng)

        def plan(found: Rows, most: float, spec: ModelSpec = spec) -> Plan:
            return plan_on(lab, spec, formats, CONTEXT, (found, most))

        made.append((spec, rows, Variant(base, partial(list, rows), plan)))
    return made


def every_choice(
    lab: Lab, variants: list[tuple[ModelSpec, Rows, Variant]]
) -> Iterator[tuple[float, float]]:
    """(loss, seconds of a token) of every model, widths and placement that fits."""
    for spec, rows, variant in variants:
        request = RequestInput(spec, BITS, CONTEXT, sensitivities=rows, quality_budget=1e3)
        problem = lab_problem(lab, request)
        count = spec.block_count
        for widths in itertools.product(BITS, repeat=count):
            splits = [[(one, 0, widths)] for one in (0, 1)]
            splits += [
                [(first, 0, widths[:cut]), (1 - first, cut, widths[cut:])]
                for first in (0, 1)
                for cut in range(1, count)
            ]
            for stages in splits:
                try:
                    plan = assess(problem, stages, Proof("", 0.0, 0.0))
                    verify(plan, problem)
                except PlanError:
                    continue
                assert plan.total_sensitivity is not None
                yield variant.base + plan.total_sensitivity, plan.decode_s


def is_of(choice: Choice, variants: list[tuple[ModelSpec, Rows, Variant]]) -> None:
    """The choice's loss is the sum over its blocks."""
    _, rows, variant = variants[choice.variant]
    added = sum(row[one.bits] for row, one in zip(rows, choice.plan.placements, strict=True))
    assert choice.loss == pytest.approx(variant.base + added)


@pytest.mark.thorough
@pytest.mark.parametrize(("seed", "near"), [(0, "64M"), (1, "310K"), (2, "64M")])
def test_no_choice_is_better_by_brute_force(tmp_path: Path, seed: int, near: str) -> None:
    rng = random.Random(seed)
    lab = lab_of(tmp_path, near)
    variants = variants_of(lab, rng)
    own = [variant for _, _, variant in variants]
    choices = list(every_choice(lab, variants))
    assert len(choices) > 100
    times = sorted(seconds for _, seconds in choices)
    used = set()
    for share in (0.0, 0.02, 0.1, 0.4, 0.9):
        at_most_s = times[int(share * (len(times) - 1))] * (1 + 1e-9)
        best = min(loss for loss, seconds in choices if seconds <= at_most_s)
        found = least_loss(own, at_most_s, tolerance=0.0)
        assert found is not None
        assert found.plan.decode_s <= at_most_s
        assert found.loss == pytest.approx(best, abs=1e-9)
        assert found.bound <= best + 1e-9
        is_of(found, variants)
        rough = least_loss(own, at_most_s)
        assert rough is not None
        assert rough.loss <= best * 1.02 + 1e-9
        assert rough.bound <= best + 1e-9
        used.add(found.variant)
    assert len(used) > 1
    assert least_loss(own, times[0] * 0.99) is None
    for most in (0.0, 0.04, 0.12, 0.3):
        quick = fastest(own, most)
        able = [seconds for loss, seconds in choices if loss <= most + 1e-12]
        if quick is None:
            assert not able
            continue
        assert quick.loss <= most + 1e-9
        assert quick.plan.decode_s == pytest.approx(min(able))
        assert quick.bound == pytest.approx(min(able), rel=1e-5)
        is_of(quick, variants)


def test_models_that_lose_more_at_their_own_bits_are_not_weighed(tmp_path: Path) -> None:
    variants = [one for _, _, one in variants_of(lab_of(tmp_path, "64M"), random.Random(3))]

    def fail() -> Rows:
        raise AssertionError("measured in vain")

    found = least_loss([variants[0], replace(variants[1], rows=fail)], 1.0)
    assert found is not None
    assert (found.variant, found.loss) == (0, 0.0)
    assert fastest([replace(variants[2], rows=fail)], 0.1) is None
