"""Every family against what transformers computed, and every implementation against the reference.

``tests/make_fixtures.py`` makes the fixtures. docs/families.md shows these counts.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from backends.base import Backend, BackendUnavailable
from backends.registry import backend_class
from model.checkpoint import Checkpoint
from model.quantize import Format
from model.reference import ReferenceModel
from tests.parity import FAMILIES, NAMES, Case, Golden, Rows
from tests.thorough import some

ATOL = 1e-4
"""Of logits, against transformers: fp32 arithmetic in another order."""

RELATIVE = 2e-5
"""Largest error between our own implementations, relative to the largest logit."""

GROUP = 32


@pytest.fixture(scope="module", params=["onnx_cpu", "torch_cpu"])
def backend(request: pytest.FixtureRequest) -> Backend:
    try:
        kind = backend_class(request.param)
        kind.probe()
    except BackendUnavailable as unavailable:
        pytest.skip(unavailable.reason)
    return kind()


@pytest.mark.parametrize("name", NAMES)
def test_reference_equals_transformers(name: str) -> None:
    golden = Golden.load(FAMILIES / name)
    model = ReferenceModel.from_checkpoint(Checkpoint.open(FAMILIES / name))
    np.testing.assert_allclose(model.forward(golden.prompt), golden.logits, atol=ATOL)
    assert golden.agreeing(golden.run(model.forward)) == len(golden.continuation)


@pytest.mark.parametrize("name", NAMES)
def test_continuations_vary(name: str) -> None:
    """A model that repeats one token would prove little."""
    assert Golden.load(FAMILIES / name).distinct_fraction > 0.4


@pytest.mark.parametrize("stages", some([1, 2, 3], 2))
@pytest.mark.parametrize("name", NAMES)
def test_stages_equal_transformers(
    backend: Backend, name: str, stages: int, tmp_path: Path
) -> None:
    case = Case.store(name, Format.of(32), tmp_path)
    rows = case.stages(backend, stages)
    assert case.golden.agreeing(rows) == len(case.golden.continuation)
    np.testing.assert_allclose(rows[0], case.golden.logits[-1], atol=10 * ATOL)


@pytest.mark.thorough
@pytest.mark.parametrize("name", NAMES)
def test_teams_equal_transformers(backend: Backend, name: str, tmp_path: Path) -> None:
    case = Case.store(name, Format.of(32), tmp_path)
    if case.most_members() < 2:
        pytest.skip("no team can share these layers")
    rows = case.team(backend, 2)
    assert case.golden.agreeing(rows) == len(case.golden.continuation)


@pytest.mark.thorough
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", NAMES)
def test_narrow_widths_equal_the_reference(
    backend: Backend, name: str, bits: int, tmp_path: Path
) -> None:
    case = Case.store(name, Format.of(bits, "rtn", GROUP), tmp_path)
    assert_close(case.stages(backend, 1), case.reference())


@pytest.mark.parametrize("name", NAMES)
def test_the_host_part_of_a_chip_equals_the_reference(name: str, tmp_path: Path) -> None:
    case = Case.store(name, Format.of(32), tmp_path)
    if any(layer.experts for layer in case.spec.layers):
        pytest.skip("no chip runs experts")
    rows = case.host()
    assert case.golden.agreeing(rows) == len(case.golden.continuation)
    assert_close(rows, case.reference())


def assert_close(actual: Rows, expected: Rows) -> None:
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=RELATIVE * scale)
