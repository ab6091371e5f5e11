"""Seconds per block of a model's own shapes, through the backend that will run them.

Weights are random, because time depends on shapes and widths alone. A layer is timed inside a stage
of several layers that is too large for a cache. Its time is its share of the stage's time without
the overhead of the call. So the time of a stage is predicted as ``cold_call_s`` plus the sum of its
blocks' times.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import zip_longest
from math import ceil, prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from backends.base import Array, Backend, Capabilities, Stage, StageOptions
from calibration.disturbance import Patience, spread_of, steady
from calibration.machine import hardware_id, usable_share
from calibration.shares import share_models
from calibration.store import CalibrationStore
from model.artifact import Tensor, store_block
from model.costs import executed_bytes, on_chip_layer_bytes
from model.memory import memory_bytes
from model.quantize import Format, random_matrix
from model.spec import QUANTIZED_TENSORS, LayerSpec, ModelSpec
from wire.conditions import Conditions, worst
from wire.limits import PREFILL_CHUNK_TOKENS
from wire.profile import TIMED_ROWS, BlockTiming, TimingKind

STAGE_BYTES = 64 << 20
"""The weights of a timed stage, if the model has enough layers. Most caches hold less."""

CACHE_BYTES = 4 << 20
"""A call that comes after so many bytes were read finds little of its own in the caches."""

MAX_TIMED_LAYERS = 8
HEAD_BYTES = 32 << 20
"""A larger head is timed with part of its vocabulary and scaled up, because it is one product."""

EMBEDDING_ROWS = 1024
"""The number of rows of the timed table. A look-up takes the same time in any table."""

LOAD_FACTOR = 2.5
"""Memory to load a stage, over its weights as executed. A stage that does not fit is not timed."""

_PREPARED = {"prepared": True}
"""Part of the key of times with prepared weights. Older times were measured on the heap."""

_CONTEXT_TOKENS = 4 * PREFILL_CHUNK_TOKENS
_MIN_REPEATS = 5
_MIN_TIME_S = 0.2
_MAX_TIME_S = 2.0
_LIMITED_TIME_S = 1.0
"""A quota stops calls, and single rounds then differ by a third."""

SHARES_BUDGET_S = 20.0
"""The time for the shares of a model. No new one is begun after it, and the next run goes on."""

_SHARE_EFFORT = (3, 0.1, 1.0)
_LIMITED_SHARE_EFFORT = (3, 0.4, 1.0)
"""The least repeats, the least seconds and the most seconds of a share; and with part of a core."""

_ROUND_S = 0.04
"""Several periods of the kernel's CPU quotas, of which short ones are 5 to 10 ms."""

Progress = Callable[[int, int], None]

Figures = tuple[tuple[float, ...], Conditions | None]
"""Seconds, and the conditions of their measurement."""


@dataclass(frozen=True, slots=True)
class Measured:
    """The seconds of a decoded row and of a prompt's token, or of passes of TIMED_ROWS rows.

    conditions: those of the measurement.
    """

    seconds: tuple[float, ...]
    conditions: Conditions


@dataclass(frozen=True, slots=True)
class Task:
    """One shape at one width to time, and the widths that run as the same kernels."""

    kind: TimingKind
    variant: int
    bits: int
    container_bits: int
    stands_for: tuple[int, ...]


def measure_model(
    spec: ModelSpec,
    bits: Sequence[int],
    backend: Backend,
    *,
    threads: int,
    store: CalibrationStore | None = None,
    progress: Progress | None = None,
    directory: Path | None = None,
    exact: bool = False,
    together: bool = False,
    shares: bool = False,
) -> tuple[BlockTiming, ...]:
    """Time embedding, distinct layers and head of ``spec`` at each of ``bits``.

    Widths that the backend does not take have no timing, nor have blocks too large to load here.
    Times in ``store`` are not measured again.

    progress: called with (done, all) steps several times a second; it may raise to end it.
    directory: holds the random blocks meanwhile, and is made if need be; by default that of the
        store.
    exact: times exact stages.
    together: times passes of several rows too. Those in ``store`` are returned in any case.
    shares: times shares of layers and head too, within SHARES_BUDGET_S, if the backend runs them.
        Those in ``store`` are returned in any case.

    Raises BackendError if the backend fails, CheckpointError if the disk is full.
    """
    capabilities = backend.probe()
    tasks = timing_tasks(
        spec, bits, capabilities.containers(exact=exact), experts=capabilities.experts
    )
    if directory is None and store is not None:
        directory = store.path.parent
    common = machine_key(capabilities, threads, exact=exact)
    bench = Bench(backend, threads, directory, exact=exact)
    wanted = share_jobs(spec, tasks) if shares and capabilities.shares else []
    total = len(tasks) + len(wanted)
    timings: dict[Task, BlockTiming] = {}
    for done, task in enumerate(tasks):
        if progress is not None:
            bench.check = partial(progress, done, total)
            bench.check()
        timing = _timing(bench, spec, task, common, store, together=together)
        if timing is not None:
            timings[task] = timing
    of_shares: dict[ShareJob, Figures] = {}
    started_s = time.perf_counter()
    for done, job in enumerate(wanted, len(tasks)):
        if progress is not None:
            bench.check = partial(progress, done, total)
            bench.check()
        if job.task in timings and time.perf_counter() - started_s < SHARES_BUDGET_S:
            of_shares |= measure_share(bench, job, common, store)
    if progress is not None:
        progress(total, total)
    return _with_shares(spec, timings, common, store, of_shares)


def _timing(
    bench: Bench,
    spec: ModelSpec,
    task: Task,
    common: Mapping[str, Any],
    store: CalibrationStore | None,
    *,
    together: bool,
) -> BlockTiming | None:
    """Return the timing of one task from ``store``, or measure and store it. None: it fits nowhere.

    common: ``machine_key``.
    """
    key = {**common, **timing_dependencies(spec, task)}
    seconds, conditions = (None, None) if store is None else store.found(key)
    if seconds is None or len(seconds) != 2:
        measured = bench.run(spec, task)
        if measured is None:
            return None
        seconds, conditions = measured.seconds, measured.conditions
        if store is not None:
            seconds, conditions = store.keep(key, seconds, conditions)
    rows_s = _known_rows_s(store, key)
    if together and not rows_s and (several := bench.run_rows(spec, task)) is not None:
        rows_s = several.seconds
        if store is not None:
            rows_s, _ = store.keep(_rows_key(key), rows_s, several.conditions)
    return BlockTiming(
        task.kind, task.variant, task.bits, seconds[0], seconds[1], conditions, rows_s
    )


def kept_timings(
    spec: ModelSpec,
    bits: Sequence[int],
    backend: Backend,
    *,
    threads: int,
    store: CalibrationStore,
    exact: bool = False,
) -> tuple[BlockTiming, ...]:
    """Return the timings in ``store`` without measuring; otherwise as ``measure_model``."""
    capabilities = backend.probe()
    common = machine_key(capabilities, threads, exact=exact)
    timings: dict[Task, BlockTiming] = {}
    for task in timing_tasks(
        spec, bits, capabilities.containers(exact=exact), experts=capabilities.experts
    ):
        key = common | timing_dependencies(spec, task)
        seconds, conditions = store.found(key)
        if seconds is not None and len(seconds) == 2:
            timings[task] = BlockTiming(
                task.kind,
                task.variant,
                task.bits,
                seconds[0],
                seconds[1],
                conditions,
                _known_rows_s(store, key),
            )
    return _with_shares(spec, timings, common, store, {})


@dataclass(frozen=True, slots=True)
class ShareJob:
    """One share to time: this ``fraction`` of a task's block, which is a block of ``part``."""

    task: Task
    fraction: float
    part: ModelSpec


def share_jobs(spec: ModelSpec, tasks: Sequence[Task]) -> list[ShareJob]:
    """Return the shares of these tasks to time, the important ones first."""
    by_task = [
        [ShareJob(task, *item) for item in share_models(spec, task.kind, task.bits).items()]
        for task in tasks
    ]
    return [job for turn in zip_longest(*by_task) for job in turn if job is not None]


def share_key(job: ShareJob, common: Mapping[str, Any]) -> dict[str, Any]:
    """Return the key of a share's times in a store; ``common`` is ``machine_key``."""
    return {**common, **timing_dependencies(job.part, job.task), "share": True}


def measure_share(
    bench: Bench, job: ShareJob, common: Mapping[str, Any], store: CalibrationStore | None
) -> dict[ShareJob, Figures]:
    """Time a share that ``store`` does not have; the result is empty if it fits nowhere."""
    key = share_key(job, common)
    if store is not None and store.get(key) is not None:
        return {}
    measured = bench.run_share(job.part, job.task)
    if measured is None:
        return {}
    if store is None:
        return {job: (measured.seconds, measured.conditions)}
    return {job: store.keep(key, measured.seconds, measured.conditions)}


def _with_shares(
    spec: ModelSpec,
    timings: Mapping[Task, BlockTiming],
    common: Mapping[str, Any],
    store: CalibrationStore | None,
    measured: Mapping[ShareJob, Figures],
) -> tuple[BlockTiming, ...]:
    """Return each task's timing at all its widths, with the shares in ``measured`` or ``store``."""
    result: list[BlockTiming] = []
    for task, timing in timings.items():
        shares_s: list[tuple[float, float, float]] = []
        conditions = [timing.conditions]
        for job in share_jobs(spec, [task]):
            seconds, of = measured.get(job) or (
                (None, None) if store is None else store.found(share_key(job, common))
            )
            if seconds is not None and len(seconds) == 2:
                shares_s.append((job.fraction, seconds[0], seconds[1]))
                conditions.append(of)
        known = worst(conditions) if None not in conditions else None
        timing = replace(timing, shares_s=tuple(sorted(shares_s)), conditions=known)
        result += [replace(timing, bits=width) for width in task.stands_for]
    return tuple(result)


def _rows_key(key: Mapping[str, Any]) -> dict[str, Any]:
    """Where the store keeps passes of several rows: apart, since they are seldom asked for."""
    return {**key, "rows": list(TIMED_ROWS)}


def _known_rows_s(store: CalibrationStore | None, key: Mapping[str, Any]) -> tuple[float, ...]:
    """Return stored passes of several rows; empty if there are none."""
    found = None if store is None else store.get(_rows_key(key))
    return found if found is not None and len(found) == len(TIMED_ROWS) else ()


def machine_key(capabilities: Capabilities, threads: int, *, exact: bool = False) -> dict[str, Any]:
    """Return everything besides the shape that a timing depends on."""
    layout = {"exact": True} if exact else _PREPARED
    return layout | {
        "hardware": hardware_id(),
        "backend": capabilities.backend,
        "version": capabilities.version,
        "threads": threads,
    }


def measure_call(
    backend: Backend, threads: int, directory: Path | None = None, *, exact: bool = False
) -> float:
    """Measure the call overhead of an agent's stage in seconds, with stages of tiny layers."""
    return Bench(backend, threads, directory, exact=exact).cold_call_s


class Bench:
    """Builds stages of random blocks, times them, and leaves nothing behind."""

    def __init__(
        self, backend: Backend, threads: int, directory: Path | None, *, exact: bool = False
    ) -> None:
        self.backend = backend
        self.threads = threads
        self._exact = exact
        self._directory = directory
        self._call: tuple[float, float, Conditions] | None = None
        self.patience = Patience()
        """The time for repeats of disturbed measurements."""
        self.check: Callable[[], None] = _nothing
        """Called now and then during a measurement, and may raise to end it."""

    @property
    def cold_call_s(self) -> float:
        """The overhead of a call in an agent. Other work has used the caches since the last one."""
        return self._measured_call()[0]

    @property
    def call_conditions(self) -> Conditions:
        """The conditions of ``cold_call_s``."""
        return self._measured_call()[2]

    def call_within_s(self, spec: ModelSpec, task: Task) -> float:
        """Return the overhead that is part of a timed call of this model's layers.

        Weights that fill the caches leave as little of the runtime's own there as other work does.
        """
        first = executed_bytes(spec, 1, Format.of(task.bits), task.container_bits)
        cold_s, warm_s, _ = self._measured_call()
        return cold_s if first * len(spec.layers) >= CACHE_BYTES else warm_s

    def _measured_call(self) -> tuple[float, float, Conditions]:
        """Return the overhead of a call after other work, and of one that follows another at once;
        and the conditions.
        """
        if self._call is None:
            bits = min(self.backend.probe().container_bits)
            few, many = (_tiny_model(layers) for layers in (1, 1 + MAX_TIMED_LAYERS))
            (few_s,), of_few = self._time(few, range(1, 2), bits, (1,))
            (many_s,), of_many = self._time(many, range(1, 2 + MAX_TIMED_LAYERS), bits, (1,))
            layer_s = (many_s - few_s) / MAX_TIMED_LAYERS
            warm_s = max(few_s - layer_s, 0.0)
            (more_s,), of_more = self._time(few, range(1, 2), bits, (1,), cold=True)
            conditions = worst((of_few, of_many, of_more)) or of_few
            self._call = warm_s + max(more_s - few_s, 0.0), warm_s, conditions
        return self._call

    def run(self, spec: ModelSpec, task: Task) -> Measured | None:
        """Return the times of a block, or None if it does not fit here."""
        if task.kind == "embedding":
            return self._embedding(spec, task)
        if task.kind == "head":
            return self._head(spec, task)
        return self._layer(spec, task)

    def run_rows(self, spec: ModelSpec, task: Task) -> Measured | None:
        """Passes of TIMED_ROWS rows, each of another sequence; None of an embedding, which shares
        nothing, and of what does not fit here.
        """
        if spec.encodes:
            return None  # All its passes have many rows.
        if task.kind == "layer":
            several = timed_layers(spec, task, self.backend.probe().on_chip_bytes)
            if several is None:
                return None
            count = len(several.layers)
            passes_s, conditions = self._time(
                several, range(1, 1 + count), task.bits, TIMED_ROWS, together=True
            )
            return Measured(
                tuple(
                    layer_share_s(each, self.call_within_s(several, task), count)
                    for each in passes_s
                ),
                conditions,
            )
        return self._head(spec, task, TIMED_ROWS) if task.kind == "head" else None

    def run_share(self, part: ModelSpec, task: Task) -> Measured | None:
        """Return the times of a block of a share, with its cuts but no sums; else as ``run``."""
        return self._head(part, task) if task.kind == "head" else self._layer(part, task, cut=True)

    def _embedding(self, spec: ModelSpec, task: Task) -> Measured | None:
        small = replace(spec, vocab=min(spec.vocab, EMBEDDING_ROWS))
        if not fits_memory(small, range(1), task):
            return None
        chunk = chunk_tokens(spec)
        (decode_s, prefill_s), conditions = self._time(small, range(1), task.bits, (1, chunk))
        return Measured((decode_s, prefill_s / chunk), conditions)

    def _layer(self, spec: ModelSpec, task: Task, *, cut: bool = False) -> Measured | None:
        several = timed_layers(spec, task, self.backend.probe().on_chip_bytes)
        if several is None:
            return None
        count, chunk = len(several.layers), chunk_tokens(spec)
        blocks = range(1, 1 + count)
        seconds, conditions = self._time(several, blocks, task.bits, (1, chunk), cut=cut)
        call_s = self.call_within_s(several, task)
        decode_s, prefill_s = (layer_share_s(each, call_s, count) for each in seconds)
        return Measured((decode_s, prefill_s / chunk), conditions)

    def _head(
        self, spec: ModelSpec, task: Task, rows: Sequence[int] | None = None
    ) -> Measured | None:
        """The times of one row, or of passes of several ``rows``."""
        head = range(spec.head_block, spec.head_block + 1)
        if spec.encodes:
            return self._output(spec, task, head)
        whole_bytes = executed_bytes(
            spec, spec.head_block, Format.of(task.bits), task.container_bits
        )
        vocab = min(spec.vocab, max(spec.vocab * HEAD_BYTES // whole_bytes, 1))
        while not fits_memory(replace(spec, vocab=vocab), head, task):
            if vocab == 1:
                return None
            vocab //= 2
        part = replace(spec, vocab=vocab)
        times_s, conditions = self._time(
            part, head, task.bits, rows or (1,), together=rows is not None
        )
        if vocab < spec.vocab:
            fixed_s = [min(self.cold_call_s, each / 2) for each in times_s]
            share = spec.vocab / vocab
            times_s = [f + (each - f) * share for f, each in zip(fixed_s, times_s, strict=True)]
        if rows is not None:
            return Measured(tuple(times_s), conditions)
        return Measured((times_s[0], times_s[0] / PREFILL_CHUNK_TOKENS), conditions)

    def _output(self, spec: ModelSpec, task: Task, head: range) -> Measured | None:
        """The times of an encoder's head, which takes all rows of a pass."""
        if not fits_memory(spec, head, task):
            return None
        chunk = chunk_tokens(spec)
        (one_s, pass_s), conditions = self._time(spec, head, task.bits, (1, chunk))
        return Measured((one_s, pass_s / chunk), conditions)

    def _time(
        self,
        spec: ModelSpec,
        blocks: range,
        bits: int,
        rows: Sequence[int],
        *,
        together: bool = False,
        cut: bool = False,
        cold: bool = False,
    ) -> tuple[list[float], Conditions]:
        """Time a call with each number of ``rows`` through a stage of random blocks.

        The rows come behind one chunk of tokens. Returns seconds by number of rows, and the
        conditions.
        together: each row is one of another sequence.
        cut: the stage is a share's, in a team that only it is in. It is timed more briefly.
        cold: memory is read between calls, whose own time does not count.
        """
        context_tokens, chunk = min(spec.max_context, _CONTEXT_TOKENS), chunk_tokens(spec)
        slots = max(rows) if together else 1
        options = StageOptions(
            slots, context_tokens, self.threads, exact=self._exact, team_sum=_alone if cut else None
        )
        timed_call = _timed_briefly if cut else _timed
        inputs = random_inputs(spec, blocks, max(chunk, *rows))
        with self.stage(spec, blocks, bits, options) as stage:

            def call(count: int) -> Callable[[], object]:
                if together:
                    slots, positions = range(count), [chunk] * count
                    return in_turn(partial(stage.decode, slots, positions), inputs, count)
                return in_turn(partial(stage.forward, 0, chunk), inputs, count)

            def calls() -> tuple[list[float], float]:
                if cold:
                    timed = [_timed_cold(call(count), self.check) for count in rows]
                else:
                    timed = [timed_call(call(count), self.check) for count in rows]
                return [median for median, _ in timed], max(spread for _, spread in timed)

            return steady(calls, self.patience, sum)

    @contextmanager
    def stage(
        self, spec: ModelSpec, blocks: range, bits: int, options: StageOptions
    ) -> Iterator[Stage]:
        """Load a stage of random blocks for as long as the context lasts.

        As an agent's stages do, all but exact ones keep prepared weights. Memory that is mapped
        from a file is read at another speed than the heap (docs/performance.md).
        """
        if self._directory is not None:
            self._directory.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=self._directory, prefix=".calibration-") as name:
            formats = [Format.of(bits)] * len(blocks)
            artifacts = list(random_artifacts(Path(name), spec, blocks, formats))
            if not options.exact:
                # The files were just written, and hashing them would only take time.
                written = frozenset(path for _, path in artifacts)
                prepared = Path(name) / "prepared"
                options = replace(options, prepared_dir=prepared, hashed=written)
            with closing(self.backend.stage(spec, artifacts, options)) as stage:
                yield stage


def random_artifacts(
    directory: Path, spec: ModelSpec, blocks: Sequence[int], formats: Sequence[Format]
) -> Iterator[tuple[int, Path]]:
    """Write blocks of random weights, each in its format.

    All differ. A runtime may keep equal weights once, and would then read them from a cache.
    """
    random = np.random.default_rng(0)
    for block, fmt in zip(blocks, formats, strict=True):
        tensors = _random_block(spec, block, fmt, random)
        yield block, store_block(directory, block, tensors, fmt).path


def timed_layers(spec: ModelSpec, task: Task, on_chip_bytes: int | None = None) -> ModelSpec | None:
    """Return a model of the equal layers that are timed together, or None if not even one fits.

    ``on_chip_bytes`` is the backend's. The timed stage fits on the chip, as in a plan, or is one
    layer.
    """
    layer = spec.layer_variants[task.variant]
    single = replace(spec, layers=(layer,))
    one_bytes = executed_bytes(single, 1, Format.of(task.bits), task.container_bits)
    wanted = min(ceil(STAGE_BYTES / one_bytes), MAX_TIMED_LAYERS, spec.layers.count(layer))
    if on_chip_bytes is not None:
        wanted = max(min(wanted, on_chip_bytes // on_chip_layer_bytes(layer)), 1)
    for count in range(wanted, 0, -1):
        several = replace(spec, layers=(layer,) * count)
        if fits_memory(several, range(1, 1 + count), task):
            return several
    return None


def random_inputs(spec: ModelSpec, blocks: range, rows: int) -> npt.NDArray[Any]:
    """Return token ids [rows] for a stage with the embedding, else hidden rows [rows, hidden]."""
    random = np.random.default_rng(0)
    if blocks[0] == 0:
        return random.integers(0, spec.vocab, rows)
    return random.standard_normal((rows, spec.hidden), np.float32)


def in_turn(
    call: Callable[[npt.NDArray[Any]], object], inputs: npt.NDArray[Any], count: int
) -> Callable[[], object]:
    """Return a call with other rows each time, which choose other experts, as in a text."""
    begins = itertools.cycle(range(0, len(inputs) - count + 1, count))

    def with_next_rows() -> object:
        begin = next(begins)
        return call(inputs[begin : begin + count])

    return with_next_rows


def layer_share_s(seconds: float, call_s: float, layers: int) -> float:
    """Return the seconds of one layer from those of a stage of ``layers`` and of a call."""
    # At least half, because a call never costs more than a layer of a real model.
    return max(seconds - call_s, seconds / 2) / layers


def timing_tasks(
    spec: ModelSpec, bits: Sequence[int], containers: Any, *, experts: bool = True
) -> list[Task]:
    """Return what to time, without layers with experts if the backend runs none."""
    usable = sorted({width for width in bits if width in containers})
    alike: dict[int, list[int]] = {}
    for width in usable:
        alike.setdefault(containers[width], []).append(width)
    # Embedding rows are unpacked from storage, so each width has its own time.
    tasks = [Task("embedding", 0, width, containers[width], (width,)) for width in usable]
    for container, widths in alike.items():
        shared = (widths[0], container, tuple(widths))
        tasks += [
            Task("layer", index, *shared)
            for index, layer in enumerate(spec.layer_variants)
            if experts or layer.experts is None
        ]
        tasks.append(Task("head", 0, *shared))
    return tasks


def timing_dependencies(spec: ModelSpec, task: Task) -> dict[str, Any]:
    """Return everything besides the machine that a timing depends on."""
    key: dict[str, Any] = {"kind": task.kind, "context": min(spec.max_context, _CONTEXT_TOKENS)}
    if task.kind == "layer":
        layer = spec.layer_variants[task.variant]
        count = min(spec.layers.count(layer), MAX_TIMED_LAYERS)
        shape = asdict(layer)
        for feature in ("bidirectional", "enters_plain"):
            if not shape[feature]:
                del shape[feature]  # Times of decoders were stored before it existed.
        if spec.encodes:
            shape["cached"] = False
        return key | {"container": task.container_bits, "layer": shape, "layers": count}
    key |= {"hidden": spec.hidden, "embed": spec.embed_dim}
    if spec.output is not None:
        ends = {"types": spec.token_types, "normed": spec.embed_norm}
        key |= ends if task.kind == "embedding" else asdict(spec.output)
    if task.kind == "embedding":
        return key | {"bits": task.bits, "positions": bool(spec.learned_positions)}
    norm = spec.layers[-1].norm if spec.final_norm else None
    if spec.logit_cap is not None:
        key["capped"] = True
    return key | {"container": task.container_bits, "vocab": spec.vocab, "norm": norm}


def fits_memory(spec: ModelSpec, blocks: range, task: Task) -> bool:
    fmt = Format.of(task.bits)
    weights = sum(executed_bytes(spec, block, fmt, task.container_bits) for block in blocks)
    # Making an artifact also takes the floats of one block.
    floats = 4 * max(sum(map(prod, spec.block_tensors(block).values())) for block in blocks)
    available_bytes, _ = memory_bytes()
    return max(LOAD_FACTOR * weights, weights + floats) < available_bytes


def chunk_tokens(spec: ModelSpec) -> int:
    return max(1, min(PREFILL_CHUNK_TOKENS, spec.max_context // 2))


def _random_block(
    spec: ModelSpec, block: int, fmt: Format, random: np.random.Generator
) -> dict[str, Tensor]:
    """Draw matrices of random codes, norms of ones, and small biases and positions."""
    tensors: dict[str, Tensor] = {}
    for name, shape in spec.block_tensors(block).items():
        if name in QUANTIZED_TENSORS:
            tensors[name] = random_matrix((shape[0], shape[1]), fmt, random)
        elif name.endswith("norm.weight"):
            tensors[name] = np.ones(shape, np.float32)
        else:
            tensors[name] = (random.random(shape, np.float32) - 0.5) * np.float32(0.02)
    return tensors


def _tiny_model(layers: int) -> ModelSpec:
    layer = LayerSpec(
        hidden=64,
        heads=1,
        kv_heads=1,
        head_dim=64,
        ffn=64,
        norm="layernorm",
        norm_eps=1e-5,
        norm_position="pre",
        activation="relu",
        gated=False,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
    )
    return ModelSpec(
        vocab=64,
        hidden=64,
        embed_dim=64,
        max_context=_CONTEXT_TOKENS,
        layers=(layer,) * layers,
        learned_positions=0,
        position_offset=0,
        final_norm=False,
        tied_head=False,
        bos_token=None,
        eos_tokens=(),
    )


def _alone(partial_rows: Array) -> Array:
    """The sum over a team of one."""
    return partial_rows


def _nothing() -> None:
    """A check that never raises."""


def _timed(call: Callable[[], object], check: Callable[[], None]) -> tuple[float, float]:
    """Return (seconds, spread) of repeats over a fifth of a second.

    Slow calls repeat less. With part of a core the time is longer.
    """
    limited = usable_share() < 1
    min_time_s = _LIMITED_TIME_S if limited else _MIN_TIME_S
    return timed_calls(call, _MIN_REPEATS, min_time_s, _MAX_TIME_S, check)


def _timed_briefly(call: Callable[[], object], check: Callable[[], None]) -> tuple[float, float]:
    """Do the same as ``_timed`` in less time, because shares are several figures a block."""
    effort = _LIMITED_SHARE_EFFORT if usable_share() < 1 else _SHARE_EFFORT
    return timed_calls(call, *effort, check)


def _timed_cold(call: Callable[[], object], check: Callable[[], None]) -> tuple[float, float]:
    """Return what ``_timed`` does, of calls between which other memory is read."""
    other = np.ones(CACHE_BYTES // 8, np.int64)

    def read() -> object:
        return np.bitwise_or.reduce(other)

    def read_and_call() -> object:
        read()
        return call()

    read_s, read_spread = _timed(read, check)
    both_s, spread = _timed(read_and_call, check)
    return max(both_s - read_s, 0.0), max(read_spread, spread)


def timed_calls(
    call: Callable[[], object],
    min_repeats: int,
    min_time_s: float,
    max_time_s: float,
    check: Callable[[], None] = _nothing,
) -> tuple[float, float]:
    """Return (seconds, spread) of a call in a series, after one uncounted call.

    The result is the median over rounds of _ROUND_S, each with the mean of its calls. On a shared
    or limited processor a call runs at full speed or stops for milliseconds. Only a mean shows the
    cost of many calls, and the median leaves out single events. Rounds go on until both minima are
    reached, or ``max_time_s`` has passed, but at least one runs. ``check`` is called between
    rounds, and may raise to end it.
    """
    call()
    rounds_s: list[float] = []
    calls, total = 0, 0
    started_s = before_s = time.perf_counter()
    while True:
        call()
        calls, total = calls + 1, total + 1
        now_s = time.perf_counter()
        elapsed_s = now_s - started_s
        done = (total >= min_repeats and elapsed_s >= min_time_s) or elapsed_s >= max_time_s
        # A short last round counts only if it is the only one.
        if now_s - before_s >= _ROUND_S or (done and not rounds_s):
            rounds_s.append((now_s - before_s) / calls)
            check()
            before_s, calls = time.perf_counter(), 0
        if done:
            return float(np.median(rounds_s)), spread_of(rounds_s)
