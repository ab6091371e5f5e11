"""The clock of planning. Time limits are points on it."""

from __future__ import annotations

import time


def now_s() -> float:
    """Seconds on a clock that never goes back; only differences mean something."""
    return time.monotonic()
