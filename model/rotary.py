"""Rotary position embedding: the one table that the reference and every backend use."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from model.spec import RopeSpec

Table = npt.NDArray[np.float32]


def rotary_table(rope: RopeSpec, head_dim: int, positions_count: int) -> tuple[Table, Table]:
    """Return cosines and sines, each float32 [positions_count, head_dim / 2].

    Column i turns the pair (i, i + head_dim / 2) of a head. Pairs from ``rotated`` / 2 on stay:
    their cosine is 1. Position p of a `dynamic` table uses the frequencies of a sequence of p + 1
    tokens, as in incremental decoding. So a prompt longer than the trained context gives the same
    result as its tokens one by one. A `longrope` table has the long factors at all positions if it
    is longer than the trained context, and else the short ones.

    Source: Su et al., "RoFormer". The scalings are those of Hugging Face transformers (linear:
    position interpolation; dynamic: NTK-aware base; llama3: by wavelength band; yarn: Peng et al.,
    "YaRN"; longrope: Ding et al., "LongRoPE").
    """
    columns = rope.columns(head_dim)
    exponents = np.arange(0, columns, 2, dtype=np.float64) / columns
    positions = np.arange(positions_count, dtype=np.float64)[:, None]
    if rope.scaling == "dynamic":
        angles = positions / _dynamic_bases(rope, columns, positions) ** exponents
    else:
        angles = positions * _scaled(rope, 1.0 / rope.theta**exponents, positions_count)
    cos, sin = (turn(angles) * rope.attention_factor for turn in (np.cos, np.sin))
    still = ((0, 0), (0, (head_dim - columns) // 2))
    cos, sin = np.pad(cos, still, constant_values=1), np.pad(sin, still)
    return cos.astype(np.float32), sin.astype(np.float32)


def rotate(
    heads: npt.NDArray[Any], cos: npt.NDArray[Any], sin: npt.NDArray[Any]
) -> npt.NDArray[Any]:
    """Rotate heads [n, heads, head_dim] by cos, sin [n, 1, head_dim / 2]."""
    first, second = np.split(heads, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _scaled(
    rope: RopeSpec, frequencies: npt.NDArray[np.float64], positions_count: int
) -> npt.NDArray[np.float64]:
    match rope.scaling:
        case "linear":
            return frequencies / rope.factor
        case "llama3":
            return _llama3(rope, frequencies)
        case "yarn":
            return _yarn(rope, frequencies)
        case "longrope":
            long = positions_count > rope.original_context
            factors = np.array(rope.long_factors if long else rope.short_factors, np.float64)
            stretched: npt.NDArray[np.float64] = frequencies / factors
            return stretched
    return frequencies


def _dynamic_bases(
    rope: RopeSpec, columns: int, positions: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    lengths = np.maximum(positions + 1, rope.original_context)
    stretch = rope.factor * lengths / rope.original_context - (rope.factor - 1)
    bases: npt.NDArray[np.float64] = rope.theta * stretch ** (columns / (columns - 2))
    return bases


def _llama3(rope: RopeSpec, frequencies: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Divide long waves' frequencies by the factor, keep short ones, interpolate between."""
    turns = rope.original_context * frequencies / (2 * math.pi)
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = np.clip(kept, 0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / rope.factor)


def _yarn(rope: RopeSpec, frequencies: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Divide the frequencies of slow pairs by the factor, keep fast ones, interpolate between.

    The bounds are pairs that make beta_fast and beta_slow turns within the trained context.
    """
    pairs = len(frequencies)
    first, last = (
        pairs * math.log(rope.original_context / (turns * 2 * math.pi)) / math.log(rope.theta)
        for turns in (rope.beta_fast, rope.beta_slow)
    )
    if rope.truncated:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    if first == last:
        last += 0.001
    divided = np.clip((np.arange(pairs) - first) / (last - first), 0, 1)
    mixed: npt.NDArray[np.float64] = (
        frequencies * (1 - divided) + frequencies / rope.factor * divided
    )
    return mixed
