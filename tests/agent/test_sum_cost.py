"""What the agent itself takes for a sum."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.sum_cost import measure_sum
from wire.identity import own_identity

FILES = Path("/proc/self/fd")


@pytest.mark.parametrize("encrypted", [True, False])
def test_the_agents_share_is_small_and_leaves_nothing_behind(
    encrypted: bool, tmp_path: Path
) -> None:
    identity = own_identity(tmp_path / "identity.pem") if encrypted else None
    before = len(list(FILES.iterdir()))
    sum_s, conditions = measure_sum(identity, 0.0)
    # A member that waited for the other one would take SILENCE_S.
    assert 1e-6 < sum_s < 0.05
    assert conditions.measured_s > 0
    assert len(list(FILES.iterdir())) == before
