from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from backends.base import BackendUnavailable
from backends.edgetpu_compiler import COMPILER
from backends.registry import BACKENDS, LIBRARIES, TOOLS
from calibration.device import figure_keys, profile_at_start
from calibration.probe_key import probe_key
from calibration.store import CalibrationStore
from tests.system import made_up

BACKEND = "onnx_cpu"


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory whose modules come before those that are installed."""
    directory = tmp_path / "path"
    directory.mkdir()
    monkeypatch.syspath_prepend(str(directory))
    yield directory
    importlib.invalidate_caches()


def key() -> str:
    importlib.invalidate_caches()
    return probe_key(BACKEND)


def test_a_key_stays_until_a_library_changes(path: Path) -> None:
    keys = [key()]
    assert keys[0]
    assert key() == keys[0]
    package = path / "onnxruntime"
    for name, content in {
        "onnxruntime/__init__.py": "one",
        "onnxruntime/capi/native.so": "two",
        "onnxruntime-9.0.dist-info/METADATA": "three",
    }.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(content)
        keys.append(key())
    (package / "capi" / "native.so").write_text("four")
    keys.append(key())
    (path / "onnxruntime-9.0.dist-info").rename(path / "onnxruntime-9.1.dist-info")
    keys.append(key())
    assert len(set(keys)) == len(keys)
    assert all(keys)


def test_a_library_that_is_gone_has_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [])
    assert key() == ""


def test_a_compiler_on_the_path_changes_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = key()
    assert TOOLS == (COMPILER,)
    tool = tmp_path / COMPILER
    tool.write_text("#!/bin/sh")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert key() != before


def test_accelerators_are_probed_at_each_start() -> None:
    assert {name for name in BACKENDS if probe_key(name)} == set(LIBRARIES) == {BACKEND}


def start(directory: Path, **settings: Any) -> Any:
    importlib.invalidate_caches()
    return profile_at_start(
        backend=BACKEND,
        cache_dir=directory / "blocks",
        known=directory / "calibration.json",
        threads=1,
        **settings,
    )


def recognizable(directory: Path) -> CalibrationStore:
    """Let an agent start, and then change what was kept, which no probe finds."""
    made_up.add_device(directory / "calibration.json")
    real = start(directory)
    store = CalibrationStore(directory / "calibration.json")
    found = store.probe(BACKEND, key())
    assert found is not None
    assert found["backend_version"] == real.backend_version
    store.keep_probe(BACKEND, key(), {**found, "backend_version": "kept"})
    quiet = store.found(
        figure_keys(backend=BACKEND, version=real.backend_version, threads=1, exact=False)["call"]
    )[1]
    call = figure_keys(backend=BACKEND, version="kept", threads=1, exact=False)["call"]
    store.put(call, (0.125,), quiet)
    return store


def test_a_second_start_probes_nothing(tmp_path: Path) -> None:
    recognizable(tmp_path)
    again = start(tmp_path, memory_limit_bytes=1 << 20, watts=3.0)
    assert (again.backend_version, again.call_s) == ("kept", 0.125)
    assert (again.memory_bytes, again.watts) == (1 << 20, 3.0)
    assert [name for name, _ in again.conditions] == ["memory", "disk", "call"]


def test_what_it_keeps_is_what_a_child_finds(tmp_path: Path) -> None:
    made_up.add_device(tmp_path / "calibration.json")
    first, second = start(tmp_path), start(tmp_path)
    for name in ("backend_version", "container_bits", "makes", "arithmetic", "shares", "call_s"):
        assert getattr(second, name) == getattr(first, name)


def test_an_exact_agent_has_widths_of_its_own(tmp_path: Path) -> None:
    recognizable(tmp_path)
    assert start(tmp_path, exact=True).container(4) == 32
    assert start(tmp_path).container(4) == 4


def test_a_library_that_begins_to_crash_is_noticed_at_the_next_start(
    tmp_path: Path, path: Path
) -> None:
    recognizable(tmp_path)
    (path / "onnxruntime.py").write_text("import os; os.abort()")
    for _ in range(2):  # A crash is not kept as an answer.
        with pytest.raises(BackendUnavailable, match=r"crashes on this machine \(exit code -6\)"):
            start(tmp_path)


def test_figures_that_are_missing_need_a_child(tmp_path: Path) -> None:
    store = recognizable(tmp_path)
    call = figure_keys(backend=BACKEND, version="kept", threads=1, exact=False)["call"]
    store.put(call, (0.125,), None)  # Nobody knows when it was measured.
    assert start(tmp_path).backend_version != "kept"


@pytest.mark.parametrize(
    "damage", [{"container_bits": 4}, {"container_bits": []}, {"makes": [1]}, {"shares": None}]
)
def test_damaged_answers_are_not_believed(tmp_path: Path, damage: dict[str, Any]) -> None:
    store = recognizable(tmp_path)
    found = store.probe(BACKEND, key())
    assert found is not None
    store.keep_probe(BACKEND, key(), {**found, **damage})
    assert start(tmp_path).backend_version != "kept"
    assert start(tmp_path).backend_version != "kept"
