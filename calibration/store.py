"""Measurements kept on disk, under everything that they depend on."""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

VERSION = 1

log = logging.getLogger(__name__)


class CalibrationStore:
    """A JSON file of measurements; safe for several processes at once.

    A key is a mapping of plain values naming all that the measurement depends on; equal keys in
    any order are one. A file that is damaged or of another version counts as empty, with a warning,
    and the next ``put`` replaces it. The disk being full or read-only costs a warning, not the
    measurement.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def get(self, key: Mapping[str, Any]) -> tuple[float, ...] | None:
        """The values stored under ``key``, or None."""
        return self._read().get(_canonical(key))

    def put(self, key: Mapping[str, Any], values: tuple[float, ...]) -> None:
        """Store ``values`` under ``key``, in place of what was there."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked():
                entries = self._read()
                entries[_canonical(key)] = values
                self._write(entries)
        except OSError as error:
            log.warning("calibration cannot be kept in %s: %s", self.path, error)

    def _read(self) -> dict[str, tuple[float, ...]]:
        try:
            content = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError) as error:
            log.warning("calibration in %s cannot be read, measuring anew: %s", self.path, error)
            return {}
        try:
            return _parse(json.loads(content))
        except (ValueError, RecursionError) as error:
            log.warning("calibration in %s is damaged, measuring anew: %s", self.path, error)
            return {}

    def _write(self, entries: Mapping[str, tuple[float, ...]]) -> None:
        content = json.dumps({"version": VERSION, "entries": entries}, indent=1, sort_keys=True)
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        temporary = Path(name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    @contextmanager
    def _locked(self) -> Iterator[None]:
        # A file of its own: the data file is replaced, and with it what a lock on it would hold.
        with self.path.with_name(self.path.name + ".lock").open("w", encoding="ascii") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _canonical(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True, separators=(",", ":"))


def _parse(content: Any) -> dict[str, tuple[float, ...]]:
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise ValueError(f"not a calibration file of version {VERSION}")
    entries = content.get("entries")
    if not isinstance(entries, dict):
        raise ValueError("no entries")
    for key, values in entries.items():
        if not isinstance(values, list) or not all(
            type(value) is float and math.isfinite(value) for value in values
        ):
            raise ValueError(f"entry {key[:60]} is not a list of finite numbers")
    return {key: tuple(values) for key, values in entries.items()}
