"""The predicted speed of a plan with several sequences at once.

Rows of several sequences go round the ring in groups. A stage runs a group in one pass, and several
groups are in the ring at a time. Large groups share the reading of weights. Small ones keep more
stages busy.
"""

from __future__ import annotations

from math import ceil

from planning.plan import Plan
from planning.together import pass_s


def decode_tokens_per_s(plan: Plan, sequences: int) -> float:
    """Predicted tokens per second of all ``sequences`` together, in the best groups."""
    return sequences / _round_s(plan, sequences, rows_at_once(plan, sequences))


def rows_at_once(plan: Plan, sequences: int) -> int:
    """Return the rows of a group with which so many sequences are fastest, the most of equals."""
    if len(plan.stages) == 1:
        return sequences
    sizes = {ceil(sequences / groups) for groups in range(1, sequences + 1)}
    return min(sorted(sizes, reverse=True), key=lambda rows: _round_s(plan, sequences, rows))


def _round_s(plan: Plan, sequences: int, rows: int) -> float:
    """Seconds of one token of each sequence, in groups of so many rows.

    A group has to go round the ring, and the slowest stage with its link has to take all groups.
    """
    ways_s = [hop.seconds + (rows - 1) * hop.passage.row_s for hop in plan.hops] + [plan.return_s]
    busy_s = [
        pass_s(stage.compute_s, stage.rows_s, rows) + way_s
        for stage, way_s in zip(plan.stages, ways_s, strict=True)
    ]
    return max(sum(busy_s), ceil(sequences / rows) * max(busy_s))
