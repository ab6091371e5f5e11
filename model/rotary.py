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

    Column i turns the pair (i, i + head_dim / 2) of a head. Position p of a `dynamic` table uses
    the frequencies of a sequence of p + 1 tokens, as in incremental decoding. So a prompt longer
    than the trained context gives the same result as its tokens one by one.

    Source: Su et al., "RoFormer". The scalings are those of Hugging Face transformers (linear:
    position interpolation; dynamic: NTK-aware base; llama3: by wavelength band).
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    positions = np.arange(positions_count, dtype=np.float64)[:, None]
    if rope.scaling == "dynamic":
        angles = positions / _dynamic_bases(rope, head_dim, positions) ** exponents
    else:
        frequencies = 1.0 / rope.theta**exponents
        if rope.scaling == "linear":
            frequencies /= rope.factor
        elif rope.scaling == "llama3":
            frequencies = _llama3(rope, frequencies)
        angles = positions * frequencies
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(
    heads: npt.NDArray[Any], cos: npt.NDArray[Any], sin: npt.NDArray[Any]
) -> npt.NDArray[Any]:
    """Rotate heads [n, heads, head_dim] by cos, sin [n, 1, head_dim / 2]."""
    first, second = np.split(heads, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _dynamic_bases(
    rope: RopeSpec, head_dim: int, positions: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    lengths = np.maximum(positions + 1, rope.original_context)
    stretch = rope.factor * lengths / rope.original_context - (rope.factor - 1)
    bases: npt.NDArray[np.float64] = rope.theta * stretch ** (head_dim / (head_dim - 2))
    return bases


def _llama3(rope: RopeSpec, frequencies: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Divide long waves' frequencies by the factor, keep short ones, interpolate between."""
    turns = rope.original_context * frequencies / (2 * math.pi)
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = np.clip(kept, 0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / rope.factor)
