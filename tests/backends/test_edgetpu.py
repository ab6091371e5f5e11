"""Stages of int8 products: the host's part exactly, the whole within what 8 bits cost.

What runs here is `tflite_cpu`: the files of an Edge TPU, interpreted on the CPU.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import importlib.metadata
import itertools
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from tokenizers import Tokenizer

from backends import edgetpu
from backends.base import Backend, BackendError, BackendUnavailable, StageOptions
from backends.edgetpu import Int8Stage, TfliteCpuBackend
from backends.edgetpu_product import Counts, Int8Weights
from backends.edgetpu_runtime import Engine
from backends.onnx_cpu import OnnxCpuBackend
from calibration.layers import timing_tasks
from calibration.quality.blocks import measure_quality
from calibration.quality.students import Options
from calibration.store import CalibrationStore
from model.artifact import read_block
from model.checkpoint import Checkpoint
from model.costs import executed_bytes, kv_bytes, stage_buffer_bytes
from model.divergence import divergences
from model.errors import CheckpointError
from model.passages import split_passages
from model.quantize import Format, QuantizedMatrix
from model.reference import ReferenceModel
from model.spec import ModelSpec
from tests.backends.test_conformance import (
    CHECKPOINTS,
    EXPERT_LAYERS,
    FIXTURES,
    LAYERS,
    Artifacts,
    random_model,
    some_tokens,
    stored,
)

TINY_OPT = Path(__file__).parents[2] / "examples" / "tiny-opt"

EXACT_ATOL = 1e-5
"""Of the host's arithmetic, relative to the largest logit: fp32 in another order."""

INT8_ERROR = 0.1
"""Of all rows' logits, as a share of their norm: 2 or 3 random layers of hidden 32 to 64, whose
attention makes the most of every error. The demo model's, below, are what to expect of a real one.
"""

REPEAT_ERROR = 0.02
"""Between two ways of running the same rows: a rounding error of the host may turn a code."""

CONTEXT = 48
COUNT = 33
OPTIONS = StageOptions(slots=8, context_tokens=CONTEXT, threads=1, exact=True)

Logits = npt.NDArray[np.floating]


class ExactProduct:
    """In place of Int8Product: the same weights, multiplied in float."""

    def __init__(self, weights: Int8Weights, _: Engine) -> None:
        self.counts = Counts()
        self._matrix = weights.codes * weights.steps[:, None]

    def __call__(self, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        product: npt.NDArray[np.float32] = rows @ self._matrix.T
        return product


@pytest.fixture(scope="module")
def backend() -> Backend:
    try:
        TfliteCpuBackend.probe()
    except BackendUnavailable as unavailable:
        pytest.skip(unavailable.reason)
    return TfliteCpuBackend()


@pytest.mark.usefixtures("backend")
def test_times_are_taken_again_when_the_runtime_of_the_ends_is_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """ONNX Runtime has the embedding and the head. The version is in the key of kept times."""
    before = TfliteCpuBackend.probe().version
    real = importlib.metadata.version
    changed = {"onnxruntime": "99.0"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: changed.get(name) or real(name))
    after = TfliteCpuBackend.probe().version
    assert after != before
    assert "onnxruntime 99.0" in after


@pytest.fixture(params=[*CHECKPOINTS, *LAYERS])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[ModelSpec, Artifacts]:
    """Every family and every feature at 8 bits."""
    return stored_model(request.param, tmp_path)


def stored_model(name: str, directory: Path) -> tuple[ModelSpec, Artifacts]:
    if name in LAYERS:
        spec, tensors = random_model(LAYERS[name])
    else:
        checkpoint = Checkpoint.open(FIXTURES / name)
        spec = checkpoint.spec
        tensors = [checkpoint.block(block) for block in range(spec.block_count)]
    return spec, stored(directory, tensors, Format.of(8))


@pytest.mark.parametrize("name", ["experts", "experts-clipped-sinks"])
def test_experts_are_refused_by_name(name: str, tmp_path: Path) -> None:
    """Neither loading nor compiling begins."""
    spec, tensors = random_model(EXPERT_LAYERS[name])
    artifacts = stored(tmp_path, tensors, Format.of(8))
    with pytest.raises(BackendError, match="layer 0 has a mixture of experts, which no Edge TPU"):
        edgetpu.product_files(spec, artifacts, tmp_path)
    tasks = timing_tasks(spec, [8], {8: 8}, experts=False)
    assert {task.kind for task in tasks} == {"embedding", "head"}


def per_row_reference(spec: ModelSpec, artifacts: Artifacts) -> ReferenceModel:
    """The model with its layers' weights as the files hold them, in float64."""
    blocks = []
    for block, path in artifacts:
        _, tensors = read_block(path, spec, block)
        if spec.block_kind(block) == "layer":
            for name, tensor in tensors.items():
                if isinstance(tensor, QuantizedMatrix):
                    weights = Int8Weights.of(tensor.dequantize())
                    tensors[name] = weights.codes * weights.steps[:, None]
        blocks.append(tensors)
    return ReferenceModel(spec, blocks, dtype=np.float64)


def test_the_host_computes_what_the_reference_does(
    backend: Backend, model: tuple[ModelSpec, Artifacts], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edgetpu, "Int8Product", ExactProduct)
    spec, artifacts = model
    tokens, others = some_tokens(spec, COUNT), some_tokens(spec, COUNT, seed=2)
    expected, expected_others = (
        per_row_reference(spec, artifacts).forward(sequence) for sequence in (tokens, others)
    )

    def close(actual: Logits, wanted: Logits) -> None:
        atol = EXACT_ATOL * max(1.0, float(np.abs(wanted).max()))
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=atol)

    with closing(backend.load(spec, artifacts, OPTIONS)) as stage:
        close(stage.forward(0, 0, tokens), expected[-1:])
        position = 0
        for rows in (7, 1, 1, 13, 2, 9):
            end = position + rows
            close(stage.forward(1, position, tokens[position:end]), expected[end - 1 : end])
            close(stage.forward(0, position, others[position:end]), expected_others[end - 1 : end])
            position = end
        # Back, and on with other tokens.
        middle = COUNT // 2
        mixed = np.concatenate([others[:middle], tokens[middle:]])
        wanted = per_row_reference(spec, artifacts).forward(mixed)
        close(stage.forward(0, middle, mixed[middle:]), wanted[-1:])


def test_eight_bits_cost_what_is_stated(
    backend: Backend, model: tuple[ModelSpec, Artifacts]
) -> None:
    spec, artifacts = model
    tokens = some_tokens(spec, COUNT)
    expected = ReferenceModel.from_artifacts(spec, artifacts, np.float64).forward(tokens)
    with closing(backend.load(spec, artifacts, OPTIONS)) as stage:
        last = stage.forward(0, 0, tokens)
        rows = np.concatenate([stage.forward(1, at, tokens[at : at + 1]) for at in range(COUNT)])
    assert np.linalg.norm(rows - expected) < INT8_ERROR * np.linalg.norm(expected)
    assert_alike(last, rows[-1:])


@pytest.mark.parametrize("sequences", [1, 2, 8])
@pytest.mark.parametrize("name", ["llama", "opt-post", "qwen3"])
def test_several_sequences_at_once(
    backend: Backend, name: str, sequences: int, tmp_path: Path
) -> None:
    spec, artifacts = stored_model(name, tmp_path)
    stage = backend.load(spec, artifacts, OPTIONS)
    assert isinstance(stage, Int8Stage)
    with closing(stage):
        prompts = [some_tokens(spec, 3 + 2 * slot, seed=slot) for slot in range(sequences)]
        for slot, prompt in enumerate(prompts):
            stage.forward(slot, 0, prompt[:-1])
        # Slots in another order than they were filled in.
        slots = list(range(sequences))[::-1]
        positions = [len(prompts[slot]) - 1 for slot in slots]
        lasts = np.array([prompts[slot][-1] for slot in slots])
        together = stage.decode(slots, positions, lasts)
        assert together.shape == (sequences, spec.vocab)
        for row, slot in enumerate(slots):
            alone = stage.forward(slot, positions[row], lasts[row : row + 1])
            assert_alike(together[row : row + 1], alone)
        with pytest.raises(BackendError, match="slots"):
            stage.decode([0, 0], [1, 1], lasts[[0, 0]])


@pytest.mark.parametrize("name", ["mistral", "opt-pre"])
def test_two_stages_give_what_one_gives(backend: Backend, name: str, tmp_path: Path) -> None:
    spec, artifacts = stored_model(name, tmp_path)
    tokens = some_tokens(spec, 11)
    with closing(backend.load(spec, artifacts, OPTIONS)) as whole:
        expected = whole.forward(0, 0, tokens)
    for cut in range(1, spec.block_count):
        with (
            closing(backend.load(spec, artifacts[:cut], OPTIONS)) as first,
            closing(backend.load(spec, artifacts[cut:], OPTIONS)) as second,
        ):
            for begin, end in itertools.pairwise((0, 5, 6, 11)):
                hidden = first.forward(1, begin, tokens[begin:end])
                assert hidden.shape == (end - begin, spec.hidden)
                assert hidden.dtype == np.float32
                logits = second.forward(1, begin, hidden, logits=end == 11)
                assert logits.shape == (1 if end == 11 else 0, spec.vocab)
        assert_alike(logits, expected)


@pytest.fixture(scope="module")
def small(
    backend: Backend, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ModelSpec, Artifacts]:
    return stored_model("llama", tmp_path_factory.mktemp("small"))


def test_what_does_not_fit_is_refused(
    backend: Backend, small: tuple[ModelSpec, Artifacts], tmp_path: Path
) -> None:
    spec, artifacts = small
    tokens = some_tokens(spec, CONTEXT + 1)
    hidden = np.zeros((2, spec.hidden + 1), np.float32)
    with closing(backend.load(spec, artifacts, OPTIONS)) as stage:
        for position, rows in ((0, CONTEXT + 1), (CONTEXT, 1), (-1, 1), (0, 0)):
            with pytest.raises(BackendError, match="context"):
                stage.forward(0, position, tokens[:rows])
        with pytest.raises(BackendError, match="slot"):
            stage.forward(8, 0, tokens[:1])
        with pytest.raises(BackendError):
            stage.forward(0, 0, tokens[:2].astype(np.float32))
        with pytest.raises(BackendError):
            stage.forward(0, 0, np.array([spec.vocab]))
    with pytest.raises(BackendError, match="closed"):
        stage.forward(0, 0, tokens[:1])
    stage.close()
    with (
        closing(backend.load(spec, artifacts[1:2], OPTIONS)) as stage,
        pytest.raises(BackendError, match="hidden"),
    ):
        stage.forward(0, 0, hidden)
    for blocks in ([], artifacts[::2], artifacts[::-1], [(spec.block_count, artifacts[0][1])]):
        with pytest.raises(BackendError):
            backend.load(spec, blocks, OPTIONS)
    with pytest.raises(BackendError, match="context"):
        backend.load(spec, artifacts, replace(OPTIONS, context_tokens=spec.max_context + 1))
    with pytest.raises(CheckpointError):
        backend.load(spec, [(1, artifacts[2][1])], OPTIONS)
    with pytest.raises(CheckpointError):
        backend.load(spec, [(1, tmp_path / "absent")], OPTIONS)


def test_a_full_disk_is_an_error_of_one_line(
    backend: Backend, small: tuple[ModelSpec, Artifacts], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_bytes(path: Path, _: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    spec, artifacts = small
    with pytest.raises(BackendError, match=r"cannot write products to .*: no space left"):
        backend.load(spec, artifacts[1:2], OPTIONS)
    assert not list(artifacts[0][1].parent.glob(".products-*"))


def test_memory_is_within_what_is_stated_and_planned(backend: Backend, tmp_path: Path) -> None:
    layer = replace(
        LAYERS["rmsnorm-post"], hidden=768, heads=12, kv_heads=12, head_dim=64, ffn=3072
    )
    spec, tensors = random_model(layer)
    artifacts = stored(tmp_path, tensors, Format.of(8))[1:-1]
    # What the first stage of a process costs is the library's.
    backend.load(spec, artifacts[:1], OPTIONS).close()
    del tensors
    gc.collect()
    before = anonymous_bytes()
    with closing(backend.load(spec, artifacts, OPTIONS)) as stage:
        stage.forward(0, 0, np.ones((CONTEXT, 768), np.float32))
        grown = anonymous_bytes() - before
        stated = stage.memory_bytes
    blocks = [block for block, _ in artifacts]
    planned = sum(
        executed_bytes(spec, block, Format.of(8), 8) + 8 * kv_bytes(spec, block, CONTEXT)
        for block in blocks
    ) + stage_buffer_bytes(spec, blocks, 64, CONTEXT)
    assert 0.3 * stated < grown < 1.25 * stated
    assert stated < planned


def anonymous_bytes() -> int:
    """Memory of this process that is neither a mapped file's nor free."""
    ctypes.CDLL(None).malloc_trim(0)
    rollup = Path("/proc/self/smaps_rollup").read_text()
    found = re.search(r"Anonymous:\s+(\d+) kB", rollup)
    assert found is not None
    return int(found[1]) * 1024


@pytest.mark.parametrize("bits", [2, 4, 16, 32])
def test_other_widths_are_refused(backend: Backend, bits: int, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(FIXTURES / "llama")
    artifacts = stored(tmp_path, [checkpoint.block(0), checkpoint.block(1)], Format.of(bits))
    with pytest.raises(BackendError, match=f"{bits} bits"):
        backend.load(checkpoint.spec, artifacts, OPTIONS)


def test_results_are_the_callers_and_files_are_gone(
    backend: Backend, small: tuple[ModelSpec, Artifacts]
) -> None:
    spec, artifacts = small
    before = sorted(artifacts[0][1].parent.iterdir())
    with closing(backend.load(spec, artifacts[:-1], OPTIONS)) as stage:
        assert sorted(artifacts[0][1].parent.iterdir()) == before
        first = stage.forward(0, 0, some_tokens(spec, 3))
        copy = first.copy()
        stage.forward(0, 0, some_tokens(spec, 6)[3:])
    np.testing.assert_array_equal(first, copy)


def test_what_the_host_had_to_do_is_reported(
    backend: Backend,
    small: tuple[ModelSpec, Artifacts],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(edgetpu, "MANY_SATURATED", -1.0)
    spec, artifacts = small
    stage = backend.load(spec, artifacts[1:2], OPTIONS)
    assert isinstance(stage, Int8Stage)
    stage.forward(0, 0, np.ones((2, spec.hidden), np.float32))
    layer = spec.layer(1)
    width = (layer.heads + 2 * layer.kv_heads) * layer.head_dim
    assert list(stage.counts) == [f"layer 0 {name}" for name in ("qkv", "o", "raise", "down")]
    assert stage.counts["layer 0 qkv"].outputs == 2 * width
    assert stage.counts["layer 0 down"].inputs == 2 * layer.ffn
    with caplog.at_level(logging.WARNING):
        stage.close()
    assert "layer 0 down: the host computed" in caplog.text


def test_the_demo_model_says_the_same(backend: Backend, tmp_path: Path) -> None:
    """Divergence of the whole model at 8 bits; docs/edgetpu.md has it over more text."""
    checkpoint = Checkpoint.open(TINY_OPT / "model")
    spec, sequences = checkpoint.spec, demo_sequences(500)
    tensors = [checkpoint.block(block) for block in range(spec.block_count)]
    artifacts = stored(tmp_path, tensors, Format.of(8))
    teacher = ReferenceModel.from_checkpoint(checkpoint)
    head = ReferenceModel.from_artifacts(spec, artifacts[-1:])
    expected = [teacher.forward(sequence) for sequence in sequences]
    kls = {}
    for kind in (backend, OnnxCpuBackend()):
        options = replace(OPTIONS, slots=1, context_tokens=128)
        with closing(kind.load(spec, artifacts[:-1], options)) as stage:
            rows = [
                divergences(wanted, head.forward(stage.forward(0, 0, np.array(sequence))))
                for wanted, sequence in zip(expected, sequences, strict=True)
            ]
        kls[type(kind)] = float(np.concatenate(rows).mean())
    assert kls[OnnxCpuBackend] < 1e-4
    assert kls[type(backend)] < 5e-4


def test_a_blocks_sensitivity_is_that_of_the_backend(backend: Backend, tmp_path: Path) -> None:
    """What 8 bits do to a block here is more than what they do to its weights, and kept apart."""
    checkpoint, sequences = Checkpoint.open(TINY_OPT / "model"), demo_sequences(300)
    store = CalibrationStore(tmp_path / "quality.json")
    weights_only, whole = (
        {
            item.block: item.kl
            for item in measure_quality(checkpoint, [8], sequences, Options(it), store=store)
        }
        for it in (None, backend)
    )
    layers = range(1, checkpoint.spec.head_block)
    assert sum(whole[block] for block in layers) > 2 * sum(weights_only[block] for block in layers)
    for end in (0, checkpoint.spec.head_block):
        assert whole[end] == pytest.approx(weights_only[end], rel=1e-3)


def demo_sequences(max_tokens: int) -> list[list[int]]:
    """Passages of the demo model's dev set, with question and answer."""
    tokenizer = Tokenizer.from_file(str(TINY_OPT / "model" / "tokenizer.json"))
    entries = json.loads((TINY_OPT / "dev.json").read_text())["data"]
    texts = (
        f"{paragraph['context']} {qa['question']} {qa['answers'][0]['text']}"
        for entry in entries
        for paragraph in entry["paragraphs"]
        for qa in paragraph["qas"]
    )
    encoded: Iterator[list[int]] = (tokenizer.encode(text).ids for text in texts)
    return split_passages(encoded, 128, max_tokens)


def assert_alike(actual: Logits, expected: Logits) -> None:
    assert actual.shape == expected.shape
    assert np.linalg.norm(actual - expected) <= REPEAT_ERROR * np.linalg.norm(expected)
