"""Who may read and change the state directory of a coordinator or agent."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import pytest

from agent.config import ConfigError as AgentError
from agent.config import claim as claim_of_agent
from coordinator.claim import claim_alone
from coordinator.config import ConfigError as CoordinatorError

LOCKS = [(claim_of_agent, "lock"), (claim_alone, "coordinator.lock")]


@pytest.mark.parametrize(("claim", "lock"), LOCKS)
def test_a_new_state_directory_is_its_users_alone(
    claim: Callable[[Path], TextIO], lock: str, tmp_path: Path
) -> None:
    """Whatever permissions the user's new files have. Whoever writes there lets devices in."""
    before = os.umask(0)
    try:
        claimed = claim(tmp_path / "state")
    finally:
        os.umask(before)
    with claimed:
        assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
        assert stat.S_IMODE((tmp_path / "state" / lock).stat().st_mode) == 0o600


@pytest.mark.parametrize(("claim", "lock"), LOCKS)
def test_a_lock_that_is_a_link_is_refused(
    claim: Callable[[Path], TextIO], lock: str, tmp_path: Path
) -> None:
    """Root may start a coordinator, or import one, in the directory of a service."""
    (tmp_path / "precious").write_text("of another user")
    (tmp_path / lock).symlink_to(tmp_path / "precious")
    with pytest.raises((AgentError, CoordinatorError), match="is not usable"):
        claim(tmp_path)
    assert (tmp_path / "precious").read_text() == "of another user"
