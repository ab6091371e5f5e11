"""How fast a device stays when it has to work for long: burst against sustained rate."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from calibration.sensors import Sensors, Throttling

_BURST_SHARE = 0.1
_SUSTAINED_SHARE = 1 / 3
_SENSOR_INTERVAL_S = 1.0


@dataclass(frozen=True, slots=True)
class Sustained:
    """Operations per second in the first tenth of ``duration_s`` and in its last third.

    Temperatures are of the hottest sensor; they, ``throttling`` and ``watts`` are None where no
    sensor tells.
    """

    duration_s: float
    burst_flops: float
    sustained_flops: float
    start_c: float | None
    hottest_c: float | None
    throttling: Throttling | None
    watts: float | None
    watts_source: str | None


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
    call()  # What happens once only is not part of a burst.
    start_c = hottest_c = _hottest_c(sensors)
    meter = sensors.power_meter()
    started_s = now_s = clock_s()
    looked_s = started_s
    ends_s: list[float] = []
    while now_s - started_s < duration_s or not ends_s:
        call()
        now_s = clock_s()
        ends_s.append(now_s - started_s)
        if now_s - looked_s >= _SENSOR_INTERVAL_S:
            looked_s = now_s
            if meter is not None:
                meter.sample()
            temperature_c = _hottest_c(sensors)
            if temperature_c is not None and hottest_c is not None:
                hottest_c = max(hottest_c, temperature_c)
            if progress is not None:
                progress(min(now_s - started_s, duration_s))
    if meter is not None:
        meter.sample()
    elapsed_s = ends_s[-1]
    return Sustained(
        duration_s=elapsed_s,
        burst_flops=operations * _rate(ends_s, 0.0, elapsed_s * _BURST_SHARE),
        sustained_flops=operations * _rate(ends_s, elapsed_s * (1 - _SUSTAINED_SHARE), elapsed_s),
        start_c=start_c,
        hottest_c=hottest_c,
        throttling=sensors.throttling(),
        watts=None if meter is None else meter.watts(),
        watts_source=None if meter is None else meter.source,
    )


def _rate(ends_s: list[float], first_s: float, last_s: float) -> float:
    """Calls per second among those that ended within (first_s, last_s], or the one after it."""
    before = [end for end in ends_s if end <= first_s]
    inside = [end for end in ends_s if first_s < end <= last_s]
    if not inside:
        inside = ends_s[len(before) : len(before) + 1]
    begin_s = before[-1] if before else 0.0
    return len(inside) / (inside[-1] - begin_s)


def _hottest_c(sensors: Sensors) -> float | None:
    return max(sensors.temperatures_c().values(), default=None)
