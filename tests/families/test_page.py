"""docs/families.md lists what is read and what was compared."""

from __future__ import annotations

from pathlib import Path

import pytest

from model import families
from tests.parity import NAMES

PAGE = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("model_type", [*families._FAMILIES, *families._TEXT_TYPES])
def test_every_architecture_is_listed(model_type: str) -> None:
    assert f"`{model_type}`" in PAGE


@pytest.mark.parametrize("name", NAMES)
def test_every_fixture_has_its_counts(name: str) -> None:
    assert f"| {name} |" in PAGE
