"""Seconds of a decoder layer for several numbers of rows, at short and at long context.

The grid is finer than the one of ``calibration.layers`` for a planner. It shows how a device's time
depends on batch, chunk and context. It is measured through the same stages and stored in the same
file. An agent finds its own figures for the same model there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import psutil

from backends.base import Backend, StageOptions
from calibration.disturbance import Patience, steady
from calibration.layers import (
    SHARES_BUDGET_S,
    Bench,
    ShareJob,
    Task,
    chunk_tokens,
    in_turn,
    layer_share_s,
    machine_key,
    measure_share,
    random_inputs,
    share_jobs,
    share_key,
    timed_calls,
    timed_layers,
    timing_dependencies,
    timing_tasks,
)
from calibration.store import CalibrationStore
from model.costs import block_flops, kv_bytes, read_bytes
from model.quantize import Format
from model.spec import ModelSpec
from wire.conditions import Conditions, worst
from wire.profile import BlockTiming

ContextName = Literal["short", "long"]

BUDGET_S = 20.0
"""The time for a new shape. Points that do not fit into it wait for the next run."""

LONG_CONTEXT_TOKENS = 2048
_BY_IMPORTANCE: tuple[tuple[int, ContextName], ...] = (
    (1, "short"),
    (64, "short"),
    (1, "long"),
    (8, "short"),
    (64, "long"),
    (256, "short"),
    (2, "short"),
    (4, "short"),
    (16, "short"),
    (8, "long"),
    (16, "long"),
    (2, "long"),
    (4, "long"),
    (256, "long"),
)
"""Rows of a call: 1 to 8 decode that many sequences, and more are a chunk of a prompt."""

_QUICK = (3, 0.04, 1.0)
_THOROUGH = (5, 0.2, 4.0)
"""The least repeats, the least seconds and the most seconds of a point."""

Progress = Callable[[int, int], None]

Points = dict[tuple[int, ContextName, int], tuple[float, Conditions | None] | None]
"""Maps (rows, context, position) to seconds and conditions, or to None if missing."""


@dataclass(frozen=True, slots=True)
class LayerTiming:
    """One layer with ``rows`` rows in one call, behind ``position`` tokens.

    flops: operations of the layer.
    moved_bytes: bytes that it reads at least: weights as executed, and visible keys and values.
    """

    variant: int
    bits: tuple[int, ...]
    container_bits: int
    rows: int
    context: ContextName
    position: int
    seconds: float
    flops: int
    moved_bytes: int
    conditions: Conditions | None = None


@dataclass(frozen=True, slots=True)
class LayerMemory:
    """The bytes of one layer with a KV cache of ``context_tokens``.

    charged_bytes: memory that the stage reports.
    taken_bytes: growth of the process while the layer was loaded and run. None if it did not grow,
        because it used free memory of its own.
    """

    variant: int
    container_bits: int
    context_tokens: int
    charged_bytes: int
    taken_bytes: int | None


@dataclass(frozen=True, slots=True)
class ShareTiming:
    """A member's share of one layer, with its cuts but no sums.

    fraction: of the layer's weights.
    decode_s, prefill_s_per_token: as in BlockTiming.
    flops, moved_bytes: of one decoded row, as in LayerTiming.
    """

    variant: int
    bits: tuple[int, ...]
    container_bits: int
    fraction: float
    decode_s: float
    prefill_s_per_token: float
    flops: int
    moved_bytes: int
    conditions: Conditions | None = None


@dataclass(frozen=True, slots=True)
class LayerTable:
    """All measurements of one model's shape. ``left_out`` counts the missing points.

    shares: empty if no team can share the model, or the backend runs no shares.
    """

    layers: tuple[LayerTiming, ...]
    memory: tuple[LayerMemory, ...]
    embedding_and_head: tuple[BlockTiming, ...]
    left_out: int
    reused: int
    shares: tuple[ShareTiming, ...] = ()


def measure_table(
    spec: ModelSpec,
    bits: Sequence[int],
    backend: Backend,
    *,
    threads: int,
    store: CalibrationStore,
    full: bool = False,
    again: bool = False,
    budget_s: float = BUDGET_S,
    progress: Progress | None = None,
    clock_s: Callable[[], float] = time.perf_counter,
) -> LayerTable:
    """Measure the missing timings of the layers of ``spec``, embedding and head.

    Once ``budget_s`` has passed no new point is begun, and the important points come first. Shares
    have a time of their own, SHARES_BUDGET_S, because agents need them too. With
    ``full`` there is no limit, and each point is repeated more. With ``again`` everything is
    measured again. A new figure replaces the stored one unless that was disturbed less. Blocks too
    large to load here are left out. ``progress`` is called with (done, all) points.

    Raises BackendError if the backend fails, CheckpointError if the disk is full.
    """
    store.path.parent.mkdir(parents=True, exist_ok=True)
    bench = Bench(backend, threads, store.path.parent)
    bench.patience = Patience(limit_s=budget_s)
    capabilities = backend.probe()
    tasks = timing_tasks(spec, bits, capabilities.container_bits, experts=capabilities.experts)
    run = _Run(spec, bench, store.again() if again else store, full, clock_s)
    points = {task: run.points() if task.kind == "layer" else [] for task in tasks}
    jobs = share_jobs(spec, tasks) if backend.probe().shares else []
    total = sum(len(points[task]) or 1 for task in tasks) + len(jobs)
    deadline_s = clock_s() + budget_s

    def on_point(count: int) -> None:
        if progress is not None:
            progress(count, total)

    on_point(0)
    done = 0
    # The small ones go first, because a slow layer could take all the time.
    tasks.sort(key=lambda task: task.kind == "layer")
    for index, task in enumerate(tasks):
        if task.kind == "layer":
            # Each width gets an equal share of the remaining time.
            share_s = (deadline_s - clock_s()) / (len(tasks) - index)
            run.layer(task, points[task], None if full else clock_s() + share_s, on_point, done)
        else:
            run.whole(task)
        done += len(points[task]) or 1
        on_point(done)
    shares_until_s = clock_s() + SHARES_BUDGET_S
    for job in jobs:
        run.share(job, in_time=full or clock_s() < shares_until_s)
        done += 1
        on_point(done)
    return run.table()


class _Run:
    """One run that fills the table."""

    def __init__(
        self,
        spec: ModelSpec,
        bench: Bench,
        store: CalibrationStore,
        full: bool,
        clock_s: Callable[[], float],
    ) -> None:
        self._spec = spec
        self._bench = bench
        self._store = store
        self._effort = _THOROUGH if full else _QUICK
        self._clock_s = clock_s
        self._machine = machine_key(bench.backend.probe(), bench.threads)
        self._context_tokens = min(spec.max_context, LONG_CONTEXT_TOKENS)
        self.layers: list[LayerTiming] = []
        self.memory: list[LayerMemory] = []
        self.others: list[BlockTiming] = []
        self.shares: list[ShareTiming] = []
        self.left_out = 0
        self.reused = 0

    def table(self) -> LayerTable:
        """Return what was measured and found so far, in order."""
        return LayerTable(
            tuple(sorted(self.layers, key=_order)),
            tuple(self.memory),
            tuple(self.others),
            self.left_out,
            self.reused,
            tuple(
                sorted(self.shares, key=lambda one: (one.variant, one.container_bits, one.fraction))
            ),
        )

    def points(self) -> list[tuple[int, ContextName, int]]:
        """Return (rows, context, position) of each point that fits the model's context."""
        found: list[tuple[int, ContextName, int]] = []
        short = chunk_tokens(self._spec)
        for rows, context in _BY_IMPORTANCE:
            position = short if context == "short" else self._context_tokens - rows
            if rows + position <= self._context_tokens and (context == "short" or position > short):
                found.append((rows, context, position))
        return found

    def whole(self, task: Task) -> None:
        """Time an embedding or a head, as agents do."""
        key = self._machine | timing_dependencies(self._spec, task)
        seconds, conditions = self._store.found(key)
        if seconds is None or len(seconds) != 2:
            measured = self._bench.run(self._spec, task)
            if measured is None:
                self.left_out += 1
                return
            seconds, conditions = self._store.keep(key, measured.seconds, measured.conditions)
        else:
            self.reused += 1
        self.others += [
            BlockTiming(task.kind, 0, bits, seconds[0], seconds[1], conditions)
            for bits in task.stands_for
        ]

    def share(self, job: ShareJob, *, in_time: bool) -> None:
        """Time a share, as agents do, or take it from the store."""
        task, part, key = job.task, job.part, share_key(job, self._machine)
        seconds, conditions = self._store.found(key)
        if seconds is not None:
            self.reused += 1
        elif in_time:
            figures = measure_share(self._bench, job, self._machine, self._store).get(job)
            seconds, conditions = figures or (None, None)
        if seconds is None or len(seconds) != 2:
            self.left_out += 1
        elif task.kind == "layer":
            position = chunk_tokens(part)
            one = 1 + part.layers.index(part.layer_variants[task.variant])
            self.shares.append(
                ShareTiming(
                    variant=task.variant,
                    bits=task.stands_for,
                    container_bits=task.container_bits,
                    fraction=job.fraction,
                    decode_s=seconds[0],
                    prefill_s_per_token=seconds[1],
                    flops=block_flops(part, one, position + 1),
                    moved_bytes=read_bytes(part, one, Format.of(task.bits), task.container_bits)
                    + kv_bytes(part, one, position + 1),
                    conditions=conditions,
                )
            )

    def layer(
        self,
        task: Task,
        points: list[tuple[int, ContextName, int]],
        deadline_s: float | None,
        on_point: Callable[[int], None],
        done: int,
    ) -> None:
        several = timed_layers(self._spec, task, self._bench.backend.probe().on_chip_bytes)
        if several is None:
            self.left_out += len(points)
            return
        known: Points = {}
        for point in points:
            seconds, conditions = self._store.found(self._key(task, several, point))
            known[point] = None if seconds is None else (seconds[0], conditions)
        memory = self._store.get(self._key(task, several, None))
        self.reused += sum(measured is not None for measured in known.values())
        if None in known.values() or memory is None:
            memory = self._measure(task, several, known, memory, deadline_s, on_point, done)
        self._note(task, several, known, memory)

    def _measure(
        self,
        task: Task,
        several: ModelSpec,
        known: Points,
        memory: tuple[float, ...] | None,
        deadline_s: float | None,
        on_point: Callable[[int], None],
        done: int,
    ) -> tuple[float, ...]:
        """Measure the missing points of ``known``, and return (charged, taken) bytes of a layer."""
        count = len(several.layers)
        blocks = range(1, 1 + count)
        inputs = random_inputs(self._spec, blocks, max(rows for rows, _, _ in known))
        call_s = self._bench.call_within_s(several, task)
        process = psutil.Process()
        before_bytes = process.memory_info().rss
        options = StageOptions(1, self._context_tokens, self._bench.threads)
        with self._bench.stage(several, blocks, task.bits, options) as stage:
            for index, (point, measured) in enumerate(known.items()):
                late = deadline_s is not None and self._clock_s() > deadline_s
                if measured is not None or (late and index):
                    continue
                rows, _, position = point
                call = in_turn(partial(stage.forward, 0, position), inputs, rows)
                calls_s, conditions = steady(
                    partial(timed_calls, call, *self._effort), self._bench.patience, float
                )
                seconds = layer_share_s(calls_s, call_s, count)
                key = self._key(task, several, point)
                (seconds, *_), conditions = self._store.keep(key, (seconds,), conditions)
                known[point] = seconds, conditions
                on_point(done + index + 1)
            if memory is None:
                grown_bytes = process.memory_info().rss - before_bytes
                memory = (stage.memory_bytes / count, grown_bytes / count)
                self._store.put(self._key(task, several, None), memory)
        self._for_agents(task, known)
        return memory

    def _for_agents(self, task: Task, known: Points) -> None:
        """Store the two figures that ``measure_model`` looks for."""
        chunk = chunk_tokens(self._spec)
        decode, prefill = known.get((1, "short", chunk)), known.get((chunk, "short", chunk))
        if decode is None or prefill is None:
            return
        key = self._machine | timing_dependencies(self._spec, task)
        conditions = worst((decode[1], prefill[1]))
        if conditions is not None and self._store.get(key) is None:
            self._store.keep(key, (decode[0], prefill[0] / chunk), conditions)

    def _note(
        self,
        task: Task,
        several: ModelSpec,
        known: Points,
        memory: tuple[float, ...],
    ) -> None:
        fmt = Format.of(task.bits)
        for (rows, context, position), measured in known.items():
            if measured is None:
                self.left_out += 1
                continue
            # Row i of the call sees position + i + 1 tokens.
            seen = position + (rows + 1) // 2
            self.layers.append(
                LayerTiming(
                    variant=task.variant,
                    bits=task.stands_for,
                    container_bits=task.container_bits,
                    rows=rows,
                    context=context,
                    position=position,
                    seconds=measured[0],
                    flops=rows * block_flops(several, 1, seen),
                    moved_bytes=read_bytes(several, 1, fmt, task.container_bits, rows)
                    + kv_bytes(several, 1, position + rows),
                    conditions=measured[1],
                )
            )
        charged, taken = memory
        self.memory.append(
            LayerMemory(
                task.variant,
                task.container_bits,
                self._context_tokens,
                round(charged),
                round(taken) if taken > 0 else None,
            )
        )

    def _key(
        self, task: Task, several: ModelSpec, point: tuple[int, ContextName, int] | None
    ) -> dict[str, Any]:
        """Return the key of a point, or of the stage's memory if it is None."""
        key: dict[str, Any] = self._machine | {
            "kind": "table",
            "container": task.container_bits,
            "layer": asdict(self._spec.layer_variants[task.variant]),
            "layers": len(several.layers),
            "context": self._context_tokens,
        }
        if point is None:
            return key | {"memory": True}
        return key | {"rows": point[0], "position": point[2]}


def _order(timing: LayerTiming) -> tuple[int, int, bool, int]:
    return timing.variant, timing.container_bits, timing.context == "long", timing.rows
