"""The Triton kernels of steps against torch; test_torch.py runs this in a process of its own.

With TRITON_INTERPRET=1, which Triton reads when it is first imported, they run without a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from backends import torch_fused, torch_fused_kernels
from backends.base import StageOptions
from backends.torch_cuda import TorchCpuBackend, TorchCudaBackend
from backends.torch_fused import BY_TORCH, StepChooser, by_triton
from model.artifact import write_artifact
from model.checkpoint import Checkpoint
from model.quantize import Format
from model.reference import ReferenceModel
from model.spec import LayerSpec, ModelSpec, RopeSpec
from tests.backends.test_conformance import LLAMA_LAYER, random_model

FIXTURES = Path(__file__).parents[1] / "fixtures"
DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
LAYER = LayerSpec(
    hidden=48,
    heads=6,
    kv_heads=2,
    head_dim=16,
    ffn=1100,
    norm="rmsnorm",
    norm_eps=1e-5,
    norm_position="pre",
    activation="silu",
    gated=True,
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    rope=RopeSpec(10000.0),
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_fused, "load_kernels", lambda device: torch_fused_kernels)
    monkeypatch.setattr(torch_fused, "CHECKED_ROWS", (1, 3))


@pytest.mark.parametrize("kind", ["relu", "silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("gated", [False, True])
def test_activations(kind: str, gated: bool) -> None:
    checks = torch_fused._Checks(DEVICE, DTYPES)
    assert checks.activate(by_triton(torch_fused_kernels).activate, kind, gated, 1100) <= 1


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("width", [48, 64, 2500])
def test_norms(width: int, centered: bool) -> None:
    checks = torch_fused._Checks(DEVICE, DTYPES)
    assert checks.add_norm(by_triton(torch_fused_kernels).add_norm, width, centered) <= 1


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("width", "turned"), [(16, 16), (12, 12), (20, 8), (16, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_heads_go_to_their_places(
    width: int, turned: int, normed: bool, dtype: torch.dtype
) -> None:
    checks = torch_fused._Checks(DEVICE, DTYPES)
    ours = by_triton(torch_fused_kernels).place
    assert checks.place(ours, 6, 2, width, turned, normed, dtype) <= 1


def test_right_kernels_are_chosen_and_wrong_ones_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    steps = StepChooser(DEVICE).layer(LAYER, 16, torch.float16, DTYPES)
    assert steps.add_norm is not BY_TORCH.add_norm
    assert steps.place is not BY_TORCH.place
    assert steps.activate is not BY_TORCH.activate
    assert not caplog.messages

    def broken(*_: object) -> None:
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(torch_fused_kernels, "place", broken)
    monkeypatch.setattr(
        torch_fused_kernels, "activate", lambda rows, kind, gated, dtype: rows[:, :1100].to(dtype)
    )
    chooser = StepChooser(DEVICE)
    for _ in range(2):
        steps = chooser.layer(LAYER, 16, torch.float16, DTYPES)
    assert steps.add_norm is not BY_TORCH.add_norm
    assert steps.place is BY_TORCH.place
    assert steps.activate is BY_TORCH.activate
    assert [message.split(" (")[0] for message in caplog.messages] == [
        "triton/place is not used",
        "triton/activate is not used",
    ]


def fixture_model(name: str) -> tuple[ModelSpec, list[dict[str, Any]]]:
    checkpoint = Checkpoint.open(FIXTURES / name)
    spec = checkpoint.spec
    return spec, [checkpoint.block(block) for block in range(spec.block_count)]


MODELS: dict[str, Callable[[], tuple[ModelSpec, Any]]] = {
    **{name: partial(fixture_model, name) for name in ("llama-linear", "mistral", "opt-post")},
    "both": lambda: random_model(replace(LLAMA_LAYER, norm_position="both", qk_norm="head")),
    "output": lambda: random_model(replace(LLAMA_LAYER, norm_position="output", qk_norm="width")),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_stage_with_kernels_gives_the_same(name: str, tmp_path: Path) -> None:
    spec, tensors = MODELS[name]()
    fmt = Format.of(8, "rtn", 32)
    artifacts = [
        (block, write_artifact(tmp_path, block, tensors[block], fmt).path)
        for block in range(spec.block_count)
    ]
    tokens = np.random.default_rng(1).integers(0, spec.vocab, 6)
    model = ReferenceModel.from_artifacts(spec, artifacts, np.float64)
    expected = model.forward(tokens)
    options = StageOptions(slots=3, context_tokens=60, threads=1, exact=True)
    backend = TorchCpuBackend() if DEVICE.type == "cpu" else TorchCudaBackend()
    stage = backend.load(spec, artifacts, options)
    assert stage._layers[0]._steps.place is not BY_TORCH.place
    results = [stage.forward(2, 0, tokens[:3]), stage.forward(2, 3, tokens[3:4])]
    stage.forward(1, 0, tokens[:4], logits=False)
    results.append(stage.decode([1, 2], [4, 4], tokens[[4, 4]]))
    stage.close()
    scale = np.abs(expected).max()
    np.testing.assert_allclose(
        np.concatenate(results), expected[[2, 3, 4, 4]], rtol=0, atol=1e-4 * scale
    )
