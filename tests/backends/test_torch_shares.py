"""Shares of layers on torch: teams against the reference, sums that fail, graphs of pieces."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, TypeVar

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed")

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from backends import torch_stage, torch_tokens
from backends.base import Array, Backend, BackendError, BackendUnavailable, StageOptions, TeamSum
from backends.registry import backend_class
from backends.torch_cuda import TorchCpuBackend
from backends.torch_cuts import without_team
from backends.torch_layers import TokenPass
from backends.torch_stage import TorchStage
from model.artifact import read_block, store_block, write_artifact
from model.checkpoint import Checkpoint
from model.quantize import Format
from model.reference import ReferenceModel
from model.share import share_spec, share_tensors
from model.spec import ModelSpec
from tests.backends.test_conformance import (
    ATOL,
    CHECKPOINTS,
    FIXTURES,
    LLAMA_LAYER,
    OPT_LAYER,
    Artifacts,
    Tensors,
    random_model,
)
from tests.team import run_together, shares_of

OPTIONS = StageOptions(slots=3, context_tokens=40, threads=1, exact=True)
HALF_TOLERANCE = 1e-2
TEAMS = ((3, 1), (1, 2, 1))

Result = TypeVar("Result")

COUNT = 24
"""The rows of a sequence in most tests."""

LAYERS = {
    "llama": replace(LLAMA_LAYER, heads=8, kv_heads=4, ffn=150),
    "opt-post": replace(OPT_LAYER, head_dim=32, ffn=150, norm_position="post"),
    "qwen3-window": replace(
        LLAMA_LAYER, heads=4, kv_heads=4, head_dim=32, ffn=150, qk_norm="head", sliding_window=5
    ),
    "gemma2-window": replace(
        LLAMA_LAYER,
        heads=8,
        kv_heads=4,
        ffn=150,
        norm_position="both",
        score_cap=1.5,
        sliding_window=5,
    ),
    "olmo": replace(LLAMA_LAYER, heads=8, kv_heads=4, ffn=150, norm_position="output"),
}
"""Layers of whole groups of 32 for each KV head, and of MLP columns that end within a group."""

Call = Callable[[TorchStage], Array]
Calls = list[tuple[Call, Array]]
"""Passes of a stage, each with the logits that the team should give."""


@dataclass(frozen=True)
class Team:
    """A model with its layers and head divided: for each member its model and its artifacts."""

    spec: ModelSpec
    artifacts: Artifacts
    members: list[tuple[ModelSpec, Artifacts]]

    def run(
        self, member: Callable[[TorchStage], Result], backend: Backend | None = None, **options: Any
    ) -> list[Result]:
        """Run all members at once, and return the result of each."""

        def run(own: tuple[ModelSpec, Artifacts], team_sum: TeamSum) -> Result:
            chosen = replace(OPTIONS, team_sum=team_sum, **options)
            stage = (backend or TorchCpuBackend()).load(*own, chosen)
            assert isinstance(stage, TorchStage)
            result = member(stage)
            stage.close()
            return result

        return run_together([partial(run, own) for own in self.members])

    def expected(self, hidden: Array) -> Array:
        """Return the logits of every row, by the reference in float64."""
        model = ReferenceModel.from_artifacts(self.spec, self.artifacts, np.float64)
        logits: Array = model.forward(hidden)
        return logits

    def check(
        self,
        calls: Calls,
        backend: Backend | None = None,
        prepare: Callable[[TorchStage], None] = lambda stage: None,
        tolerance: float = ATOL,
        **options: Any,
    ) -> None:
        """The members' logits of each pass, side by side, are the expected ones."""

        def member(stage: TorchStage) -> list[Array]:
            prepare(stage)
            return [call(stage) for call, _ in calls]

        results = self.run(member, backend, **options)
        for (_, expected), parts in zip(calls, zip(*results, strict=True), strict=True):
            actual = np.concatenate(parts, axis=1)
            assert actual.dtype == np.float32
            assert actual.shape == expected.shape
            scale = max(1.0, float(np.abs(expected).max(initial=0)))
            np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


def team_of(directory: Path, name: str, weights: Sequence[int], fmt: Format) -> Team:
    spec, tensors = random_model(LAYERS[name])
    return divided(directory, spec, tensors, weights, fmt)


def divided(
    directory: Path, spec: ModelSpec, tensors: Tensors, weights: Sequence[int], fmt: Format
) -> Team:
    """Write the artifacts of layers and head, and their slices for each member."""
    blocks = range(1, spec.block_count)
    whole = [
        (block, write_artifact(directory, block, tensors[block], fmt).path) for block in blocks
    ]
    stored = {block: read_block(path, spec, block)[1] for block, path in whole}
    members = []
    for share in shares_of(spec, weights, fmt.group_size):
        parts = {block: share_tensors(spec, block, stored[block], share) for block in blocks}
        paths = [(block, store_block(directory, block, parts[block], fmt).path) for block in blocks]
        members.append((share_spec(spec, share), paths))
    return Team(spec, whole, members)


def hidden_rows(spec: ModelSpec, count: int = COUNT, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal((count, spec.hidden), np.float32)


def forward(slot: int, position: int, rows: Array) -> Call:
    return lambda stage: stage.forward(slot, position, rows)


def decode(slots: Sequence[int], position: int, rows: Array) -> Call:
    return lambda stage: stage.decode(slots, [position] * len(slots), rows)


def some_calls(team: Team) -> Calls:
    """In one call, in chunks, token by token, several sequences together, and rolled back."""
    texts = [hidden_rows(team.spec, seed=seed) for seed in range(3)]
    logits = [team.expected(text) for text in texts]
    calls: Calls = [(forward(0, 0, texts[0]), logits[0][-1:])]
    for begin, end in itertools.pairwise((0, 7, 8, 9, 20)):
        calls.append((forward(1, begin, texts[1][begin:end]), logits[1][end - 1 : end]))
    prompt = texts[2][:20]
    calls.append((lambda stage: stage.forward(2, 0, prompt, logits=False), logits[2][:0]))
    for at in range(20, COUNT):
        slots = [2, 1] if at % 2 else [1, 2]
        rows, expected = (np.stack([each[slot][at] for slot in slots]) for each in (texts, logits))
        calls.append((decode(slots, at, rows), expected))
    mixed = np.concatenate([texts[0][:9], texts[1][9:]])
    calls.append((forward(0, 9, mixed[9:]), team.expected(mixed)[-1:]))
    calls.append((forward(2, COUNT - 1, texts[2][-1:]), logits[2][-1:]))
    return calls


@pytest.fixture(params=["torch_cpu", "torch_cuda"])
def backend(request: pytest.FixtureRequest) -> Backend:
    kind = backend_class(request.param)
    try:
        assert kind.probe().shares
    except BackendUnavailable as unavailable:
        pytest.skip(unavailable.reason)
    return kind()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_team_continues_like_the_original(backend: Backend, name: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(FIXTURES / name)
    spec = checkpoint.spec
    golden = np.load(FIXTURES / name / "golden.npz")
    prompt, continuation = golden["prompt"], golden["continuation"]
    tensors = [checkpoint.block(block) for block in range(spec.block_count)]
    team = divided(tmp_path, spec, tensors, (3, 1), Format.of(32))
    tokens = np.concatenate([prompt, continuation])
    hidden = ReferenceModel(spec, tensors[:1]).forward(tokens).astype(np.float32)

    def member(stage: TorchStage) -> list[Array]:
        first = stage.forward(1, 0, hidden[: len(prompt)])
        rest = range(len(prompt), len(tokens) - 1)
        return [first, *(stage.forward(1, at, hidden[at : at + 1]) for at in rest)]

    results = team.run(member, backend, context_tokens=len(tokens))
    steps = [np.concatenate(parts, axis=1) for parts in zip(*results, strict=True)]
    np.testing.assert_allclose(steps[0][0], golden["logits"][-1], atol=1e-3)
    assert [int(logits.argmax()) for logits in steps] == continuation.tolist()


@pytest.mark.parametrize("bits", [4, 8, 32])
@pytest.mark.parametrize("weights", TEAMS, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_a_team_equals_the_reference(
    backend: Backend, name: str, weights: tuple[int, ...], bits: int, tmp_path: Path
) -> None:
    team = team_of(tmp_path, name, weights, Format.of(bits, "rtn", 32))
    team.check(some_calls(team), backend)


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("name", LAYERS)
def test_half_precision(
    name: str, bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU computes in, here by the CPU."""
    monkeypatch.setattr(torch_stage, "compute_dtype", lambda *_, **__: torch.float16)
    team = team_of(tmp_path, name, TEAMS[1], Format.of(bits, "rtn", 32))
    team.check(some_calls(team), tolerance=HALF_TOLERANCE)


@pytest.mark.parametrize("half", [False, True])
def test_a_pass_cuts_each_layer_twice_with_all_its_rows(
    half: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_stage, "PROMPT_ROWS", 5)
    if half:
        monkeypatch.setattr(torch_stage, "compute_dtype", lambda *_, **__: torch.float16)
    team = team_of(tmp_path, "llama", (1,), Format.of(8, "rtn", 32))
    cut: list[tuple[int, ...]] = []

    def team_sum(partial: Array) -> Array:
        assert partial.dtype == np.float32
        assert partial.flags.c_contiguous
        cut.append(partial.shape)
        total: Array = partial.copy()
        total.flags.writeable = False
        partial[...] = np.nan  # The stage may not use it afterwards.
        return total

    stage = TorchCpuBackend().load(*team.members[0], replace(OPTIONS, team_sum=team_sum))
    assert cut == []
    hidden = hidden_rows(team.spec)
    stage.forward(0, 0, hidden[:12])
    stage.forward(0, 12, hidden[12:13], logits=False)
    stage.decode([2, 0], [0, 13], hidden[:2])
    stage.close()
    width = team.spec.hidden
    assert cut == [(12, width)] * 4 + [(1, width)] * 4 + [(2, width)] * 4


class Lost(RuntimeError):
    """A sum that fails like a broken barrier, which torch's errors look like."""


@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("rows", [1, 6])
def test_a_sum_that_fails_passes_through_and_earlier_rows_stay(
    rows: int, at: int, tmp_path: Path
) -> None:
    team = team_of(tmp_path, "opt-post", (1,), Format.of(32))
    sums = itertools.count()
    failing = False

    def team_sum(partial: Array) -> Array:
        if failing and next(sums) == at:
            raise Lost("pi-2 is gone")
        return partial

    stage = TorchCpuBackend().load(*team.members[0], replace(OPTIONS, team_sum=team_sum))
    texts = [hidden_rows(team.spec, seed=seed) for seed in range(2)]
    expected = [team.expected(text) for text in texts]
    for slot, text in enumerate(texts):
        stage.forward(slot, 0, text[:9])
    failing = True
    # Rows without a sum reach the cache, and they may hold anything.
    overflown = np.full((rows, team.spec.hidden), np.inf, np.float32)
    many = decode([1, 0], 9, overflown.repeat(2, axis=0))
    call = many if rows == 1 else forward(0, 9, overflown)
    with pytest.raises(Lost, match="pi-2 is gone"):
        call(stage)
    failing = False
    for position in range(9, COUNT):
        row = slice(position, position + 1)
        for slot in (0, 1):
            logits = stage.forward(slot, position, texts[slot][row])
            np.testing.assert_allclose(logits, expected[slot][row], rtol=0, atol=1e-4)
    stage.close()


def test_errors_of_torch_stay_errors_of_the_backend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    team = team_of(tmp_path, "llama", (1,), Format.of(32))
    stage = TorchCpuBackend().load(*team.members[0], replace(OPTIONS, team_sum=np.copy))
    hidden = hidden_rows(team.spec)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: unspecified")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", broken)
    with pytest.raises(BackendError, match="cannot run the stage: CUDA error"):
        stage.forward(0, 0, hidden)
    stage.close()


# ---- graphs of pieces ---------------------------------------------------------------------------


class RecordedGraph(TorchDispatchMode):  # type: ignore[misc]  # torch has no types here
    """A CUDA graph's behaviour on a CPU: it replays the operations of its capture, in place."""

    captured: ClassVar[list[RecordedGraph]] = []
    under_way: ClassVar[list[RecordedGraph]] = []

    def __init__(self) -> None:
        super().__init__()
        self.ended = False
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        assert not self.under_way
        self.under_way.append(self)
        self.__enter__()

    def capture_end(self) -> None:
        self.__exit__(None, None, None)
        self.under_way.remove(self)
        if self.ended:
            self.ended = False
            raise RuntimeError("CUDA error: operation failed due to a previous error")
        self.captured.append(self)
        # A capture computes nothing, so its values must not matter.
        for _, args, kwargs, result in self._calls:
            held = {tensor.untyped_storage().data_ptr() for tensor in tensors((args, kwargs))}
            for tensor in tensors(result):
                if tensor.untyped_storage().data_ptr() not in held and tensor.is_floating_point():
                    tensor.fill_(torch.nan)

    def replay(self) -> None:
        for call, args, kwargs, result in self._calls:
            again = tensors(call(*args, **kwargs))
            for old, new in zip(tensors(result), again, strict=True):
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, result))
        return result


def check_no_capture() -> None:
    """Do what CUDA does when a thread waits for the device during another's capture."""
    under_way = list(RecordedGraph.under_way)
    for graph in under_way:
        graph.ended = True
    if under_way:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> type[RecordedGraph]:
    """torch.cuda as far as capturing needs it, on the CPU."""
    stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: check_no_capture())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(RecordedGraph, "captured", [])
    monkeypatch.setattr(RecordedGraph, "under_way", [])
    monkeypatch.setattr(torch_tokens, "SHORTEST_LENGTH", 8)
    return RecordedGraph


def capture(stage: TorchStage) -> None:
    stage._decoder._captures = True


@pytest.mark.parametrize("name", LAYERS)
def test_graphs_of_pieces_give_the_same(
    name: str, tmp_path: Path, graphs: type[RecordedGraph], caplog: pytest.LogCaptureFixture
) -> None:
    """Members capture at a token's first pass, and one that does not capture notices nothing."""
    team = team_of(tmp_path, name, TEAMS[1], Format.of(8, "rtn", 32))
    text = hidden_rows(team.spec)
    logits = team.expected(text)
    calls = some_calls(team)
    calls += [(forward(0, at, text[at : at + 1]), logits[at : at + 1]) for at in range(COUNT)]
    eager = threading.Lock()

    def prepare(stage: TorchStage) -> None:
        if not eager.acquire(blocking=False):
            capture(stage)

    team.check(calls, prepare=prepare)
    assert "without CUDA graphs" not in caplog.text
    # Two members have graphs of five pieces each. Lengths: 8, 16 and 32 in slot 0, 8 and 16 in slot
    # 1, 32 in slot 2, and 32 for two sequences together.
    assert len(graphs.captured) == 2 * 5 * (3 + 2 + 1 + 1)


@pytest.mark.parametrize("name", LAYERS)
def test_graphs_of_chunks_give_the_same(
    name: str,
    tmp_path: Path,
    graphs: type[RecordedGraph],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whole layers: prompts run in chunks, of which the last is padded. Graphs serve all slots."""
    monkeypatch.setattr(torch_stage, "PROMPT_ROWS", 5)
    team = team_of(tmp_path, name, (1,), Format.of(8, "rtn", 32))
    stage = TorchCpuBackend().load(team.spec, team.artifacts, replace(OPTIONS, context_tokens=24))
    capture(stage)
    for call, expected in some_calls(team):
        actual = call(stage)
        scale = max(1.0, float(np.abs(expected).max(initial=0)))
        np.testing.assert_allclose(actual, expected, rtol=0, atol=ATOL * scale)
    stage.close()
    assert "without CUDA graphs" not in caplog.text
    # Lengths of chunks: 8, 16 and 24. Lengths of tokens: 8 and 16 in slot 1, 24 in slot 2, and 24
    # for two sequences together.
    assert len(graphs.captured) == 3 + 2 + 1 + 1


def test_without_graphs_of_chunks_tokens_keep_theirs(
    tmp_path: Path,
    graphs: type[RecordedGraph],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    team = team_of(tmp_path, "llama", (1,), Format.of(8, "rtn", 32))
    stage = TorchCpuBackend().load(team.spec, team.artifacts, OPTIONS)
    capture(stage)
    text = hidden_rows(team.spec)
    expected = team.expected(text)

    def refuse() -> RecordedGraph:
        raise RuntimeError("capture refused\nand more")

    with monkeypatch.context() as refusing:
        refusing.setattr(torch.cuda, "CUDAGraph", refuse)
        first = stage.forward(0, 0, text[:9])
    np.testing.assert_allclose(first, expected[8:9], rtol=0, atol=1e-4)
    assert caplog.messages == ["prompts run without CUDA graphs, slower: capture refused"]
    for at in range(9, COUNT):
        row = slice(at, at + 1)
        logits = stage.forward(0, at, text[row])
        np.testing.assert_allclose(logits, expected[row], rtol=0, atol=1e-4)
    again = stage.forward(1, 0, text[:9])
    np.testing.assert_allclose(again, expected[8:9], rtol=0, atol=1e-4)
    stage.close()
    assert len(graphs.captured) == 2


@pytest.mark.parametrize("pieces", [0, 2])
def test_without_graphs_of_pieces_a_team_gives_the_same(
    pieces: int,
    tmp_path: Path,
    graphs: type[RecordedGraph],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    team = team_of(tmp_path, "llama", TEAMS[0], Format.of(8, "rtn", 32))
    local = threading.local()

    def refuse() -> RecordedGraph:
        local.count = getattr(local, "count", 0) + 1
        if local.count > pieces:
            raise RuntimeError("capture refused\nand more")
        return RecordedGraph()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", refuse)
    team.check(some_calls(team), prepare=capture)
    assert caplog.messages == ["tokens run without CUDA graphs, slower: capture refused"] * 2


def test_graphs_of_pieces_let_a_failed_sum_through(
    tmp_path: Path, graphs: type[RecordedGraph]
) -> None:
    team = team_of(tmp_path, "llama", (1,), Format.of(32))
    failing = False

    def team_sum(partial: Array) -> Array:
        if failing:
            raise Lost("pi-2 is gone")
        return partial

    stage = TorchCpuBackend().load(*team.members[0], replace(OPTIONS, team_sum=team_sum))
    capture(stage)
    text = hidden_rows(team.spec)
    expected = team.expected(text)
    for at in range(COUNT):
        row = slice(at, at + 1)
        failing = True
        with pytest.raises(Lost):
            stage.forward(0, at, -text[row])
        failing = False
        np.testing.assert_allclose(
            stage.forward(0, at, text[row]), expected[row], rtol=0, atol=1e-4
        )
    stage.close()


def test_a_piece_asks_the_host_for_nothing(tmp_path: Path) -> None:
    """A graph cannot contain what depends on values, which fake tensors do not have."""
    team = team_of(tmp_path, "opt-post", TEAMS[0], Format.of(4, "rtn", 32))
    spec, artifacts = team.members[0]
    stage = TorchCpuBackend().load(spec, artifacts, replace(OPTIONS, team_sum=np.copy))
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, torch.inference_mode(), without_team(stage._cut):
        places = torch.arange(2)
        result = stage._token_pass(
            torch.zeros((2, spec.hidden)), TokenPass(places, places, 16, None)
        )
        assert result.shape == (2, spec.vocab)
    stage.close()


@pytest.fixture
def gpu() -> Backend:
    kind = backend_class("torch_cuda")
    try:
        kind.probe()
    except BackendUnavailable as unavailable:
        pytest.skip(unavailable.reason)
    return kind()


def test_on_a_gpu_partial_rows_are_in_pinned_memory(gpu: Backend, tmp_path: Path) -> None:
    team = team_of(tmp_path, "llama", (1,), Format.of(4, "rtn", 32))
    pinned: list[bool] = []

    def team_sum(partial: Array) -> Array:
        assert partial.dtype == np.float32
        pinned.append(torch.from_numpy(partial).is_pinned())
        return partial

    options = replace(OPTIONS, exact=False, team_sum=team_sum)
    stage = gpu.load(*team.members[0], options)
    assert pinned == []
    hidden = hidden_rows(team.spec)
    stage.forward(0, 0, hidden[:9])
    stage.decode([0, 1], [9, 0], hidden[9:11])
    stage.close()
    assert pinned == [True] * 8


def test_on_a_gpu_pieces_run_without_graphs_too(
    gpu: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    team = team_of(tmp_path, "llama", TEAMS[0], Format.of(8, "rtn", 32))

    def refuse() -> None:
        raise RuntimeError("capture refused")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", refuse)
    team.check(some_calls(team), gpu)
    assert "without CUDA graphs" in caplog.text
