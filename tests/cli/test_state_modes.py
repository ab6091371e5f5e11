"""Who may read and change the state directory of a coordinator or agent."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import pytest

from agent.config import claim as claim_of_agent
from coordinator.claim import claim_alone


@pytest.mark.parametrize("claim", [claim_of_agent, claim_alone])
def test_a_new_state_directory_is_its_users_alone(
    claim: Callable[[Path], TextIO], tmp_path: Path
) -> None:
    """Whatever permissions the user's new files have. Whoever writes there lets devices in."""
    before = os.umask(0)
    try:
        lock = claim(tmp_path / "state")
    finally:
        os.umask(before)
    with lock:
        assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
