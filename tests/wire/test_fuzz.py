"""A short run of the fuzzing targets that need no process. ``make fuzz`` runs them for longer."""

from __future__ import annotations

import pytest

from tests.fuzz.stages import StageSteps
from tests.fuzz.targets import TARGETS

STEPS = {"codec": 20, "introduction": 150, "TLS": 60, "rows and tokens": 60, "texts": 20}


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
@pytest.mark.parametrize("name", TARGETS)
def test_hostile_bytes_end_in_an_error_that_readers_expect(name: str) -> None:
    step = TARGETS[name](7)
    try:
        assert sum(step() for _ in range(STEPS[name])) >= 300
    finally:
        if isinstance(step, StageSteps):
            step.close()
