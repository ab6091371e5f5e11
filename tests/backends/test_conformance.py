"""Every backend that runs on this machine, against model.reference in float64.

A new backend needs no test of its own here, because the registry's table is tested. Backends that
always round activations have their own tolerances in test_edgetpu.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from backends.base import (
    Backend,
    BackendError,
    BackendUnavailable,
    Stage,
    StageOptions,
)
from backends.registry import BACKENDS, backend_class
from model.artifact import write_artifact
from model.checkpoint import Checkpoint
from model.errors import CheckpointError
from model.quantize import BITS, Format, Scheme
from model.reference import ReferenceModel
from model.spec import ExpertSpec, LayerSpec, ModelSpec, RopeSpec
from tests.thorough import some

FIXTURES = Path(__file__).parents[1] / "fixtures"
CHECKPOINTS = sorted(path.parent.name for path in FIXTURES.glob("*/config.json"))

ATOL = 1e-5
"""Largest error, relative to the largest logit: what fp32 arithmetic in another order leaves."""

ROUNDING = {"edgetpu", "tflite_cpu"}

CONTEXT = 48
CHUNKS = (7, 1, 1, 13, 2, 1, 8)
OPTIONS = StageOptions(slots=2, context_tokens=CONTEXT, threads=1, exact=True)

Artifacts = list[tuple[int, Path]]
Tensors = list[dict[str, npt.NDArray[np.float32]]]

LLAMA_LAYER = LayerSpec(
    hidden=48,
    heads=4,
    kv_heads=2,
    head_dim=16,
    ffn=80,
    norm="rmsnorm",
    norm_eps=1e-6,
    norm_position="pre",
    activation="silu",
    gated=True,
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    rope=RopeSpec(theta=10000.0),
)
OPT_LAYER = replace(
    LLAMA_LAYER,
    kv_heads=4,
    norm="layernorm",
    activation="relu",
    gated=False,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    rope=None,
)
EXPERTS_LAYER = replace(LLAMA_LAYER, ffn=64, experts=ExpertSpec(count=6, active=2))
EXPERT_LAYERS = {
    "experts": EXPERTS_LAYER,
    "experts-beside-mlp": replace(
        EXPERTS_LAYER,
        experts=ExpertSpec(5, 3, normalized=False, shared_ffn=192, shared_gate=True),
    ),
    "experts-clipped-sinks": replace(
        EXPERTS_LAYER,
        sinks=True,
        sliding_window=6,
        experts=ExpertSpec(4, 2, "topk_softmax", bias=True, limit=0.7),
    ),
}
"""Layers with experts, which no chip runs."""

LAYERS = {
    "gelu": replace(OPT_LAYER, activation="gelu"),
    "gelu-tanh-gated": replace(LLAMA_LAYER, activation="gelu_tanh", mlp_bias=True),
    "layernorm-rotary-grouped": replace(LLAMA_LAYER, norm="layernorm", out_bias=True),
    "rmsnorm-post": replace(LLAMA_LAYER, norm_position="post"),
    "narrow-heads": replace(LLAMA_LAYER, head_dim=6, qkv_bias=True),
    "narrow-heads-unrotated": replace(OPT_LAYER, head_dim=10),
    "narrow-normed-heads-window": replace(
        LLAMA_LAYER, head_dim=8, qk_norm="head", sliding_window=5
    ),
    "narrow-heads-partly-rotated": replace(
        LLAMA_LAYER,
        head_dim=12,
        rope=RopeSpec(10000.0, "yarn", 4.0, original_context=16, rotated=8, attention_factor=1.2),
    ),
    "wide-heads-window": replace(LLAMA_LAYER, head_dim=32, sliding_window=2),
    "norms-around-parts": replace(
        LLAMA_LAYER, norm_position="both", activation="gelu_tanh", score_scale=0.2
    ),
    "norms-of-outputs": replace(LLAMA_LAYER, norm_position="output", qk_norm="head"),
    "layernorms-of-outputs": replace(OPT_LAYER, norm_position="output"),
    "normed-width": replace(LLAMA_LAYER, qk_norm="width", qkv_bias=True),
    "normed-width-narrow-heads": replace(
        LLAMA_LAYER, norm_position="output", qk_norm="width", head_dim=6, sliding_window=7
    ),
    "capped-scores": replace(LLAMA_LAYER, score_scale=0.5, score_cap=1.5),
    "capped-scores-window": replace(
        LLAMA_LAYER, norm_position="both", head_dim=8, score_cap=0.7, sliding_window=5
    ),
}
MIXED_LAYERS = {
    "capped-logits": (replace(LLAMA_LAYER, norm_position="both"),) * 2,
    "rotary-per-layer": (
        replace(LLAMA_LAYER, norm_position="both", qk_norm="head", sliding_window=5),
        replace(
            LLAMA_LAYER,
            norm_position="both",
            qk_norm="head",
            rope=RopeSpec(1e6, scaling="linear", factor=8.0),
        ),
    ),
    "unrotated-layer": (
        replace(LLAMA_LAYER, norm_position="output", qk_norm="head", rope=None),
        replace(LLAMA_LAYER, norm_position="output", qk_norm="head", sliding_window=4),
    ),
    "norms-around-then-before": (
        replace(LLAMA_LAYER, norm_position="both"),
        LLAMA_LAYER,
        replace(LLAMA_LAYER, norm_position="output"),
    ),
    "norms-of-outputs-then-around": (
        replace(LLAMA_LAYER, norm_position="output"),
        replace(LLAMA_LAYER, norm_position="both"),
        replace(LLAMA_LAYER, norm_position="post"),
    ),
}
"""Models whose layers differ. Their logits are capped."""


@pytest.fixture(scope="module", params=sorted(set(BACKENDS) - ROUNDING))
def backend(request: pytest.FixtureRequest) -> Backend:
    try:
        kind = backend_class(request.param)
        kind.probe()
    except BackendUnavailable as unavailable:
        pytest.skip(unavailable.reason)
    return kind()


@pytest.mark.parametrize("bits", some(BITS, 3, 4, 32))
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoint(backend: Backend, name: str, bits: int, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(FIXTURES / name)
    spec = checkpoint.spec
    tensors = [checkpoint.block(block) for block in range(spec.block_count)]
    artifacts = stored(tmp_path, tensors, Format.of(bits))
    if bits not in backend.probe().container_bits:
        with pytest.raises(BackendError):
            backend.load(spec, artifacts, OPTIONS)
        return
    check_against_reference(backend, spec, artifacts)


@pytest.mark.parametrize(
    ("bits", "scheme"),
    some([(3, "truncate"), (8, "truncate"), (4, "rtn")], (4, "rtn")),
)
@pytest.mark.parametrize("name", [*LAYERS, *EXPERT_LAYERS])
def test_feature(backend: Backend, name: str, bits: int, scheme: Scheme, tmp_path: Path) -> None:
    spec, tensors = random_model((LAYERS | EXPERT_LAYERS)[name])
    artifacts = stored(tmp_path, tensors, Format.of(bits, scheme, 64, symmetric=True))
    check_against_reference(backend, spec, artifacts)


@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("name", MIXED_LAYERS)
def test_mixed_layers(backend: Backend, name: str, bits: int, tmp_path: Path) -> None:
    spec, tensors = random_model(*MIXED_LAYERS[name], logit_cap=4.0)
    artifacts = stored(tmp_path, tensors, Format.of(bits))
    check_against_reference(backend, spec, artifacts)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_full_precision_continues_like_the_original(
    backend: Backend, name: str, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(FIXTURES / name)
    golden = np.load(FIXTURES / name / "golden.npz")
    prompt, expected = golden["prompt"], golden["continuation"].tolist()
    tensors = [checkpoint.block(block) for block in range(checkpoint.spec.block_count)]
    artifacts = stored(tmp_path, tensors, Format.of(32))
    options = replace(OPTIONS, context_tokens=len(prompt) + len(expected))
    stage = backend.load(checkpoint.spec, artifacts, options)
    logits = stage.forward(0, 0, prompt)
    np.testing.assert_allclose(logits[0], golden["logits"][-1], atol=1e-3)
    tokens: list[int] = []
    while True:
        tokens.append(int(logits[0].argmax()))
        if len(tokens) == len(expected):
            break
        logits = stage.forward(0, len(prompt) + len(tokens) - 1, np.array(tokens[-1:]))
    stage.close()
    assert tokens == expected


@pytest.mark.parametrize("bits", [4, 8, 32])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_two_stages_give_what_one_gives(
    backend: Backend, name: str, bits: int, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(FIXTURES / name)
    spec = checkpoint.spec
    tensors = [checkpoint.block(block) for block in range(spec.block_count)]
    artifacts = stored(tmp_path, tensors, Format.of(bits))
    tokens = some_tokens(spec, 11)
    whole = backend.load(spec, artifacts, OPTIONS)
    expected = whole.forward(0, 0, tokens)
    whole.close()
    for cut in range(1, spec.block_count):
        first = backend.load(spec, artifacts[:cut], OPTIONS)
        second = backend.load(spec, artifacts[cut:], OPTIONS)
        for begin, end in itertools.pairwise((0, 5, 6, 11)):
            hidden = first.forward(1, begin, tokens[begin:end])
            assert hidden.shape == (end - begin, spec.hidden)
            assert hidden.dtype == np.float32
            logits = second.forward(1, begin, hidden, logits=end == 11)
            assert logits.shape == (1 if end == 11 else 0, spec.vocab)
        first.close()
        second.close()
        assert_close(logits, expected)


@pytest.mark.parametrize("bits", [2, 4, 8, 32])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_sequences_decode_together(backend: Backend, name: str, bits: int, tmp_path: Path) -> None:
    """One to eight at once, each with a prompt of another length, in changing company."""
    checkpoint = Checkpoint.open(FIXTURES / name)
    spec = checkpoint.spec
    tensors = [checkpoint.block(block) for block in range(spec.block_count)]
    artifacts = stored(tmp_path, tensors, Format.of(bits))
    slots, steps = 8, 8
    sequences = [some_tokens(spec, 3 * slot + 1 + steps, seed=slot) for slot in range(slots)]
    reference = ReferenceModel.from_artifacts(spec, artifacts, np.float64)
    expected = [reference.forward(sequence) for sequence in sequences]
    stage = backend.load(spec, artifacts, replace(OPTIONS, slots=slots))
    positions = [len(sequence) - steps for sequence in sequences]
    for slot, sequence in enumerate(sequences):
        stage.forward(slot, 0, sequence[: positions[slot]], logits=False)
    for step in range(steps):
        together = [(slot * 3 + step) % slots for slot in range(slots - step)]
        at = [positions[slot] for slot in together]
        tokens = np.array([sequences[slot][positions[slot]] for slot in together])
        rows = stage.decode(together, at, tokens)
        wanted = np.stack([expected[slot][positions[slot]] for slot in together])
        assert_close(rows, wanted)
        for slot in together:
            positions[slot] += 1
    stage.close()


@pytest.fixture(scope="module")
def small(
    backend: Backend, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ModelSpec, Artifacts]:
    spec, tensors = random_model(LLAMA_LAYER)
    return spec, stored(tmp_path_factory.mktemp("small"), tensors, Format.of(4))


def test_rows_beyond_the_context_are_refused(
    backend: Backend, small: tuple[ModelSpec, Artifacts]
) -> None:
    spec, artifacts = small
    stage = backend.load(spec, artifacts, OPTIONS)
    tokens = some_tokens(spec, CONTEXT + 1)
    with pytest.raises(BackendError, match="context"):
        stage.forward(0, 0, tokens)
    before = stage.forward(0, 0, tokens[:CONTEXT])
    with pytest.raises(BackendError, match="context"):
        stage.forward(0, CONTEXT, tokens[:1])
    with pytest.raises(BackendError, match="context"):
        stage.forward(0, -1, tokens[:1])
    with pytest.raises(BackendError, match="context"):
        stage.forward(0, 0, tokens[:0])
    # A refused call leaves the cache as it was.
    assert_close(stage.forward(0, CONTEXT - 1, tokens[CONTEXT - 1 : CONTEXT]), before)
    stage.close()


def test_inputs_of_the_wrong_form_are_refused(
    backend: Backend, small: tuple[ModelSpec, Artifacts]
) -> None:
    spec, artifacts = small
    stage = backend.load(spec, artifacts, OPTIONS)
    for slot in (-1, OPTIONS.slots):
        with pytest.raises(BackendError, match="slot"):
            stage.forward(slot, 0, some_tokens(spec, 1))
    for tokens in ([spec.vocab], [-1]):
        with pytest.raises(BackendError, match="token ids"):
            stage.forward(0, 0, np.array(tokens))
    with pytest.raises(BackendError):
        stage.forward(0, 0, np.zeros((2, spec.hidden), np.float32))
    stage.close()
    layers = backend.load(spec, artifacts[1:], OPTIONS)
    for shape in ((2, spec.hidden - 1), (spec.hidden,), (1, 1, spec.hidden)):
        with pytest.raises(BackendError):
            layers.forward(0, 0, np.zeros(shape, np.float32))
    layers.close()


def test_several_sequences_decode_as_one_by_one(
    backend: Backend, small: tuple[ModelSpec, Artifacts]
) -> None:
    spec, artifacts = small
    stage = backend.load(spec, artifacts, OPTIONS)
    tokens = some_tokens(spec, 9)
    stage.forward(0, 0, tokens[:7])
    stage.forward(1, 0, tokens[:3])
    expected = [stage.forward(1, 3, tokens[8:]), stage.forward(0, 7, tokens[7:8])]
    both = stage.decode([1, 0], [3, 7], tokens[[8, 7]])
    stage.close()
    assert_close(both, np.concatenate(expected).astype(np.float64))


def test_results_outlive_later_calls(backend: Backend, small: tuple[ModelSpec, Artifacts]) -> None:
    spec, artifacts = small
    stage = backend.load(spec, artifacts[:-1], OPTIONS)
    first = stage.forward(0, 0, some_tokens(spec, 3))
    copy = first.copy()
    stage.forward(0, 0, some_tokens(spec, 6)[3:])
    stage.close()
    np.testing.assert_array_equal(first, copy)


def test_close_is_idempotent_and_final(
    backend: Backend, small: tuple[ModelSpec, Artifacts]
) -> None:
    spec, artifacts = small
    stage = backend.load(spec, artifacts, OPTIONS)
    assert stage.memory_bytes > 0
    stage.close()
    stage.close()
    with pytest.raises(BackendError, match="closed"):
        stage.forward(0, 0, some_tokens(spec, 1))


def test_blocks_that_are_not_a_stage_are_refused(
    backend: Backend, small: tuple[ModelSpec, Artifacts]
) -> None:
    spec, artifacts = small
    for blocks in ([], artifacts[::2], artifacts[::-1], [(spec.block_count, artifacts[0][1])]):
        with pytest.raises(BackendError):
            backend.load(spec, blocks, OPTIONS)
    with pytest.raises(BackendError, match="context"):
        backend.load(spec, artifacts, replace(OPTIONS, context_tokens=spec.max_context + 1))


def test_wrong_artifacts_are_refused(
    backend: Backend, small: tuple[ModelSpec, Artifacts], tmp_path: Path
) -> None:
    spec, artifacts = small
    with pytest.raises(CheckpointError):
        backend.load(spec, [(1, artifacts[2][1])], OPTIONS)
    content = artifacts[1][1].read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"\xff" * 64 + content[64:]):
        path = tmp_path / "damaged"
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            backend.load(spec, [(1, path)], OPTIONS)
    with pytest.raises(CheckpointError):
        backend.load(spec, [(1, tmp_path / "absent")], OPTIONS)


def check_against_reference(backend: Backend, spec: ModelSpec, artifacts: Artifacts) -> None:
    """One shot, token by token, in odd chunks, rolled back, and two slots interleaved."""
    count = sum(CHUNKS)
    tokens, others = some_tokens(spec, count), some_tokens(spec, count, seed=2)
    expected, expected_others = (
        ReferenceModel.from_artifacts(spec, artifacts, np.float64).forward(sequence)
        for sequence in (tokens, others)
    )
    stage = backend.load(spec, artifacts, OPTIONS)
    assert_close(stage.forward(0, 0, tokens), expected[-1:])
    for position in range(count):
        row = slice(position, position + 1)
        assert_close(stage.forward(0, position, tokens[row]), expected[row])
        assert_close(stage.forward(1, position, others[row]), expected_others[row])
    check_in_chunks(stage, tokens, expected)
    # Back to the middle and on with other tokens, while the other slot keeps its own.
    middle = count // 2
    mixed = np.concatenate([tokens[:middle], others[middle:]])
    reference = ReferenceModel.from_artifacts(spec, artifacts, np.float64)
    expected_mixed = reference.forward(mixed)
    assert_close(stage.forward(0, middle, mixed[middle:]), expected_mixed[-1:])
    assert_close(stage.forward(1, count - 1, others[-1:]), expected_others[-1:])
    stage.close()


def check_in_chunks(
    stage: Stage, tokens: npt.NDArray[np.int64], expected: npt.NDArray[np.float64]
) -> None:
    position = 0
    for rows in CHUNKS:
        end = position + rows
        assert_close(stage.forward(0, position, tokens[position:end]), expected[end - 1 : end])
        # The same rows again, with the logits of several.
        for wanted in {0, min(rows, 3), rows}:
            again = stage.forward(0, position, tokens[position:end], logits=wanted)
            assert_close(again, expected[end - wanted : end])
        position = end


def assert_close(actual: npt.NDArray[np.float32], expected: npt.NDArray[np.floating]) -> None:
    assert actual.dtype == np.float32
    assert actual.shape == expected.shape
    scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=ATOL * scale)


def some_tokens(spec: ModelSpec, count: int, seed: int = 1) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, spec.vocab, count)


def random_model(*layers: LayerSpec, logit_cap: float | None = None) -> tuple[ModelSpec, Tensors]:
    """Random weights for ``layers``, two of one. Learned positions if the first has no rotary."""
    first = layers[0]
    learned = 0 if first.rope else 66
    spec = ModelSpec(
        vocab=71,
        hidden=first.hidden,
        embed_dim=first.hidden,
        max_context=64,
        layers=layers if len(layers) > 1 else layers * 2,
        learned_positions=learned,
        position_offset=2 if learned else 0,
        final_norm=first.norm_position != "post",
        tied_head=False,
        bos_token=None,
        eos_tokens=(2,),
        logit_cap=logit_cap,
    )
    random = np.random.default_rng(0)
    tensors = [
        {
            name: (random.standard_normal(shape) * 0.2 + ("norm.weight" in name)).astype(np.float32)
            for name, shape in spec.block_tensors(block).items()
        }
        for block in range(spec.block_count)
    ]
    return spec, tensors


def stored(directory: Path, tensors: Tensors, fmt: Format) -> Artifacts:
    return [
        (block, write_artifact(directory, block, values, fmt).path)
        for block, values in enumerate(tensors)
    ]
