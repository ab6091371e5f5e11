"""Which files of a cache were used longest ago, by their times of change."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

SKEW_NS = 3600 * 10**9
"""A shared disk's clock may be ahead of this machine's by so much."""


def by_use(paths: Iterable[Path]) -> list[Path]:
    """Sort files and folders, the one used longest ago first. Raises OSError.

    A time far in the future comes first. It was written before the clock was set back, and so
    before all that was used since. Otherwise such files would stay for as long as the clock was
    ahead.
    """
    latest_ns = time.time_ns() + SKEW_NS

    def key(path: Path) -> tuple[bool, int]:
        used_ns = path.stat().st_mtime_ns
        return used_ns <= latest_ns, used_ns

    return sorted(paths, key=key)
