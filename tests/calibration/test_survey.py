from __future__ import annotations

from pathlib import Path

import pytest

from backends.base import BackendError, BackendUnavailable
from calibration import survey
from calibration.device import measure_disk, memory_copy_rate
from calibration.sensors import Sensors
from calibration.survey import survey_device


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "_FLOPS_TIME_S", 0.01)
    monkeypatch.setattr(survey, "_HIDDEN", 128)
    monkeypatch.setattr(survey, "_REPEATS_LIMIT_S", 0.5)


def test_a_survey_of_this_machine(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    result = survey_device(
        tmp_path / "state",
        2,
        declared_watts=7.5,
        sensors=Sensors(tmp_path, ask_firmware=str, temperatures_c=lambda: {"soc": 41.0}),
        progress=lambda done, total: steps.append((done, total)),
    )
    assert set(result.memory_read_bytes_per_s) == {1, 2}
    assert min(result.memory_copy_bytes_per_s.values()) > 0
    assert result.disk_write_bytes_per_s > 0
    assert result.storage_free_bytes > 0
    assert 0 < result.memory_available_bytes <= result.memory_total_bytes
    for backend in result.backends:
        if backend.reason is None:
            assert set(backend.flops) == set(backend.container_bits.values())
            assert all(backend.best_flops[bits] >= rate for bits, rate in backend.flops.items())
    assert (result.watts, result.watts_source) == (7.5, "declared")
    assert result.temperatures_c == {"soc": 41.0}
    assert result.throttling is None
    assert result.sustained is None
    assert steps == [(done, steps[-1][1]) for done in range(len(steps))]
    assert list((tmp_path / "state").iterdir()) == []


def test_a_sensor_counts_more_than_a_declaration(tmp_path: Path) -> None:
    rails = tmp_path / "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0"
    rails.mkdir(parents=True)
    (rails / "rail_name_0").write_text("POM_5V_IN\n")
    (rails / "in_power0_input").write_text("4200\n")
    sensors = Sensors(tmp_path, ask_firmware=str, temperatures_c=dict)
    result = survey_device(
        tmp_path / "state", 1, declared_watts=7.5, sustain_s=0.05, sensors=sensors
    )
    assert result.watts == pytest.approx(4.2)
    assert result.watts_source == "INA3221"
    assert result.sustained is not None
    assert result.sustained.duration_s >= 0.05
    assert set(result.memory_read_bytes_per_s) == {1}


def test_without_sensor_and_declaration_there_are_no_watts(tmp_path: Path) -> None:
    sensors = Sensors(tmp_path, ask_firmware=str, temperatures_c=dict)
    result = survey_device(tmp_path, 1, sensors=sensors)
    assert (result.watts, result.watts_source) == (None, None)


def test_unusable_arguments(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match="abacus"):
        survey_device(tmp_path, 1, backends=["abacus"])
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BackendError, match="not usable"):
        survey_device(tmp_path / "file", 1)


def test_reading_past_the_page_cache_is_a_figure_or_none(tmp_path: Path) -> None:
    written, read = measure_disk(tmp_path)
    assert written > 0
    assert read is None or read > 0
    assert list(tmp_path.iterdir()) == []


def test_more_threads_than_cores_copy_too() -> None:
    assert memory_copy_rate(3)[0] > 0
