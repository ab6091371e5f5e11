"""What the agent itself takes for a sum."""

from __future__ import annotations

from pathlib import Path

from agent.sum_cost import measure_sum

FILES = Path("/proc/self/fd")


def test_the_agents_share_is_small_and_leaves_nothing_behind() -> None:
    before = len(list(FILES.iterdir()))
    sum_s, conditions = measure_sum(0.0)
    # A member that waited for the other one would take SILENCE_S.
    assert 1e-6 < sum_s < 0.05
    assert conditions.measured_s > 0
    assert len(list(FILES.iterdir())) == before
