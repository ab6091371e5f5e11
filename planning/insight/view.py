"""A plan as JSON, for the command line and for HTTP clients."""

from __future__ import annotations

from typing import Any

from model.spec import ModelSpec
from planning.forecast import decode_tokens_per_s
from planning.insight.team import fractions
from planning.plan import Plan


def describe_plan(spec: ModelSpec, plan: Plan, slots: int) -> dict[str, Any]:
    """A plan as JSON: its own fields, and each block by name with its device and bits.

    A block of a team has its lead as device. ``shares`` has the part of a layer's weights that each
    member of a team has.

    Predicted tokens per second are for ``slots`` sequences at once. Predicted seconds of a prompt
    are for the objective's prompt. An encoder has no such figures, but those of one pass.
    """
    return {
        **plan.to_dict(),
        "blocks": [
            {
                "block": placement.block,
                "name": spec.block_name(placement.block),
                "device": placement.device,
                "bits": placement.bits,
            }
            for placement in plan.placements
        ],
        "shares": fractions(spec, plan),
        "prompt_tokens": plan.objective.prompt_tokens,
        **(_passes(plan) if spec.encodes else _tokens(plan, slots)),
        "slots": slots,
        "encodes": spec.encodes,
        "proven_optimal": plan.proven_optimal,
        "gap": plan.gap,
    }


def _tokens(plan: Plan, slots: int) -> dict[str, Any]:
    prompt_tokens = plan.objective.prompt_tokens
    return {
        "predicted_ms_per_token": plan.decode_s * 1e3,
        "predicted_prefill_ms_per_token": plan.prefill_s_per_token * 1e3,
        "chunk_tokens": plan.chunk_tokens(prompt_tokens),
        "predicted_prompt_s": plan.prompt_s(prompt_tokens),
        "predicted_first_token_s": plan.first_token_s(prompt_tokens),
        "predicted_tokens_per_s": decode_tokens_per_s(plan, slots),
    }


def _passes(plan: Plan) -> dict[str, Any]:
    """One pass of texts with ``prompt_tokens`` in all, and how often passes follow each other."""
    return {
        "predicted_ms_per_pass": plan.decode_s * 1e3,
        "predicted_passes_per_s": 1 / (plan.bottleneck_s or plan.decode_s),
    }
