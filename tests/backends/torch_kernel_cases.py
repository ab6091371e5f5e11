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
from backends.torch_packed import PackedWeight
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
    for count, outputs in ((1, 2), (3, 8)):
        x = random.standard_normal((count, columns)).astype(np.float32)
        on_device = torch.from_numpy(x).to(DEVICE)
        product = host(torch_kernels.gemv(on_device, packed, outputs, 4))
        np.testing.assert_allclose(product, x @ expected.T, rtol=0, atol=1e-3)
        half = torch_kernels.gemv(on_device.half(), packed, outputs, 4)
        assert half.dtype == torch.float16
        np.testing.assert_allclose(host(half), x @ expected.T, rtol=0, atol=0.2)


def host(values: torch.Tensor) -> Any:
    return values.cpu().numpy()
