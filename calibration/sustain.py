"""Compares a device's burst rate with the rate that it sustains.

The slowdown itself is measured. Only sensors and counters show its cause. If they are silent, or if
other programs took the processor, the result says so and does not blame heat.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from calibration.disturbance import LoadMeter
from calibration.sensors import Sensors, Throttling
from wire.conditions import QUIET_CORES, QUIET_SHARE, Conditions

_BURST_SHARE = 0.1
_SUSTAINED_SHARE = 1 / 3
_SENSOR_INTERVAL_S = 1.0

KEPT_SHARE = 0.95
"""A device that keeps this share of its speed has not become slower."""


@dataclass(frozen=True, slots=True)
class Sustained:
    """Operations per second in the first tenth of ``duration_s`` and in its last third.

    Temperatures are of the hottest sensor. They, ``throttling`` and ``watts`` are None without a
    sensor. ``during_burst`` and ``during_sustained`` are the conditions. Clocks are means over the
    cores. ``cause`` says why the device became slower, as far as is known. It is empty if it did
    not.
    """

    duration_s: float
    burst_flops: float
    sustained_flops: float
    start_c: float | None
    hottest_c: float | None
    throttling: Throttling | None
    watts: float | None
    watts_source: str | None
    during_burst: Conditions
    during_sustained: Conditions
    burst_clock_hz: float | None
    sustained_clock_hz: float | None
    cause: str


def measure_sustained(
    call: Callable[[], object],
    operations: int,
    duration_s: float,
    sensors: Sensors,
    *,
    clock_s: Callable[[], float] = time.perf_counter,
    progress: Callable[[float], None] | None = None,
) -> Sustained:
    """Repeat ``call``, which does ``operations`` floating-point operations, for ``duration_s``.

    ``progress`` is called about once a second with the seconds that have passed.
    """
    call()  # One-time work is not part of a burst.
    watch = _Watch(sensors, duration_s)
    started_s = now_s = looked_s = clock_s()
    ends_s: list[float] = []
    while now_s - started_s < duration_s or not ends_s:
        call()
        now_s = clock_s()
        ends_s.append(now_s - started_s)
        watch.after_call(ends_s[-1])
        if now_s - looked_s >= _SENSOR_INTERVAL_S:
            looked_s = now_s
            watch.look()
            if progress is not None:
                progress(min(now_s - started_s, duration_s))
    return watch.result(operations, ends_s)


class _Watch:
    """Watches sensors and other programs while a call repeats for ``duration_s``."""

    def __init__(self, sensors: Sensors, duration_s: float) -> None:
        self._sensors = sensors
        self._burst_end_s = duration_s * _BURST_SHARE
        self._last_part_s = duration_s * (1 - _SUSTAINED_SHARE)
        self._start_c = self._hottest_c = _hottest_c(sensors)
        self._meter = sensors.power_meter()
        self._before, self._events = sensors.throttling(), sensors.throttle_events()
        self._load = LoadMeter(sensors.root)
        self._during_burst: Conditions | None = None
        self._burst_clock_hz: float | None = None
        self._in_last_part = False

    def after_call(self, elapsed_s: float) -> None:
        """Read conditions once at the end of the burst, and from the last part's beginning on."""
        if self._during_burst is None and elapsed_s >= self._burst_end_s:
            self._during_burst = self._load.conditions()
            self._burst_clock_hz = self._sensors.clock_hz()
        if not self._in_last_part and elapsed_s >= self._last_part_s:
            self._in_last_part = True
            self._load.restart()

    def look(self) -> None:
        """Read power and temperature."""
        if self._meter is not None:
            self._meter.sample()
        temperature_c = _hottest_c(self._sensors)
        if temperature_c is not None and self._hottest_c is not None:
            self._hottest_c = max(self._hottest_c, temperature_c)

    def result(self, operations: int, ends_s: list[float]) -> Sustained:
        """Return the rates of calls that ended at these times, and why they fell if they did."""
        meter, sensors, elapsed_s = self._meter, self._sensors, ends_s[-1]
        if meter is not None:
            meter.sample()
        during_sustained, throttling = self._load.conditions(), sensors.throttling()
        burst = _rate(ends_s, 0.0, elapsed_s * _BURST_SHARE)
        sustained = _rate(ends_s, elapsed_s * (1 - _SUSTAINED_SHARE), elapsed_s)
        result = Sustained(
            duration_s=elapsed_s,
            burst_flops=operations * burst,
            sustained_flops=operations * sustained,
            start_c=self._start_c,
            hottest_c=self._hottest_c,
            throttling=throttling,
            watts=None if meter is None else meter.watts(),
            watts_source=None if meter is None else meter.source,
            during_burst=self._during_burst or during_sustained,
            during_sustained=during_sustained,
            burst_clock_hz=self._burst_clock_hz,
            sustained_clock_hz=sensors.clock_hz(),
            cause="",
        )
        if result.sustained_flops >= KEPT_SHARE * result.burst_flops:
            return result
        flags = set() if throttling is None else set(throttling.now)
        if throttling is not None and self._before is not None:
            flags |= set(throttling.since_boot) - set(self._before.since_boot)
        more_events = (sensors.throttle_events() or 0) - (self._events or 0)
        return replace(result, cause=_cause(result, sorted(flags), more_events))


def _cause(result: Sustained, flags: Sequence[str], events: int) -> str:
    """Say why the device became slower, as far as is known.

    ``flags`` are the firmware's. ``events`` counts how often the processor slowed itself down.
    """
    causes = []
    if flags:
        causes.append(f"the firmware reports {', '.join(flags)}")
    if events > 0:
        causes.append(f"the processor slowed down for heat {events} times")
    first_hz, last_hz = result.burst_clock_hz, result.sustained_clock_hz
    if first_hz and last_hz and last_hz < KEPT_SHARE * first_hz:
        causes.append(f"the clock fell from {first_hz / 1e9:.2f} to {last_hz / 1e9:.2f} GHz")
    first, last = result.during_burst, result.during_sustained
    limit = max(QUIET_CORES, QUIET_SHARE * last.cores)
    for who, before, after in (
        ("other programs used", first.others_cores, last.others_cores),
        ("the hypervisor took", first.stolen_cores, last.stolen_cores),
    ):
        if after > before + limit:
            causes.append(
                f"{who} {after:.1f} of {last.cores} cores at the end, {before:.1f} at the beginning"
            )
    if last.held_share > first.held_share + 0.1:
        causes.append(
            f"the container's processor limit stopped it in {last.held_share:.0%} of periods"
        )
    if causes:
        return "; ".join(causes)
    if last.was_busy:
        return f"unknown; {last.text}"
    return "unknown: no sensor reports heat or throttling, no other program used the processor"


def _rate(ends_s: list[float], first_s: float, last_s: float) -> float:
    """Return calls per second among those that ended within (first_s, last_s], or the next one."""
    before = [end for end in ends_s if end <= first_s]
    inside = [end for end in ends_s if first_s < end <= last_s]
    if not inside:
        inside = ends_s[len(before) : len(before) + 1]
    begin_s = before[-1] if before else 0.0
    return len(inside) / (inside[-1] - begin_s)


def _hottest_c(sensors: Sensors) -> float | None:
    return max(sensors.temperatures_c().values(), default=None)
