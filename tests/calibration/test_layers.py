"""Timings through the real backends. Tests assert which there are, not how long they are."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from backends.base import (
    Backend,
    BackendError,
    BackendUnavailable,
    Capabilities,
    Stage,
    StageOptions,
)
from backends.onnx_cpu import OnnxCpuBackend, OnnxCpuStage
from backends.registry import BACKENDS, backend_class
from calibration import layers
from calibration.layers import Bench, Task, kept_timings, measure_call, measure_model
from calibration.shares import share_models
from calibration.store import CalibrationStore, is_doubtful
from model.quantize import Format
from model.spec import LayerSpec, ModelSpec, RopeSpec
from tests.backends.numpy_cpu import NumpyBackend
from wire.hygiene import is_plausible
from wire.profile import TIMED_ROWS

WIDE = LayerSpec(
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
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    rope=RopeSpec(theta=10000.0),
)
NARROW = replace(WIDE, ffn=32)
SPEC = ModelSpec(
    vocab=90,
    hidden=64,
    embed_dim=48,
    max_context=96,
    layers=(WIDE, NARROW, WIDE, WIDE),
    learned_positions=98,
    position_offset=2,
    final_norm=True,
    tied_head=True,
    bos_token=None,
    eos_tokens=(2,),
)


class Recorder(Backend):
    """The machine's own backend, and a list of what was loaded through it."""

    loaded: list[tuple[ModelSpec, list[int], StageOptions]]
    inner: Backend

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.loaded = []

    @classmethod
    def probe(cls) -> Capabilities:
        return backend_kind().probe()

    def load(
        self, spec: ModelSpec, artifacts: Sequence[tuple[int, Path]], options: StageOptions
    ) -> Stage:
        self.loaded.append((spec, [block for block, _ in artifacts], options))
        return self.inner.load(spec, artifacts, options)


def backend_kind() -> type[Backend]:
    for name in BACKENDS:
        try:
            kind = backend_class(name)
            kind.probe()
        except BackendUnavailable:
            continue
        return kind
    pytest.skip("no backend is available")


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    monkeypatch.setattr(layers, "_MIN_TIME_S", 0.005)
    return Recorder(backend_kind()())


def test_every_block_shape_has_a_timing_at_every_width(backend: Recorder, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    timings = measure_model(
        SPEC,
        (2, 4, 8, 32),
        backend,
        threads=1,
        directory=tmp_path,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert {(timing.kind, timing.variant, timing.bits) for timing in timings} == {
        (kind, variant, bits)
        for kind, variant in (("embedding", 0), ("layer", 0), ("layer", 1), ("head", 0))
        for bits in (2, 4, 8, 32)
    }
    assert len(timings) == 16
    assert all(timing.decode_s > 0 and timing.prefill_s_per_token > 0 for timing in timings)
    reached = list(dict.fromkeys(steps))
    total = len(reached) - 1
    assert reached == [(done, total) for done in range(total + 1)]
    assert steps == sorted(steps)
    assert list(tmp_path.iterdir()) == []


def test_passes_of_several_rows_are_kept_beside_the_others(
    backend: Recorder, tmp_path: Path
) -> None:
    store = CalibrationStore(tmp_path / "calibration.json")
    alone = measure_model(SPEC, (4,), backend, threads=1, store=store)
    assert all(timing.rows_s == () for timing in alone)
    more = measure_model(SPEC, (4,), backend, threads=1, store=store, together=True)
    assert [replace(timing, rows_s=()) for timing in more] == list(alone)
    known = {timing.kind: timing.rows_s for timing in more}
    assert known["embedding"] == ()
    for kind in ("layer", "head"):
        assert len(known[kind]) == len(TIMED_ROWS)
        assert all(seconds > 0 for seconds in known[kind])
    backend.loaded.clear()
    # Whoever asks next finds them, and so does whoever only looks.
    assert measure_model(SPEC, (4,), backend, threads=1, store=store) == more
    assert kept_timings(SPEC, (4,), backend, threads=1, store=store) == more
    assert backend.loaded == []


SHARED = replace(SPEC, layers=(replace(WIDE, head_dim=32, ffn=256, kv_heads=4),) * 2)
"""All of its layers are alike, and have whole groups of weights to divide."""


@pytest.fixture
def numpy(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    monkeypatch.setattr(layers, "_MIN_TIME_S", 0.005)
    monkeypatch.setattr(layers, "_SHARE_EFFORT", (1, 0.005, 1.0))
    recorder = Recorder(NumpyBackend())
    monkeypatch.setattr(Recorder, "probe", NumpyBackend.probe)
    return recorder


def test_shares_are_timed_with_their_cuts(numpy: Recorder, tmp_path: Path) -> None:
    store = CalibrationStore(tmp_path / "calibration.json")
    steps: list[tuple[int, int]] = []
    without = measure_model(SHARED, (32,), numpy, threads=1, store=store)
    assert all(timing.shares_s == () for timing in without)
    numpy.loaded.clear()
    timings = measure_model(
        SHARED,
        (32,),
        numpy,
        threads=1,
        store=store,
        shares=True,
        progress=lambda done, total: steps.append((done, total)),
    )
    fractions = {timing.kind: [share[0] for share in timing.shares_s] for timing in timings}
    assert fractions["layer"] == [0.25, 0.5, 1.0]
    assert fractions["embedding"] == []
    assert fractions["head"] == pytest.approx([0.25], abs=0.01)
    assert all(is_plausible(timing) for timing in timings)
    # Only shares were loaded. The head's is a smaller head, and layers are cut.
    sizes = {
        (spec.layers[0].kv_heads, spec.layers[0].ffn, options.team_sum is None)
        for spec, blocks, options in numpy.loaded
        if 1 in blocks and spec.layers[0].gated  # The tiny layers show what a call costs.
    }
    assert sizes == {(4, 256, False), (2, 128, False), (1, 64, False)}
    assert steps[-1][0] == steps[-1][1] == 7
    numpy.loaded.clear()
    # Whoever asks next finds them, and so does whoever only looks.
    assert measure_model(SHARED, (32,), numpy, threads=1, store=store) == timings
    assert kept_timings(SHARED, (32,), numpy, threads=1, store=store) == timings
    assert numpy.loaded == []


def test_shares_wait_for_the_next_run_when_time_is_up(
    numpy: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CalibrationStore(tmp_path / "calibration.json")
    monkeypatch.setattr(layers, "SHARES_BUDGET_S", 0.0)
    timings = measure_model(SHARED, (32,), numpy, threads=1, store=store, shares=True)
    assert {timing.kind for timing in timings} == {"embedding", "layer", "head"}
    assert all(timing.shares_s == () for timing in timings)


def test_a_disturbed_share_makes_its_block_doubtful(numpy: Recorder, tmp_path: Path) -> None:
    store = CalibrationStore(tmp_path / "calibration.json")
    measure_model(SHARED, (32,), numpy, threads=1, store=store, shares=True)
    content = json.loads(store.path.read_text())
    quiet, noisy = [2, 0.0, 0.0, 0.0, 0.1, 0.01, 1.0], [2, 1.5, 0.0, 0.0, 3.0, 0.01, 1.0]
    content["conditions"] = {
        key: noisy if "share" in key and '"kind":"layer"' in key else quiet
        for key in content["entries"]
    }
    store.path.write_text(json.dumps(content))
    timings = kept_timings(SHARED, (32,), numpy, threads=1, store=store)
    assert {timing.kind for timing in timings if is_doubtful(timing.conditions)} == {"layer"}
    numpy.loaded.clear()
    again = store.again(is_doubtful)
    measure_model(SHARED, (32,), numpy, threads=1, store=again, shares=True)
    whole = [
        spec
        for spec, blocks, options in numpy.loaded
        if 1 in blocks and spec.layers[0].gated and options.team_sum is None
    ]
    assert numpy.loaded
    assert whole == []


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(SPEC, id="layers that differ"),
        pytest.param(
            replace(SHARED, layers=(replace(SHARED.layers[0], kv_heads=1),)), id="one KV head"
        ),
    ],
)
def test_what_no_team_can_share_has_no_shares(
    spec: ModelSpec, numpy: Recorder, tmp_path: Path
) -> None:
    timings = measure_model(spec, (32,), numpy, threads=1, directory=tmp_path, shares=True)
    assert timings
    assert all(timing.shares_s == () for timing in timings)


def test_shares_have_whole_heads_and_whole_groups() -> None:
    layer = replace(WIDE, heads=6, kv_heads=3, head_dim=64, ffn=1000)
    spec = replace(SPEC, layers=(layer,), vocab=1000)
    found = share_models(spec, "layer", 4)
    assert sorted(found) == pytest.approx([1 / 3, 2 / 3, 1.0])
    group = Format.of(4).group_size
    for fraction, part in found.items():
        assert part.layers[0].kv_heads == round(3 * fraction)
        assert part.layers[0].heads == 2 * part.layers[0].kv_heads
        assert part.layers[0].ffn % group == 0 or part.layers[0].ffn == 1000
        assert part.layers[0].ffn == pytest.approx(1000 * fraction, abs=group)


def test_widths_that_run_alike_are_measured_once(backend: Recorder, tmp_path: Path) -> None:
    containers = backend.probe().container_bits
    alike = [bits for bits in containers if containers[bits] == containers[4]]
    timings = measure_model(SPEC, alike, backend, threads=1, directory=tmp_path)
    layers_loaded = [
        blocks for spec, blocks, _ in backend.loaded if spec.layers[0] == WIDE and 0 not in blocks
    ]
    # One stage of layers and one of the head.
    assert len(layers_loaded) == 2
    times = {timing.decode_s for timing in timings if timing.kind == "head"}
    assert len(times) == 1


def test_a_layer_is_timed_among_as_many_as_the_model_has(backend: Recorder, tmp_path: Path) -> None:
    measure_model(SPEC, (4,), backend, threads=1, directory=tmp_path)
    counts = {spec.layers[0]: len(blocks) for spec, blocks, _ in backend.loaded if 1 in blocks}
    assert (counts[WIDE], counts[NARROW]) == (3, 1)


def test_what_is_stored_is_not_measured_again(backend: Recorder, tmp_path: Path) -> None:
    store = CalibrationStore(tmp_path / "calibration.json")
    first = measure_model(SPEC, (4, 8), backend, threads=1, store=store)
    backend.loaded.clear()
    again = measure_model(SPEC, (4, 8), backend, threads=1, store=store)
    assert again == first
    assert backend.loaded == []
    measure_model(SPEC, (4, 8), backend, threads=2, store=store)
    assert backend.loaded != []


def test_exact_stages_have_times_of_their_own(backend: Recorder, tmp_path: Path) -> None:
    store = CalibrationStore(tmp_path / "calibration.json")
    measure_model(SPEC, (4, 8), backend, threads=1, store=store)
    backend.loaded.clear()
    timings = measure_model(SPEC, (4, 8), backend, threads=1, store=store, exact=True)
    assert backend.loaded
    assert all(options.exact for _, _, options in backend.loaded)
    heads = [timing for timing in timings if timing.kind == "head"]
    assert [timing.bits for timing in heads] == [4, 8]


def test_other_models_share_what_is_alike(backend: Recorder, tmp_path: Path) -> None:
    store = CalibrationStore(tmp_path / "calibration.json")
    measure_model(SPEC, (4,), backend, threads=1, store=store)
    backend.loaded.clear()
    measure_model(replace(SPEC, vocab=91, bos_token=1), (4,), backend, threads=1, store=store)
    assert {tuple(blocks) for _, blocks, _ in backend.loaded} == {(SPEC.head_block,)}


def test_a_large_vocabulary_is_scaled_up_from_a_part(
    backend: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "HEAD_BYTES", 1 << 18)
    # Every call takes 2 ms, half of which at most is for the call itself.
    monkeypatch.setattr(layers, "_timed", lambda call, check: (call(), (2e-3, 0.0))[1])
    spec = replace(SPEC, vocab=1 << 16, embed_dim=64)
    timings = measure_model(spec, (4,), backend, threads=1, directory=tmp_path)
    (head,) = (timing for timing in timings if timing.kind == "head")
    (part,) = (loaded.vocab for loaded, blocks, _ in backend.loaded if blocks == [spec.head_block])
    assert 0 < part < 1 << 14
    assert head.decode_s == pytest.approx(1e-3 + 1e-3 * spec.vocab / part)


def test_the_directory_for_random_blocks_is_made_and_left_empty(
    backend: Recorder, tmp_path: Path
) -> None:
    directory = tmp_path / "agent" / "blocks"
    assert measure_model(SPEC, (4,), backend, threads=1, directory=directory)
    assert list(directory.iterdir()) == []


def test_widths_that_the_backend_lacks_have_no_timing(backend: Recorder, tmp_path: Path) -> None:
    assert measure_model(SPEC, (7,), backend, threads=1, directory=tmp_path) == ()


def test_blocks_that_do_not_fit_have_no_timing(
    backend: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "memory_bytes", lambda: (1000, 1 << 30))
    assert measure_model(SPEC, (4,), backend, threads=1, directory=tmp_path) == ()
    assert backend.loaded == []


def test_a_failing_backend_leaves_no_files(backend: Recorder, tmp_path: Path) -> None:
    odd = replace(SPEC, layers=(replace(WIDE, head_dim=15, rope=None),))
    with pytest.raises(BackendError):
        measure_model(odd, (4,), backend, threads=1, directory=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_cost_of_a_call_is_small_and_not_negative(backend: Recorder, tmp_path: Path) -> None:
    assert 0 <= measure_call(backend, 1, tmp_path) < 0.1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("calls_ms", "expected_ms"),
    [
        # The kernel of a device with half a core lets nine calls through and holds up the tenth.
        ([1.0] * 9 + [11.0], 2.0),
        # Something that happens once in half a second is no part of a call.
        ([1.0] * 100 + [200.0] + [1.0] * 100, 1.0),
        ([60.0], 60.0),
    ],
    ids=["quota", "hiccup", "slow"],
)
def test_calls_count_as_many_of_them_cost(
    monkeypatch: pytest.MonkeyPatch, calls_ms: list[float], expected_ms: float
) -> None:
    durations_ms = itertools.cycle(calls_ms)
    now_ms = [0.0]

    def call() -> None:
        now_ms[0] += next(durations_ms)

    monkeypatch.setattr("time.perf_counter", lambda: now_ms[0] / 1e3)
    seconds, _ = layers.timed_calls(call, 5, 0.4, 2.0)
    assert seconds == pytest.approx(expected_ms / 1e3, rel=0.05)


class Watched(OnnxCpuBackend):
    """Notes, once stages are loaded, which of them have prepared weights on the disk."""

    def __init__(self) -> None:
        self.prepared: list[bool] = []

    def load(
        self, spec: ModelSpec, artifacts: Sequence[tuple[int, Path]], options: StageOptions
    ) -> OnnxCpuStage:
        stage = super().load(spec, artifacts, options)
        kept = options.prepared_dir
        self.prepared.append(kept is not None and any(kept.rglob("weights-*.bin")))
        return stage


def test_layers_are_timed_in_the_memory_that_an_agent_serves_from(tmp_path: Path) -> None:
    for exact in (False, True):
        backend = Watched()
        bench = Bench(backend, 1, tmp_path, exact=exact)
        assert bench.run(SPEC, Task("layer", 0, 8, 32 if exact else 8, (8,))) is not None
        # Exact stages keep none, there as here.
        assert set(backend.prepared) == {not exact}
    assert not list(tmp_path.iterdir())
