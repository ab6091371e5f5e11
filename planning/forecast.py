"""What a plan predicts of several sequences at once."""

from __future__ import annotations

from planning.plan import Plan


def decode_tokens_per_s(plan: Plan, sequences: int) -> float:
    """Tokens per second of so many sequences at once, in all."""
    return 1 / plan.shared_s(sequences)
