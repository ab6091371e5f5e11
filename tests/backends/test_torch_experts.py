"""Experts on a torch device: the ways without a look at the choice equal that of a CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("torch")
import torch
from torch.nn import functional

from backends.torch_experts import TorchExperts
from model.artifact import Tensor
from model.quantize import Format, quantize
from model.spec import QUANTIZED_TENSORS, ExpertSpec
from tests.backends.test_conformance import EXPERTS_LAYER, random_model


@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.parametrize(
    "spec",
    [
        ExpertSpec(12, 2),
        ExpertSpec(12, 3, "topk_softmax", bias=True, limit=0.5),
        ExpertSpec(12, 3, normalized=False, first=4, held=6),
    ],
    ids=["plain", "clipped", "some"],
)
def test_all_ways_give_the_same(spec: ExpertSpec, rows: int, bits: int) -> None:
    layer = replace(EXPERTS_LAYER, experts=spec)
    _, blocks = random_model(layer)
    tensors: dict[str, Tensor] = {
        name: quantize(tensor, Format.of(bits)) if name in QUANTIZED_TENSORS else tensor
        for name, tensor in blocks[1].items()
    }
    vectors = {
        name: torch.from_numpy(tensor.copy())
        for name, tensor in blocks[1].items()
        if name.startswith("router")
    }
    experts = TorchExperts(layer, spec, tensors, {}, torch.device("cpu"), torch.float32)
    x = torch.randn((rows, layer.hidden), generator=torch.Generator().manual_seed(0))
    expected = experts(x, vectors, functional.silu)
    assert rows == 1 or expected.abs().max() > 0
    chosen, weights = experts._route(
        functional.linear(x, vectors["router.weight"], vectors.get("router.bias"))
    )
    for way in (experts._gathered, experts._all):
        torch.testing.assert_close(way(x, chosen, weights, functional.silu), expected)
    experts.chosen_alone = False
    torch.testing.assert_close(experts(x, vectors, functional.silu), expected)
