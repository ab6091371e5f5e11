"""What this device is and what it can give: measured, and limited by its user and its container."""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from backends.base import Backend, BackendError, BackendUnavailable, FilesMissing
from backends.registry import backend_class, makers, require_known
from calibration.layers import measure_call
from calibration.machine import memory_bytes, processor_name, usable_cores, usable_threads
from wire.profile import DeviceProfile

MIN_HEADROOM_BYTES = 64 << 20
HEADROOM_SHARE = 0.1
"""What stays free of the memory that was free at start: for the system, and for this process."""

_READ_BUFFER_BYTES = 128 << 20
_READ_TIME_S = 0.25
_WRITE_CHUNK_BYTES = 1 << 20
_WRITE_LIMIT_BYTES = 32 << 20
_WRITE_TIME_S = 0.25

_CHILD = """
import json, sys
settings = json.load(sys.stdin)
sys.path[:] = settings.pop("path")
from calibration.device import answer_parent
answer_parent(settings)
"""
"""Finds modules where its parent does, and never in the directory that it happens to start in."""


def profile_device(
    *,
    backend: str,
    cache_dir: Path,
    memory_limit_bytes: int | None = None,
    storage_limit_bytes: int | None = None,
    threads: int | None = None,
    watts: float | None = None,
    exact: bool = False,
) -> DeviceProfile:
    """Measure this device for stages run by ``backend``; takes about a second.

    cache_dir: where blocks will be kept; created. A limit caps what is free, it cannot add to it.
    threads: None for as many as ``usable_threads`` finds. watts: what its user says. exact: stages
    will be loaded so. Raises BackendUnavailable where the backend does not run here, BackendError
    where it cannot be exact or the cache directory cannot be written.
    """
    kind = backend_class(backend)
    capabilities = kind.probe()
    containers = capabilities.containers(exact=exact)
    if not containers:
        raise BackendError(f"{backend} always rounds activations: start it without --exact")
    threads = threads or usable_threads()
    # The backend first: what a GPU that shares the memory takes at its start is then gone already.
    of_its_own = kind.memory_bytes()
    available_bytes, total_bytes = of_its_own or memory_bytes()
    headroom_bytes = max(MIN_HEADROOM_BYTES, int(available_bytes * HEADROOM_SHARE))
    usable_bytes = max(available_bytes - headroom_bytes, 0)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        storage_bytes = _storage_bytes(cache_dir)
        disk_write_bytes_per_s = measure_disk_write(cache_dir)
    except OSError as error:
        raise BackendError(f"cache directory {cache_dir} is not usable: {error}") from error
    return DeviceProfile(
        machine=platform.machine(),
        processor=processor_name(),
        cores=usable_cores(),
        threads=threads,
        backend=capabilities.backend,
        backend_version=capabilities.version,
        container_bits=tuple(sorted(containers.items())),
        memory_bytes=min(usable_bytes, memory_limit_bytes or usable_bytes),
        memory_total_bytes=total_bytes,
        storage_bytes=min(storage_bytes, storage_limit_bytes or storage_bytes),
        memory_read_bytes_per_s=kind.memory_read_bytes_per_s() or measure_memory_read(threads),
        disk_write_bytes_per_s=disk_write_bytes_per_s,
        call_s=_call_s(kind(), threads, cache_dir, exact),
        watts=watts,
        on_chip_bytes=capabilities.on_chip_bytes,
        makes=tuple(sorted(makers().items())),
        arithmetic=capabilities.arithmetic,
    )


def profile_in_child(*, backend: str, cache_dir: Path, **settings: float | None) -> DeviceProfile:
    """``profile_device`` in a process of its own, so that this one imports no backend for it.

    settings: its other arguments. A library that crashes while it is imported, as one built for
    newer processors does, is a BackendUnavailable.
    """
    require_known(backend)
    everything = {"path": sys.path, "backend": backend, "cache_dir": str(cache_dir), **settings}
    completed = subprocess.run(  # noqa: S603 - this interpreter, with our own settings
        [sys.executable, "-I", "-c", _CHILD],
        input=json.dumps(everything),
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        answer = json.loads(completed.stdout.splitlines()[-1])
    except (ValueError, IndexError) as error:
        how = (completed.stderr.strip().splitlines() or [f"exit code {completed.returncode}"])[-1]
        raise BackendUnavailable(backend, f"it crashes on this machine ({how})") from error
    if "unavailable" in answer:
        raise BackendUnavailable(backend, answer["unavailable"])
    if "error" in answer:
        raise BackendError(answer["error"])
    for name in ("container_bits", "makes"):
        answer[name] = tuple(map(tuple, answer[name]))
    return DeviceProfile(**answer)


def answer_parent(settings: dict[str, Any]) -> None:
    """The other process of ``profile_in_child``: the answer goes to stdout, as JSON."""
    answer: dict[str, Any]
    try:
        profile = profile_device(**{**settings, "cache_dir": Path(settings["cache_dir"])})
        answer = dataclasses.asdict(profile)
    except BackendUnavailable as error:
        answer = {"unavailable": error.reason}
    except BackendError as error:
        answer = {"error": str(error)}
    sys.stdout.write("\n" + json.dumps(answer) + "\n")


def _call_s(backend: Backend, threads: int, directory: Path, exact: bool) -> float:
    """0 where the shoal has to make files for it first: the agent measures it then."""
    try:
        return measure_call(backend, threads, directory, exact=exact)
    except FilesMissing:
        return 0.0


def measure_memory_read(threads: int) -> float:
    """Bytes per second that ``threads`` threads read together from main memory, at best."""
    items = _buffer_items()
    parts = np.array_split(np.ones(items, np.int64), threads)
    # numpy lets go of the interpreter lock while it reduces.
    return items * 8 / _best_s(threads, np.bitwise_or.reduce, parts)


def measure_memory_copy(threads: int) -> float:
    """Bytes per second, read plus written, of ``threads`` threads copying in main memory."""
    items = _buffer_items() // 2
    sources = np.array_split(np.ones(items, np.int64), threads)
    targets = np.array_split(np.zeros(items, np.int64), threads)
    return 2 * items * 8 / _best_s(threads, np.copyto, targets, sources)


def measure_disk_write(directory: Path) -> float:
    """Bytes per second of a short file in ``directory``, written through to the disk.

    Raises OSError where it cannot be written.
    """
    return measure_disk(directory)[0]


def measure_disk(directory: Path) -> tuple[float, float | None]:
    """(written, read) bytes per second of a short file in ``directory``, past the page cache.

    Read is None where the file system cannot be read past it. Raises OSError where the file
    cannot be written.
    """
    chunk = np.random.default_rng(0).bytes(_WRITE_CHUNK_BYTES)
    written = 0
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".write-test-", buffering=0) as file:
        started_s = time.perf_counter()
        elapsed_s = 0.0
        while written < _WRITE_LIMIT_BYTES and elapsed_s < _WRITE_TIME_S:
            file.write(chunk)
            os.fsync(file.fileno())
            written += len(chunk)
            elapsed_s = time.perf_counter() - started_s
        return written / elapsed_s, _disk_read(Path(file.name))


def _disk_read(path: Path) -> float | None:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return None
    try:
        # Direct reads need memory that starts at a page.
        with mmap.mmap(-1, _WRITE_CHUNK_BYTES) as buffer:
            started_s = time.perf_counter()
            size = 0
            while count := os.readv(handle, [buffer]):
                size += count
            return size / (time.perf_counter() - started_s)
    except OSError:
        return None
    finally:
        os.close(handle)


def _buffer_items() -> int:
    """Eight-byte items that the memory measurements go over."""
    available_bytes, _ = memory_bytes()
    return max(min(_READ_BUFFER_BYTES, available_bytes // 8) // 8, 1 << 16)


def _best_s(threads: int, work: Callable[..., object], *parts: Sequence[Any]) -> float:
    """Least seconds in which ``threads`` threads do ``work`` on all parts, of several tries."""
    best_s = math.inf
    with ThreadPoolExecutor(threads) as pool:
        started_s = time.perf_counter()
        while time.perf_counter() - started_s < _READ_TIME_S:
            before_s = time.perf_counter()
            list(pool.map(work, *parts))
            best_s = min(best_s, time.perf_counter() - before_s)
    return best_s


def _storage_bytes(cache_dir: Path) -> int:
    """Free on the cache's disk, and what the cache holds already."""
    held = sum(path.stat().st_size for path in cache_dir.rglob("*") if path.is_file())
    return shutil.disk_usage(cache_dir).free + held
