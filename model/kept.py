"""Says in words what a plan does to the codes that a model's files already have."""

from __future__ import annotations

from collections.abc import Sequence

from model.adapters import MERGED
from model.checkpoint import Checkpoint
from model.families.quantization import read_quantization
from model.spec import QUANTIZED_TENSORS

_NOT_HERE = "packed weights, whose codes may be kept, but are not downloaded yet"

PLAIN = frozenset(("F64", "F32", "F16", "BF16"))


def weight_notes(checkpoint: Checkpoint, bits: Sequence[int]) -> list[str]:
    """Return one line for each kind of packed weights in the files; nothing for plain numbers.

    bits: of every block of the plan. A line counts the blocks that it is true of.
    """
    found: dict[str, tuple[set[str], set[int]]] = {}
    if not checkpoint.tensors:  # Only config.json is here.
        packed = read_quantization(checkpoint.config)
        return [] if packed is None else [f"{_NOT_HERE} ({packed.method})"]
    for block, width in enumerate(bits):
        native = checkpoint.native_format(block)
        kept = checkpoint.kept_formats(block) if native and native.bits == width else {}
        for canonical, label in checkpoint.source_dtypes(block).items():
            if label in PLAIN or canonical not in QUANTIZED_TENSORS:
                continue
            if label.endswith(MERGED):
                start, named = "LoRA adapter merged into", label.removesuffix(MERGED)
            elif canonical in kept and kept[canonical] == native:
                start, named = f"{width}-bit codes kept from the file", label
                named = named.removesuffix(f" {width} bits")
            else:
                start, named = "decoded from" if width >= 16 else "requantized from", label
            labels, blocks = found.setdefault(start, (set(), set()))
            labels.add(named)
            blocks.add(block)
    return [
        _note(start, sorted(labels), len(blocks), len(bits))
        for start, (labels, blocks) in found.items()
    ]


def _note(start: str, labels: Sequence[str], blocks: int, all_blocks: int) -> str:
    kept = start.endswith("file")
    named = f" ({', '.join(labels)})" if kept else f" {' and '.join(labels)}"
    where = "all blocks" if blocks == all_blocks else f"{blocks} of {all_blocks} blocks"
    return f"{start}{named}: {where}"
