"""Configs with nonsense in one field: refused in one line, or read."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model.errors import ModelError
from model.families import load_spec
from tests.parity import FAMILIES, NAMES

Place = tuple[str, ...]

OFTEN_ABSENT = (
    "dtype", "head_dim", "layer_types", "rope_parameters", "rope_scaling", "sliding_window_pattern",
    "text_config",
)  # fmt: skip
NONSENSE: list[Any] = [
    None, True, -1, 0, 3.5, 1e308, 10**30, "", "x", [], ["x"], {}, {"a": 1},
    {"full_attention": None, "sliding_attention": 3}, {"rope_type": "linear", "factor": 1e308},
]  # fmt: skip


def places(values: dict[str, Any]) -> Iterator[Place]:
    """Yield the path of each field, also of nested ones."""
    for key, value in values.items():
        yield (key,)
        if isinstance(value, dict):
            yield from ((key, *rest) for rest in places(value))


@pytest.mark.parametrize("name", NAMES)
def test_nonsense_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    config = json.loads((FAMILIES / name / "config.json").read_text())
    refusals = []
    for place in {*places(config), *((key,) for key in OFTEN_ABSENT)}:
        for value in NONSENSE:
            changed = copy.deepcopy(config)
            target = changed
            for key in place[:-1]:
                target = target[key]
            target[place[-1]] = value
            (tmp_path / "config.json").write_text(json.dumps(changed))
            try:
                load_spec(tmp_path)
            except ModelError as error:
                refusals.append(str(error))
    assert len(refusals) > 50
    assert [text for text in refusals if "\n" in text] == []
