from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from calibration.store import MAX_MODELS, VERSION, CalibrationStore, is_doubtful
from model.checkpoint import Checkpoint
from wire.conditions import Conditions

FIXTURES = Path(__file__).parents[1] / "fixtures"
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
    assert "measured again" in caplog.text
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


QUIET = Conditions(4, 0.0, 0.0, 0.0, 0.1, 0.02, 1000.0)
BUSY = Conditions(4, 1.2, 0.0, 0.0, 3.0, 0.1, 2000.0)
BUSIER = Conditions(4, 3.2, 0.0, 0.0, 5.0, 0.4, 3000.0)


@pytest.mark.parametrize(
    ("first", "then", "kept"),
    [
        (BUSY, QUIET, "then"),  # A better figure takes the place of a noisy one,
        (QUIET, BUSY, "first"),  # but never the other way round.
        (QUIET, QUIET, "then"),
        (BUSIER, BUSY, "then"),
        (BUSY, BUSIER, "first"),
    ],
)
def test_the_less_disturbed_figure_is_kept(
    tmp_path: Path, first: Conditions, then: Conditions, kept: str
) -> None:
    store = CalibrationStore(tmp_path / "calibration.json")
    store.keep(KEY, (0.1,), first)
    expected = ((0.1,), first) if kept == "first" else ((0.2,), then)
    assert store.keep(KEY, (0.2,), then) == expected
    assert CalibrationStore(store.path).found(KEY) == expected


def test_figures_of_unknown_conditions_give_way(tmp_path: Path) -> None:
    store = CalibrationStore(tmp_path / "calibration.json")
    store.put(KEY, (0.1,))  # As earlier versions did.
    assert store.found(KEY) == ((0.1,), None)
    assert store.again(is_doubtful).get(KEY) is None
    assert store.keep(KEY, (0.2,), BUSY) == ((0.2,), BUSY)
    assert store.again(is_doubtful).get(KEY) is None
    store.keep(KEY, (0.3,), QUIET)
    assert store.again(is_doubtful).get(KEY) == (0.3,)
    assert store.again().get(KEY) is None


def test_a_file_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps({"version": VERSION, "entries": {json.dumps({"a": 1}): [0.5]}}))
    path.write_text(path.read_text().replace('\\"a\\": 1', '\\"a\\":1'))
    assert CalibrationStore(path).found({"a": 1}) == ((0.5,), None)


@pytest.mark.parametrize("damaged", ["x", [1], [4, 0, 0, 0, 0, 0, None], [4.0] * 7, {}])
def test_damaged_conditions_cost_only_themselves(tmp_path: Path, damaged: object) -> None:
    store = CalibrationStore(tmp_path / "calibration.json")
    store.keep(KEY, (0.1,), QUIET)
    content = json.loads(store.path.read_text())
    content["conditions"] = {key: damaged for key in content["conditions"]}
    content["models"] = [damaged, {"spec": 1, "bits": []}, {"spec": {}, "bits": ["4"]}]
    store.path.write_text(json.dumps(content))
    assert store.found(KEY) == ((0.1,), None)
    assert store.models() == []


def test_models_are_remembered_with_all_widths(tmp_path: Path) -> None:
    store = CalibrationStore(tmp_path / "calibration.json")
    for number in range(MAX_MODELS + 2):
        store.note_model({"vocab": number}, (4,))
    store.note_model({"vocab": 5}, (8, 4))
    assert len(store.models()) == MAX_MODELS
    assert store.models()[-1] == ({"vocab": 5}, (4, 8))
    assert ({"vocab": 0}, (4,)) not in store.models()


def test_a_model_of_another_version_keeps_no_other_from_being_measured(tmp_path: Path) -> None:
    store = CalibrationStore(tmp_path / "calibration.json")
    spec = Checkpoint.open(FIXTURES / "llama").spec
    store.note_model(spec.to_dict() | {"newer": 1}, (4,))
    store.note_model(spec.to_dict(), (4, 8))
    assert store.specs() == [(spec, (4, 8))]


@pytest.mark.skipif(os.geteuid() != 0, reason="only the administrator writes for others")
def test_what_the_administrator_writes_is_the_services(tmp_path: Path) -> None:
    os.chown(tmp_path, 12345, 23456)
    store = CalibrationStore(tmp_path / "calibration.json")
    store.keep(KEY, (0.1,), QUIET)
    for path in tmp_path.iterdir():
        assert (path.stat().st_uid, path.stat().st_gid) == (12345, 23456), path


def test_a_lock_that_is_a_link_is_not_followed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "calibration.json.lock").symlink_to(tmp_path / "precious")
    CalibrationStore(tmp_path / "calibration.json").put(KEY, (0.1,))
    assert (tmp_path / "precious").read_text() == "mine"
    assert "cannot be kept" in caplog.text
