"""A short run of the fuzzing targets that need no process. ``make fuzz`` runs them for longer."""

from __future__ import annotations

import pytest

from tests.fuzz.targets import TARGETS

STEPS = {"codec": 20, "introduction": 150, "TLS": 60}


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
@pytest.mark.parametrize("name", TARGETS)
def test_hostile_bytes_end_in_an_error_that_readers_expect(name: str) -> None:
    step = TARGETS[name](7)
    assert sum(step() for _ in range(STEPS[name])) >= 300
