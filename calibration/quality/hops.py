"""Measures how rounding the hidden state between two blocks changes the predictions.

Hidden rows between blocks on different devices cross a link at 16 or 8 bits a value
(wire.activations). A student is the original model with the rows of one boundary rounded in this
way. All else is as in calibration.quality.blocks, at the same cost.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from calibration.quality.students import (
    BY_REFERENCE,
    BlockSource,
    Options,
    Rows,
    Run,
    Sequences,
    check_text,
    students_of,
    text_key,
)
from calibration.store import CalibrationStore
from model.checkpoint import Checkpoint
from wire.activations import HopBits, decode_rows, encode_rows

MEASURED_BITS: tuple[HopBits, ...] = (16, 8)
"""32 bits lose nothing."""


@dataclass(frozen=True, slots=True)
class HopSensitivity:
    """Mean KL(original || rounded) in nats with the rows behind block ``boundary`` rounded."""

    boundary: int
    bits: HopBits
    kl: float


def measure_hops(
    checkpoint: Checkpoint,
    sequences: Sequences,
    bits: Sequence[HopBits] = MEASURED_BITS,
    options: Options = BY_REFERENCE,
    *,
    store: CalibrationStore | None = None,
    directory: Path | None = None,
) -> tuple[HopSensitivity, ...]:
    """Measure every boundary at each of ``bits``; sorted by boundary, the widest first.

    Boundary b lies behind block b: from the embedding (0) to the last layer. Each boundary is
    stored as soon as it is done. All else, and the errors, are as in ``measure_quality``.
    """
    check_text(checkpoint.spec, sequences)
    widths = sorted(set(bits), reverse=True)
    key = text_key(checkpoint, sequences) | {"kind": "hop"}
    found: dict[tuple[int, HopBits], float] = {}
    missing: dict[int, list[HopBits]] = {}
    for boundary in range(checkpoint.spec.head_block):
        for width in widths:
            known = None if store is None else store.get(key | {"block": boundary, "bits": width})
            if known is not None and len(known) == 1:
                found[boundary, width] = known[0]
            else:
                missing.setdefault(boundary, []).append(width)
    for hop in measure_boundaries(checkpoint, missing, sequences, options, directory):
        found[hop.boundary, hop.bits] = hop.kl
        if store is not None:
            store.put(key | {"block": hop.boundary, "bits": hop.bits}, (hop.kl,))
    return tuple(
        HopSensitivity(boundary, width, found[boundary, width])
        for boundary in range(checkpoint.spec.head_block)
        for width in widths
    )


def measure_boundaries(
    source: BlockSource,
    wanted: Mapping[int, Sequence[HopBits]],
    sequences: Sequences,
    options: Options,
    directory: Path | None = None,
) -> Generator[HopSensitivity, None, None]:
    """Yield each boundary at each of its wanted widths as soon as it is measured.

    All else is as in ``calibration.quality.blocks.measure_blocks``.
    """
    check_text(source.spec, sequences)
    if not wanted:
        return
    head = source.spec.head_block
    with students_of(source, sequences, options, directory) as students:
        # The blocks behind a boundary, and the head.
        students.expect(head + sum(head - boundary for boundary in wanted))
        final = students.teach([boundary + 1 for boundary in wanted])
        for boundary, widths in wanted.items():
            changes: dict[HopBits, Run] = {
                width: partial(through_hop, bits=width) for width in widths
            }
            for width, kl in students.rounded(boundary + 1, changes, final).items():
                yield HopSensitivity(boundary, width, kl)


def worst_hops(hops: Sequence[HopSensitivity]) -> dict[HopBits, float]:
    """Return the largest KL of all boundaries by width; a plan counts it for each hop."""
    return {
        bits: max(hop.kl for hop in hops if hop.bits == bits)
        for bits in sorted({hop.bits for hop in hops}, reverse=True)
    }


def through_hop(rows: Rows, bits: HopBits) -> Rows:
    """Return hidden rows [n, hidden] as they arrive when they are sent at ``bits``."""
    count, hidden = rows.shape
    return decode_rows(encode_rows(rows, bits), count, hidden, bits)
