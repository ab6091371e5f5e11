"""All that a device can tell of itself alone: arithmetic, memory, disk, heat and watts."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from backends.base import Backend, BackendError, BackendUnavailable, StageOptions
from backends.registry import backend_class, probe_all
from calibration.device import measure_disk, measure_memory_copy, measure_memory_read
from calibration.layers import Bench, random_inputs
from calibration.machine import memory_bytes, processor_name, usable_cores
from calibration.sensors import PowerMeter, Sensors, Throttling
from calibration.sustain import Sustained, measure_sustained
from model.costs import block_flops
from model.spec import LayerSpec, ModelSpec

FLOPS_ROWS = 256
"""Rows of a call: enough that arithmetic, not memory, is what limits."""

_FLOPS_TIME_S = 0.6
_HIDDEN = 1024

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class BackendSurvey:
    """One backend on this device: its rates, or the reason why it does not run here.

    ``flops`` maps each width that it computes with to floating-point operations per second, as they
    were sustained over all calls; ``best_flops`` to those of the fastest call.
    """

    name: str
    version: str | None
    reason: str | None
    container_bits: Mapping[int, int]
    flops: Mapping[int, float]
    best_flops: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class DeviceSurvey:
    """What was measured, in SI units. None and empty: no sensor, or it cannot be measured here.

    Bandwidths are by number of threads. ``watts`` is the mean while computing; its source is the
    sensor, or "declared" where the user gave it.
    """

    machine: str
    cores: int
    threads: int
    memory_available_bytes: int
    memory_total_bytes: int
    storage_free_bytes: int
    memory_read_bytes_per_s: Mapping[int, float]
    memory_copy_bytes_per_s: Mapping[int, float]
    disk_write_bytes_per_s: float
    disk_read_bytes_per_s: float | None
    backends: tuple[BackendSurvey, ...]
    temperatures_c: Mapping[str, float]
    throttling: Throttling | None
    watts: float | None
    watts_source: str | None
    sustained: Sustained | None


def survey_device(
    directory: Path,
    threads: int,
    *,
    backends: Sequence[str] | None = None,
    sustain_s: float = 0.0,
    declared_watts: float | None = None,
    sensors: Sensors | None = None,
    progress: Progress | None = None,
) -> DeviceSurvey:
    """Measure this device; takes a few seconds, and ``sustain_s`` more where that is asked for.

    directory: where the disk is measured and random weights are written meanwhile; created.
    backends: names; None for all. ``progress`` is called with (done, all) steps.
    Raises BackendUnavailable for an unknown backend or where none runs here, BackendError where
    one fails or the directory cannot be written.
    """
    sensors = sensors or Sensors()
    found = _probe(backends)
    available = [name for name, survey in found.items() if survey.reason is None]
    if not available:
        first = next(iter(found.values()))
        raise BackendUnavailable(first.name, first.reason or "")
    steps = _Steps(progress, 3 + sum(len(_widths(found[name])) for name in available))
    available_bytes, total_bytes = memory_bytes()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(directory).free
        write_bytes_per_s, read_bytes_per_s = measure_disk(directory)
    except OSError as error:
        raise BackendError(f"directory {directory} is not usable: {error}") from error
    steps.done()
    counts = sorted({1, threads})
    memory_read = {count: measure_memory_read(count) for count in counts}
    steps.done()
    memory_copy = {count: measure_memory_copy(count) for count in counts}
    steps.done()
    meter = sensors.power_meter()
    surveys = tuple(
        _with_flops(survey, threads, directory, meter, steps) for survey in found.values()
    )
    sustained = None
    if sustain_s > 0:
        sustained = _sustain(found[available[0]], threads, directory, sensors, sustain_s, progress)
    watts, source = _power(meter, sustained, declared_watts)
    return DeviceSurvey(
        machine=processor_name(),
        cores=usable_cores(),
        threads=threads,
        memory_available_bytes=available_bytes,
        memory_total_bytes=total_bytes,
        storage_free_bytes=free_bytes,
        memory_read_bytes_per_s=memory_read,
        memory_copy_bytes_per_s=memory_copy,
        disk_write_bytes_per_s=write_bytes_per_s,
        disk_read_bytes_per_s=read_bytes_per_s,
        backends=surveys,
        temperatures_c=sensors.temperatures_c(),
        throttling=sensors.throttling(),
        watts=watts,
        watts_source=source,
        sustained=sustained,
    )


class _Steps:
    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._count, self._total = progress, -1, total
        self.done()

    def done(self) -> None:
        self._count += 1
        if self._progress is not None:
            self._progress(self._count, self._total)


def _probe(names: Sequence[str] | None) -> dict[str, BackendSurvey]:
    results = probe_all()
    surveys: dict[str, BackendSurvey] = {}
    for name in results if names is None else names:
        if name not in results:
            backend_class(name)  # Raises, naming the known ones.
        result = results[name]
        if isinstance(result, BackendUnavailable):
            surveys[name] = BackendSurvey(name, None, result.reason, {}, {}, {})
        else:
            surveys[name] = BackendSurvey(name, result.version, None, result.container_bits, {}, {})
    return surveys


def _widths(survey: BackendSurvey) -> dict[int, int]:
    """The narrowest stored width of each width that is computed with."""
    widths: dict[int, int] = {}
    for bits, container in sorted(survey.container_bits.items()):
        widths.setdefault(container, bits)
    return widths


def _with_flops(
    survey: BackendSurvey,
    threads: int,
    directory: Path,
    meter: PowerMeter | None,
    steps: _Steps,
) -> BackendSurvey:
    if survey.reason is not None:
        return survey
    backend = backend_class(survey.name)()
    flops: dict[int, float] = {}
    best_flops: dict[int, float] = {}
    for container, bits in _widths(survey).items():
        with compute_call(backend, bits, threads, directory) as (call, operations):
            call()
            times_s: list[float] = []
            while sum(times_s) < _FLOPS_TIME_S:
                before_s = time.perf_counter()
                call()
                times_s.append(time.perf_counter() - before_s)
                if meter is not None:
                    meter.sample()
            flops[container] = len(times_s) * operations / sum(times_s)
            best_flops[container] = operations / min(times_s)
        steps.done()
    return BackendSurvey(
        survey.name, survey.version, None, survey.container_bits, flops, best_flops
    )


def _sustain(
    survey: BackendSurvey,
    threads: int,
    directory: Path,
    sensors: Sensors,
    duration_s: float,
    progress: Progress | None,
) -> Sustained:
    def on_time(elapsed_s: float) -> None:
        if progress is not None:
            progress(round(elapsed_s), round(duration_s))

    bits = min(survey.container_bits)
    backend = backend_class(survey.name)()
    with compute_call(backend, bits, threads, directory) as (call, operations):
        return measure_sustained(call, operations, duration_s, sensors, progress=on_time)


@contextmanager
def compute_call(
    backend: Backend, bits: int, threads: int, directory: Path
) -> Iterator[tuple[Callable[[], object], int]]:
    """A call of FLOPS_ROWS rows through one large layer, and its floating-point operations.

    directory: for the layer's random weights meanwhile.
    """
    layer = LayerSpec(
        hidden=_HIDDEN,
        heads=_HIDDEN // 64,
        kv_heads=_HIDDEN // 64,
        head_dim=64,
        ffn=4 * _HIDDEN,
        norm="rmsnorm",
        norm_eps=1e-5,
        norm_position="pre",
        activation="relu",
        gated=False,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
    )
    spec = ModelSpec(
        vocab=64,
        hidden=_HIDDEN,
        embed_dim=_HIDDEN,
        max_context=FLOPS_ROWS,
        layers=(layer,),
        learned_positions=0,
        position_offset=0,
        final_norm=False,
        tied_head=False,
        bos_token=None,
        eos_tokens=(),
    )
    blocks = range(1, 2)
    inputs = random_inputs(spec, blocks, FLOPS_ROWS)
    options = StageOptions(1, FLOPS_ROWS, threads)
    # Row i sees i + 1 positions: on average half of them.
    operations = FLOPS_ROWS * block_flops(spec, 1, FLOPS_ROWS // 2)
    with Bench(backend, threads, directory).stage(spec, blocks, bits, options) as stage:
        yield partial(stage.forward, 0, 0, inputs), operations


def _power(
    meter: PowerMeter | None, sustained: Sustained | None, declared_watts: float | None
) -> tuple[float | None, str | None]:
    if sustained is not None and sustained.watts is not None:
        return sustained.watts, sustained.watts_source
    measured = None if meter is None else meter.watts()
    if meter is not None and measured is not None:
        return measured, meter.source
    return declared_watts, None if declared_watts is None else "declared"
