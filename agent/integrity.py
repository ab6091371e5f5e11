"""Checks that the files of a stage still hold what was written: storage rots, cards lie.

A load hashes up to CHECK_FIRST_BYTES before it answers. A thread behind it hashes the rest, at a
low priority. Files that came over the network in the same load were hashed on arrival.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from agent.blocks import CacheError
from backends.base import BackendError, Stage
from model.errors import ModelError

log = logging.getLogger(__name__)

CHECK_FIRST_BYTES = 8 << 20
"""8 MiB take a twentieth of a second on a processor that hashes 150 MB/s."""

NICENESS = 10
"""With this niceness the thread gets a tenth of a core while the stage wants all of them."""

_READ_BYTES = 1 << 20


class Contents:
    """The files of one load, each with the SHA-256 that it must have."""

    def __init__(self, *, check_all_first: bool = False) -> None:
        """With ``check_all_first``, the load waits until everything is hashed."""
        self._check_all_first = check_all_first
        self._expected: dict[Path, str] = {}
        self._hashed: set[Path] = set()
        self.damaged_files = 0
        """The number of files that were removed in this load because they were damaged."""

    def expect(self, files: Mapping[Path, str]) -> None:
        """Add files to check."""
        self._expected.update(files)

    def trust(self, paths: Iterable[Path]) -> None:
        """Take files as checked: they were hashed while they were written or read."""
        self._hashed.update(paths)

    @property
    def hashed(self) -> frozenset[Path]:
        """The files of this load that were hashed and found whole."""
        return frozenset(self._hashed)

    @property
    def is_checked_later(self) -> bool:
        """Whether the remaining files are too large to be hashed before the stage answers."""
        rest_bytes = sum(path.stat().st_size for path in self._unchecked() if path.is_file())
        return rest_bytes > CHECK_FIRST_BYTES and not self._check_all_first

    def find_damaged(self, stopped: Callable[[], bool] = lambda: False) -> Iterator[Path]:
        """Hash each unchecked file, and yield the damaged ones. ``stopped`` ends it early.

        A missing file counts as evicted, not as damaged.
        """
        for path in self._unchecked():
            sha256 = _hash(path, stopped)
            if stopped():
                return
            if sha256 == self._expected[path]:
                self._hashed.add(path)
            elif sha256 is not None:
                yield path

    def forget(self) -> None:
        """Forget all files, because others take their place."""
        self._expected.clear()

    def _unchecked(self) -> list[Path]:
        return [path for path in self._expected if path not in self._hashed]


def load_whole(
    contents: Contents,
    fetch: Callable[[], None],
    load: Callable[[], Stage],
    remove: Callable[[Path], None],
) -> Stage:
    """Fetch and load a stage; do it once more if its files turn out to be damaged.

    After a failed load every file is hashed, since a file may be the reason. ``remove`` removes one
    file from the cache. Raises CacheError for files that are damaged again, and the errors of
    ``fetch`` and ``load``.
    """
    removed: set[Path] = set()
    while True:
        fetch()
        try:
            stage = load()
        except (BackendError, ModelError):
            damaged = list(contents.find_damaged())
            if not damaged:
                raise
        else:
            contents.expect(stage.kept_files)
            damaged = [] if contents.is_checked_later else list(contents.find_damaged())
            if not damaged:
                return stage
            stage.close()
        again = sorted(removed & set(damaged))
        if again:
            raise CacheError(
                f"{again[0]} is damaged again right after it was written: this device's disk or "
                "memory fails; check it, or use another --state-dir"
            )
        for path in damaged:
            log.warning("%s is damaged: it is removed, and fetched or made again", path)
            remove(path)
        removed.update(damaged)
        contents.damaged_files = len(removed)
        contents.forget()


class Watch:
    """Hashes the remaining files of a load in a thread, until the first damaged one."""

    def __init__(self, contents: Contents, on_damage: Callable[[Path], None]) -> None:
        self._contents = contents
        self._on_damage = on_damage
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="integrity", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop hashing, and wait until the thread has ended."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # Not every system has priorities.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        damaged = next(self._contents.find_damaged(self._stopped.is_set), None)
        if damaged is not None:
            self._on_damage(damaged)


def _hash(path: Path, stopped: Callable[[], bool]) -> str | None:
    """Return the SHA-256 of a file, "" if it cannot be read, or None if it is gone."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while not stopped() and (piece := file.read(_READ_BYTES)):
                digest.update(piece)
    except FileNotFoundError:
        return None
    except OSError:
        return ""
    return digest.hexdigest()
