"""Compiled files for the chip, kept under a key of the .tflite files they were made from.

edgetpu_compiler exists for x86-64 only. A stage's files are compiled together, because only then do
they share the chip's memory. So each stage is a compilation of its own. The results are kept in a
directory that can be copied to devices without a compiler:

    DIRECTORY/KEY-VERSION/000.tflite ...    KEY: SHA-256 over the stage's files in order

Source: the Edge TPU compiler's documentation (co-compilation, -s, on- and off-chip memory).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from backends.base import BackendError
from model.artifact import file_sha256
from model.bounded import read_json
from model.errors import CheckpointError

log = logging.getLogger(__name__)

COMPILER = "edgetpu_compiler"
DIRECTORY_VARIABLE = "SHOAL_EDGETPU_DIR"
CUSTOM_OPERATOR = b"edgetpu-custom-op"
"""The operator that the compiler maps to the chip. Others would run on the CPU unnoticed."""

COMPILE_TIMEOUT_S = 1800.0

TICK_S = 0.5

_LOG = "compiler.log"
_SUMS = "sha256.json"
"""The hash of each file when it was made. Directories copied from elsewhere may lack it."""
_OFF_CHIP = re.compile(
    r"Off-chip memory used for streaming uncached model parameters:\s*([\d.]+)\s*([KMG]?i?B)"
)
_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "KB": 1000, "MB": 10**6}


@dataclass(frozen=True, slots=True)
class Compiler:
    """An installed edgetpu_compiler."""

    path: str
    version: str


@dataclass(frozen=True, slots=True)
class Compiled:
    """A stage's files for the chip, in the order of the .tflite files.

    streamed_bytes: weights that do not fit on the chip, by the compiler's ``log``.
    """

    files: tuple[Path, ...]
    log: Path
    streamed_bytes: int

    @staticmethod
    def of(files: Sequence[Path], log: Path) -> Compiled:
        return Compiled(tuple(files), log, _streamed(_read(log)))


def default_directory() -> Path:
    """Return the directory of compiled files: SHOAL_EDGETPU_DIR, or below the user's cache."""
    base = os.environ.get(DIRECTORY_VARIABLE)
    if base:
        return Path(base)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "shoal" / "edgetpu"


def find_compiler() -> Compiler | None:
    """Return the compiler on PATH, or None. Raises BackendError if it does not run."""
    path = shutil.which(COMPILER)
    if path is None:
        return None
    found = re.search(r"version\s+([\w.]+)", _run([path, "--version"]))
    if found is None:
        raise BackendError(f"{path} does not say its version: is it Google's {COMPILER}?")
    return Compiler(path, found[1])


def stage_key(files: Sequence[Path]) -> str:
    """Return the key of a stage's files, in this order."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file_sha256(file).encode())
    return digest.hexdigest()


def find_compiled(directory: Path, files: Sequence[Path], version: str | None) -> Compiled | None:
    """Find the compiled ``files`` of this version, or of the latest one if it is None."""
    key = stage_key(files)
    for path in sorted(directory.glob(f"{key}-{version or '*'}"), reverse=True):
        compiled = [path / f"{index:03}.tflite" for index in range(len(files))]
        if all(file.is_file() for file in compiled) and _is_whole(path, compiled):
            return Compiled.of(compiled, path / _LOG)
    return None


def compile_files(
    compiler: Compiler,
    files: Sequence[Path],
    directory: Path,
    tick: Callable[[], None] = lambda: None,
) -> Compiled:
    """Compile a stage's files together, or find an earlier compilation.

    ``tick`` is called each TICK_S, and may raise to end the compiler. Raises BackendError if the
    compiler refuses a file or maps none of its operators, or if the directory cannot be written.
    """
    found = find_compiled(directory, files, compiler.version)
    if found is not None:
        return found
    target = directory / f"{stage_key(files)}-{compiler.version}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".compiling-") as name:
            work = Path(name)
            made = _compile(compiler, files, work, tick)
            finished = work / "finished"
            finished.mkdir()
            for index, path in enumerate(made):
                path.rename(finished / f"{index:03}.tflite")
            (work / _LOG).rename(finished / _LOG)
            sums = {path.name: file_sha256(path) for path in finished.glob("*.tflite")}
            (finished / _SUMS).write_text(json.dumps(sums), encoding="ascii")
            if not target.exists():
                finished.rename(target)
    except OSError as error:
        raise BackendError(f"{directory}: {(error.strerror or str(error)).lower()}") from error
    found = find_compiled(directory, files, compiler.version)
    if found is None:
        raise BackendError(f"{target} is incomplete: remove it and try again")
    return found


def _is_whole(directory: Path, files: Sequence[Path]) -> bool:
    """Whether compiled files are undamaged. A damaged compilation is removed as a whole."""
    try:
        sums = read_json(directory / _SUMS)
        if all(file_sha256(file) == sums[file.name] for file in files):
            return True
    except FileNotFoundError:
        return True
    except (OSError, ValueError, KeyError, TypeError, CheckpointError):
        pass  # Unreadable files count as damaged.
    log.warning("%s is damaged: it is removed, and compiled again", directory)
    shutil.rmtree(directory, ignore_errors=True)
    return False


def _compile(
    compiler: Compiler, files: Sequence[Path], work: Path, tick: Callable[[], None]
) -> list[Path]:
    """Return the compiled files in ``work``. The compiler's output goes to its log."""
    inputs = []
    for index, file in enumerate(files):
        link = work / f"{index:03}.tflite"
        link.symlink_to(file)
        inputs.append(link)
    said = _run([compiler.path, "-s", "-o", str(work), *map(str, inputs)], tick)
    # An empty file could not be sent to other machines.
    (work / _LOG).write_text(said or "\n", encoding="utf-8")
    outputs = [work / f"{path.stem}_edgetpu.tflite" for path in inputs]
    for file, output in zip(files, outputs, strict=True):
        if not output.is_file():
            raise BackendError(f"{COMPILER} {compiler.version} wrote no output for {file}")
        if CUSTOM_OPERATOR not in output.read_bytes():
            raise BackendError(
                f"{COMPILER} {compiler.version} mapped no operator of {file} to the Edge TPU"
            )
    return outputs


def _run(command: list[str], tick: Callable[[], None] = lambda: None) -> str:
    try:
        process = subprocess.Popen(  # noqa: S603 - found on the user's PATH by its own name
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise BackendError(f"{command[0]}: {(error.strerror or str(error)).lower()}") from error
    deadline_s = time.monotonic() + COMPILE_TIMEOUT_S
    with process:
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    said, _ = process.communicate(timeout=TICK_S)
                    break
                tick()
                if time.monotonic() > deadline_s:
                    raise BackendError(f"{command[0]} did not end within {COMPILE_TIMEOUT_S:g} s")
        finally:
            if process.poll() is None:
                # The compiler may have started other processes: Google's is said to be a script.
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        lines = said.strip().splitlines() or [f"exit code {process.returncode}"]
        raise BackendError(f"{COMPILER} failed: {lines[-1][:300]}")
    return said


def _streamed(log: str) -> int:
    return int(sum(float(number) * _UNITS.get(unit, 1) for number, unit in _OFF_CHIP.findall(log)))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
