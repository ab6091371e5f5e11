"""Triton kernels for packed weights: multiply without unpacking, or unpack in one pass.

This module is imported only if Triton is installed and a device can run it. backends.torch_matmul
compares and times a kernel before it uses it. A kernel may use only Triton's names, even in
annotations. All but one take words of 32 / BITS codes, low bits first. Scales and zeros that do
not change have a stride of 0. The last takes the tiles of torch's 4-bit product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from backends.torch_packed import Int4Weight, PackedWeight

_UNPACK_WORDS = 1024

_UNPACK_COLUMNS = 2048


def _gemv(
    x: tl.tensor,
    words: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    result: tl.tensor,
    rows: tl.tensor,
    outputs: tl.tensor,
    row_words: tl.tensor,
    columns: tl.tensor,
    scale_row: tl.tensor,
    scale_group: tl.tensor,
    zero_row: tl.tensor,
    zero_group: tl.tensor,
    BITS: tl.constexpr,
    GROUP_WORDS: tl.constexpr,
    WORDS: tl.constexpr,
) -> None:
    """Compute one output of one row of x in one program, WORDS words at a time. Sums are fp32.

    A thread has a word with the values that its codes multiply, and adds them up by itself. Threads
    exchange nothing before the end.
    """
    PER_WORD: tl.constexpr = 32 // BITS
    MASK: tl.constexpr = (1 << BITS) - 1
    # Programs that read the same weights for different rows of x run next to each other.
    row = tl.program_id(0) % rows
    output = (tl.program_id(0) // rows).to(tl.int64)  # Offsets into a large head exceed 32 bits.
    code = tl.arange(0, PER_WORD)
    sums = tl.zeros((WORDS,), dtype=tl.float32)
    for first in range(0, row_words, WORDS):
        word = first + tl.arange(0, WORDS)
        exists = word < row_words
        group = word // GROUP_WORDS
        packed = tl.load(words + output * row_words + word, mask=exists, other=0)
        scale = tl.load(
            scales + output * scale_row + group * scale_group, mask=exists, other=0.0
        ).to(tl.float32)
        zero = tl.load(zeros + output * zero_row + group * zero_group, mask=exists, other=0)
        column = word[:, None] * PER_WORD + code[None, :]
        values = tl.load(x + row * columns + column, mask=column < columns, other=0.0)
        # The mask removes the sign that a right shift drags in. A code in the low bits of the float
        # 2^23 reads as 2^23 + code. This is one logical operation, and conversions run at a
        # fraction of its speed.
        codes = ((packed[:, None] >> (code * BITS)[None, :]) & MASK) | 0x4B000000
        steps = codes.to(tl.float32, bitcast=True) - (zero.to(tl.float32) + 8388608.0)[:, None]
        sums += tl.sum(steps * values.to(tl.float32), axis=1) * scale
    total = tl.sum(sums, axis=0)
    tl.store(result + row * outputs + output, total.to(result.dtype.element_ty))


def _gemm(
    x: tl.tensor,
    words: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    result: tl.tensor,
    rows: tl.tensor,
    outputs: tl.tensor,
    row_words: tl.tensor,
    columns: tl.tensor,
    scale_row: tl.tensor,
    scale_group: tl.tensor,
    zero_row: tl.tensor,
    zero_group: tl.tensor,
    BITS: tl.constexpr,
    GROUP_WORDS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
) -> None:
    """Compute OUTPUTS outputs of ROWS rows of x in one program, a group of columns at a time."""
    PER_WORD: tl.constexpr = 32 // BITS
    MASK: tl.constexpr = (1 << BITS) - 1
    GROUP: tl.constexpr = GROUP_WORDS * PER_WORD
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    output_exists = output < outputs
    wide = output.to(tl.int64)  # Offsets into a large head exceed 32 bits.
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    word = tl.arange(0, GROUP_WORDS)
    code = tl.arange(0, PER_WORD)
    sums = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
    for first in range(0, row_words, GROUP_WORDS):
        group = first // GROUP_WORDS
        packed = tl.load(
            words + wide[:, None] * row_words + (first + word)[None, :],
            mask=output_exists[:, None],
            other=0,
        )
        scale = tl.load(
            scales + wide * scale_row + group * scale_group, mask=output_exists, other=0.0
        ).to(tl.float32)
        zero = tl.load(
            zeros + wide * zero_row + group * zero_group, mask=output_exists, other=0
        ).to(tl.float32)
        codes = ((packed[:, :, None] >> (code * BITS)[None, None, :]) & MASK).to(tl.float32)
        weights = (codes - zero[:, None, None]) * scale[:, None, None]
        weights = tl.reshape(weights.to(x.dtype.element_ty), (OUTPUTS, GROUP))
        column = group * GROUP + tl.arange(0, GROUP)
        values = tl.load(
            x + row[:, None] * columns + column[None, :],
            mask=(row < rows)[:, None] & (column < columns)[None, :],
            other=0.0,
        )
        sums = tl.dot(values, tl.trans(weights), sums)
    tl.store(
        result + row[:, None] * outputs + output[None, :],
        sums.to(result.dtype.element_ty),
        mask=(row < rows)[:, None] & output_exists[None, :],
    )


def _unpack(
    words: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    result: tl.tensor,
    row_words: tl.tensor,
    columns: tl.tensor,
    scale_row: tl.tensor,
    scale_group: tl.tensor,
    zero_row: tl.tensor,
    zero_group: tl.tensor,
    BITS: tl.constexpr,
    GROUP_WORDS: tl.constexpr,
    WORDS: tl.constexpr,
) -> None:
    """Unpack WORDS words of one row in one program."""
    PER_WORD: tl.constexpr = 32 // BITS
    MASK: tl.constexpr = (1 << BITS) - 1
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    exists = word < row_words
    group = word // GROUP_WORDS
    packed = tl.load(words + row * row_words + word, mask=exists, other=0)
    scale = tl.load(scales + row * scale_row + group * scale_group, mask=exists, other=0.0)
    zero = tl.load(zeros + row * zero_row + group * zero_group, mask=exists, other=0)
    code = tl.arange(0, PER_WORD)
    codes = (packed[:, None] >> (code * BITS)[None, :]) & MASK
    values = (codes - zero.to(tl.int32)[:, None]).to(tl.float32) * scale.to(tl.float32)[:, None]
    column = word[:, None] * PER_WORD + code[None, :]
    tl.store(
        result + row * columns + column,
        values.to(result.dtype.element_ty),
        mask=column < columns,
    )


def _unpack_tiles(
    tiles: tl.tensor,
    scales_and_offsets: tl.tensor,
    result: tl.tensor,
    columns: tl.tensor,
    group_stride: tl.tensor,
    GROUP: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Unpack BLOCK columns of one row of torch's 4-bit tiles in one program.

    A tile has 8 rows and INNER times 16 columns, and a word has 8 codes of one row.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = column < columns
    span: tl.constexpr = INNER * 16
    # Columns 2 i and 2 i + 1 of 8 belong to lane i of the row, as do those 8 columns further on and
    # those of the next 16. So a word has four pairs. The first of each pair is in its low half.
    lane = (row % 8) * 4 + column % 8 // 2
    pair = column // 8 % 4
    tile = row // 8 * (columns // span) + column // span
    word = (tile * 32 + lane) * (INNER // 2) + column % span // 32
    packed = tl.load(tiles + word, mask=exists, other=0)
    codes = (packed >> (column % 2 * 16 + pair * 4)) & 15
    scale = scales_and_offsets + column // GROUP * group_stride + row * 2
    step = tl.load(scale, mask=exists, other=0.0).to(tl.float32)
    offset = tl.load(scale + 1, mask=exists, other=0.0).to(tl.float32)
    values = (codes - 8).to(tl.float32) * step + offset
    tl.store(
        result + row * columns + column,
        values.to(result.dtype.element_ty),
        mask=exists,
    )


# Decorators of an untyped library would leave the functions untyped.
# Were it known that rows are aligned, a thread would load four words at once, and the threads would
# have to exchange them. The number of rows would only cost a compilation for each.
gemv_kernel = triton.jit(_gemv, do_not_specialize=["row_words", "rows"])
gemm_kernel = triton.jit(_gemm, do_not_specialize=["rows"])
unpack_kernel = triton.jit(_unpack)
unpack_tiles_kernel = triton.jit(_unpack_tiles)


def gemv(x: torch.Tensor, weight: PackedWeight, warps: int, words: int) -> torch.Tensor:
    """Multiply x [n, K] by the packed weight to [n, N] of x's dtype. Meant for few rows.

    A step of a program takes ``words`` consecutive words of a row.
    """
    x = x.contiguous()
    outputs = weight.words.shape[0]
    result = torch.empty((x.shape[0], outputs), dtype=x.dtype, device=x.device)
    # Only a grid's first dimension may exceed 65,535.
    gemv_kernel[(len(x) * outputs,)](
        x,
        weight.words,
        weight.scales,
        weight.zeros,
        result,
        len(x),
        outputs,
        weight.words.shape[1],
        weight.columns,
        *weight.scales.stride(),
        *weight.zeros.stride(),
        BITS=weight.bits,
        GROUP_WORDS=weight.group_size * weight.bits // 32,
        WORDS=words,
        num_warps=warps,
    )
    return result


def gemm(x: torch.Tensor, weight: PackedWeight, outputs_per_program: int) -> torch.Tensor:
    """Multiply x [n, K] of fp16 by the packed weight to [n, N]. Meant for a prompt's rows."""
    x = x.contiguous()
    rows, outputs = x.shape[0], weight.words.shape[0]
    result = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    rows_per_program = 16 if rows <= 16 else 64
    grid = triton.cdiv(outputs, outputs_per_program), triton.cdiv(rows, rows_per_program)
    gemm_kernel[grid](
        x,
        weight.words,
        weight.scales,
        weight.zeros,
        result,
        rows,
        outputs,
        weight.words.shape[1],
        weight.columns,
        *weight.scales.stride(),
        *weight.zeros.stride(),
        BITS=weight.bits,
        GROUP_WORDS=weight.group_size * weight.bits // 32,
        ROWS=rows_per_program,
        OUTPUTS=outputs_per_program,
        num_warps=4,
    )
    return result


def unpack(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """Return the values [N, K] in ``dtype``."""
    outputs, row_words = weight.words.shape
    result = torch.empty((outputs, weight.columns), dtype=dtype, device=weight.words.device)
    unpack_kernel[(outputs, triton.cdiv(row_words, _UNPACK_WORDS))](
        weight.words,
        weight.scales,
        weight.zeros,
        result,
        row_words,
        weight.columns,
        *weight.scales.stride(),
        *weight.zeros.stride(),
        BITS=weight.bits,
        GROUP_WORDS=weight.group_size * weight.bits // 32,
        WORDS=_UNPACK_WORDS,
    )
    return result


def unpack_tiles(weight: Int4Weight, dtype: torch.dtype) -> torch.Tensor:
    """Return the values [N, K] of torch's 4-bit tiles in ``dtype``."""
    row_tiles, column_tiles, _, words = weight.tiles.shape
    rows, columns = 8 * row_tiles, 32 * words * column_tiles
    result = torch.empty((rows, columns), dtype=dtype, device=weight.tiles.device)
    unpack_tiles_kernel[(rows, triton.cdiv(columns, _UNPACK_COLUMNS))](
        weight.tiles,
        weight.scales_and_offsets,
        result,
        columns,
        weight.scales_and_offsets.stride(0),
        GROUP=weight.group_size,
        INNER=2 * words,
        BLOCK=_UNPACK_COLUMNS,
    )
    return result
