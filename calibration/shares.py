"""The shares of a model's blocks that are timed, so that plans know what teams gain."""

from __future__ import annotations

from dataclasses import replace

from model.quantize import Format
from model.share import Share, Steps, mlp_units, most_members, share_spec, share_steps
from model.spec import ModelSpec
from wire.profile import TimingKind

LAYER_FRACTIONS = (0.5, 0.25, 1.0)
"""The fractions of a layer, the important ones first. All of it shows what the cuts alone cost."""

HEAD_FRACTION = 0.25
"""A head is not cut, so a single share shows how its time grows."""


def share_models(spec: ModelSpec, kind: TimingKind, bits: int) -> dict[float, ModelSpec]:
    """Map the fraction of each timed share of a block to the model of that share, in order.

    The fractions are the nearest ones that the model's KV heads allow. Heads, columns of the MLP
    and vocabulary are in proportion. It is empty if the model has too few KV heads for a team, if
    its layers differ in size, or for an embedding.
    """
    group_size = Format.of(bits).group_size
    if kind == "embedding" or most_members(spec, group_size) < 2:
        return {}
    if kind == "head":
        vocab = max(round(HEAD_FRACTION * spec.vocab), 1)
        return {vocab / spec.vocab: replace(spec, vocab=vocab)}
    layer, steps = spec.layers[0], share_steps(spec, group_size)
    found: dict[float, ModelSpec] = {}
    for fraction in LAYER_FRACTIONS:
        pieces = max(round(fraction * layer.kv_heads / steps.kv_heads), 1)
        share = _first_part(spec, steps, pieces)
        found.setdefault(share.kv_heads[1] / layer.kv_heads, share_spec(spec, share))
    return found


def _first_part(spec: ModelSpec, steps: Steps, pieces: int) -> Share:
    """Return the share with this many steps of KV heads, and as large a part of the rest."""
    layer = spec.layers[0]
    kv_heads = min(pieces * steps.kv_heads, layer.kv_heads)
    fraction = kv_heads / layer.kv_heads
    units = mlp_units(layer)
    columns = max(round(fraction * units / steps.columns), 1) * steps.columns
    return Share(
        (0, kv_heads),
        (0, min(columns, units)),
        (0, max(round(fraction * spec.vocab), 1)),
    )
