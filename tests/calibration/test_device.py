from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from backends.base import BackendError, BackendUnavailable
from backends.registry import BACKENDS, backend_class
from calibration import device
from calibration.device import (
    kept_profile,
    measure_disk_write,
    measure_memory_read,
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
    assert measure_memory_read(3) > 1e8


def test_the_disk_measurement_leaves_nothing(tmp_path: Path) -> None:
    assert measure_disk_write(tmp_path) > 0
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


def test_a_library_that_crashes_is_a_backend_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnxruntime.py").write_text("import os; os.abort()")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(BackendUnavailable, match=r"crashes on this machine \(exit code -6\)"):
        profile_in_child(backend="onnx_cpu", cache_dir=tmp_path)


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
