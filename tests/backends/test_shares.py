"""Every backend that runs shares of layers, in teams, against whole layers of the numpy reference.

A new backend needs no test of its own here: the registry and ``Capabilities.shares`` select it.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from math import gcd
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pytest

from backends.base import Array, Backend, BackendUnavailable, Stage, StageOptions, TeamSum
from backends.registry import BACKENDS, backend_class
from model.artifact import read_block, store_block
from model.checkpoint import Checkpoint
from model.quantize import Format
from model.reference import ReferenceModel
from model.share import share_spec, share_steps, share_tensors
from model.spec import LayerSpec, ModelSpec
from tests.backends.test_conformance import (
    CHECKPOINTS,
    EXPERT_LAYERS,
    FIXTURES,
    LAYERS,
    LLAMA_LAYER,
    MIXED_LAYERS,
    OPT_LAYER,
    Artifacts,
    Tensors,
    assert_close,
    random_model,
    stored,
)
from tests.team import run_together, shares_of

OPTIONS = StageOptions(slots=4, context_tokens=40, threads=1, exact=True)
GROUP = 32
TEAMS = [((2, 1), bits) for bits in (32, 8, 4)] + [((1, 2, 2), bits) for bits in (32, 4, 3)]
"""The members' relative sizes, and the width of the weights."""

SHARED = LAYERS | EXPERT_LAYERS

ROWS = 36

Result = TypeVar("Result")
Call = Callable[[Stage], Array]


@dataclass(frozen=True, slots=True)
class Team:
    """A model, its whole layers and head, and each member's spec and slices of them."""

    spec: ModelSpec
    whole: Artifacts
    members: list[tuple[ModelSpec, Artifacts]]

    def run(
        self, backend: Backend, run: Callable[[Stage], Result], options: StageOptions = OPTIONS
    ) -> list[Result]:
        """Load every member's stage, and run them at once. Return the members' results."""

        def member(own: ModelSpec, artifacts: Artifacts, team_sum: TeamSum) -> Result:
            with closing(backend.load(own, artifacts, replace(options, team_sum=team_sum))) as it:
                return run(it)

        return run_together([partial(member, *pair) for pair in self.members])

    def expected(self, rows: Array) -> npt.NDArray[np.float64]:
        """Return what whole layers make of each row [n, hidden], in float64."""
        model = ReferenceModel.from_artifacts(self.spec, self.whole, np.float64)
        return model.forward(rows)


def team_of(
    directory: Path, spec: ModelSpec, tensors: Tensors, weights: Sequence[int], fmt: Format
) -> Team:
    """Store a model, and slice layers and head into shares in proportion to ``weights``."""
    whole = stored(directory, tensors, fmt)[1:]
    blocks = [(block, read_block(path, spec, block)[1]) for block, path in whole]
    members = [
        (
            share_spec(spec, share),
            [
                (block, store_block(directory, block, sliced, fmt).path)
                for block, sliced in (
                    (block, share_tensors(spec, block, stored_tensors, share))
                    for block, stored_tensors in blocks
                )
            ],
        )
        for share in shares_of(spec, weights, fmt.group_size)
    ]
    return Team(spec, whole, members)


def with_heads(layer: LayerSpec, members: int, fmt: Format) -> LayerSpec:
    """Return the layer with KV heads of whole groups for ``members``, one of them with more."""
    queries = layer.heads // layer.kv_heads
    step = GROUP // gcd(GROUP, queries * layer.head_dim) if fmt.group_size else 1
    kv_heads = step * (2 * members - 1)
    return replace(
        layer, heads=kv_heads * queries, kv_heads=kv_heads, ffn=(2 * members - 1) * GROUP - 16
    )


def format_of(bits: int) -> Format:
    return Format.of(bits, "rtn", GROUP) if bits <= 8 else Format.of(bits)


def some_rows(spec: ModelSpec, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal((ROWS, spec.hidden), np.float32)


@pytest.fixture(scope="module", params=sorted(BACKENDS))
def backend(request: pytest.FixtureRequest) -> Backend:
    try:
        kind = backend_class(request.param)
        if not kind.probe().shares:
            pytest.skip(f"{request.param} runs whole layers alone")
    except BackendUnavailable as unavailable:
        pytest.skip(unavailable.reason)
    return kind()


def checkpoint_cases() -> Iterator[tuple[str, tuple[int, ...], int]]:
    """Yield checkpoints with enough KV heads of whole groups for a team, at each width."""
    for name, (weights, bits) in itertools.product(CHECKPOINTS, TEAMS):
        spec = Checkpoint.open(FIXTURES / name).spec
        steps = share_steps(spec, format_of(bits).group_size)
        if spec.layers[0].kv_heads >= len(weights) * steps.kv_heads:
            yield name, weights, bits


@pytest.mark.parametrize(("name", "weights", "bits"), list(checkpoint_cases()), ids=str)
def test_checkpoint(
    backend: Backend, name: str, weights: tuple[int, ...], bits: int, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(FIXTURES / name)
    spec, fmt = checkpoint.spec, format_of(bits)
    tensors = [checkpoint.block(block) for block in range(spec.block_count)]
    check_against_reference(backend, team_of(tmp_path, spec, tensors, weights, fmt))


@pytest.mark.thorough
@pytest.mark.parametrize(("weights", "bits"), TEAMS, ids=str)
@pytest.mark.parametrize("name", [name for name in SHARED if SHARED[name].qk_norm != "width"])
def test_feature(
    backend: Backend, name: str, weights: tuple[int, ...], bits: int, tmp_path: Path
) -> None:
    fmt = format_of(bits)
    spec, tensors = random_model(with_heads(SHARED[name], len(weights), fmt))
    check_against_reference(backend, team_of(tmp_path, spec, tensors, weights, fmt))


@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("name", MIXED_LAYERS)
def test_mixed_layers(backend: Backend, name: str, bits: int, tmp_path: Path) -> None:
    fmt, weights = format_of(bits), (2, 1)
    layers = [with_heads(layer, len(weights), fmt) for layer in MIXED_LAYERS[name]]
    spec, tensors = random_model(*layers, logit_cap=4.0)
    check_against_reference(backend, team_of(tmp_path, spec, tensors, weights, fmt))


def check_against_reference(backend: Backend, team: Team) -> None:
    """One sequence in chunks, others beside it in changing company, rolled back, begun anew."""
    texts = [some_rows(team.spec, seed) for seed in range(3)]
    logits = [team.expected(text) for text in texts]
    calls: list[tuple[Call, npt.NDArray[np.float64]]] = []

    def forward(text: int, slot: int, begin: int, end: int, *, wanted: int = 1) -> None:
        rows, expected = texts[text][begin:end], logits[text][end - wanted : end]
        calls.append((lambda stage: stage.forward(slot, begin, rows, logits=wanted), expected))

    def decode(pairs: Sequence[tuple[int, int]], positions: Sequence[int]) -> None:
        slots = [slot for _, slot in pairs]
        rows, expected = (
            np.stack([each[text][at] for (text, _), at in zip(pairs, positions, strict=True)])
            for each in (texts, logits)
        )
        calls.append((lambda stage: stage.decode(slots, positions, rows), expected))

    forward(0, 2, 0, 7, wanted=0)
    forward(0, 2, 7, 8)
    forward(1, 3, 0, 3)
    forward(2, 0, 0, 20)
    for step in range(3):
        decode([(2, 0), (0, 2), (1, 3)], [20 + step, 8 + step, 3 + step])
        decode([(1, 3), (2, 0)], [3 + step, 20 + step])  # Again, in another order.
    decode([(0, 2)], [11])
    forward(0, 2, 12, 30, wanted=2)
    forward(0, 2, 27, 30, wanted=3)
    # Rolled back to the middle, and on with the rows of another sequence.
    texts.append(np.concatenate([texts[0][:9], texts[1][9:]]))
    logits.append(team.expected(texts[3]))
    forward(3, 2, 9, 15)
    forward(1, 3, 6, 8)
    forward(1, 0, 0, 5)
    decode([(1, 0), (1, 3)], [5, 8])

    results = team.run(backend, lambda stage: [call(stage) for call, _ in calls])
    for (_, expected), parts in zip(calls, zip(*results, strict=True), strict=True):
        actual = np.concatenate(parts, axis=1)
        if len(expected):
            assert_close(actual, expected)
        else:
            assert actual.shape == expected.shape


@pytest.fixture(scope="module", params=["pre", "post"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Team:
    layer = replace(OPT_LAYER, head_dim=32, norm_position=request.param)
    spec, tensors = random_model(layer)
    return team_of(tmp_path_factory.mktemp("small"), spec, tensors, (2, 1), format_of(4))


@pytest.fixture
def alone(small: Team) -> tuple[ModelSpec, Artifacts]:
    """The first member's share."""
    return small.members[0]


def test_members_without_the_head_hold_equal_rows(backend: Backend, small: Team) -> None:
    """Every member can hand the hidden rows on."""
    layers = Team(small.spec, small.whole[:-1], [(own, parts[:-1]) for own, parts in small.members])
    rows = some_rows(small.spec)

    def run(stage: Stage) -> Array:
        chunk = stage.forward(1, 0, rows[:20])
        kept = chunk.copy()
        ones = [stage.forward(1, at, rows[at : at + 1]) for at in range(20, ROWS)]
        np.testing.assert_array_equal(chunk, kept)  # Results outlive later calls.
        return np.concatenate([chunk, *ones])

    results = layers.run(backend, run)
    assert_close(results[0], layers.expected(rows))
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


def test_a_head_alone_is_divided_too(backend: Backend, small: Team) -> None:
    heads = Team(small.spec, small.whole[-1:], [(own, parts[-1:]) for own, parts in small.members])
    rows = some_rows(small.spec)
    logits = heads.run(backend, lambda stage: stage.decode([2, 0], [3, 5], rows[:2]))
    assert_close(np.concatenate(logits, axis=1), heads.expected(rows[:2]))


def test_each_layer_is_cut_twice_with_all_rows_in_order(
    backend: Backend, alone: tuple[ModelSpec, Artifacts]
) -> None:
    """So members with other backends add up the same rows."""
    spec, artifacts = alone
    seen: list[Array] = []

    def team_sum(rows: Array) -> Array:
        assert rows.dtype == np.float32
        seen.append(rows.copy())
        return rows

    stage = backend.load(spec, artifacts, replace(OPTIONS, team_sum=team_sum))
    rows = some_rows(spec)

    def cuts(call: Callable[[], Any]) -> list[Array]:
        seen.clear()
        call()
        assert len(seen) == 2 * len(spec.layers)
        return list(seen)

    # Without logits the last sum is still called for, because other members wait in it.
    for head in (True, False):
        chunk = cuts(lambda head=head: stage.forward(0, 0, rows[:7], logits=head))  # type: ignore[misc]
        assert [partial.shape for partial in chunk] == [(7, spec.hidden)] * len(chunk)
    for slot in (0, 1, 3):
        stage.forward(slot, 0, rows[slot : slot + 2])
    forth = cuts(lambda: stage.decode([3, 0, 1], [2, 2, 2], rows[[3, 4, 5]]))
    back = cuts(lambda: stage.decode([1, 3, 0], [2, 2, 2], rows[[5, 3, 4]]))
    for first, second in zip(forth, back, strict=True):
        assert_close(first[[2, 0, 1]], second)
    stage.close()


def test_the_sum_may_overwrite_the_rows_and_reuse_its_own(
    backend: Backend, alone: tuple[ModelSpec, Artifacts]
) -> None:
    spec, artifacts = alone
    memory = np.empty((ROWS, spec.hidden), np.float32)

    def team_sum(rows: Array) -> Array:
        total = memory[: len(rows)]
        total[...] = rows
        rows[...] = np.nan
        return total

    def run(team_sum: TeamSum) -> Array:
        options = replace(OPTIONS, team_sum=team_sum)
        with closing(backend.load(spec, artifacts, options)) as stage:
            first = [stage.forward(0, 0, rows[:9]), stage.forward(1, 0, rows[:1])]
            return np.concatenate([*first, stage.decode([0, 1], [9, 1], rows[:2])])

    rows = some_rows(spec)
    np.testing.assert_array_equal(run(team_sum), run(lambda partial: partial.copy()))


class MemberLost(RuntimeError):
    """The error of a sum that no stage knows."""


@pytest.mark.parametrize("at", range(4))
def test_an_error_of_the_sum_goes_through(
    backend: Backend, alone: tuple[ModelSpec, Artifacts], at: int
) -> None:
    """And the stage goes on from earlier rows, whatever the failed pass left."""
    spec, artifacts = alone
    before_failure: list[int] = []

    def team_sum(rows: Array) -> Array:
        if before_failure:
            before_failure[0] -= 1
            if before_failure[0] < 0:
                before_failure.clear()
                raise MemberLost("pi-2 left")
        return rows

    rows, bad = some_rows(spec), np.full((ROWS, spec.hidden), np.inf, np.float32)
    with closing(backend.load(spec, artifacts, replace(OPTIONS, team_sum=team_sum))) as stage:

        def results() -> list[Array]:
            return [
                stage.decode([0, 1], [9, 2], rows[[9, 2]]),
                stage.forward(0, 10, rows[10:14]),
                stage.forward(1, 3, rows[3:4]),
            ]

        stage.forward(0, 0, rows[:9])
        stage.forward(1, 0, rows[:2])
        expected = results()
        calls: list[Callable[[], Array]] = [
            lambda: stage.forward(0, 9, bad[:20]),
            lambda: stage.forward(0, 9, bad[:1]),
            lambda: stage.decode([1, 0], [2, 9], bad[:2]),
        ]
        for call in calls:
            before_failure.append(at)
            with pytest.raises(MemberLost, match="pi-2 left"):
                call()
        for found, wanted in zip(results(), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_rounded_activations_cost_a_share_no_more_than_whole_layers(
    backend: Backend, tmp_path: Path
) -> None:
    """Relative L2 error of logits at 4 bits: 1 to 4 % with rounding to 8 bits, less without."""
    spec, tensors = random_model(with_heads(LLAMA_LAYER, 2, format_of(4)))
    team = team_of(tmp_path, spec, tensors, (2, 1), format_of(4))
    rows = some_rows(spec)

    def run(stage: Stage) -> Array:
        stage.forward(0, 0, rows[:20], logits=False)
        return np.concatenate([stage.forward(0, at, rows[at : at + 1]) for at in range(20, ROWS)])

    logits = np.concatenate(team.run(backend, run, replace(OPTIONS, exact=False)), axis=1)
    expected = team.expected(rows)[20:]
    assert np.linalg.norm(logits - expected) < 0.06 * np.linalg.norm(expected)


def test_a_share_takes_its_part_of_memory(backend: Backend, tmp_path: Path) -> None:
    layer = replace(LLAMA_LAYER, hidden=256, heads=16, kv_heads=8, head_dim=32, ffn=1024)
    spec, tensors = random_model(layer)
    team = team_of(tmp_path, spec, tensors, (3, 1), format_of(8))
    # A process's first stage may also count what libraries allocate once, such as a workspace.
    backend.load(spec, team.whole, OPTIONS).close()
    with closing(backend.load(spec, team.whole, OPTIONS)) as stage:
        whole = stage.memory_bytes
    parts = team.run(backend, lambda stage: stage.memory_bytes)
    assert parts[1] < 0.5 * whole < parts[0] < whole


def test_a_share_runs_in_another_thread_than_it_was_loaded_in(
    backend: Backend, alone: tuple[ModelSpec, Artifacts]
) -> None:
    spec, artifacts = alone
    rows = some_rows(spec)
    results: list[Array] = []
    with closing(backend.load(spec, artifacts, replace(OPTIONS, team_sum=np.copy))) as stage:
        worker = threading.Thread(target=lambda: results.append(stage.forward(0, 0, rows)))
        worker.start()
        worker.join()
        np.testing.assert_array_equal(results[0], stage.forward(0, 0, rows))
