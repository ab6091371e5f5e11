"""Triton kernels for the steps between a layer's products. Each replaces a dozen of torch's.

This module is imported only if Triton is installed and a device can run it. backends.torch_fused
compares a kernel with torch before it uses it. A kernel may use only Triton's names, even in
annotations. All arithmetic is fp32. Inputs and results may be fp32, fp16 or bf16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_ACTIVATE_COLUMNS = 1024


def _add_norm(
    hidden: tl.tensor,
    part: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    total: tl.tensor,
    result: tl.tensor,
    epsilon: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ADDS: tl.constexpr,
    CENTERED: tl.constexpr,
) -> None:
    """Add ``part`` to one row, store the sum, and store its layer norm (CENTERED) or RMS norm."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    exists = column < WIDTH
    at = row * WIDTH + column
    x = tl.load(hidden + at, mask=exists, other=0.0).to(tl.float32)
    if ADDS:
        x += tl.load(part + at, mask=exists, other=0.0).to(tl.float32)
        tl.store(total + at, x, mask=exists)
    if CENTERED:
        x = tl.where(exists, x - tl.sum(x, axis=0) / WIDTH, 0.0)
    x *= 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / WIDTH + epsilon)
    x *= tl.load(weight + column, mask=exists, other=0.0)
    if CENTERED:
        x += tl.load(bias + column, mask=exists, other=0.0)
    tl.store(result + at, x.to(result.dtype.element_ty), mask=exists)


def _place(
    heads: tl.tensor,
    slots: tl.tensor,
    positions: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    weights: tl.tensor,
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    epsilon: tl.tensor,
    slot_stride: tl.tensor,
    head_stride: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TURNED: tl.constexpr,
    NORMED: tl.constexpr,
) -> None:
    """Take one head of one row to its place: the query, or a position of the caches.

    Queries and keys are normalized (NORMED) and then turned in their first TURNED columns.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    column = tl.arange(0, BLOCK)
    exists = column < WIDTH
    source = heads + (row * (HEADS + 2 * KV_HEADS) + head) * WIDTH
    position = tl.load(positions + row)
    x = tl.load(source + column, mask=exists, other=0.0).to(tl.float32)
    if head < HEADS + KV_HEADS:
        if NORMED:
            inverse = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / WIDTH + epsilon)
            x *= inverse * tl.load(weights + head * WIDTH + column, mask=exists, other=0.0)
        if TURNED > 0:
            half: tl.constexpr = TURNED // 2
            turned = column < TURNED
            first = column < half
            other = tl.where(first, column + half, column - half)
            y = tl.load(source + other, mask=turned, other=0.0).to(tl.float32)
            if NORMED:
                y *= inverse * tl.load(weights + head * WIDTH + other, mask=turned, other=0.0)
            angle = position * half + tl.where(first, column, column - half)
            x *= tl.load(cos + angle, mask=turned, other=1.0)
            y *= tl.load(sin + angle, mask=turned, other=0.0)
            x += tl.where(first, -y, y)
    cached = tl.load(slots + row) * slot_stride + position * WIDTH + column
    if head < HEADS:
        result = query + (row * HEADS + head) * WIDTH + column
        tl.store(result, x.to(query.dtype.element_ty), mask=exists)
    elif head < HEADS + KV_HEADS:
        key = keys + cached + (head - HEADS) * head_stride
        tl.store(key, x.to(keys.dtype.element_ty), mask=exists)
    else:
        value = values + cached + (head - HEADS - KV_HEADS) * head_stride
        tl.store(value, x.to(values.dtype.element_ty), mask=exists)


def _activate(
    rows: tl.tensor,
    result: tl.tensor,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Activate BLOCK columns of one row. If GATED, multiply by those WIDTH columns further on."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = column < WIDTH
    source = rows + row * WIDTH * (2 if GATED else 1) + column
    x = tl.load(source, mask=exists, other=0.0).to(tl.float32)
    if KIND == "relu":
        x = tl.maximum(x, 0.0)
    elif KIND == "silu":
        x *= tl.sigmoid(x)
    elif KIND == "gelu":
        x *= 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
    else:  # gelu_tanh, and (1 + tanh(z)) / 2 is sigmoid(2 z)
        x *= tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    if GATED:
        x *= tl.load(source + WIDTH, mask=exists, other=0.0).to(tl.float32)
    tl.store(result + row * WIDTH + column, x.to(result.dtype.element_ty), mask=exists)


# Decorators of an untyped library would leave the functions untyped.
add_norm_kernel = triton.jit(_add_norm)
place_kernel = triton.jit(_place)
activate_kernel = triton.jit(_activate)


def add_norm(
    hidden: torch.Tensor,
    part: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    epsilon: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return hidden + part, fp32 [n, width], and its norm in ``dtype``.

    Without a part, ``hidden`` may have any dtype and is returned as it is.
    """
    hidden = hidden.contiguous()
    rows, width = hidden.shape
    total = hidden if part is None else torch.empty_like(hidden)
    result = torch.empty((rows, width), dtype=dtype, device=hidden.device)
    block = triton.next_power_of_2(width)
    add_norm_kernel[(rows,)](
        hidden,
        hidden if part is None else part.contiguous(),
        weight,
        weight if bias is None else bias,
        total,
        result,
        epsilon,
        WIDTH=width,
        BLOCK=block,
        ADDS=part is not None,
        CENTERED=bias is not None,
        num_warps=min(16, max(1, block // 256)),
    )
    return total, result


def place(
    heads: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    weights: torch.Tensor | None,
    epsilon: float,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """Write heads [n, (H + 2 KV) * width] to ``query`` [n, H, width] and to the caches.

    slots, positions: int64 [n].
    rotary: cosines and sines, fp32 [context, turned columns / 2] each.
    weights: those of the norms of queries and keys, fp32 [H + KV, width].
    keys, values: caches [slots, KV, context, width].
    """
    rows, count, width = query.shape
    kv_heads = keys.shape[1]
    cos, sin = (positions, positions) if rotary is None else rotary
    block = triton.next_power_of_2(width)
    place_kernel[(rows, count + 2 * kv_heads)](
        heads.contiguous(),
        slots,
        positions,
        cos,
        sin,
        positions if weights is None else weights,
        query,
        keys,
        values,
        epsilon,
        keys.stride(0),
        keys.stride(1),
        HEADS=count,
        KV_HEADS=kv_heads,
        WIDTH=width,
        BLOCK=block,
        TURNED=0 if rotary is None else 2 * rotary[0].shape[1],
        NORMED=weights is not None,
        num_warps=max(1, block // 128),
    )


def activate(rows: torch.Tensor, kind: str, gated: bool, dtype: torch.dtype) -> torch.Tensor:
    """Return kind(rows) [n, F] in ``dtype``, or kind(gate) * up of rows [n, gate and up]."""
    count, width = rows.shape[0], rows.shape[1] // (2 if gated else 1)
    result = torch.empty((count, width), dtype=dtype, device=rows.device)
    activate_kernel[(count, triton.cdiv(width, _ACTIVATE_COLUMNS))](
        rows.contiguous(),
        result,
        KIND=kind,
        GATED=gated,
        WIDTH=width,
        BLOCK=_ACTIVATE_COLUMNS,
        num_warps=4,
    )
    return result
