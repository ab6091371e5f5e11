from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from calibration.sensors import Sensors
from calibration.sustain import Sustained, measure_sustained


class Device:
    """A device that gets hot and slow after ten seconds; its clock goes on while it computes."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def clock_s(self) -> float:
        return self.now_s

    def call(self) -> None:
        self.now_s += 0.1 if self.now_s < 10 else 0.2

    def temperatures_c(self) -> dict[str, float]:
        return {"soc": 40 + min(self.now_s, 30), "board": 35.0}


def test_a_device_that_throttles(tmp_path: Path) -> None:
    device = Device()
    sensors = Sensors(
        tmp_path,
        clock_s=device.clock_s,
        ask_firmware=lambda: "throttled=0x4",
        temperatures_c=device.temperatures_c,
    )
    seen: list[float] = []
    result = measure_sustained(
        device.call, 1000, 40.0, sensors, clock_s=device.clock_s, progress=seen.append
    )
    assert result.burst_flops == pytest.approx(10_000)
    assert result.sustained_flops == pytest.approx(5_000)
    assert result.duration_s == pytest.approx(40.0, abs=0.3)
    assert result.start_c == pytest.approx(40.1)
    assert result.hottest_c == pytest.approx(70.0)
    assert result.throttling is not None
    assert result.throttling.now == ("throttled",)
    assert (result.watts, result.watts_source) == (None, None)
    assert seen == sorted(seen)
    assert len(seen) > 30


def test_one_call_that_takes_longer_than_all_the_time(tmp_path: Path) -> None:
    device = Device()

    def slow() -> None:
        device.now_s += 90

    sensors = Sensors(tmp_path, ask_firmware=str, temperatures_c=dict)
    result = measure_sustained(slow, 900, 60.0, sensors, clock_s=device.clock_s)
    assert result.burst_flops == result.sustained_flops == pytest.approx(10)
    assert result.hottest_c is None


def slowing(tmp_path: Path, **sensors: Callable[[], Any]) -> Sustained:
    """What is said of a device that takes twice as long after ten seconds."""
    device = Device()
    settings: dict[str, Any] = {"ask_firmware": str, "temperatures_c": dict} | sensors
    found = Sensors(tmp_path, clock_s=device.clock_s, **settings)
    return measure_sustained(device.call, 1000, 40.0, found, clock_s=device.clock_s)


def test_without_a_sensor_that_says_so_it_is_not_heat(tmp_path: Path) -> None:
    result = slowing(tmp_path)
    assert result.sustained_flops < 0.6 * result.burst_flops
    assert result.cause.startswith("unknown")
    # A sensor that gets warm is no proof: every processor gets warm when it computes.
    warm = slowing(tmp_path, temperatures_c=lambda: {"soc": 62.0})
    assert warm.cause.startswith("unknown")


def test_what_the_firmware_says_is_the_cause(tmp_path: Path) -> None:
    result = slowing(tmp_path, ask_firmware=lambda: "throttled=0xa")
    assert result.cause == "the firmware reports clock capped, soft temperature limit"


def test_a_flag_of_an_hour_ago_is_not_the_cause(tmp_path: Path) -> None:
    result = slowing(tmp_path, ask_firmware=lambda: "throttled=0x40000")
    assert result.cause.startswith("unknown")


def test_a_clock_that_fell_is_the_cause(tmp_path: Path) -> None:
    clock = tmp_path / "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq"
    events = tmp_path / "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count"
    for path, text in ((clock, "2400000\n"), (events, "3\n")):
        path.parent.mkdir(parents=True)
        path.write_text(text)

    def temperatures_c() -> dict[str, float]:
        if device.now_s > 10:
            clock.write_text("1200000\n")
            events.write_text("8\n")
        return {"soc": 80.0}

    device = Device()
    sensors = Sensors(tmp_path, ask_firmware=str, temperatures_c=temperatures_c)
    result = measure_sustained(device.call, 1000, 40.0, sensors, clock_s=device.clock_s)
    assert (result.burst_clock_hz, result.sustained_clock_hz) == (2.4e9, 1.2e9)
    assert result.cause == (
        "the processor slowed down for heat 5 times; the clock fell from 2.40 to 1.20 GHz"
    )


def test_a_neighbour_that_comes_later_is_the_cause() -> None:
    """Real load by other processes in the second half; one call computes for some milliseconds."""
    cores = len(os.sched_getaffinity(0))
    children: list[subprocess.Popen[bytes]] = []

    def call() -> None:
        end_s = time.process_time() + 0.005
        while time.process_time() < end_s:
            pass

    def progress(elapsed_s: float) -> None:
        if not children:
            children.extend(
                subprocess.Popen([sys.executable, "-c", "while True: pass"])
                for _ in range(3 * cores)
            )

    sensors = Sensors(ask_firmware=str, temperatures_c=dict)
    try:
        result = measure_sustained(call, 1000, 6.0, sensors, progress=progress)
    finally:
        for child in children:
            child.kill()
            child.wait()
    assert result.during_sustained.was_busy
    if result.sustained_flops < 0.95 * result.burst_flops:
        assert "other programs used" in result.cause
        assert "heat" not in result.cause


def test_a_device_that_keeps_its_speed_needs_no_cause(tmp_path: Path) -> None:
    device = Device()

    def steady() -> None:
        device.now_s += 0.1

    sensors = Sensors(tmp_path, ask_firmware=str, temperatures_c=dict)
    result = measure_sustained(steady, 1000, 30.0, sensors, clock_s=device.clock_s)
    assert result.cause == ""
