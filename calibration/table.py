"""Seconds of a decoder layer for several numbers of rows, at short and at long context.

A finer grid than ``calibration.layers`` gives a planner: it shows how a device's time depends on
batch, chunk and context. It is measured through the same stages and stored in the same file, and
leaves there what an agent would otherwise measure for the same model.
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
    Bench,
    Task,
    chunk_tokens,
    layer_share_s,
    machine_key,
    random_inputs,
    timed_calls,
    timed_layers,
    timing_dependencies,
    timing_tasks,
)
from calibration.store import CalibrationStore
from model.costs import block_flops, executed_bytes, kv_bytes
from model.quantize import Format
from model.spec import ModelSpec
from wire.conditions import Conditions, worst
from wire.profile import BlockTiming

ContextName = Literal["short", "long"]

BUDGET_S = 20.0
"""Time for a new shape; points that it does not suffice for are left for the next time."""

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
"""Rows of a call: 1 to 8 decode that many sequences, more are a chunk of a prompt."""

_QUICK = (3, 0.04, 1.0)
_THOROUGH = (5, 0.2, 4.0)
"""Least repeats, least seconds and most seconds of a point."""

Progress = Callable[[int, int], None]

Points = dict[tuple[int, ContextName, int], tuple[float, Conditions | None] | None]
"""By (rows, context, position): seconds and what else went on; None where it is missing."""


@dataclass(frozen=True, slots=True)
class LayerTiming:
    """One layer, ``rows`` rows in one call behind ``position`` tokens.

    ``flops`` and ``moved_bytes`` are what the layer computes and at least reads: its weights as
    executed and the keys and values that are seen.
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
    """Bytes of one layer with a KV cache of ``context_tokens``.

    ``charged_bytes`` is what the stage says of itself, ``taken_bytes`` by how much the process
    grew while it was loaded and run; None where it did not grow, reusing what it had.
    """

    variant: int
    container_bits: int
    context_tokens: int
    charged_bytes: int
    taken_bytes: int | None


@dataclass(frozen=True, slots=True)
class LayerTable:
    """Everything measured of one model's shape. ``left_out`` counts the points that are missing."""

    layers: tuple[LayerTiming, ...]
    memory: tuple[LayerMemory, ...]
    embedding_and_head: tuple[BlockTiming, ...]
    left_out: int
    reused: int


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
    """Measure what ``store`` does not hold yet of the layers of ``spec``, embedding and head.

    It stops starting new points once ``budget_s`` has passed, the less important ones suffering
    first; with ``full`` there is no limit and each point is repeated more. With ``again`` all is
    measured anew, and stored in place of what was, unless that was disturbed less. Blocks too large
    to be loaded here are left out. ``progress`` is called with (done, all) points.
    Raises BackendError where the backend fails, CheckpointError where the disk is full.
    """
    store.path.parent.mkdir(parents=True, exist_ok=True)
    bench = Bench(backend, threads, store.path.parent)
    bench.patience = Patience(limit_s=budget_s)
    tasks = timing_tasks(spec, bits, backend.probe().container_bits)
    run = _Run(spec, bench, store.again() if again else store, full, clock_s)
    points = {task: run.points() if task.kind == "layer" else [] for task in tasks}
    total = sum(len(points[task]) or 1 for task in tasks)
    deadline_s = clock_s() + budget_s

    def on_point(count: int) -> None:
        if progress is not None:
            progress(count, total)

    on_point(0)
    done = 0
    # The small ones first, so that a slow layer cannot crowd them out.
    tasks.sort(key=lambda task: task.kind == "layer")
    for index, task in enumerate(tasks):
        if task.kind == "layer":
            # Each width gets an equal share of what is left.
            share_s = (deadline_s - clock_s()) / (len(tasks) - index)
            run.layer(task, points[task], None if full else clock_s() + share_s, on_point, done)
        else:
            run.whole(task)
        done += len(points[task]) or 1
        on_point(done)
    return LayerTable(
        tuple(sorted(run.layers, key=_order)),
        tuple(run.memory),
        tuple(run.others),
        run.left_out,
        run.reused,
    )


class _Run:
    """One go at the table: what it found out so far."""

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
        self.left_out = 0
        self.reused = 0

    def points(self) -> list[tuple[int, ContextName, int]]:
        """(rows, context, position) of each point that fits the model's context."""
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
        """Fill the gaps of ``known``; returns (charged, taken) bytes of a layer."""
        count = len(several.layers)
        blocks = range(1, 1 + count)
        inputs = random_inputs(self._spec, blocks, max(rows for rows, _, _ in known))
        call_s = self._bench.call_s
        process = psutil.Process()
        before_bytes = process.memory_info().rss
        options = StageOptions(1, self._context_tokens, self._bench.threads)
        with self._bench.stage(several, blocks, task.bits, options) as stage:
            for index, (point, measured) in enumerate(known.items()):
                late = deadline_s is not None and self._clock_s() > deadline_s
                if measured is not None or (late and index):
                    continue
                rows, _, position = point
                call = partial(stage.forward, 0, position, inputs[:rows])
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
        """Leave the two figures that ``measure_model`` looks for."""
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
        weights = executed_bytes(several, 1, Format.of(task.bits), task.container_bits)
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
                    moved_bytes=weights + kv_bytes(several, 1, position + rows),
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
        """What a point depends on; None stands for the memory of the stage."""
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
