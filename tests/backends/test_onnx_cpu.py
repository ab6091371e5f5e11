"""The ONNX Runtime backend: layouts, segments, memory, threads."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import pytest

pytest.importorskip("onnxruntime")
import onnx
import onnxruntime as ort
from onnx import TensorProto

from backends import onnx_aligned, onnx_cpu, onnx_prepared, onnx_session
from backends.base import Array, BackendError, BackendUnavailable, StageOptions
from backends.onnx_cpu import OnnxCpuBackend
from backends.onnx_graph import Graph, cached_head_width
from backends.onnx_matrix import (
    EXACT_BITS,
    KERNEL_BITS,
    PackedMatrix,
    bytes_of,
    containers,
    executable,
    stack_rows,
)
from backends.onnx_session import new_session
from backends.registry import BACKENDS, backend_class, probe_all
from model.artifact import file_sha256, write_artifact
from model.checkpoint import Checkpoint
from model.errors import CheckpointError
from model.quantize import GROUP_SIZES, Format, QuantizedMatrix, Scheme, quantize, unpack
from model.reference import ReferenceModel
from model.spec import LayerSpec, ModelSpec, RopeSpec

FIXTURES = Path(__file__).parents[1] / "fixtures"

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
ROOT = Path(__file__).parents[2]
OPTIONS = StageOptions(slots=1, context_tokens=32, threads=1)
NEWEST = {2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 8: 8, 16: 32, 32: 32}
"""Stored width to executed width where the runtime has every kernel."""
ROOMY = replace(OPTIONS, memory_bytes=1 << 40, fast_prompts=True)


@pytest.mark.parametrize("columns", [64, 72, 20])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize(
    ("scheme", "symmetric"), [("rtn", False), ("rtn", True), ("truncate", True)]
)
def test_packed_matrices_hold_exactly_the_stored_values(
    columns: int, bits: int, scheme: Scheme, symmetric: bool
) -> None:
    stored = quantize(some_weights(columns), Format.of(bits, scheme, 32, symmetric))
    packed = pack(stored)
    assert packed.bits == NEWEST[bits]
    np.testing.assert_array_equal(values_of(packed), stored.dequantize())


@pytest.mark.parametrize(
    ("kernels", "changes"),
    [
        (KERNEL_BITS, {}),
        ((4, 8), {2: 4}),
        ((4,), {2: 4, 5: 32, 6: 32, 8: 32}),
        ((), dict.fromkeys((2, 3, 4, 5, 6, 8), 32)),
    ],
)
def test_codes_take_the_narrowest_kernel_that_holds_them(
    kernels: tuple[int, ...], changes: dict[int, int]
) -> None:
    assert containers(kernels) == NEWEST | changes


def test_a_width_without_a_kernel_runs_in_a_wider_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runtime that refuses 2 bits, as 1.23 does: nothing but its refusal says so."""
    session = ort.InferenceSession

    def refusing(model: bytes, *arguments: Any) -> Any:
        nodes = onnx.load_from_string(model).graph.node
        widths = [item.i for node in nodes for item in node.attribute if item.name == "bits"]
        if 2 in widths:
            raise RuntimeError("nbits_ == 4 || nbits_ == 8 was false")
        return session(model, *arguments)

    onnx_session.container_bits.cache_clear()
    monkeypatch.setattr(ort, "InferenceSession", refusing)
    try:
        assert OnnxCpuBackend.probe().container_bits[2] == 4
        spec, artifacts = stored_model(tmp_path, LAYER, layers=1, bits=2)
        reference = ReferenceModel.from_artifacts(spec, artifacts, np.float64)
        tokens = np.random.default_rng(1).integers(0, spec.vocab, 9)
        with closing(OnnxCpuBackend().load(spec, artifacts, OPTIONS)) as stage:
            found = stage.forward(0, 0, tokens)
        expected = reference.forward(tokens)[-1:]
        assert np.linalg.norm(found - expected) < 0.04 * np.linalg.norm(expected)
    finally:
        onnx_session.container_bits.cache_clear()


@pytest.mark.parametrize("bits", [2, 4, 6, 16])
def test_exact_matrices_are_the_stored_values_as_floats(bits: int) -> None:
    stored = quantize(some_weights(72), Format.of(bits))
    exact = executable(stored, EXACT_BITS)
    assert isinstance(exact, np.ndarray)
    np.testing.assert_array_equal(exact, stored.dequantize())


def test_rows_are_stacked_only_where_layouts_agree() -> None:
    weights = some_weights(64)
    four, eight = (pack(quantize(weights, Format.of(bits))) for bits in (4, 8))
    centred = pack(quantize(weights, Format.of(4, symmetric=True)))
    for matrix in (four, centred):
        both = stack_rows([matrix, matrix])
        assert isinstance(both, PackedMatrix)
        np.testing.assert_array_equal(values_of(both), np.tile(values_of(matrix), (2, 1)))
    assert stack_rows([four, eight]) is None
    assert stack_rows([four, centred]) is None
    assert stack_rows([four, weights]) is None
    dense = stack_rows([weights, weights])
    assert isinstance(dense, np.ndarray)
    assert dense.shape == (12, 64)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("name", ["llama", "opt-post", "qwen3"])
def test_rounded_activations_cost_a_few_percent_at_most(
    name: str, bits: int, group_size: int, tmp_path: Path
) -> None:
    """Relative L2 error of the logits against the same weights in float64: 1 to 4 % on these random
    checkpoints, whatever the width."""
    checkpoint = Checkpoint.open(FIXTURES / name)
    spec = checkpoint.spec
    fmt = Format.of(bits, "rtn", group_size)
    artifacts = [
        (block, write_artifact(tmp_path, block, checkpoint.block(block), fmt).path)
        for block in range(spec.block_count)
    ]
    tokens = np.random.default_rng(1).integers(0, spec.vocab, 20)
    expected = ReferenceModel.from_artifacts(spec, artifacts, np.float64).forward(tokens)
    with closing(OnnxCpuBackend().load(spec, artifacts, OPTIONS)) as stage:
        rows = [stage.forward(0, at, tokens[at : at + 1]) for at in range(20)]
        chunk = stage.forward(0, 0, tokens)
    error = np.linalg.norm(np.concatenate(rows) - expected) / np.linalg.norm(expected)
    assert error < 0.06
    assert np.linalg.norm(chunk[0] - rows[-1][0]) < 0.06 * np.linalg.norm(expected[-1])


@pytest.mark.parametrize("columns", [64, 72, 20])
def test_bytes_are_within_half_a_step_of_the_stored_values(columns: int) -> None:
    weights = some_weights(columns)
    weights[2] *= 1e4
    weights[4] = 0
    stored = quantize(weights, Format.of(4))
    narrow = bytes_of(stored)
    values = stored.dequantize()
    assert narrow.codes.shape == (columns, 6)
    assert np.abs(narrow.codes.astype(int)).max() == 127
    error = np.abs(narrow.codes.T * narrow.scales[:, None] - values).max(axis=1)
    assert (error <= np.abs(values).max(axis=1) / 254 * 1.0001).all()
    assert not error[4]


def test_each_row_of_activations_has_a_scale_of_its_own() -> None:
    """Relative L2 error of a row's products, whatever the other rows are: 1 % on normal values."""
    random = np.random.default_rng(0)
    stored = quantize(random.standard_normal((96, 256), np.float32), Format.of(8))
    bias = random.standard_normal(96, np.float32)
    sizes = np.array([1e-4, 1e-3, 0.01, 0.1, 1, 10, 100, 1000, 0])
    rows = (random.standard_normal((9, 256)) * sizes[:, None]).astype(np.float32)
    graph = Graph()
    value = graph.input("hidden", TensorProto.FLOAT, (1, "n", 256))
    result = graph.linear(value, bytes_of(stored), bias)
    graph.output(result, "output", TensorProto.FLOAT, (1, "n", 96))
    (found,) = new_session(graph, 1).run(["output"], {"hidden": rows[None]})
    expected = rows @ stored.dequantize().T
    error = np.linalg.norm(found[0] - bias - expected, axis=1)
    assert (error <= 0.02 * np.linalg.norm(expected, axis=1) + 1e-5).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", ["llama", "opt-post", "qwen3"])
def test_prompts_in_bytes_cost_a_few_percent_at_most(name: str, bits: int, tmp_path: Path) -> None:
    """As above, of a prompt that runs through the copy and of tokens behind it, which do not: about
    a quarter more."""
    checkpoint = Checkpoint.open(FIXTURES / name)
    spec = checkpoint.spec
    artifacts = [
        (block, write_artifact(tmp_path, block, checkpoint.block(block), Format.of(bits)).path)
        for block in range(spec.block_count)
    ]
    tokens = np.random.default_rng(1).integers(0, spec.vocab, 24)
    expected = ReferenceModel.from_artifacts(spec, artifacts, np.float64).forward(tokens)
    with closing(OnnxCpuBackend().load(spec, artifacts, ROOMY)) as stage:
        rows = [stage.forward(0, 0, tokens[:20])]
        rows += [stage.forward(0, at, tokens[at : at + 1]) for at in range(20, 24)]
    error = np.linalg.norm(np.concatenate(rows) - expected[19:])
    assert error < 0.08 * np.linalg.norm(expected[19:])


def test_bytes_are_only_for_prompts_of_stages_with_room_that_may_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, artifacts = stored_model(tmp_path / "four", LAYER, layers=2, bits=4)
    plain, roomy = some_results(spec, artifacts, OPTIONS), some_results(spec, artifacts, ROOMY)
    # Prompts of fewer rows than pay take the same way as tokens.
    np.testing.assert_array_equal(roomy, plain)
    long = some_results(spec, artifacts, OPTIONS, rows=20)
    in_bytes = some_results(spec, artifacts, ROOMY, rows=20)
    assert not np.array_equal(in_bytes, long)
    assert_similar(in_bytes, long)
    with closing(OnnxCpuBackend().load(spec, artifacts, OPTIONS)) as stage:
        base_bytes = stage.memory_bytes
    with closing(OnnxCpuBackend().load(spec, artifacts, ROOMY)) as stage:
        needed_bytes = stage.memory_bytes
    weights = 2 * (64 * 64 * 3 + 64 * 96 * 3)
    assert weights < needed_bytes - base_bytes < 1.2 * weights
    exact = some_results(spec, artifacts, replace(OPTIONS, exact=True), rows=20)
    same = some_results(spec, artifacts, replace(ROOMY, exact=True), rows=20)
    np.testing.assert_array_equal(same, exact)
    small = replace(ROOMY, memory_bytes=base_bytes)
    np.testing.assert_array_equal(some_results(spec, artifacts, small, rows=20), long)
    wide = stored_model(tmp_path / "wide", LAYER, layers=2, bits=16)[1]
    mixed = [*artifacts[:2], wide[2], artifacts[3]]
    expected = some_results(spec, mixed, OPTIONS, rows=20)
    np.testing.assert_array_equal(some_results(spec, mixed, ROOMY, rows=20), expected)
    monkeypatch.setattr(onnx_cpu, "sums_bytes_exactly", lambda: False)
    np.testing.assert_array_equal(some_results(spec, artifacts, ROOMY, rows=20), long)


def test_prepared_bytes_are_those_that_were_made(tmp_path: Path) -> None:
    layer = replace(LAYER, hidden=256, ffn=512)
    spec, artifacts = stored_model(tmp_path / "blocks", layer, layers=3, bits=4)
    expected = some_results(spec, artifacts, ROOMY, rows=20)
    home = tmp_path / "prepared"
    options = replace(ROOMY, prepared_dir=home)
    for _ in ("made", "opened"):
        np.testing.assert_allclose(
            some_results(spec, artifacts, options, rows=20), expected, atol=1e-5
        )
        assert len(list(home.iterdir())) == 3  # The layers, the head, and the layers as bytes.
    # Within a limit nothing is kept that would exceed it.
    limit = 3 * sum(path.stat().st_size for _, path in artifacts)
    few = tmp_path / "few"
    some_results(spec, artifacts, replace(options, prepared_dir=few, prepared_bytes=limit))
    assert 0 < sum(path.stat().st_size for path in few.glob("*/*")) <= limit
    some_results(spec, artifacts, replace(options, prepared_dir=few, prepared_bytes=0))


def test_embedding_and_head_run_without_layers_from_prepared_files(tmp_path: Path) -> None:
    spec, artifacts = stored_model(tmp_path / "blocks", LAYER, layers=1, bits=8)
    expected = some_results(spec, artifacts, OPTIONS, rows=1)
    options = replace(OPTIONS, prepared_dir=tmp_path / "prepared")
    tokens = np.random.default_rng(1).integers(0, spec.vocab, 2)
    stages = [OnnxCpuBackend().load(spec, [artifact], options) for artifact in artifacts]
    for at, token in enumerate(tokens):
        rows = token.reshape(1)
        for stage in stages:
            rows = stage.forward(0, at, rows)
        np.testing.assert_allclose(rows[0], expected[at], atol=1e-5)
    for stage in stages:
        stage.close()


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
    expected = some_results(spec, artifacts, OPTIONS)
    monkeypatch.setattr(onnx_cpu, "SEGMENT_BYTES", 1)
    assert_similar(some_results(spec, artifacts, OPTIONS), expected)
    prepared = replace(OPTIONS, prepared_dir=tmp_path / "prepared")
    for _ in ("made", "opened"):
        assert_similar(some_results(spec, artifacts, prepared), expected)
    exact = replace(prepared, exact=True)
    reference = some_results(spec, artifacts, replace(exact, prepared_dir=None))
    np.testing.assert_allclose(some_results(spec, artifacts, exact), reference, atol=1e-5)


def test_prepared_weights_are_used_only_for_what_they_were_made_from(tmp_path: Path) -> None:
    # The runtime does not read back all smaller ones as it saved them: they are not kept.
    layer = replace(LAYER, hidden=256, ffn=512)
    spec, artifacts = stored_model(tmp_path / "one", layer, layers=2, bits=4)
    home = tmp_path / "prepared"
    options = replace(OPTIONS, prepared_dir=home)
    expected = some_results(spec, artifacts, options)
    kept = sorted(home.iterdir())
    assert len(kept) == 2  # The layers and the head.
    times = [path.stat().st_mtime_ns for path in kept]
    some_results(spec, artifacts, options)
    assert [path.stat().st_mtime_ns for path in kept] == times
    # Damaged: made again.
    weights = next(kept[0].glob("weights-*.bin"))
    weights.write_bytes(weights.read_bytes()[:-1])
    (kept[1] / "graph-0.onnx").write_bytes(b"not a model")
    (kept[1] / "facts.json").write_text("[]")
    assert_similar(some_results(spec, artifacts, options), expected)
    assert sorted(home.iterdir()) == kept
    # Another context, other weights: nothing of the old remains, and nothing of it is used.
    some_results(spec, artifacts, replace(options, context_tokens=20))
    assert len(set(home.iterdir()) - set(kept)) == 2
    others = stored_model(tmp_path / "two", layer, layers=2, bits=4, seed=1)[1]
    different = some_results(spec, others, options)
    assert_similar(different, some_results(spec, others, OPTIONS))
    assert not np.allclose(different, expected, atol=0.1)
    assert len(list(home.iterdir())) == 2


def test_what_was_prepared_before_makes_room_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = replace(LAYER, hidden=256, ffn=512)
    spec, artifacts = stored_model(tmp_path / "one", layer, layers=2, bits=4)
    home = tmp_path / "prepared"
    options = replace(OPTIONS, prepared_dir=home)
    some_results(spec, artifacts, options)
    old = set(home.iterdir())
    (home / ".new-of-a-killed-load").mkdir()
    seen: list[set[Path]] = []
    write = onnx_prepared._write

    def watched(*arguments: Any) -> None:
        seen.append(set(home.iterdir()) & {*old, home / ".new-of-a-killed-load"})
        write(*arguments)

    monkeypatch.setattr(onnx_prepared, "_write", watched)
    some_results(spec, artifacts, replace(options, context_tokens=20))
    assert len(old) == 2
    assert seen == [set(), set()]
    assert len(list(home.iterdir())) == 2


def test_prepared_weights_take_no_more_than_they_may(tmp_path: Path) -> None:
    layer = replace(LAYER, hidden=256, ffn=1024)
    for bits in (2, 3, 4, 8, 16):
        spec, artifacts = stored_model(tmp_path / f"{bits}", layer, layers=2, bits=bits)
        home = tmp_path / f"{bits}" / "prepared"
        some_results(spec, artifacts, replace(OPTIONS, prepared_dir=home))
        kept = sum(path.stat().st_size for path in home.rglob("*") if path.is_file())
        stored = sum(path.stat().st_size for _, path in artifacts)

        assert 0 < kept <= OnnxCpuBackend.PREPARED_FACTOR * stored


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
def test_prepared_weights_take_memory_only_as_they_are_read(tmp_path: Path) -> None:
    layer = replace(LAYER, hidden=256, ffn=512)
    spec, artifacts = stored_model(tmp_path / "blocks", layer, layers=2, bits=4)
    home = tmp_path / "prepared"
    options = replace(OPTIONS, prepared_dir=home)
    expected = some_results(spec, artifacts, options)
    with closing(OnnxCpuBackend().load(spec, artifacts, options)) as stage:
        assert resident_bytes(home) == 0
        tokens = np.random.default_rng(1).integers(0, spec.vocab, 9)
        np.testing.assert_array_equal(stage.forward(0, 0, tokens)[0], expected[0])
        assert resident_bytes(home) > 0


def test_blocks_run_alone_from_prepared_weights(tmp_path: Path) -> None:
    spec, artifacts = stored_model(
        tmp_path / "blocks", replace(LAYER, hidden=256), layers=1, bits=4
    )
    for block in range(spec.block_count):
        inputs = np.ones((3, 256), np.float32) if block else np.arange(3)
        options = replace(OPTIONS, prepared_dir=tmp_path / f"{block}")
        results = []
        for chosen in (OPTIONS, options, options):
            with closing(
                OnnxCpuBackend().load(spec, artifacts[block : block + 1], chosen)
            ) as stage:
                results.append(stage.forward(0, 0, inputs))
        np.testing.assert_array_equal(results[1], results[0])
        np.testing.assert_array_equal(results[2], results[0])
        assert bool(list(tmp_path.glob(f"{block}/*"))) == (block > 0)


def test_a_disk_without_room_prepares_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, artifacts = stored_model(tmp_path, LAYER, layers=2, bits=4)
    monkeypatch.setattr(onnx_prepared, "DISK_FACTOR", 1e12)
    home = tmp_path / "prepared"
    results = some_results(spec, artifacts, replace(OPTIONS, prepared_dir=home))
    np.testing.assert_array_equal(results, some_results(spec, artifacts, OPTIONS))
    assert list(home.iterdir()) == []


def test_neighbouring_slots_share_a_call_and_others_do_not(tmp_path: Path) -> None:
    spec, artifacts = stored_model(tmp_path, LAYER, layers=2, bits=4)
    options = replace(OPTIONS, slots=6, exact=True)
    tokens = np.random.default_rng(2).integers(0, spec.vocab, (6, 9))
    with closing(OnnxCpuBackend().load(spec, artifacts, options)) as stage:
        lengths = [3, 1, 8, 5, 2, 7]
        for slot, length in enumerate(lengths):
            stage.forward(slot, 0, tokens[slot, :length])
        for slots in ([0, 1, 2, 3, 4, 5], [5, 3, 2, 0], [4]):
            at = [lengths[slot] for slot in slots]
            rows = tokens[slots, at]
            expected = [
                stage.forward(s, p, rows[i : i + 1])[0]
                for i, (s, p) in enumerate(zip(slots, at, strict=True))
            ]
            np.testing.assert_allclose(stage.decode(slots, at, rows), expected, atol=1e-5)
        with pytest.raises(BackendError, match="distinct"):
            stage.decode([1, 1], [1, 1], tokens[0, :2])
        with pytest.raises(BackendError, match="slot"):
            stage.decode([6], [1], tokens[0, :1])


@pytest.mark.parametrize(("bits", "base"), [(4, OPTIONS), (8, OPTIONS), (32, OPTIONS), (4, ROOMY)])
def test_memory_is_what_the_process_grows_by(bits: int, base: StageOptions, tmp_path: Path) -> None:
    layer = replace(LAYER, hidden=768, heads=12, kv_heads=12, head_dim=64, ffn=3072)
    spec, artifacts = stored_model(tmp_path, layer, layers=3, bits=bits)
    options = replace(base, slots=2, context_tokens=1024)
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


def test_every_thread_that_runs_a_stage_reads_denormals_as_zero() -> None:
    """In a process of its own: the runtime does it once a process, and threads inherit it."""
    program = """
import threading, numpy as np
from backends.onnx_session import flush_denormals
tiny, one = np.array([1e-40], np.float32), np.array([1], np.float32)
def run():
    before = bool((tiny * one)[0])
    flush_denormals()
    print(before, bool((tiny * one)[0]))
for _ in range(2):
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
"""
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert answer.stdout.split() == ["True", "False"] * 2


def some_weights(columns: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(columns).standard_normal((6, columns)).astype(np.float32)


def some_results(
    spec: ModelSpec, artifacts: list[tuple[int, Path]], options: StageOptions, rows: int = 9
) -> npt.NDArray[np.float32]:
    """Logits of a prompt of ``rows`` tokens and of the token behind it."""
    tokens = np.random.default_rng(1).integers(0, spec.vocab, rows + 1)
    with closing(OnnxCpuBackend().load(spec, artifacts, options)) as stage:
        prompt, last = tokens[:rows], tokens[rows:]
        return np.concatenate([stage.forward(0, 0, prompt), stage.forward(0, rows, last)])


def resident_bytes(directory: Path) -> int:
    """What this process has in memory of the files in ``directory``."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if line[:1].islower() or line[:1].isdigit():
            ours = f" {directory}/" in line
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) << 10
    return total


def assert_similar(actual: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> None:
    """Equal but for what a last digit more or less does to the rounding of activations."""
    assert actual.shape == expected.shape
    assert np.linalg.norm(actual - expected) < 0.03 * np.linalg.norm(expected)


def pack(stored: QuantizedMatrix) -> PackedMatrix:
    packed = executable(stored, NEWEST)
    assert isinstance(packed, PackedMatrix)
    return packed


def values_of(packed: PackedMatrix) -> npt.NDArray[np.float32]:
    """What MatMulNBits multiplies with."""
    rows, blocks, _ = packed.codes.shape
    codes = unpack(packed.codes, packed.bits)
    zeros: npt.NDArray[np.uint8] = np.full((rows, blocks), 1 << (packed.bits - 1), np.uint8)
    if packed.zero_points is not None:
        padding = -packed.zero_points.shape[1] % packed.bits
        zeros = unpack(np.pad(packed.zero_points, ((0, 0), (0, padding))), packed.bits)[:, :blocks]
    values = (codes.astype(np.float32) - zeros[:, :, None]) * packed.scales[:, :, None]
    return values.reshape(rows, -1)[:, : packed.columns]


def stored_model(
    directory: Path, layer: LayerSpec, *, layers: int, bits: int, seed: int = 0
) -> tuple[ModelSpec, list[tuple[int, Path]]]:
    spec = ModelSpec(
        vocab=64,
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
    random = np.random.default_rng(seed)
    artifacts = []
    for block in range(spec.block_count):
        tensors = {
            name: random.standard_normal(shape, np.float32) * np.float32(0.1)
            for name, shape in spec.block_tensors(block).items()
        }
        artifact = write_artifact(directory, block, tensors, Format.of(bits))
        artifacts.append((block, artifact.path))
    return spec, artifacts


@pytest.mark.parametrize("hidden", [36, 40, 72, 104])
@pytest.mark.parametrize("bits", [2, 4, 8, 16, 32])
def test_prepared_weights_of_any_hidden_size(tmp_path: Path, hidden: int, bits: int) -> None:
    """Vectors of no multiple of 64 bytes must not move what follows: it ends the process."""
    layer = replace(LAYER, hidden=hidden, ffn=hidden + 4)
    spec, artifacts = stored_model(tmp_path / "model", layer, layers=2, bits=bits)
    home = tmp_path / "prepared"
    expected = some_results(spec, artifacts, OPTIONS)
    for _ in range(2):
        results = some_results(spec, artifacts, replace(OPTIONS, prepared_dir=home))
        assert_similar(results, expected)
    for graph in home.glob("*/graph-*.onnx"):
        model = onnx.load(graph, load_external_data=False)
        for tensor in model.graph.initializer:
            assert all(begin % 64 == 0 for begin, _ in onnx_aligned._spans(tensor))


@pytest.mark.parametrize("name", ["graph-0.onnx", "facts.json", "weights-0.bin"])
@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_flipped_bytes_of_prepared_files_are_found(tmp_path: Path, name: str, place: float) -> None:
    layer = replace(LAYER, hidden=256, ffn=512)
    spec, artifacts = stored_model(tmp_path / "one", layer, layers=2, bits=4)
    home = tmp_path / "prepared"
    options = replace(OPTIONS, prepared_dir=home)
    with closing(OnnxCpuBackend().load(spec, artifacts, options)) as stage:
        assert stage.kept_files == {}  # They were made in this load.
    whole = {path: path.read_bytes() for path in home.glob(f"*/{name}")}
    for path, content in whole.items():
        data = bytearray(content)
        data[int(place * len(data))] ^= 1
        path.write_bytes(data)
    with closing(OnnxCpuBackend().load(spec, artifacts, options)) as stage:
        damaged = [path for path, sha256 in stage.kept_files.items() if file_sha256(path) != sha256]
    if name != "weights-0.bin":
        assert damaged == []  # They were made again, as are the graphs that belong to them.
    # ONNX Runtime finds some damage itself; then the file was made again in this load.
    made_again = [path for path in whole if path.read_bytes() == whole[path]]
    assert {*damaged, *made_again} >= whole.keys()


def test_nothing_is_kept_of_damaged_blocks(tmp_path: Path) -> None:
    layer = replace(LAYER, hidden=256, ffn=512)
    spec, artifacts = stored_model(tmp_path / "one", layer, layers=2, bits=4)
    path = artifacts[1][1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    options = replace(OPTIONS, prepared_dir=tmp_path / "prepared")
    with pytest.raises(CheckpointError, match="damaged"):
        OnnxCpuBackend().load(spec, artifacts, options)
    assert not list(tmp_path.glob("prepared/*/weights-*"))


def test_a_pass_that_lets_others_compute_between_layers_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_cpu, "SEGMENT_BYTES", 1)
    spec, artifacts = stored_model(tmp_path, LAYER, layers=3, bits=8)
    backend, options, calls = OnnxCpuBackend(), replace(OPTIONS, slots=2), 0
    with (
        closing(backend.load(spec, artifacts, options)) as stage,
        closing(backend.load(spec, artifacts, options)) as other,
    ):

        def between() -> float:
            nonlocal calls
            calls += 1
            other.forward(0, 0, np.arange(5)[::-1])
            return 1.0

        def passes() -> list[Array]:
            return [
                stage.forward(0, 0, np.arange(7)),
                stage.forward(1, 0, np.arange(7)[::-1]),
                stage.forward(0, 7, np.array([3])),
                stage.decode([0, 1], [8, 7], np.array([4, 5])),
            ]

        expected = passes()
        stage.between = between
        found = passes()
    assert calls == 4 * 3  # Between three layers and the head.
    for one, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, wanted)
