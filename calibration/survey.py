"""Everything that a device can measure alone: arithmetic, memory, disk, heat and watts."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from backends.base import Backend, BackendError, BackendUnavailable, StageOptions
from backends.registry import backend_class, probe_all
from calibration.device import measure_disk, memory_copy_rate, memory_read_rate
from calibration.disturbance import LoadMeter, Patience, spread_of, steady
from calibration.layers import Bench, random_inputs
from calibration.machine import hardware_id, processor_name, usable_cores
from calibration.sensors import PowerMeter, Sensors, Throttling
from calibration.store import CalibrationStore
from calibration.sustain import Sustained, measure_sustained
from model.costs import block_flops
from model.memory import memory_bytes
from model.spec import LayerSpec, ModelSpec
from wire.conditions import Conditions

FLOPS_ROWS = 256
"""The rows of a call. With this many, arithmetic and not memory is the limit."""

SLOWER = 0.6
"""A figure below this share of an earlier one is reported."""

_FLOPS_TIME_S = 0.6
_REPEATS_SHARE, _REPEATS_LIMIT_S = 2.0, 20.0
"""The time for repeats of disturbed measurements: over the first tries' time, and at most."""

_HIDDEN = 1024

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class BackendSurvey:
    """One backend on this device: its rates, or the reason why it does not run here.

    flops: maps each executed width to floating-point operations per second, over all calls.
    best_flops: the same, of the fastest call.
    """

    name: str
    version: str | None
    reason: str | None
    container_bits: Mapping[int, int]
    flops: Mapping[int, float]
    best_flops: Mapping[int, float]
    conditions: Mapping[int, Conditions] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DeviceSurvey:
    """The measured figures, in SI units. None or empty: no sensor, or not measurable here.

    Bandwidths are by number of threads.

    watts: the mean while computing.
    watts_source: the sensor, or "declared" if the user gave the watts.
    conditions: by figure: disk, and memory_read and memory_copy followed by the number of threads.
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
    conditions: Mapping[str, Conditions]


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
    """Measure this device. It takes a few seconds, and ``sustain_s`` more if that is given.

    directory: where the disk is measured and random weights are written; it is created.
    backends: names; None for all.
    progress: called with (done, all) steps.

    Raises BackendUnavailable for an unknown backend or if none runs here, BackendError if one fails
    or the directory cannot be written.
    """
    sensors = sensors or Sensors()
    found = _probe(backends)
    available = _available(found)
    steps = _Steps(progress, 3 + sum(len(_widths(found[name])) for name in available))
    available_bytes, total_bytes = memory_bytes()
    free_bytes, (write_bytes_per_s, read_bytes_per_s), disk_conditions = _disk(directory)
    conditions = {"disk": disk_conditions}
    steps.done()
    patience = Patience(_REPEATS_SHARE, _REPEATS_LIMIT_S)
    read_rates = _rates("memory_read", memory_read_rate, threads, patience, conditions)
    steps.done()
    copy_rates = _rates("memory_copy", memory_copy_rate, threads, patience, conditions)
    steps.done()
    meter = sensors.power_meter()
    surveys = tuple(
        _with_flops(survey, threads, directory, meter, steps, patience) for survey in found.values()
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
        memory_read_bytes_per_s=read_rates,
        memory_copy_bytes_per_s=copy_rates,
        disk_write_bytes_per_s=write_bytes_per_s,
        disk_read_bytes_per_s=read_bytes_per_s,
        backends=surveys,
        temperatures_c=sensors.temperatures_c(),
        throttling=sensors.throttling(),
        watts=watts,
        watts_source=source,
        sustained=sustained,
        conditions=conditions,
    )


def _available(found: Mapping[str, BackendSurvey]) -> list[str]:
    """Return the names of the backends that run here. Raises BackendUnavailable if none does."""
    available = [name for name, survey in found.items() if survey.reason is None]
    if not available:
        first = next(iter(found.values()))
        raise BackendUnavailable(first.name, first.reason or "")
    return available


def _disk(directory: Path) -> tuple[int, tuple[float, float | None], Conditions]:
    """Return free bytes, (write, read) bytes per second and conditions. Raises BackendError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(directory).free
        meter = LoadMeter(kernel=False)
        rates = measure_disk(directory)
        return free_bytes, rates, meter.conditions()
    except OSError as error:
        raise BackendError(f"directory {directory} is not usable: {error}") from error


def _rates(
    name: str,
    measure: Callable[[int], tuple[float, float]],
    threads: int,
    patience: Patience,
    conditions: dict[str, Conditions],
) -> dict[int, float]:
    """Measure bytes per second with one thread and with all. ``conditions`` gets those of each."""
    rates: dict[int, float] = {}
    for count in sorted({1, threads}):
        rates[count], conditions[f"{name} {count}"] = steady(
            partial(measure, count), patience, lambda rate: 1 / rate
        )
    return rates


def slower_than_before(survey: DeviceSurvey, store: CalibrationStore, *, again: bool) -> list[str]:
    """Name the figures that earlier surveys of this machine found much faster, one line each.

    A neighbour on the same host takes memory bandwidth and clock unseen. The fastest of each figure
    is kept in ``store``. With ``again`` the new one is kept.
    """
    figures = {
        f"{name}, {count} thread{'s' * (count != 1)}": (rate, 1e9, "GB/s")
        for name, rates in (
            ("memory read", survey.memory_read_bytes_per_s),
            ("memory copy", survey.memory_copy_bytes_per_s),
        )
        for count, rate in rates.items()
    }
    figures |= {
        f"{backend.name} {backend.version}, {bits} bits": (rate, 1e9, "GFLOP/s")
        for backend in survey.backends
        for bits, rate in backend.flops.items()
    }
    lines = []
    for name, (rate, unit, label) in figures.items():
        key = {"hardware": hardware_id(), "kind": "survey", "figure": name}
        key["threads"] = str(survey.threads)
        known = store.get(key)
        before = known[0] if known is not None and len(known) == 2 else 0.0
        if rate < SLOWER * before:
            day = time.strftime("%Y-%m-%d %H:%M", time.localtime(known[1] if known else 0))
            lines.append(f"{name}: {rate / unit:.1f} {label} now, {before / unit:.1f} on {day}")
        if again or rate > before:
            store.put(key, (rate, time.time()))
    return lines


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
            backend_class(name)  # Raises an error that names the known ones.
        result = results[name]
        if isinstance(result, BackendUnavailable):
            surveys[name] = BackendSurvey(name, None, result.reason, {}, {}, {})
        else:
            surveys[name] = BackendSurvey(name, result.version, None, result.container_bits, {}, {})
    return surveys


def _widths(survey: BackendSurvey) -> dict[int, int]:
    """Return the narrowest stored width of each executed width."""
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
    patience: Patience,
) -> BackendSurvey:
    if survey.reason is not None:
        return survey
    backend = backend_class(survey.name)()
    flops: dict[int, float] = {}
    best_flops: dict[int, float] = {}
    conditions: dict[int, Conditions] = {}
    for container, bits in _widths(survey).items():
        with compute_call(backend, bits, threads, directory) as (call, operations):
            call()
            (flops[container], best_flops[container]), conditions[container] = steady(
                partial(_flops, call, operations, meter), patience, lambda rates: 1 / rates[0]
            )
        steps.done()
    return BackendSurvey(
        survey.name, survey.version, None, survey.container_bits, flops, best_flops, conditions
    )


def _flops(
    call: Callable[[], object], operations: int, meter: PowerMeter | None
) -> tuple[tuple[float, float], float]:
    """Return ((operations per second over all calls, of the best call), spread of the calls)."""
    times_s: list[float] = []
    while sum(times_s) < _FLOPS_TIME_S:
        before_s = time.perf_counter()
        call()
        times_s.append(time.perf_counter() - before_s)
        if meter is not None:
            meter.sample()
    rates = len(times_s) * operations / sum(times_s), operations / min(times_s)
    return rates, spread_of(times_s)


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
    """Yield a call of FLOPS_ROWS rows through one large layer, and its floating-point operations.

    ``directory`` holds the layer's random weights meanwhile.
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
    # Row i sees i + 1 positions, which is half of them on average.
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
