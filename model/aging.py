"""Which files of a cache were used longest ago, by their times of change."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from operator import itemgetter
from pathlib import Path

SKEW_NS = 3600 * 10**9
"""A shared disk's clock may be ahead of this machine's by so much."""


def by_use(paths: Iterable[Path]) -> list[Path]:
    """Sort files and folders, the one used longest ago first. Raises OSError.

    Those that another thread or process has removed meanwhile are left out.
    A time far in the future comes first. It was written before the clock was set back, and so
    before all that was used since. Otherwise such files would stay for as long as the clock was
    ahead.
    """
    latest_ns = time.time_ns() + SKEW_NS

    found = []
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            used_ns = path.stat().st_mtime_ns
            found.append((used_ns <= latest_ns, used_ns, path))
    return [path for _, _, path in sorted(found, key=itemgetter(0, 1))]
