"""What rounding the hidden state between two blocks does to what the model says.

Where two neighbouring blocks are on different devices, the hidden rows between them cross a link at
16 or 8 bits a value (wire.activations). The student is the original model with the rows of one
boundary rounded so; otherwise this is as in calibration.quality, with its runner and its cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from backends.base import Backend
from calibration.quality import (
    Progress,
    Rows,
    Run,
    Sequences,
    _check,
    _Options,
    _runner,
    _text_key,
)
from calibration.store import CalibrationStore
from model.checkpoint import Checkpoint
from wire.activations import HopBits, decode_rows, encode_rows

MEASURED_BITS: tuple[HopBits, ...] = (16, 8)
"""32 bits lose nothing."""


def measure_hops(
    checkpoint: Checkpoint,
    sequences: Sequences,
    bits: Sequence[HopBits] = MEASURED_BITS,
    *,
    backend: Backend | None = None,
    threads: int = 1,
    store: CalibrationStore | None = None,
    progress: Progress | None = None,
    directory: Path | None = None,
) -> dict[int, dict[int, float]]:
    """Boundary -> width -> mean KL(original || rounded) in nats.

    Boundary b lies behind block b: from the embedding (0) to the last layer. Each boundary is
    stored as soon as it is done. The rest, and what is raised, as in ``measure_quality``.
    """
    _check(checkpoint.spec, sequences)
    head = checkpoint.spec.head_block
    key = _text_key(checkpoint, sequences) | {"kind": "hop"}
    found: dict[int, dict[int, float]] = {boundary: {} for boundary in range(head)}
    for boundary, kls in found.items():
        for width in sorted(set(bits), reverse=True):
            known = None if store is None else store.get(key | {"block": boundary, "bits": width})
            if known is not None and len(known) == 1:
                kls[width] = known[0]
    missing: dict[int, list[HopBits]] = {
        boundary: widths
        for boundary, kls in found.items()
        if (widths := [width for width in sorted(set(bits), reverse=True) if width not in kls])
    }
    if missing:
        with _runner(checkpoint, sequences, _Options(backend, threads, progress), directory) as run:
            # The blocks behind a boundary, and the head.
            run.expect(head + sum(head - boundary for boundary in missing))
            final = run.teach([boundary + 1 for boundary in missing])
            for boundary, widths in missing.items():
                changes: dict[int, Run] = {
                    width: partial(through_hop, bits=width) for width in widths
                }
                for sent_bits, kl in run.rounded(boundary + 1, changes, final).items():
                    found[boundary][sent_bits] = kl
                    if store is not None:
                        store.put(key | {"block": boundary, "bits": sent_bits}, (kl,))
    return found


def worst_hops(kls: dict[int, dict[int, float]]) -> dict[int, float]:
    """By width, the largest of all boundaries: what a plan has to reckon with for a hop."""
    widths = {width for by_width in kls.values() for width in by_width}
    return {
        width: max(by_width[width] for by_width in kls.values() if width in by_width)
        for width in sorted(widths, reverse=True)
    }


def through_hop(rows: Rows, bits: HopBits) -> Rows:
    """What arrives of hidden rows [n, hidden] that are sent at ``bits``."""
    count, hidden = rows.shape
    return decode_rows(encode_rows(rows, bits), count, hidden, bits)
