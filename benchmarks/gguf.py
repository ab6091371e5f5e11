"""Writes GGUF files of random weights, with which llama.cpp runs a shape at full speed.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (version 3)
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from model.spec import ModelSpec

ALIGNMENT = 32
BLOCK = 32
"""The weights of a block of q4_0 and q8_0."""

TYPES = {"q4_0": (2, 18), "q8_0": (8, 34), "q4_k": (12, 144)}
"""ggml's number of the type, and the bytes of a block: an fp16 scale and the codes.

Blocks of q4_k have 256 weights, and a second fp16 scale.
"""
_SUPER = 256

F32 = 0
_UINT32, _FLOAT32, _STRING = 4, 6, 8


def write_llama(path: Path, spec: ModelSpec, kind: str, context_tokens: int) -> None:
    """Write a Llama model of the shape ``spec`` with every matrix in ``kind``, without a tokenizer.

    Raises ValueError for a shape that is not Llama's.
    """
    layer = spec.layers[0]
    if layer.rope is None or not layer.gated or layer.norm != "rmsnorm" or layer.qkv_bias:
        raise ValueError("llama.cpp is compared on Llama's architecture only")
    fields: list[tuple[str, int, str | int | float]] = [
        ("general.architecture", _STRING, "llama"),
        ("llama.block_count", _UINT32, len(spec.layers)),
        ("llama.context_length", _UINT32, context_tokens),
        ("llama.embedding_length", _UINT32, spec.hidden),
        ("llama.feed_forward_length", _UINT32, layer.ffn),
        ("llama.attention.head_count", _UINT32, layer.heads),
        ("llama.attention.head_count_kv", _UINT32, layer.kv_heads),
        ("llama.rope.dimension_count", _UINT32, layer.head_dim),
        ("llama.rope.freq_base", _FLOAT32, layer.rope.theta),
        ("llama.attention.layer_norm_rms_epsilon", _FLOAT32, layer.norm_eps),
        ("llama.vocab_size", _UINT32, spec.vocab),
        ("tokenizer.ggml.model", _STRING, "no_vocab"),
    ]
    number, block_bytes = TYPES[kind]
    tensors = list(_tensors(spec))
    header = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(fields))
    for key, value_type, value in fields:
        header += _string(key) + struct.pack("<I", value_type) + _value(value_type, value)
    offset = 0
    for name, shape in tensors:
        header += _string(name) + struct.pack("<I", len(shape))
        header += struct.pack(f"<{len(shape)}Q", *reversed(shape))
        header += struct.pack("<IQ", F32 if len(shape) == 1 else number, offset)
        offset += _padded(_tensor_bytes(shape, block_bytes))
    random = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(header)
        file.write(bytes(-len(header) % ALIGNMENT))
        for _, shape in tensors:
            _write_tensor(file, shape, block_bytes, random)


def _tensors(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "token_embd.weight", (spec.vocab, spec.hidden)
    yield "output_norm.weight", (spec.hidden,)
    yield "output.weight", (spec.vocab, spec.hidden)
    for index, layer in enumerate(spec.layers):
        width, kv = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
        for name, shape in {
            "attn_norm": (spec.hidden,),
            "ffn_norm": (spec.hidden,),
            "attn_q": (width, spec.hidden),
            "attn_k": (kv, spec.hidden),
            "attn_v": (kv, spec.hidden),
            "attn_output": (spec.hidden, width),
            "ffn_gate": (layer.ffn, spec.hidden),
            "ffn_up": (layer.ffn, spec.hidden),
            "ffn_down": (spec.hidden, layer.ffn),
        }.items():
            yield f"blk.{index}.{name}.weight", shape


def _write_tensor(
    file: BinaryIO, shape: tuple[int, ...], block_bytes: int, random: np.random.Generator
) -> None:
    if len(shape) == 1:
        content = np.ones(shape, np.float32).tobytes()
    else:
        rows, columns = shape
        weights, largest = _BLOCKS[block_bytes]
        blocks = random.integers(0, 256, (rows * columns // weights, block_bytes), np.uint8)
        scale = np.array([1 / (largest * columns**0.5)], np.float16)
        blocks[:, :2] = scale.view(np.uint8)
        if weights == _SUPER:
            blocks[:, 2:4] = (scale * np.float16(8)).view(np.uint8)
        content = blocks.tobytes()
    file.write(content)
    file.write(bytes(_padded(len(content)) - len(content)))


def _tensor_bytes(shape: tuple[int, ...], block_bytes: int) -> int:
    return (
        4 * shape[0]
        if len(shape) == 1
        else shape[0] * shape[1] // _BLOCKS[block_bytes][0] * block_bytes
    )


_BLOCKS = {18: (BLOCK, 8), 34: (BLOCK, 127), 144: (_SUPER, 15 * 63)}
"""The weights of a block by its bytes, and the largest product of code and 6-bit scale."""


def _padded(size: int) -> int:
    return size + -size % ALIGNMENT


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _value(value_type: int, value: str | int | float) -> bytes:
    if isinstance(value, str):
        return _string(value)
    return struct.pack("<f" if value_type == _FLOAT32 else "<I", value)
