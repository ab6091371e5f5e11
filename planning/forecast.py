"""The predicted speed of a plan with several sequences at once."""

from __future__ import annotations

from planning.plan import Plan
from planning.together import pass_s

_TOGETHER = 2
"""From so many sequences per stage on, their rows were seen to go round together."""


def decode_tokens_per_s(plan: Plan, sequences: int) -> float:
    """Predicted tokens per second of all ``sequences`` together.

    With few sequences per stage each row meets others now and then (``Plan.shared_s``, which is
    also what a plan for throughput minimises). With more of them the slowest stage collects rows.
    From there on they stay together, and each stage runs all of them in one pass.
    """
    apart = 1 / plan.shared_s(sequences)
    if sequences < _TOGETHER * len(plan.stages):
        return apart
    return max(apart, sequences / _round_s(plan, sequences))


def _round_s(plan: Plan, sequences: int) -> float:
    """Seconds of one token of each sequence, if every stage runs all rows in one pass."""
    stages_s = sum(pass_s(stage.compute_s, stage.rows_s, sequences) for stage in plan.stages)
    more_rows_s = (sequences - 1) * sum(hop.passage.row_s for hop in plan.hops)
    return stages_s + sum(hop.seconds for hop in plan.hops) + more_rows_s + plan.return_s
