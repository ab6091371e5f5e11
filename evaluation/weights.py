"""How many bits the weights of a model have at a plan's widths."""

from __future__ import annotations

import math
from collections.abc import Sequence

from model.checkpoint import Checkpoint
from model.spec import QUANTIZED_TENSORS, ModelSpec


def bits_per_weight(checkpoint: Checkpoint, bits: Sequence[int]) -> float:
    """Return the mean over all weights of matrices. Scales and zero points do not count."""
    return mean_bits(checkpoint.spec, bits)


def mean_bits(spec: ModelSpec, bits: Sequence[int]) -> float:
    """Return the mean over all weights of matrices of a model's shape."""
    counts = _weights(spec)
    return sum(count * width for count, width in zip(counts, bits, strict=True)) / sum(counts)


def ratio(checkpoint: Checkpoint, bits: Sequence[int]) -> float:
    """Return the bits of all weights divided by those in the files: DILEMMA's ratio."""
    own = [checkpoint.lossless_format(block).bits for block in range(checkpoint.spec.block_count)]
    return bits_per_weight(checkpoint, bits) / bits_per_weight(checkpoint, own)


def _weights(spec: ModelSpec) -> list[int]:
    """The weights of each block that are quantized."""
    return [
        sum(
            math.prod(shape)
            for name, shape in spec.block_tensors(block).items()
            if name in QUANTIZED_TENSORS
        )
        for block in range(spec.block_count)
    ]
