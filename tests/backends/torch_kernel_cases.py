"""The Triton kernels against stored values; test_torch.py runs this in a process of its own.

With TRITON_INTERPRET=1, which Triton reads when it is first imported, they run without a GPU.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

from backends import torch_kernels
from backends.torch_matmul import scales_and_offsets
from backends.torch_packed import Int4Weight, PackedWeight
from model.quantize import INTEGER_BITS, Format, quantize

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
CASES = [
    *((Format.of(bits, "rtn", 32), 5, 72) for bits in INTEGER_BITS),
    (Format.of(4, "rtn", 64, symmetric=True), 3, 64),
    (Format.of(3, "truncate", 32), 3, 64),
    # More words in a row than one step of a kernel takes.
    (Format.of(8, "truncate", 128), 2, 1100),
]


@pytest.mark.parametrize(("fmt", "rows", "columns"), CASES)
def test_kernels(fmt: Format, rows: int, columns: int) -> None:
    random = np.random.default_rng(fmt.bits)
    stored = [
        quantize(random.standard_normal((rows, columns)).astype(np.float32), fmt) for _ in range(2)
    ]
    packed = PackedWeight.of(stored, DEVICE)
    expected = np.concatenate([matrix.dequantize() for matrix in stored])
    np.testing.assert_array_equal(host(torch_kernels.unpack(packed, torch.float32)), expected)
    for count, warps, words in ((1, 1, 256), (3, 4, 128)):
        x = random.standard_normal((count, columns)).astype(np.float32)
        on_device = torch.from_numpy(x).to(DEVICE)
        product = host(torch_kernels.gemv(on_device, packed, warps, words))
        np.testing.assert_allclose(product, x @ expected.T, rtol=0, atol=1e-3)
        half = torch_kernels.gemv(on_device.half(), packed, warps, words)
        assert half.dtype == torch.float16
        np.testing.assert_allclose(host(half), x @ expected.T, rtol=0, atol=0.2)
    for count in (3, 70):
        x = random.standard_normal((count, columns)).astype(np.float32)
        product = torch_kernels.gemm(torch.from_numpy(x).to(DEVICE).half(), packed, 16)
        assert product.dtype == torch.float16
        np.testing.assert_allclose(host(product), x @ expected.T, rtol=0, atol=0.2)


@pytest.mark.parametrize("inner", [2, 4, 8])
def test_tiles_are_unpacked(inner: int) -> None:
    stored = quantize(
        np.random.default_rng(inner).standard_normal((24, 256)).astype(np.float32),
        Format.of(4, "rtn", 64),
    )
    packed = PackedWeight.of([stored], DEVICE)
    tiles = torch.from_numpy(tiles_of(stored.codes(), inner)).to(DEVICE)
    if DEVICE.type == "cuda":
        codes = torch.from_numpy(stored.codes()).to(DEVICE)
        pairs = (codes[:, ::2] << 4) | codes[:, 1::2]
        by_torch = torch.ops.aten._convert_weight_to_int4pack(pairs, inner)
        np.testing.assert_array_equal(host(by_torch), host(tiles))
    held = Int4Weight(tiles, scales_and_offsets(packed, torch.float32), 64)
    expected = stored.dequantize()
    np.testing.assert_allclose(
        host(torch_kernels.unpack_tiles(held, torch.float32)), expected, rtol=0, atol=1e-5
    )
    strips = [torch_kernels.unpack_tiles(strip, torch.float32) for strip in held.strips(16 * 256)]
    assert [len(strip) for strip in strips] == [16, 8]
    np.testing.assert_allclose(np.concatenate(list(map(host, strips))), expected, rtol=0, atol=1e-5)


def tiles_of(codes: Any, inner: int) -> Any:
    """Return codes [N, K] as torch's tiles int32 [N / 8, K / (16 inner), 32, inner / 2].

    Source: matrix_to_m16n8k16_Bint4_layout in torch's int4mm.cu.
    """
    rows, columns = codes.shape
    tiles = np.zeros((rows // 8, columns // (16 * inner), 32, inner // 2), np.uint32)
    for tile, outer, lane, word in np.ndindex(*tiles.shape):
        row = codes[tile * 8 + lane // 4].astype(np.uint32)
        first = (outer * inner + 2 * word) * 16 + lane % 4 * 2
        values = [row[first + at] for at in (0, 1, 8, 9, 16, 17, 24, 25)]
        places = zip((7, 5, 3, 1, 6, 4, 2, 0), range(28, -4, -4), strict=True)
        tiles[tile, outer, lane, word] = sum(values[at] << shift for at, shift in places)
    return tiles.view(np.int32)


def host(values: torch.Tensor) -> Any:
    return values.cpu().numpy()
