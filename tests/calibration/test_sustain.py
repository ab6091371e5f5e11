from __future__ import annotations

from pathlib import Path

import pytest

from calibration.sensors import Sensors
from calibration.sustain import measure_sustained


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
