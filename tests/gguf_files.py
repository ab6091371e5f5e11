"""Writes GGUF files for tests, valid ones and others."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from model.gguf_types import TYPES

NUMBERS = {kind.name: number for number, kind in TYPES.items()}
ALIGNMENT = 32


@dataclass
class Tensor:
    """A tensor to write. ``offset`` and ``shape`` (outermost first) may lie."""

    kind: str
    shape: tuple[int, ...]
    data: bytes
    offset: int | None = None
    number: int | None = None


@dataclass
class Gguf:
    """A file to write: metadata and tensors by name."""

    metadata: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    version: int = 3

    def header(self) -> tuple[bytes, list[int]]:
        """Return the header without padding, and the tensors' offsets in the data."""
        parts = [b"GGUF", struct.pack("<IQQ", self.version, len(self.tensors), len(self.metadata))]
        for key, value in self.metadata.items():
            parts += [text(key), typed(value)]
        offsets, offset = [], 0
        for name, tensor in self.tensors.items():
            given = offset if tensor.offset is None else tensor.offset
            number = NUMBERS[tensor.kind] if tensor.number is None else tensor.number
            parts += [text(name), struct.pack("<I", len(tensor.shape))]
            parts += [struct.pack("<Q", size) for size in reversed(tensor.shape)]
            parts.append(struct.pack("<IQ", number, given))
            offsets.append(offset)
            offset += len(tensor.data) + -len(tensor.data) % ALIGNMENT
        return b"".join(parts), offsets

    def write(self, path: Path) -> Path:
        header, _ = self.header()
        data = b"".join(
            tensor.data + bytes(-len(tensor.data) % ALIGNMENT) for tensor in self.tensors.values()
        )
        path.write_bytes(header + bytes(-len(header) % ALIGNMENT) + data)
        return path


def plain(values: Any, kind: str = "F32") -> Tensor:
    """Return a tensor of float32 or fp16 values."""
    array = np.asarray(values, {"F32": np.float32, "F16": np.float16}[kind])
    return Tensor(kind, array.shape, array.tobytes())


def text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def typed(value: Any) -> bytes:
    """Return a metadata value behind its type. Lists are arrays; floats are float32."""
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        items = [typed(item) for item in value]
        kind = items[0][:4] if items else struct.pack("<I", 8)
        return (
            struct.pack("<I", 9)
            + kind
            + struct.pack("<Q", len(items))
            + b"".join(item[4:] for item in items)
        )
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<Ii", 5, value) if value < 0 else struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    return struct.pack("<I", 8) + text(value)


TINY: Mapping[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 1,
    "llama.context_length": 64,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}
TINY_SHAPES: Mapping[str, tuple[int, ...]] = {
    "token_embd.weight": (48, 32),
    "output_norm.weight": (32,),
    "blk.0.attn_norm.weight": (32,),
    "blk.0.attn_q.weight": (32, 32),
    "blk.0.attn_k.weight": (16, 32),
    "blk.0.attn_v.weight": (16, 32),
    "blk.0.attn_output.weight": (32, 32),
    "blk.0.ffn_norm.weight": (32,),
    "blk.0.ffn_gate.weight": (64, 32),
    "blk.0.ffn_up.weight": (64, 32),
    "blk.0.ffn_down.weight": (32, 64),
}


def tiny(kind: str = "F32", **changes: Any) -> Gguf:
    """Return a model of one layer with tied head, whose matrices are of a type.

    changes: metadata with ``__`` for a dot; None leaves an entry out.
    """
    random = np.random.default_rng(1)
    metadata = dict(TINY) | {key.replace("__", "."): value for key, value in changes.items()}
    tensors = {
        name: plain(random.normal(0, 0.3, shape))
        if len(shape) == 1 or kind == "F32"
        else random_blocks(kind, shape, random)
        for name, shape in TINY_SHAPES.items()
    }
    return Gguf({key: value for key, value in metadata.items() if value is not None}, tensors)


HALVES = {"F16": (0,), "Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q4_K": (0, 2),
          "Q6_K": (208,)}  # fmt: skip
"""Where blocks have fp16 numbers."""


def random_blocks(kind: str, shape: tuple[int, ...], random: np.random.Generator) -> Tensor:
    """Return random codes whose fp16 numbers are small, of both signs."""
    known = TYPES[NUMBERS[kind]]
    count = int(np.prod(shape)) // known.values
    blocks = random.integers(0, 256, (count, known.size_bytes), np.uint8)
    for begin in HALVES.get(kind, ()):
        # K types have scales up to 63 besides.
        spread = 0.0003 if kind.endswith("_K") else 0.01
        halves = random.normal(0, spread, (count, 1)).astype(np.float16)
        blocks[:, begin : begin + 2] = halves.view(np.uint8)
    if kind == "MXFP4":
        blocks[:, 0] = random.integers(118, 124, count)
    return Tensor(kind, shape, blocks.tobytes())
