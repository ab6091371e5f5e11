from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from calibration.shapes import shape_spec
from model.checkpoint import Checkpoint
from model.costs import (
    block_flops,
    executed_bytes,
    hop_bytes,
    kv_bytes,
    read_bytes,
    stage_buffer_bytes,
    stored_bytes,
)
from model.families import load_spec
from model.quantize import Format, QuantizedMatrix, quantize
from model.spec import QUANTIZED_TENSORS, ModelSpec

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.mark.parametrize(
    ("fmt", "container"),
    [
        (Format(2), 2), (Format(3), 4), (Format(4, "rtn", 64), 4), (Format(6), 8),
        (Format(4, symmetric=True), 4), (Format(3, symmetric=True), 4), (Format(8), 8),
        (Format.of(5, "truncate"), 8),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("name", ["opt-post", "llama", "qwen3"])
def test_executed_bytes_are_those_of_the_container(name: str, fmt: Format, container: int) -> None:
    checkpoint = Checkpoint.open(FIXTURES / name)
    for block in range(checkpoint.spec.block_count):
        total = 0
        for tensor_name, tensor in checkpoint.block(block).items():
            if tensor_name not in QUANTIZED_TENSORS:
                total += tensor.nbytes
                continue
            matrix: QuantizedMatrix = quantize(tensor, fmt)
            if tensor_name == "tokens.weight":
                total += matrix.stored_bytes
                continue
            data, zeros = matrix.in_container(container)
            # Scales, their copy beside the codes, and the sums of the codes.
            total += data.nbytes + 3 * matrix.scales().nbytes + zeros.nbytes
        assert executed_bytes(checkpoint.spec, block, fmt, container) == total


def test_executed_bytes_of_floats_follow_the_container() -> None:
    spec = load_spec(FIXTURES / "llama")
    shapes = spec.block_tensors(1)
    matrices = sum(int(np.prod(shapes[name])) for name in shapes if name in QUANTIZED_TENSORS)
    norms = 4 * 2 * spec.hidden
    assert executed_bytes(spec, 1, Format.of(16), 32) == 4 * matrices + norms
    assert executed_bytes(spec, 1, Format.of(16), 16) == 2 * matrices + norms
    assert executed_bytes(spec, 1, Format(4), 32) == 4 * matrices + norms


def test_known_figures() -> None:
    """llama: hidden 32, ffn 48, 4 heads and 2 kv heads of 8, vocabulary 260, worked by hand."""
    spec = load_spec(FIXTURES / "llama")
    weights = 32 * 32 * 2 + 16 * 32 * 2 + 3 * 32 * 48
    assert block_flops(spec, 1, 10) == 2 * weights + 4 * 4 * 8 * 10
    assert block_flops(spec, 0, 10) == 0
    assert block_flops(spec, spec.head_block, 10) == 2 * 260 * 32
    assert kv_bytes(spec, 1, 10) == 2 * 2 * 8 * 10 * 4
    assert kv_bytes(spec, 1, 10, 2) == 2 * 2 * 8 * 10 * 2
    assert kv_bytes(spec, 0, 10) == kv_bytes(spec, spec.head_block, 10) == 0
    assert [hop_bytes(spec, bits) for bits in (8, 16, 32)] == [32 + 4, 64 + 4, 128]
    assert hop_bytes(spec) == 64 + 4
    assert stored_bytes(spec, 0, Format.of(16)) == 260 * 32 * 2
    assert stored_bytes(spec, 0, Format(4, "rtn", 32)) == 260 * (16 + 2 + 1)


def test_a_window_bounds_the_work_of_attention() -> None:
    spec = load_spec(FIXTURES / "mistral")
    assert block_flops(spec, 1, 1000) == block_flops(spec, 1, 20)
    assert kv_bytes(spec, 1, 1000) == 50 * kv_bytes(spec, 1, 20)


def test_buffers_hold_scores_and_logits() -> None:
    spec = load_spec(FIXTURES / "llama")
    layer = stage_buffer_bytes(spec, [1], 16, 1000)
    assert layer > 4 * 4 * 16 * 1000
    assert stage_buffer_bytes(spec, [spec.head_block], 1, 10) > 4 * spec.vocab
    assert stage_buffer_bytes(spec, [0], 2, 10) == 2 * stage_buffer_bytes(spec, [0], 1, 10)
    assert stage_buffer_bytes(spec, range(spec.block_count), 16, 1000) == layer


def routed_model() -> ModelSpec:
    return shape_spec("qwen3-30b-a3b")


def test_memory_counts_all_experts_and_time_those_used() -> None:
    """Qwen3-30B-A3B has 30.5 billion weights, and a token uses 3.3 billion of them."""
    spec = routed_model()
    blocks = range(spec.block_count)
    weights = sum(stored_bytes(spec, block, Format.of(32)) for block in blocks) / 4
    assert 30.4e9 < weights < 30.7e9
    used = sum(block_flops(spec, block, 0) for block in blocks) / 2 + spec.vocab * spec.hidden
    assert 3.2e9 < used < 3.5e9
    layer = spec.layers[0]
    dense = replace(spec, layers=(replace(layer, ffn=layer.used_ffn, experts=None),))
    router = 2 * 128 * spec.hidden
    assert block_flops(spec, 1, 64) == block_flops(dense, 1, 64) + router


@pytest.mark.parametrize("container", [4, 32])
def test_a_pass_reads_the_experts_of_its_rows(container: int) -> None:
    spec, fmt = routed_model(), Format.of(4)
    layer = spec.layers[0]
    dense = replace(spec, layers=(replace(layer, ffn=layer.used_ffn, experts=None),))
    router = 4 * 128 * spec.hidden
    one, whole = read_bytes(spec, 1, fmt, container), executed_bytes(spec, 1, fmt, container)
    # A wide row has fewer bytes of zero points than several narrow ones.
    assert one == pytest.approx(executed_bytes(dense, 1, fmt, container) + router, rel=2e-3)
    several = [read_bytes(spec, 1, fmt, container, rows) for rows in (1, 2, 8, 64, 4096)]
    assert several == sorted(several)
    assert several[-1] == whole
    assert one < 0.12 * whole
    assert read_bytes(dense, 1, fmt, container, 7) == executed_bytes(dense, 1, fmt, container)
