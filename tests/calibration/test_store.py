from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from calibration.store import VERSION, CalibrationStore

KEY = {"hardware": "a board", "layer": {"hidden": 64, "rope": None}, "threads": 4}


def test_what_was_stored_is_found_by_another_reader(tmp_path: Path) -> None:
    path = tmp_path / "state" / "calibration.json"
    CalibrationStore(path).put(KEY, (0.1, 2e-7))
    assert CalibrationStore(path).get(KEY) == (0.1, 2e-7)
    assert CalibrationStore(path).get(dict(reversed(KEY.items()))) == (0.1, 2e-7)


@pytest.mark.parametrize(
    "other", [{"threads": 3}, {"hardware": "another"}, {"layer": {"hidden": 64}}, {"more": 1}]
)
def test_every_part_of_a_key_counts(tmp_path: Path, other: dict[str, object]) -> None:
    store = CalibrationStore(tmp_path / "calibration.json")
    store.put(KEY, (0.1,))
    assert store.get(KEY | other) is None


def test_later_values_replace_earlier_ones(tmp_path: Path) -> None:
    store = CalibrationStore(tmp_path / "calibration.json")
    store.put(KEY, (0.1,))
    store.put({"other": 1}, (0.3,))
    store.put(KEY, (0.2,))
    assert store.get(KEY) == (0.2,)
    assert store.get({"other": 1}) == (0.3,)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"[" * 100_000,
        json.dumps({"version": VERSION + 1, "entries": {}}).encode(),
        json.dumps({"version": VERSION}).encode(),
        json.dumps({"version": VERSION, "entries": {"a": "b"}}).encode(),
        json.dumps({"version": VERSION, "entries": {"a": [True]}}).encode(),
        b'{"version": 1, "entries": {"a": [NaN]}}',
    ],
)
def test_a_damaged_file_is_ignored_with_a_warning_and_rewritten(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "calibration.json"
    path.write_bytes(content)
    store = CalibrationStore(path)
    assert store.get(KEY) is None
    assert "measuring anew" in caplog.text
    store.put(KEY, (0.5,))
    assert CalibrationStore(path).get(KEY) == (0.5,)


def test_no_temporary_file_stays(tmp_path: Path) -> None:
    store = CalibrationStore(tmp_path / "calibration.json")
    store.put(KEY, (0.1,))
    assert {path.name for path in tmp_path.iterdir()} == {
        "calibration.json",
        "calibration.json.lock",
    }


def test_a_disk_that_takes_nothing_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    CalibrationStore(tmp_path / "file" / "calibration.json").put(KEY, (0.1,))
    assert "cannot be kept" in caplog.text


def test_processes_writing_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_many, args=(path, number)) for number in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    store = CalibrationStore(path)
    for number in range(3):
        for index in range(20):
            assert store.get({"writer": number, "index": index}) == (float(index),)


def _write_many(path: Path, number: int) -> None:
    store = CalibrationStore(path)
    for index in range(20):
        store.put({"writer": number, "index": index}, (float(index),))
