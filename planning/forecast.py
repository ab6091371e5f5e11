"""What a plan predicts of several sequences at once."""

from __future__ import annotations

from planning.plan import Plan


def decode_tokens_per_s(plan: Plan, sequences: int) -> float:
    """Tokens per second of so many sequences at once, in all: as fast as each goes round the ring,
    or as the slowest stage lets one after the other through. Rows that a stage runs in one pass
    cost it less than this assumes."""
    return 1 / max(plan.bottleneck_s, plan.decode_s / sequences)
