"""The files that kernels show, as trees of small files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from calibration.sensors import Sensors, Throttling, parse_throttled

RAPL = "sys/class/powercap/intel-rapl:0"
INA = "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3"
INA_OLD = "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0"


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def tree(root: Path, files: Mapping[str, object]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def sensors(root: Path, clock: Clock | None = None, firmware: str = "") -> Sensors:
    return Sensors(root, clock_s=clock or Clock(), ask_firmware=lambda: firmware)


@pytest.mark.parametrize("text", ["throttled=0x50005\n", "50005", "0x50005"])
def test_flags_of_a_raspberry_pi(text: str) -> None:
    assert parse_throttled(text) == Throttling(
        ("under-voltage", "throttled"), ("under-voltage", "throttled")
    )


def test_flags_that_held_once_hold_no_more() -> None:
    assert parse_throttled("throttled=0xe0000") == Throttling(
        (), ("clock capped", "throttled", "soft temperature limit")
    )


@pytest.mark.parametrize("text", ["", "VCHI initialization failed", "throttled=", "0x123456789"])
def test_other_answers_are_none(text: str) -> None:
    assert parse_throttled(text) is None


def test_sysfs_is_asked_before_the_firmware(tmp_path: Path) -> None:
    assert sensors(tmp_path).throttling() is None
    assert sensors(tmp_path, firmware="throttled=0x0").throttling() == Throttling((), ())
    tree(tmp_path, {"sys/devices/platform/soc/soc:firmware/get_throttled": "4"})
    found = sensors(tmp_path, firmware="throttled=0x0").throttling()
    assert found == Throttling(("throttled",), ())


def test_no_sensor_no_watts(tmp_path: Path) -> None:
    assert sensors(tmp_path).power_meter() is None


def test_watts_of_energy_counters_that_wrap(tmp_path: Path) -> None:
    clock = Clock()
    tree(
        tmp_path,
        {
            f"{RAPL}/energy_uj": 9_000_000,
            f"{RAPL}/max_energy_range_uj": 10_000_000,
            "sys/class/powercap/intel-rapl:1/energy_uj": 0,
            # A part of package 0, counted there.
            "sys/class/powercap/intel-rapl:0:0/energy_uj": 0,
        },
    )
    meter = sensors(tmp_path, clock).power_meter()
    assert meter is not None
    assert (meter.source, meter.watts()) == ("RAPL", None)
    tree(tmp_path, {f"{RAPL}/energy_uj": 3_000_000})
    tree(tmp_path, {"sys/class/powercap/intel-rapl:1/energy_uj": 2_000_000})
    tree(tmp_path, {"sys/class/powercap/intel-rapl:0:0/energy_uj": 99_000_000})
    clock.now_s += 2
    meter.sample()
    # (10 - 9 + 3) J and 2 J in 2 s.
    assert meter.watts() == pytest.approx(3.0)


def test_watts_of_a_jetson_are_those_of_its_input(tmp_path: Path) -> None:
    tree(
        tmp_path,
        {
            f"{INA}/in1_label": "VDD_IN",
            f"{INA}/in1_input": 5000,
            f"{INA}/curr1_input": 1000,
            f"{INA}/in2_label": "VDD_CPU_GPU_CV",
            f"{INA}/in2_input": 5000,
            f"{INA}/curr2_input": 600,
            f"{INA}/in7_label": "sum of shunt voltages",
        },
    )
    meter = sensors(tmp_path).power_meter()
    assert meter is not None
    assert meter.watts() is None
    meter.sample()
    tree(tmp_path, {f"{INA}/curr1_input": 2000})
    meter.sample()
    assert meter.source == "INA3221"
    assert meter.watts() == pytest.approx(7.5)


def test_rails_without_an_input_are_summed(tmp_path: Path) -> None:
    tree(
        tmp_path,
        {
            f"{INA_OLD}/rail_name_0": "GPU",
            f"{INA_OLD}/in_power0_input": 1200,
            f"{INA_OLD}/rail_name_1": "CPU",
            f"{INA_OLD}/in_power1_input": 800,
        },
    )
    meter = sensors(tmp_path).power_meter()
    assert meter is not None
    meter.sample()
    assert meter.watts() == pytest.approx(2.0)


def test_this_machine_answers_without_an_error() -> None:
    mine = Sensors()
    assert all(-50 < value < 150 for value in mine.temperatures_c().values())
    mine.throttling()
    meter = mine.power_meter()
    if meter is not None:
        meter.sample()
