"""Attention whose scores PyTorch's fused operator cannot compute: capped ones, and sinks."""

from __future__ import annotations

import torch
from torch.nn import functional


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    cap: float | None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mix values by the softmax of scores, which become cap * tanh(score / cap) if there is a cap.

    queries: [sequences, heads, rows, width].
    keys, values: [sequences, heads, length, width].
    mask: [sequences, 1, rows, length], 0 where a row sees a position and else -inf.
    sinks: fp32 [heads, rows, 1], one more score of each row, which adds no value.

    Returns the mixed values, shaped like ``queries``.
    """
    if cap is None and sinks is None:
        return functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, scale=scale
        )
    # Scaled queries keep products within fp16.
    scores = ((queries * scale) @ keys.transpose(-1, -2)).float()
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    scores = scores + mask
    if sinks is None:
        weights = scores.softmax(dim=-1)
    else:
        sinks = sinks.expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]
    return weights.to(values.dtype) @ values
