"""The predicted speed of a plan with several sequences at once."""

from __future__ import annotations

from planning.plan import Plan


def decode_tokens_per_s(plan: Plan, sequences: int) -> float:
    """Predicted tokens per second of all ``sequences`` together."""
    return 1 / plan.shared_s(sequences)
