"""A short run of hostile bytes on the ports of running processes. ``make fuzz`` runs for longer."""

from __future__ import annotations

from pathlib import Path

from tests.fuzz.live import living


def test_a_shoal_answers_the_same_after_hostile_bytes(tmp_path: Path) -> None:
    with living(tmp_path, seed=7) as shoal:
        shoal.run(3.0)
    assert min(shoal.frames.values()) > 0
