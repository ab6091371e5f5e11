"""Measures this device's abilities, within the limits of its user and its container."""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from backends.base import (
    Backend,
    BackendError,
    BackendUnavailable,
    FilesMissing,
    HardwareAbsent,
)
from backends.registry import backend_class, makers, require_known
from calibration.disturbance import LoadMeter, Patience, spread_of, steady
from calibration.layers import Bench
from calibration.machine import (
    hardware_id,
    kernel_id,
    processor_name,
    usable_cores,
    usable_threads,
)
from calibration.probe_key import probe_key
from calibration.store import CalibrationStore
from model.memory import memory_bytes
from wire.conditions import Conditions
from wire.profile import DeviceProfile

Key = dict[str, Any]

_Figure = tuple[float, Conditions | None]
"""A figure, and the conditions of its measurement."""

MIN_HEADROOM_BYTES = 64 << 20
HEADROOM_SHARE = 0.1
"""The share of memory that stays free for the system and for this process."""

START_PATIENCE_S = 0.5
"""An agent that starts does not wait for a quiet moment. It measures again in one."""

CANCEL_S = 0.1
"""How soon a cancelled measurement in another process ends."""

_READ_BUFFER_BYTES = 128 << 20
_READ_TIME_S = 0.25
_WRITE_CHUNK_BYTES = 1 << 20
_WRITE_LIMIT_BYTES = 32 << 20
_WRITE_TIME_S = 0.25

_CHILD = """
import gc, json, os, sys
gc.disable()
settings = json.load(sys.stdin)
sys.path[:] = settings.pop("path")
from calibration.device import answer_parent
answer_parent(settings)
sys.stdout.flush()
os._exit(0)
"""
"""The child finds modules where its parent does, and never in its working directory. It lives for
its answer alone: it collects no garbage, and does not take its modules apart."""


def profile_device(
    *,
    backend: str,
    cache_dir: Path,
    memory_limit_bytes: int | None = None,
    storage_limit_bytes: int | None = None,
    threads: int | None = None,
    watts: float | None = None,
    exact: bool = False,
    patience_s: float = START_PATIENCE_S,
    known: Path | None = None,
    scratch: Path | None = None,
) -> DeviceProfile:
    """Measure this device for stages run by ``backend``. It takes about a second.

    cache_dir: the directory for blocks, which is created.
    memory_limit_bytes, storage_limit_bytes: cap the free amounts, and cannot add to them.
    threads: None for ``usable_threads``.
    watts: declared by the user.
    exact: whether stages are exact.
    patience_s: the most time for repeats of disturbed measurements. They never take longer than the
        first tries did.
    known: the file of a CalibrationStore, whose figures are used as by ``known_or_measured``. The
        disk is always measured.
    scratch: a directory on the same disk for what is written meanwhile. None for ``cache_dir``.

    Raises BackendUnavailable if the backend does not run here, BackendError if it cannot be exact
    or the cache directory cannot be written.
    """
    kind = backend_class(backend)
    facts = _facts(kind, exact=exact)
    threads = threads or usable_threads()
    # The backend comes first, so that a GPU that shares the memory has already taken its part.
    memory = _usable_memory(kind)
    storage_bytes, disk = _measured_disk(cache_dir, scratch or cache_dir)
    bench = Bench(kind(), threads, scratch or cache_dir, exact=exact)
    bench.patience = Patience(limit_s=patience_s)
    figures = {"disk": disk, **_memory_and_call(bench, kind, known, exact=exact)}
    limits = memory_limit_bytes, storage_limit_bytes
    return _assembled(facts, threads, memory, storage_bytes, figures, limits, watts)


def _facts(kind: type[Backend], *, exact: bool) -> dict[str, Any]:
    """Return those fields of a DeviceProfile that come from probing. Raises BackendError."""
    capabilities = kind.probe()
    containers = capabilities.containers(exact=exact)
    if not containers:
        raise BackendError(
            f"{capabilities.backend} always rounds activations: start it without --exact"
        )
    return {
        "backend": capabilities.backend,
        "backend_version": capabilities.version,
        "container_bits": tuple(sorted(containers.items())),
        "on_chip_bytes": capabilities.on_chip_bytes,
        "makes": tuple(sorted(makers().items())),
        "arithmetic": capabilities.arithmetic,
        "shares": capabilities.shares,
    }


def _assembled(
    facts: Mapping[str, Any],
    threads: int,
    memory: tuple[int, int],
    storage_bytes: int,
    figures: Mapping[str, _Figure],
    limits_bytes: tuple[int | None, int | None],
    watts: float | None,
) -> DeviceProfile:
    """Put a profile together. ``limits_bytes`` are those of memory and of storage."""
    usable_bytes, total_bytes = memory
    memory_limit_bytes, storage_limit_bytes = limits_bytes
    conditions = ((name, figures[name][1]) for name in ("memory", "disk", "call"))
    return DeviceProfile(
        machine=platform.machine(),
        processor=processor_name(),
        cores=usable_cores(),
        threads=threads,
        memory_bytes=min(usable_bytes, memory_limit_bytes or usable_bytes),
        memory_total_bytes=total_bytes,
        storage_bytes=min(storage_bytes, storage_limit_bytes or storage_bytes),
        memory_read_bytes_per_s=figures["memory"][0],
        disk_write_bytes_per_s=figures["disk"][0],
        call_s=figures["call"][0],
        watts=watts,
        conditions=tuple((name, of) for name, of in conditions if of is not None),
        kernel_id=kernel_id(),
        **facts,
    )


def _usable_memory(kind: type[Backend] | None = None) -> tuple[int, int]:
    """Return (bytes that stages may take, all bytes) of the memory that holds their weights.

    kind: None for a backend whose stages are in the machine's memory.
    """
    available_bytes, total_bytes = (kind and kind.memory_bytes()) or memory_bytes()
    headroom_bytes = max(MIN_HEADROOM_BYTES, int(available_bytes * HEADROOM_SHARE))
    return max(available_bytes - headroom_bytes, 0), total_bytes


def _memory_and_call(
    bench: Bench, kind: type[Backend], known: Path | None, *, exact: bool
) -> dict[str, _Figure]:
    """Return the rate of memory and the overhead of a call with their conditions, by name."""
    capabilities, store = kind.probe(), None if known is None else CalibrationStore(known)
    keys = figure_keys(
        backend=capabilities.backend,
        version=capabilities.version,
        threads=bench.threads,
        exact=exact,
    )
    rate = partial(_memory_rate, kind, bench.threads)
    measure: dict[str, Callable[[], _Figure]] = {
        "memory": lambda: steady(rate, bench.patience, _slowness),
        "call": lambda: _call_s(bench),
    }
    return {name: known_or_measured(store, keys[name], measure[name]) for name in measure}


def _measured_disk(cache_dir: Path, scratch: Path) -> tuple[int, _Figure]:
    """Make the directory. Return its free bytes, and the rate of writing with its conditions.

    Raises BackendError if it cannot be written.
    """
    with _usable(cache_dir):
        storage_bytes = _storage_bytes(cache_dir)
        meter = LoadMeter(kernel=False)
        return storage_bytes, (measure_disk(scratch)[0], meter.conditions())


@contextmanager
def _usable(cache_dir: Path) -> Iterator[None]:
    """Make the directory. Raises BackendError if it, or work in it meanwhile, meets an OSError."""
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise BackendError(f"cache directory {cache_dir} is not usable: {error}") from error


@contextmanager
def _scratch(cache_dir: Path) -> Iterator[Path]:
    """Yield a directory in ``cache_dir`` that is gone at the end. Raises BackendError."""
    with _usable(cache_dir):
        scratch = tempfile.TemporaryDirectory(dir=cache_dir, prefix=".calibration-")
    with scratch as name:
        yield Path(name)


def kept_profile(
    profile: DeviceProfile, store: CalibrationStore, *, exact: bool, measured: bool = True
) -> DeviceProfile:
    """Return ``profile`` with the less disturbed figures of ``store``, and keep the better ones.

    With ``measured`` False, ``profile`` has nothing new and takes the stored figures. Figures are
    stored under the hardware, as block times are.
    """
    figures = {
        "memory": profile.memory_read_bytes_per_s,
        "disk": profile.disk_write_bytes_per_s,
        "call": profile.call_s,
        "relay": profile.relay_s,
        "sum": profile.sum_s,
    }
    keys = figure_keys(
        backend=profile.backend,
        version=profile.backend_version,
        threads=profile.threads,
        exact=exact,
    )
    changes: dict[str, float] = {}
    conditions = dict(profile.conditions)
    for figure, value in figures.items():
        key = keys[figure]
        if not measured:
            values, found = store.found(key)
        elif figure in conditions:
            values, found = store.keep(key, (value,), conditions[figure])
        else:
            continue
        if values is not None and found is not None and len(values) == 1:
            changes[figure], conditions[figure] = values[0], found
    return replace(
        profile,
        conditions=tuple(conditions.items()),
        memory_read_bytes_per_s=changes.get("memory", profile.memory_read_bytes_per_s),
        disk_write_bytes_per_s=changes.get("disk", profile.disk_write_bytes_per_s),
        call_s=changes.get("call", profile.call_s),
        relay_s=changes.get("relay", profile.relay_s),
        sum_s=changes.get("sum", profile.sum_s),
    )


def known_or_measured(
    store: CalibrationStore | None,
    key: Mapping[str, Any],
    measure: Callable[[], _Figure],
) -> _Figure:
    """Return a figure and its conditions from ``store``, else measure and keep the better one.

    A stored figure counts if it was measured since this machine started, because the hardware has
    hardly changed since then. An agent measures a disturbed figure again in a quiet moment. Agents
    that share the store take turns, so that one of them measures for all. Without a store
    everything is measured.
    """
    if store is None:
        return measure()
    with store.turn():
        known = _known(store, key)
        if known is not None:
            return known
        value, conditions = measure()
        if conditions is not None:
            (value,), conditions = store.keep(key, (value,), conditions)
        return value, conditions


def _known(store: CalibrationStore, key: Mapping[str, Any]) -> _Figure | None:
    """Return a figure that was measured since this machine started, or None."""
    values, found = store.found(key)
    if (
        values is not None
        and len(values) == 1
        and found is not None
        and psutil.boot_time() <= found.measured_s <= time.time()
    ):
        return values[0], found
    return None


def figure_keys(*, backend: str, version: str, threads: int, exact: bool) -> dict[str, Key]:
    """Return the keys in a CalibrationStore of the device's own figures, by their names."""
    keys: dict[str, Key] = {
        "memory": {"backend": backend, "threads": threads},  # An accelerator has its own memory.
        "disk": {},
        "call": {"backend": backend, "version": version, "threads": threads, "exact": exact},
        "relay": {},
        "sum": {},
    }
    own = {"hardware": hardware_id(), "kind": "device", "figures": 2}  # 1: nothing was encrypted.
    return {figure: {**own, "figure": figure, **key} for figure, key in keys.items()}


def profile_at_start(
    *,
    backend: str,
    cache_dir: Path,
    known: Path,
    memory_limit_bytes: int | None = None,
    storage_limit_bytes: int | None = None,
    threads: int | None = None,
    watts: float | None = None,
    exact: bool = False,
) -> DeviceProfile:
    """Return ``profile_in_child``, without a child if ``known`` has all but the disk's figure.

    A child has then probed the same libraries since this machine started. It takes most of an
    agent's start, because it imports them.
    """
    store = CalibrationStore(known)
    key = probe_key(backend)
    threads = threads or usable_threads()
    kept = store.probe(_probe_name(backend, exact=exact), key) if key else None
    facts = None if kept is None else _read_facts(backend, kept)
    if facts is not None:
        keys = figure_keys(
            backend=backend, version=facts["backend_version"], threads=threads, exact=exact
        )
        found = {name: _known(store, keys[name]) for name in ("memory", "call")}
        figures = {name: figure for name, figure in found.items() if figure is not None}
        if len(figures) == len(found):
            memory = _usable_memory()
            storage_bytes, figures["disk"] = _measured_disk(cache_dir, cache_dir)
            limits = memory_limit_bytes, storage_limit_bytes
            return _assembled(facts, threads, memory, storage_bytes, figures, limits, watts)
    profile = profile_in_child(
        backend=backend,
        cache_dir=cache_dir,
        known=known,
        memory_limit_bytes=memory_limit_bytes,
        storage_limit_bytes=storage_limit_bytes,
        threads=threads,
        watts=watts,
        exact=exact,
    )
    if key and facts is None:
        facts = {name: getattr(profile, name) for name in _FACTS}
        store.keep_probe(_probe_name(backend, exact=exact), key, facts)
    return profile


_FACTS = ("backend", "backend_version", "container_bits", "makes", "arithmetic", "shares")
"""The fields of a profile that ``profile_at_start`` keeps. Others of ``_facts`` need hardware."""


def _probe_name(backend: str, *, exact: bool) -> str:
    return f"{backend}, exact" if exact else backend


def _read_facts(backend: str, kept: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the kept fields as a profile has them, or None if they are damaged."""
    try:
        facts = {
            "backend": backend,
            "backend_version": str(kept["backend_version"]),
            "container_bits": tuple((int(a), int(b)) for a, b in kept["container_bits"]),
            "makes": tuple((str(a), str(b)) for a, b in kept["makes"]),
            "arithmetic": str(kept["arithmetic"]),
            "shares": kept["shares"],
        }
    except (KeyError, TypeError, ValueError):
        return None
    return facts if facts["container_bits"] and type(facts["shares"]) is bool else None


def profile_in_child(
    *,
    backend: str,
    cache_dir: Path,
    known: Path | None = None,
    check: Callable[[], None] | None = None,
    **settings: float | None,
) -> DeviceProfile:
    """Run ``profile_device`` in a child process, so that this one imports no backend.

    ``settings`` are its other arguments. ``check`` is called each CANCEL_S, and may raise to end
    the measurement. Then the child is killed, and what it has written is removed. A library may
    crash at its import, if it was built for newer processors. That is a BackendUnavailable.
    """
    require_known(backend)
    everything = {
        "path": sys.path,
        "backend": backend,
        "cache_dir": str(cache_dir),
        "known": "" if known is None else str(known),
        **settings,
    }
    with _scratch(cache_dir) as scratch:
        out, err, code = _answer_of_child({**everything, "scratch": str(scratch)}, check)
    try:
        answer = json.loads(out.splitlines()[-1])
    except (ValueError, IndexError) as error:
        if code == -signal.SIGKILL:
            raise BackendError(
                f"the probe of {backend} was killed, maybe for lack of memory"
            ) from error
        how = (err.strip().splitlines() or [f"exit code {code}"])[-1]
        raise BackendUnavailable(backend, f"it crashes on this machine ({how})") from error
    if "absent" in answer:
        raise HardwareAbsent(backend, answer["absent"])
    if "unavailable" in answer:
        raise BackendUnavailable(backend, answer["unavailable"])
    if "error" in answer:
        raise BackendError(answer["error"])
    for name in ("container_bits", "makes"):
        answer[name] = tuple(map(tuple, answer[name]))
    answer["conditions"] = tuple((name, Conditions(**of)) for name, of in answer["conditions"])
    return DeviceProfile(**answer)


def _answer_of_child(
    settings: Mapping[str, Any], check: Callable[[], None] | None
) -> tuple[str, str, int]:
    """Return what the child writes to stdout and to stderr, and its exit code."""
    with subprocess.Popen(  # noqa: S603 - this interpreter, with our own settings
        [sys.executable, "-I", "-c", _CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        try:
            out, err = _communicate(child, json.dumps(settings), check)
        except BaseException:  # Cancelled or interrupted: the child must not outlive it.
            child.kill()
            raise
    return out, err, child.returncode


def _communicate(
    child: subprocess.Popen[str], said: str, check: Callable[[], None] | None
) -> tuple[str, str]:
    """Return the child's stdout and stderr, unless ``check`` raises first."""
    remaining: str | None = said
    while True:
        try:
            return child.communicate(remaining, timeout=None if check is None else CANCEL_S)
        except subprocess.TimeoutExpired:
            remaining = None  # The call continues with the text that it has begun to write.
            if check is not None:
                check()


def answer_parent(settings: dict[str, Any]) -> None:
    """Run the child's side of ``profile_in_child``, and write the answer to stdout as JSON."""
    answer: dict[str, Any]
    try:
        names = ("cache_dir", "known", "scratch")
        paths = {name: Path(settings[name]) for name in names if settings[name]}
        profile = profile_device(**{**settings, "known": None, **paths})
        answer = dataclasses.asdict(profile)
    except BackendUnavailable as error:
        kind = "absent" if isinstance(error, HardwareAbsent) else "unavailable"
        answer = {kind: error.reason}
    except BackendError as error:
        answer = {"error": str(error)}
    sys.stdout.write("\n" + json.dumps(answer) + "\n")


def _call_s(bench: Bench) -> _Figure:
    """Measure the call overhead. 0 if that takes files from others; the agent measures it later."""
    try:
        return bench.cold_call_s, bench.call_conditions
    except FilesMissing:
        return 0.0, None


def _memory_rate(kind: type[Backend], threads: int) -> tuple[float, float]:
    """Return ``memory_read_rate`` of the memory that holds the backend's stages."""
    rate = kind.memory_read_bytes_per_s()
    return memory_read_rate(threads) if rate is None else (rate, 0.0)


def memory_read_rate(threads: int) -> tuple[float, float]:
    """Return bytes per second that threads read together from main memory, and the spread."""
    items = _buffer_items()
    parts = np.array_split(np.ones(items, np.int64), threads)
    # numpy releases the interpreter lock while it reduces.
    best_s, spread = _best_s(threads, np.bitwise_or.reduce, parts)
    return items * 8 / best_s, spread


def memory_copy_rate(threads: int) -> tuple[float, float]:
    """Return bytes per second, read plus written, of threads that copy, and the spread."""
    items = _buffer_items() // 2
    sources = np.array_split(np.ones(items, np.int64), threads)
    targets = np.array_split(np.zeros(items, np.int64), threads)
    best_s, spread = _best_s(threads, np.copyto, targets, sources)
    return 2 * items * 8 / best_s, spread


def _slowness(rate: float) -> float:
    return 1 / rate


def measure_disk(directory: Path) -> tuple[float, float | None]:
    """Return (written, read) bytes per second of a short file, past the page cache.

    Read is None if the file system cannot bypass the cache. Raises OSError if the file cannot be
    written.
    """
    chunk = os.urandom(_WRITE_CHUNK_BYTES)
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
    """Return the number of eight-byte items that the memory measurements cover."""
    available_bytes, _ = memory_bytes()
    return max(min(_READ_BUFFER_BYTES, available_bytes // 8) // 8, 1 << 16)


def _best_s(
    threads: int, work: Callable[..., object], *parts: Sequence[Any]
) -> tuple[float, float]:
    """Return the least seconds of several tries, and their spread.

    In each try, ``threads`` threads do ``work`` on all parts.
    """
    times_s: list[float] = []
    with ThreadPoolExecutor(threads) as pool:
        started_s = time.perf_counter()
        while time.perf_counter() - started_s < _READ_TIME_S:
            before_s = time.perf_counter()
            list(pool.map(work, *parts))
            times_s.append(time.perf_counter() - before_s)
    return min(times_s), spread_of(times_s[1:])


def _storage_bytes(cache_dir: Path) -> int:
    """Return the free bytes on the cache's disk, plus the bytes of the cache."""
    held = 0
    for folder, _, names in os.walk(cache_dir):
        for name in names:
            with suppress(FileNotFoundError):  # Other measurements remove their files meanwhile.
                held += Path(folder, name).stat().st_size
    return shutil.disk_usage(cache_dir).free + held
