"""The time of a row when several sequences are decoded at once: one formula for all of planning.

The only stage of a plan has all n rows in each pass. In a ring of S stages rows go round in groups,
one for each stage. So n / S rows share a pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from wire.profile import TIMED_ROWS


def pass_s(one_s: float, rows_s: Sequence[float], rows: float) -> float:
    """Seconds of a pass of ``rows`` rows, linear between the passes that were timed.

    ``one_s`` is the pass of one row, ``rows_s`` has the passes of TIMED_ROWS. If ``rows_s`` is
    empty, rows share nothing.
    """
    if rows <= 1 or not rows_s:
        return rows * one_s
    points = list(zip((1, *TIMED_ROWS), (one_s, *rows_s), strict=True))
    for (fewer, low_s), (more, high_s) in pairwise(points):
        if rows <= more or more == TIMED_ROWS[-1]:
            return low_s + (high_s - low_s) * (rows - fewer) / (more - fewer)
    raise AssertionError("the last point ends the loop")


def row_s(one_s: float, rows_s: Sequence[float], sequences: int, stages: int) -> float:
    """Seconds that one row keeps a stage busy, with so many sequences on so many stages."""
    rows = max(sequences / stages, 1.0)
    return pass_s(one_s, rows_s, rows) / rows
