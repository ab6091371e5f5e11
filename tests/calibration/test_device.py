from __future__ import annotations

import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from backends.base import BackendError, BackendUnavailable
from backends.registry import BACKENDS, backend_class
from calibration import device
from calibration.device import (
    _storage_bytes,
    figure_keys,
    kept_profile,
    known_or_measured,
    measure_disk,
    memory_read_rate,
    profile_device,
    profile_in_child,
)
from calibration.store import CalibrationStore
from wire.conditions import Conditions
from wire.profile import DeviceProfile


def available_backend() -> str:
    for name in BACKENDS:
        try:
            backend_class(name).probe()
        except BackendUnavailable:
            continue
        return name
    pytest.skip("no backend is available")


def test_a_profile_of_this_machine(tmp_path: Path) -> None:
    name = available_backend()
    cache_dir = tmp_path / "state" / "blocks"
    profile = profile_device(backend=name, cache_dir=cache_dir)
    capabilities = backend_class(name).probe()
    assert profile.backend == name
    assert profile.backend_version == capabilities.version
    assert dict(profile.container_bits) == dict(capabilities.container_bits)
    assert 0 < profile.memory_bytes < profile.memory_total_bytes
    assert 1 <= profile.threads <= profile.cores
    assert profile.storage_bytes > 0
    assert profile.memory_read_bytes_per_s > 1e8
    assert profile.disk_write_bytes_per_s > 0
    assert 0 <= profile.call_s < 0.1
    assert list(cache_dir.iterdir()) == []


def test_limits_cap_and_never_add(tmp_path: Path) -> None:
    name = available_backend()
    tight = profile_device(
        backend=name,
        cache_dir=tmp_path,
        memory_limit_bytes=1 << 20,
        storage_limit_bytes=1 << 21,
        threads=1,
    )
    assert (tight.memory_bytes, tight.storage_bytes, tight.threads) == (1 << 20, 1 << 21, 1)
    wide = profile_device(
        backend=name,
        cache_dir=tmp_path,
        memory_limit_bytes=1 << 60,
        storage_limit_bytes=1 << 60,
    )
    assert wide.memory_bytes < wide.memory_total_bytes
    assert wide.storage_bytes < 1 << 60


def test_an_unusable_cache_directory_is_one_clear_error(tmp_path: Path) -> None:
    name = available_backend()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BackendError, match="cache directory"):
        profile_device(backend=name, cache_dir=tmp_path / "file" / "blocks")


def test_an_unknown_backend_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match="abacus"):
        profile_device(backend="abacus", cache_dir=tmp_path)


def test_more_threads_than_cores_are_measured_too() -> None:
    assert memory_read_rate(3)[0] > 1e8


def test_the_disk_measurement_leaves_nothing(tmp_path: Path) -> None:
    assert measure_disk(tmp_path)[0] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_child_measures_the_same_device(tmp_path: Path) -> None:
    name = available_backend()
    limits: dict[str, Any] = {
        "memory_limit_bytes": 1 << 20,
        "storage_limit_bytes": 1 << 21,
        "threads": 1,
    }
    here = profile_device(backend=name, cache_dir=tmp_path, **limits)
    there = profile_in_child(backend=name, cache_dir=tmp_path, **limits)
    measured = ("memory_read_bytes_per_s", "disk_write_bytes_per_s", "call_s", "conditions")
    assert [name for name, _ in there.conditions] == ["memory", "disk", "call"]
    assert replace(there, **{field: getattr(here, field) for field in measured}) == here


def test_figures_since_the_machines_start_are_not_measured_again(tmp_path: Path) -> None:
    name = available_backend()
    store = CalibrationStore(tmp_path / "calibration.json")
    version = backend_class(name).probe().version
    keys = figure_keys(backend=name, version=version, threads=1, exact=False)

    def profile(measured_s: float) -> DeviceProfile:
        busy = Conditions(2, 1e9, 0.0, 0.0, 0.0, 0.0, measured_s)
        for figure in ("memory", "call"):
            store.put(keys[figure], (0.125,), busy)
        return profile_in_child(backend=name, cache_dir=tmp_path, known=store.path, threads=1)

    now_s, booted_s = time.time(), psutil.boot_time()
    known = profile(now_s)
    assert known.memory_read_bytes_per_s == known.call_s == 0.125
    assert dict(known.conditions)["call"].measured_s == now_s
    assert dict(known.conditions)["disk"].measured_s >= now_s
    measured = profile(booted_s - 1.0)
    assert measured.memory_read_bytes_per_s > 1e8
    assert measured.call_s != 0.125
    assert dict(measured.conditions)["call"].measured_s >= now_s
    # The next agent need not measure.
    assert store.get(keys["call"]) == (measured.call_s,)


def test_one_of_those_that_share_a_store_measures(tmp_path: Path) -> None:
    measured: list[float] = []

    def measure() -> tuple[float, Conditions]:
        measured.append(time.time())
        time.sleep(0.05)  # So that all have asked before one knows.
        return measured[-1], Conditions(1, 0.0, 0.0, 0.0, 0.0, 0.0, measured[-1])

    def ask(_: int) -> float:
        store = CalibrationStore(tmp_path / "shared" / "calibration.json")
        return known_or_measured(store, {"figure": "call"}, measure)[0]

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(ask, range(4))) == set(measured)
    assert len(measured) == 1


def test_a_store_that_cannot_be_written_stops_no_measurement(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    store = CalibrationStore(tmp_path / "file" / "calibration.json")
    quiet = Conditions(1, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0)
    assert known_or_measured(store, {}, lambda: (2.0, quiet)) == (2.0, quiet)
    assert "calibration cannot be kept" in caplog.text


def test_an_exact_agent_says_what_its_weights_take_then(tmp_path: Path) -> None:
    usual = profile_in_child(backend="onnx_cpu", cache_dir=tmp_path, threads=1)
    exact = profile_in_child(backend="onnx_cpu", cache_dir=tmp_path, threads=1, exact=True)
    assert usual.container(4) == 4
    assert [exact.container(bits) for bits, _ in usual.container_bits] == [32] * 8


def test_a_backend_that_always_rounds_is_not_exact(tmp_path: Path) -> None:
    try:
        backend_class("tflite_cpu").probe()
    except BackendUnavailable as error:
        pytest.skip(error.reason)
    with pytest.raises(BackendError, match="start it without --exact"):
        profile_device(backend="tflite_cpu", cache_dir=tmp_path, exact=True)


def test_what_a_child_cannot_do_is_said_as_here(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match="unknown; known are"):
        profile_in_child(backend="quantum", cache_dir=tmp_path)
    with pytest.raises(BackendError, match="cache directory /proc/x is not usable"):
        profile_in_child(backend=available_backend(), cache_dir=Path("/proc/x"))


def test_a_measurement_that_is_ended_leaves_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = """
import json, signal, sys
settings = json.load(sys.stdin)
open((settings.get("scratch") or settings["cache_dir"]) + "/.write-test-of-child", "w").close()
signal.pause()
"""

    def cancel() -> None:
        if any(tmp_path.rglob(".write-test-of-child")):
            raise KeyboardInterrupt

    monkeypatch.setattr(device, "_CHILD", busy)
    with pytest.raises(KeyboardInterrupt):
        profile_in_child(backend="onnx_cpu", cache_dir=tmp_path, check=cancel)
    assert [*tmp_path.iterdir()] == []


def test_files_that_vanish_while_a_cache_is_counted_are_left_out(tmp_path: Path) -> None:
    """As those of a calibration beside the agent's do."""
    ended = threading.Event()

    def comes_and_goes() -> None:
        while not ended.is_set():
            with TemporaryDirectory(dir=tmp_path) as name:
                for number in range(50):
                    Path(name, str(number)).touch()

    (tmp_path / "stays").write_bytes(bytes(1000))
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(comes_and_goes)
        try:
            for _ in range(4000):  # One look in a thousand met a file that was gone.
                assert _storage_bytes(tmp_path) >= 1000
        finally:
            ended.set()
            sys.setswitchinterval(interval_s)


def test_a_library_that_crashes_is_a_backend_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnxruntime.py").write_text("import os; os.abort()")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(BackendUnavailable, match=r"crashes on this machine \(exit code -6\)"):
        profile_in_child(backend="onnx_cpu", cache_dir=tmp_path)


def test_a_probe_that_is_killed_says_nothing_of_the_backend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At boot memory may be short for a moment. The next start may have enough."""
    (tmp_path / "onnxruntime.py").write_text("import os; os.kill(os.getpid(), 9)")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(BackendError, match="was killed, maybe for lack of memory") as raised:
        profile_in_child(backend="onnx_cpu", cache_dir=tmp_path)
    assert not isinstance(raised.value, BackendUnavailable)


def test_what_lies_in_the_cache_may_make_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in (("a" * 64, 1000), (f"prepared/{'b' * 64}/key/weights-0.bin", 4500)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    assert device._storage_bytes(tmp_path) == 5600


def test_figures_of_one_backend_are_not_kept_for_another(tmp_path: Path) -> None:
    store = CalibrationStore(tmp_path / "calibration.json")
    quiet, busy = (Conditions(2, others, 0.0, 0.0, 0.0, 0.0, 1.0) for others in (0.0, 2.0))
    gpu = DeviceProfile(
        "x86_64",
        "p",
        2,
        2,
        "torch_cuda",
        "1",
        ((4, 4),),
        1 << 30,
        1 << 30,
        1 << 30,
        2e12,
        1e9,
        call_s=1e-4,
        conditions=(("memory", quiet), ("call", quiet)),
    )
    assert kept_profile(gpu, store, exact=False) == gpu
    slower = replace(gpu, memory_read_bytes_per_s=1e12, conditions=(("memory", busy),))
    assert kept_profile(slower, store, exact=False).memory_read_bytes_per_s == 2e12
    cpu = replace(slower, backend="onnx_cpu", memory_read_bytes_per_s=1e10)
    assert kept_profile(cpu, store, exact=False).memory_read_bytes_per_s == 1e10
