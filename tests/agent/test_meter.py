"""What a stage counts and remembers, and what sensors may tell."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from agent.gauges import Gauges
from agent.meter import REMEMBERED_PASSES, StageMeter
from agent.sequences import Rows, Sequence
from calibration.sensors import Sensors
from wire.messages import Sampling, TracedPass


def turn(number: int, position: int, count: int, arrived_s: float) -> tuple[Sequence, Rows]:
    rows = Rows(position, count, True, np.zeros(count, dtype=np.int64), arrived_s=arrived_s)
    return Sequence(number, 0, Sampling(1, ()), None), rows


def test_passes_are_counted_and_remembered_by_sequence() -> None:
    meter = StageMeter()
    prompt, both = turn(1, 0, 5, 1.0), [turn(1, 5, 1, 3.0), turn(2, 0, 1, 3.5)]
    meter.ran([prompt], 1.25, 2.0)
    meter.sent(1, prompt[1])
    meter.ran(both, 4.0, 4.5)
    for sequence, rows in both:
        meter.sent(sequence.number, rows)
    assert (meter.passes, meter.rows) == (2, 7)
    assert (meter.compute_s, meter.waited_s) == (1.25, 0.25 + 1.0 + 0.5)
    first, second = meter.passes_of((1,))
    assert first == TracedPass(1, 0, 5, 1, 1_000_000, 1_250_000, 2_000_000, first.sent_us)
    assert (second.position, second.together, second.arrived_us) == (5, 2, 3_000_000)
    assert [item.sequence for item in meter.passes_of((1, 2, 3))] == [1, 1, 2]


def test_the_time_of_other_stages_does_not_count() -> None:
    meter, one = StageMeter(), turn(1, 0, 5, 1.0)
    for _ in range(2):
        meter.begins([one], time.monotonic())
        meter.paused(1000.0)
        assert meter.running()[0] < 0
        meter.ends()
        meter.ran([one], 1250.0, 2500.0)
    assert meter.compute_s == 500.0


def test_old_passes_are_forgotten() -> None:
    meter = StageMeter()
    for position in range(REMEMBERED_PASSES + 3):
        _, rows = turn(1, position, 1, 0.0)
        meter.sent(1, rows)
    kept = meter.passes_of((1,))
    assert (len(kept), kept[0].position) == (REMEMBERED_PASSES, 3)


@pytest.mark.parametrize(
    ("told_c", "expected"),
    [
        ({}, None),
        ({"cpu": 51.0, "gpu": 62.5}, 62.5),
        ({"broken": 65535.0, "nan": float("nan"), "cpu": 40.0, "cold": -300.0}, 40.0),
        ({"broken": float("inf")}, None),
    ],
)
def test_sensors_that_tell_nonsense_are_left_out(
    told_c: dict[str, float], expected: float | None
) -> None:
    gauges = Gauges(Sensors(temperatures_c=lambda: told_c))
    gauges.sample()
    assert gauges.celsius == expected
    assert 0 <= gauges.load <= 1


def test_sensors_that_fail_leave_the_thread_alive() -> None:
    def fail() -> dict[str, float]:
        raise OSError(5, "a dead bus")

    gauges = Gauges(Sensors(temperatures_c=fail))
    gauges.celsius = 50.0
    gauges.sample()
    assert gauges.celsius is None
    over = threading.Event()
    over.set()
    gauges.run(over)
