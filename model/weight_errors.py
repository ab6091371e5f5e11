"""Measures how far quantizing moves the weights of a checkpoint, once for each block and format."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path

from model.bounded import read_json
from model.checkpoint import Checkpoint
from model.durable import replace_text
from model.quantize import Format, weight_error
from model.spec import QUANTIZED_TENSORS


def weight_errors(
    checkpoint: Checkpoint,
    formats: Iterable[Format],
    state_dir: Path,
    on_step: Callable[[int, int], None],
) -> tuple[dict[int, float], ...]:
    """Return for each block: bits -> the largest |w - w_b| / 2^b over its matrices.

    A file in ``state_dir`` keeps the results. Losing it costs time, never correctness.
    ``on_step`` gets (blocks done, all blocks), and may raise to end the work.
    Source: DILEMMA, constraint (2g) and "Environment Setup".
    Raises model.errors.ModelError, OSError.
    """
    path = state_dir / "weight-errors" / f"{checkpoint.fingerprint}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    known = _read(path)
    formats = tuple(formats)
    errors: list[dict[int, float]] = []
    count = checkpoint.spec.block_count
    for block in range(count):
        own = [checkpoint.format_of(block, fmt) for fmt in formats]
        missing = [fmt for fmt in own if f"{block}/{fmt.key}" not in known]
        if missing:
            tensors = checkpoint.block(block)
            for fmt in missing:
                kept = checkpoint.kept(block, fmt)
                stored = checkpoint.own_codes(block, fmt)
                errors_of_block = [
                    weight_error(tensor, fmt, kept.get(name), normalized=True)
                    for name, tensor in tensors.items()
                    if name in QUANTIZED_TENSORS and name not in stored
                ]
                known[f"{block}/{fmt.key}"] = max(errors_of_block, default=0.0)
            replace_text(path, json.dumps(known))
        errors.append({fmt.bits: known[f"{block}/{fmt.key}"] for fmt in own})
        on_step(block + 1, count)
    return tuple(errors)


def _read(path: Path) -> dict[str, float]:
    """Return the errors in a file by block and format, or nothing if it is damaged."""
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, OverflowError):
        found = {key: float(error) for key, error in read_json(path).items()}
        if all(0 <= error < math.inf for error in found.values()):
            return found
    return {}
