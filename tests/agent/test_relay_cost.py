"""What the agent itself takes for a token."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from agent.relay_cost import measure_relay
from wire.identity import own_identity


@pytest.mark.parametrize("encrypted", [True, False])
def test_the_agents_share_is_small_and_leaves_nothing_behind(
    encrypted: bool, tmp_path: Path
) -> None:
    identity = own_identity(tmp_path / "identity.pem") if encrypted else None
    before = threading.active_count()
    relay_s, conditions = measure_relay(identity, 0.0)
    # Far below what a forgotten subtraction of the stage's own time, or a wait, would give.
    assert 1e-6 < relay_s < 0.05
    assert conditions.measured_s > 0
    for thread in threading.enumerate():
        if thread.name == "stage":
            thread.join(60)
    assert threading.active_count() <= before
