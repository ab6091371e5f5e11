"""What is particular to the ONNX Runtime backend: layouts, segments, memory, thread hygiene."""

from __future__ import annotations

import gc
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil
import pytest

pytest.importorskip("onnxruntime")

from backends import onnx_cpu
from backends.base import BackendError, BackendUnavailable, StageOptions
from backends.onnx_cpu import OnnxCpuBackend
from backends.onnx_graph import Graph, PackedMatrix, cached_head_width, stack_rows
from backends.registry import BACKENDS, backend_class, probe_all
from model.artifact import write_artifact
from model.quantize import Format, QuantizedMatrix, Scheme, quantize
from model.spec import LayerSpec, ModelSpec, RopeSpec

LAYER = LayerSpec(
    hidden=64,
    heads=4,
    kv_heads=2,
    head_dim=16,
    ffn=96,
    norm="rmsnorm",
    norm_eps=1e-6,
    norm_position="pre",
    activation="silu",
    gated=True,
    qkv_bias=True,
    out_bias=False,
    mlp_bias=False,
    rope=RopeSpec(theta=10000.0),
)
OPTIONS = StageOptions(slots=1, context_tokens=32, threads=1)


@pytest.mark.parametrize("columns", [64, 72, 20])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize(
    ("scheme", "symmetric"), [("rtn", False), ("rtn", True), ("truncate", True)]
)
def test_packed_planes_hold_exactly_the_stored_values(
    columns: int, bits: int, scheme: Scheme, symmetric: bool
) -> None:
    weights = np.random.default_rng(bits).standard_normal((6, columns)).astype(np.float32)
    stored = quantize(weights, Format.of(bits, scheme, 32, symmetric))
    packed = pack(stored)
    assert packed.planes == (1 if bits <= 4 else 2)
    expected = stored.dequantize()
    # Adding two planes rounds once more than decoding a whole code does.
    atol = 2**-22 * float(np.abs(expected).max())
    np.testing.assert_allclose(values_of(packed), expected, rtol=0, atol=atol)


def test_rows_are_stacked_only_where_layouts_agree() -> None:
    weights = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    four, eight = (pack(quantize(weights, Format.of(bits))) for bits in (4, 8))
    both = stack_rows([four, four])
    assert isinstance(both, PackedMatrix)
    np.testing.assert_array_equal(values_of(both), np.tile(values_of(four), (2, 1)))
    assert stack_rows([four, eight]) is None
    assert stack_rows([four, weights]) is None
    dense = stack_rows([weights, weights])
    assert isinstance(dense, np.ndarray)
    assert dense.shape == (10, 64)


@pytest.mark.parametrize(
    ("head_dim", "rotary", "width"),
    [(64, True, 64), (80, True, 80), (8, True, 16), (8, False, 8), (10, False, 16)],
)
def test_heads_are_padded_only_where_the_kernel_needs_it(
    head_dim: int, rotary: bool, width: int
) -> None:
    rope = RopeSpec(theta=10000.0) if rotary else None
    assert cached_head_width(replace(LAYER, head_dim=head_dim, rope=rope)) == width


@pytest.mark.parametrize("bits", [4, 8, 32])
def test_a_stage_in_many_segments_gives_what_one_gives(
    bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, artifacts = stored_model(tmp_path, LAYER, layers=4, bits=bits)
    hidden = np.random.default_rng(1).standard_normal((9, 64)).astype(np.float32)
    whole = OnnxCpuBackend().load(spec, artifacts[1:-1], OPTIONS)
    expected = [whole.forward(0, 0, hidden), whole.forward(0, 9, hidden[:1])]
    whole.close()
    monkeypatch.setattr(onnx_cpu, "SEGMENT_BYTES", 1)
    parts = OnnxCpuBackend().load(spec, artifacts[1:-1], OPTIONS)
    actual = [parts.forward(0, 0, hidden), parts.forward(0, 9, hidden[:1])]
    parts.close()
    for result, wanted in zip(actual, expected, strict=True):
        np.testing.assert_allclose(result, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8, 32])
def test_memory_is_what_the_process_grows_by(bits: int, tmp_path: Path) -> None:
    layer = replace(LAYER, hidden=768, heads=12, kv_heads=12, head_dim=64, ffn=3072)
    spec, artifacts = stored_model(tmp_path, layer, layers=3, bits=bits)
    options = replace(OPTIONS, slots=2, context_tokens=1024)
    spec = replace(spec, max_context=1024)
    # What the first stage of a process costs is the library's.
    OnnxCpuBackend().load(spec, artifacts[1:2], OPTIONS).close()
    gc.collect()
    before = psutil.Process().memory_info().rss
    stage = OnnxCpuBackend().load(spec, artifacts[1:-1], options)
    stage.forward(0, 0, np.zeros((64, 768), np.float32))
    grown = psutil.Process().memory_info().rss - before
    stated = stage.memory_bytes
    stage.close()
    assert 0.6 * stated < grown < 1.25 * stated


def test_memory_is_freed_by_close(tmp_path: Path) -> None:
    layer = replace(LAYER, hidden=512, ffn=2048)
    spec, artifacts = stored_model(tmp_path, layer, layers=4, bits=32)
    OnnxCpuBackend().load(spec, artifacts, OPTIONS).close()
    before = psutil.Process().memory_info().rss
    for _ in range(4):
        stage = OnnxCpuBackend().load(spec, artifacts, OPTIONS)
        stated = stage.memory_bytes
        stage.close()
    assert psutil.Process().memory_info().rss - before < stated


def test_closing_ends_the_threads_of_a_stage(tmp_path: Path) -> None:
    spec, artifacts = stored_model(tmp_path, LAYER, layers=1, bits=4)
    before = psutil.Process().num_threads()
    stage = OnnxCpuBackend().load(spec, artifacts, replace(OPTIONS, threads=3))
    assert psutil.Process().num_threads() > before
    stage.close()
    assert psutil.Process().num_threads() <= before


def test_a_stage_runs_in_another_thread_than_it_was_loaded_in(tmp_path: Path) -> None:
    spec, artifacts = stored_model(tmp_path, LAYER, layers=1, bits=4)
    stage = OnnxCpuBackend().load(spec, artifacts, OPTIONS)
    results: list[npt.NDArray[np.float32]] = []
    tokens = np.array([3, 1, 4])
    worker = threading.Thread(target=lambda: results.append(stage.forward(0, 0, tokens)))
    worker.start()
    worker.join()
    np.testing.assert_array_equal(results[0], stage.forward(0, 0, tokens))
    stage.close()


def test_a_head_of_odd_width_is_refused(tmp_path: Path) -> None:
    layer = replace(LAYER, head_dim=15, rope=None)
    spec, artifacts = stored_model(tmp_path, layer, layers=1, bits=4)
    with pytest.raises(BackendError, match="odd"):
        OnnxCpuBackend().load(spec, artifacts, OPTIONS)


def test_failures_of_the_runtime_are_backend_errors_of_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, artifacts = stored_model(tmp_path, LAYER, layers=1, bits=4)
    monkeypatch.setattr(Graph, "serialized", lambda _: b"not a model")
    with pytest.raises(BackendError) as caught:
        OnnxCpuBackend().load(spec, artifacts, OPTIONS)
    assert "\n" not in str(caught.value)


def test_registry_names_what_it_has() -> None:
    with pytest.raises(BackendUnavailable, match="onnx_cpu") as caught:
        backend_class("abacus")
    assert caught.value.backend == "abacus"
    assert set(probe_all()) == set(BACKENDS)


def pack(stored: QuantizedMatrix) -> PackedMatrix:
    container = 4 if stored.format.bits <= 4 else 8
    codes, zeros = stored.in_container(container)
    layout = PackedMatrix.of_nibbles if container == 4 else PackedMatrix.of_bytes
    return layout(stored.shape[1], codes, stored.scales(), zeros)


def values_of(packed: PackedMatrix) -> npt.NDArray[np.float32]:
    """What MatMulNBits multiplies with, planes summed."""
    rows, blocks, _ = packed.codes.shape
    codes = np.stack([packed.codes & 15, packed.codes >> 4], axis=-1).reshape(rows, blocks, -1)
    zeros = np.stack([packed.zero_points & 15, packed.zero_points >> 4], axis=-1)
    zeros = zeros.reshape(rows, -1)[:, :blocks]
    values = (codes.astype(np.float32) - zeros[:, :, None]) * packed.scales[:, :, None]
    planes = values.reshape(rows, packed.planes, -1)[:, :, : packed.columns]
    summed: npt.NDArray[np.float32] = planes.sum(axis=1)
    return summed


def stored_model(
    directory: Path, layer: LayerSpec, *, layers: int, bits: int
) -> tuple[ModelSpec, list[tuple[int, Path]]]:
    spec = ModelSpec(
        vocab=50,
        hidden=layer.hidden,
        embed_dim=layer.hidden,
        max_context=64,
        layers=(layer,) * layers,
        learned_positions=0,
        position_offset=0,
        final_norm=True,
        tied_head=False,
        bos_token=None,
        eos_tokens=(2,),
    )
    random = np.random.default_rng(0)
    artifacts = []
    for block in range(spec.block_count):
        tensors = {
            name: random.standard_normal(shape, np.float32) * np.float32(0.1)
            for name, shape in spec.block_tensors(block).items()
        }
        artifact = write_artifact(directory, block, tensors, Format.of(bits))
        artifacts.append((block, artifact.path))
    return spec, artifacts
