"""The grid of layer times. Tests assert which points there are, not how long they take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from backends.base import Backend, BackendUnavailable
from backends.registry import BACKENDS, backend_class
from calibration import layers, table
from calibration.layers import kept_timings, measure_model
from calibration.store import CalibrationStore
from calibration.table import LayerTable, measure_table
from cli.commands.calibrate_views import show_table
from cli.render import Screen
from model.spec import LayerSpec, ModelSpec
from tests.backends.numpy_cpu import NumpyBackend

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
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
)
SPEC = ModelSpec(
    vocab=90,
    hidden=64,
    embed_dim=64,
    max_context=1024,
    layers=(LAYER, LAYER, replace(LAYER, ffn=32)),
    learned_positions=0,
    position_offset=0,
    final_norm=True,
    tied_head=False,
    bos_token=None,
    eos_tokens=(),
)
ALL = {(rows, context) for rows in (1, 2, 4, 8, 16, 64, 256) for context in ("short", "long")}


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Backend:
    monkeypatch.setattr(table, "_QUICK", (1, 0.0, 0.01))
    monkeypatch.setattr(layers, "_MIN_TIME_S", 0.001)
    for name in BACKENDS:
        try:
            backend_class(name).probe()
        except BackendUnavailable:
            continue
        return backend_class(name)()
    pytest.skip("no backend is available")


@pytest.fixture
def store(tmp_path: Path) -> CalibrationStore:
    return CalibrationStore(tmp_path / "state" / "calibration.json")


measure_whole = partial(measure_table, clock_s=lambda: 0.0)
"""With all points, however slow the machine is."""


def places(result: LayerTable) -> set[tuple[int, int, int, str]]:
    return {(item.variant, item.container_bits, item.rows, item.context) for item in result.layers}


def test_every_point_of_every_shape(backend: Backend, store: CalibrationStore) -> None:
    steps: list[tuple[int, int]] = []
    result = measure_whole(
        SPEC,
        (4, 8),
        backend,
        threads=1,
        store=store,
        progress=lambda done, total: steps.append((done, total)),
    )
    containers = backend.probe().container_bits
    assert places(result) == {
        (variant, containers[bits], *point)
        for variant in (0, 1)
        for bits in (4, 8)
        for point in ALL
    }
    assert (result.left_out, result.reused) == (0, 0)
    assert {(item.kind, item.bits) for item in result.embedding_and_head} == {
        (kind, bits) for kind in ("embedding", "head") for bits in (4, 8)
    }
    assert all(item.seconds > 0 for item in result.layers)
    assert all(item.position + item.rows <= 1024 for item in result.layers)
    assert {item.context_tokens for item in result.memory} == {1024}
    assert all(item.charged_bytes > 0 for item in result.memory)
    assert steps[0] == (0, steps[-1][0])
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert {path.name for path in store.path.parent.iterdir()} == {
        "calibration.json",
        "calibration.json.lock",
    }


def test_operations_grow_with_rows_and_context(backend: Backend, store: CalibrationStore) -> None:
    result = measure_whole(SPEC, (4,), backend, threads=1, store=store)
    one, two = (
        next(item for item in result.layers if (item.rows, item.context) == (rows, "short"))
        for rows in (1, 2)
    )
    matrices = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96)
    # One row behind 64 tokens sees 65.
    assert one.flops == matrices + 4 * 64 * 65
    assert two.flops == 2 * one.flops
    assert two.moved_bytes - one.moved_bytes == 2 * 32 * 4


def test_what_is_stored_is_not_measured_again(backend: Backend, store: CalibrationStore) -> None:
    first = measure_whole(SPEC, (4,), backend, threads=1, store=store)
    again = measure_whole(SPEC, (4,), backend, threads=1, store=store)
    assert (again.layers, again.memory) == (first.layers, first.memory)
    assert again.reused == len(first.layers) + len(first.embedding_and_head)
    assert measure_whole(SPEC, (4,), backend, threads=2, store=store).reused == 0
    assert measure_whole(SPEC, (4,), backend, threads=1, store=store, again=True).reused == 0


def test_agents_find_what_they_would_measure(
    backend: Backend, store: CalibrationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = measure_whole(SPEC, (4,), backend, threads=1, store=store)

    def refuse(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(layers.Bench, "run", refuse)
    timings = measure_model(SPEC, (4,), backend, threads=1, store=store)
    layer = next(item for item in timings if (item.kind, item.variant) == ("layer", 0))
    points = {(item.variant, item.rows, item.context): item.seconds for item in result.layers}
    assert layer.decode_s == points[0, 1, "short"]
    assert layer.prefill_s_per_token == points[0, 64, "short"] / 64


def test_without_time_only_the_most_important_points(
    backend: Backend, store: CalibrationStore
) -> None:
    def clock() -> Iterator[float]:
        now_s = 0.0
        while True:
            yield now_s
            now_s += 1.0

    ticks = clock()
    few = measure_table(
        SPEC, (4,), backend, threads=1, store=store, budget_s=0.5, clock_s=lambda: next(ticks)
    )
    assert places(few) == {(0, 4, 1, "short"), (1, 4, 1, "short")}
    assert few.left_out == 2 * len(ALL) - 2
    # The next run goes on from there.
    rest = measure_whole(SPEC, (4,), backend, threads=1, store=store)
    assert rest.left_out == 0
    assert set(few.layers) < set(rest.layers)


def test_a_short_context_has_fewer_points(backend: Backend, store: CalibrationStore) -> None:
    result = measure_whole(replace(SPEC, max_context=96), (4,), backend, threads=1, store=store)
    assert {(item.rows, item.context) for item in result.layers} == {
        *((rows, "short") for rows in (1, 2, 4, 8, 16)),
        *((rows, "long") for rows in (1, 2, 4, 8, 16)),
    }


def test_blocks_that_do_not_fit_are_left_out(
    backend: Backend, store: CalibrationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "memory_bytes", lambda: (1000, 1 << 30))
    result = measure_whole(SPEC, (4,), backend, threads=1, store=store)
    assert (result.layers, result.memory) == ((), ())
    # Of a head a part is enough.
    assert [item.kind for item in result.embedding_and_head] == ["head"]
    assert result.left_out == 2 * len(ALL) + 1


def test_shares_are_in_the_table_and_agents_find_them(
    backend: Backend,
    store: CalibrationStore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(layers, "_SHARE_EFFORT", (1, 0.001, 1.0))
    spec = replace(SPEC, layers=(replace(LAYER, kv_heads=4, head_dim=32, ffn=256),) * 2)
    numpy = NumpyBackend()
    result = measure_whole(spec, (32,), numpy, threads=1, store=store)
    assert [share.fraction for share in result.shares] == [0.25, 0.5, 1.0]
    smaller, _, whole = result.shares
    assert 0 < smaller.flops < whole.flops
    assert 0 < smaller.moved_bytes < whole.moved_bytes
    show_table(Screen(json_output=False), result, "numpy_cpu")
    shown = capsys.readouterr().out
    for text in ("shares of one layer", "25%", "50%", "whole, with cuts"):
        assert text in shown
    (timing,) = (
        timing
        for timing in kept_timings(spec, (32,), numpy, threads=1, store=store)
        if timing.kind == "layer"
    )
    assert timing.shares_s == tuple(
        (share.fraction, share.decode_s, share.prefill_s_per_token) for share in result.shares
    )
    # Nothing is measured again, and a backend without shares shows none.
    again = measure_whole(spec, (32,), numpy, threads=1, store=store)
    assert again.shares == result.shares
    if not backend.probe().shares:
        without = measure_table(spec, (32,), backend, threads=1, store=store, budget_s=0.0)
        assert without.shares == ()
