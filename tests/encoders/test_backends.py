"""Every backend against transformers at 32 bits, and against the reference at fewer."""

from __future__ import annotations

from contextlib import ExitStack, closing
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from backends.base import Array, Backend, BackendError, BackendUnavailable, StageOptions
from backends.edgetpu import HostEncoderLayers
from backends.edgetpu_host import HostLayer, stacks
from backends.registry import backend_class
from model.artifact import read_block
from model.checkpoint import Checkpoint
from model.quantize import Format
from model.reference import ReferenceModel
from model.rotary import rotary_table
from model.spec import ModelSpec
from model.texts import Texts
from tests.encoder_cases import ENCODERS, NAMES, Golden, stored

ATOL = 1e-4
OPTIONS = StageOptions(slots=1, context_tokens=48, threads=1, exact=True)


@pytest.fixture(scope="module", params=["onnx_cpu", "torch_cpu"])
def backend(request: pytest.FixtureRequest) -> Backend:
    try:
        kind = backend_class(request.param)
        kind.probe()
    except BackendUnavailable as unavailable:
        pytest.skip(unavailable.reason)
    return kind()


def run(
    backends: list[Backend], spec: ModelSpec, artifacts: list[tuple[int, Path]], golden: Golden
) -> Array:
    """Run the blocks in as many stages as there are backends."""
    cuts = [len(artifacts) * index // len(backends) for index in range(len(backends) + 1)]
    rows = golden.tokens
    with ExitStack() as resources:
        for backend, (begin, end) in zip(backends, pairwise(cuts), strict=True):
            stage = backend.stage(spec, artifacts[begin:end], OPTIONS)
            resources.enter_context(closing(stage))
            assert stage.memory_bytes > 0
            rows = stage.encode(rows, golden.texts)
    return rows


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_stages_equal_transformers(
    backend: Backend, name: str, stages: int, tmp_path: Path
) -> None:
    checkpoint, artifacts = stored(name, Format.of(32), tmp_path)
    golden = Golden.load(name)
    rows = run([backend] * stages, checkpoint.spec, artifacts, golden)
    np.testing.assert_allclose(rows, golden.output, atol=ATOL)
    np.testing.assert_array_equal(rows.argmax(axis=-1), golden.output.argmax(axis=-1))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", NAMES)
def test_narrow_widths_equal_the_reference(
    backend: Backend, name: str, bits: int, tmp_path: Path
) -> None:
    checkpoint, artifacts = stored(name, Format.of(bits, "rtn", 32), tmp_path)
    golden = Golden.load(name)
    expected = ReferenceModel.from_artifacts(checkpoint.spec, artifacts, np.float64).encode(
        golden.tokens, golden.texts
    )
    rows = run([backend], checkpoint.spec, artifacts, golden)
    np.testing.assert_allclose(rows, expected, atol=ATOL)


@pytest.mark.parametrize("name", ["minilm", "roberta-class", "modernbert", "mpnet"])
def test_texts_that_share_a_pass_do_not_see_each_other(
    backend: Backend, name: str, tmp_path: Path
) -> None:
    checkpoint, artifacts = stored(name, Format.of(32), tmp_path)
    golden = Golden.load(name)
    begins = golden.texts.begins()
    with closing(backend.stage(checkpoint.spec, artifacts, OPTIONS)) as stage:
        alone = [
            stage.encode(golden.tokens[begin:end], Texts((end - begin,), (second,)))
            for (begin, end), second in zip(pairwise(begins), golden.texts.seconds, strict=True)
        ]
        np.testing.assert_allclose(
            np.concatenate(alone), stage.encode(golden.tokens, golden.texts), atol=ATOL
        )


def test_a_pass_that_does_not_fit_is_refused(backend: Backend, tmp_path: Path) -> None:
    checkpoint, artifacts = stored("minilm", Format.of(32), tmp_path)
    with closing(backend.stage(checkpoint.spec, artifacts, OPTIONS)) as stage:
        tokens = np.zeros(49, np.int64)
        for texts, said in (
            (Texts.plain(49), "context of 48"),
            (Texts.plain(40), "rows"),
            (Texts((49,), (50,)), "rows"),
        ):
            with pytest.raises(BackendError, match=said):
                stage.encode(tokens, texts)
        with pytest.raises(BackendError, match="within"):
            stage.encode(np.full(3, checkpoint.spec.vocab), Texts.plain(3))


def test_a_stage_between_the_ends_takes_and_gives_hidden_rows(
    backend: Backend, tmp_path: Path
) -> None:
    checkpoint, artifacts = stored("bert-span", Format.of(32), tmp_path)
    golden = Golden.load("bert-span")
    spec = checkpoint.spec
    blocks = [read_block(path, spec, block)[1] for block, path in artifacts]
    rows = ReferenceModel(spec, blocks[:2]).encode(golden.tokens, golden.texts)
    with closing(backend.stage(spec, artifacts[2:4], OPTIONS)) as stage:
        rows = stage.encode(rows, golden.texts)
    np.testing.assert_allclose(rows, golden.hidden, atol=ATOL)


def test_fast_prompts_of_onnx_are_near(tmp_path: Path) -> None:
    checkpoint, artifacts = stored("minilm", Format.of(8, "rtn", 32), tmp_path)
    golden = Golden.load("minilm")
    options = StageOptions(slots=1, context_tokens=48, threads=1, fast_prompts=True)
    with closing(backend_class("onnx_cpu")().stage(checkpoint.spec, artifacts, options)) as stage:
        rows = stage.encode(golden.tokens, golden.texts)
    cosine = (rows * golden.output).sum(axis=1)
    assert cosine.min() > 0.98, ENCODERS


@pytest.mark.parametrize(
    "name", ["minilm", "modernbert", "bert-span", "qwen3-embed", "mpnet", "gemma3-embed"]
)
def test_the_host_part_of_a_chip_equals_the_reference(name: str) -> None:
    """With exact products, all else is computed as by the reference."""
    checkpoint, golden = Checkpoint.open(ENCODERS / name), Golden.load(name)
    spec = checkpoint.spec
    blocks = [checkpoint.block(block) for block in range(spec.block_count)]
    rows = ReferenceModel(spec, blocks[:1]).encode(golden.tokens, golden.texts)
    layers = []
    for block in range(1, spec.head_block):
        tensors, layer = blocks[block], spec.layer(block)
        matrices = {
            product: np.concatenate([tensors[f"{part}.weight"] for part in parts])
            for product, parts in stacks(layer).items()
        }
        products = {key: partial(_multiplied, matrix) for key, matrix in matrices.items()}
        rotary = None if layer.rope is None else rotary_table(layer.rope, layer.head_dim, 48)
        layers.append(HostLayer(layer, tensors, products, rotary, 1, 48))
    rows = HostEncoderLayers(layers, 0, ExitStack()).run(rows, golden.texts)
    head = ReferenceModel(spec, blocks[-1:], first_block=spec.head_block)
    np.testing.assert_allclose(head.encode(rows, golden.texts), golden.output, atol=ATOL)


def _multiplied(matrix: Array, rows: Array) -> Array:
    product: Array = rows @ matrix.T
    return product


@pytest.mark.parametrize("name", ["minilm", "bert-class", "distilbert-span", "modernbert"])
def test_chips_run_encoders_with_products_of_8_bits(name: str, tmp_path: Path) -> None:
    kind = backend_class("tflite_cpu")
    try:
        kind.probe()
    except BackendUnavailable as unavailable:
        pytest.skip(unavailable.reason)
    checkpoint, artifacts = stored(name, Format.of(8, "rtn", 32), tmp_path)
    golden = Golden.load(name)
    expected = ReferenceModel.from_artifacts(checkpoint.spec, artifacts).encode(
        golden.tokens, golden.texts
    )
    options = StageOptions(slots=1, context_tokens=48, threads=1)
    with closing(kind().stage(checkpoint.spec, artifacts, options)) as stage:
        rows = stage.encode(golden.tokens, golden.texts)
    error = np.linalg.norm(rows - expected) / np.linalg.norm(expected)
    assert error < 0.25
