"""Keeps the tokens of answers in flight on disk, so that an answer that was cut off can go on.

A client that asks again with the id of its request gets the tokens that it may have had, and then
the rest. The coordinator may have been killed in between. Without the tokens, a long answer could
become another one: its rows would be computed in other chunks, and their last bits differ.

Each answer has a small file from its first token to its end. It is written but not synced, because
a killed process loses nothing that it has written. A file has tokens of an answer and no prompt.
"""

from __future__ import annotations

import array
import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from coordinator.errors import CoordinatorError
from wire.rare_log import RareLog

log = logging.getLogger(__name__)

KEPT_S = 600.0
"""A client asks again within this time, or never."""

MOST_KEPT = 256
"""The answers that were cut off and are kept."""

MOST_BYTES = 4 << 20
"""A larger file is none of ours."""

KEY_BYTES = 16


class Entry:
    """The tokens of one answer."""

    def __init__(self, path: Path | None, tokens: Sequence[int], rare_log: RareLog) -> None:
        """``tokens`` are those of before. Without a path nothing is written."""
        self.tokens = tuple(tokens)
        self._path = path
        self._rare_log = rare_log
        self._file: int | None = None

    def add(self, tokens: Sequence[int]) -> None:
        """Write the next tokens, before the client gets them."""
        if self._path is None or not tokens:
            return
        try:
            if self._file is None:
                flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
                self._file = os.open(self._path, flags, 0o600)
                tokens = (*self.tokens, *tokens)
            os.write(self._file, array.array("q", tokens).tobytes())
        except OSError as error:
            self._rare_log.warning("journal", "answers cannot be kept: %s", error)
            self.close(keeps=False)
            self._path = None

    def withdraw(self) -> None:
        """Forget the tokens, because they are wrong."""
        self.tokens = ()
        self.close(keeps=False)

    def close(self, *, keeps: bool) -> None:
        """End the file, and remove it unless it ``keeps``."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if self._path is not None and not keeps:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)


class AnswerJournal:
    """The answers in a directory. Without one, nothing is kept."""

    def __init__(self, directory: Path | None = None) -> None:
        """Earlier coordinators may have left answers in the directory."""
        self._directory = directory
        self._open: set[str] = set()
        self._rare_log = RareLog(log)

    @contextlib.contextmanager
    def entry(self, *parts: object) -> Iterator[Entry]:
        """Keep an answer that these ``parts`` determine while the context is open.

        An answer that ends by a CoordinatorError is kept for KEPT_S. A second answer of the same
        parts at the same time is not kept.
        """
        key = hashlib.sha256(repr(parts).encode()).hexdigest()[: 2 * KEY_BYTES]
        if self._directory is None or key in self._open:
            yield Entry(None, (), self._rare_log)
            return
        path, keeps = self._directory / key, False
        self._open.add(key)
        self._sweep(self._directory)
        entry = Entry(path, _read(path), self._rare_log)
        try:
            yield entry
        except CoordinatorError:
            keeps = True
            raise
        finally:
            self._open.discard(key)
            entry.close(keeps=keeps)

    def _sweep(self, directory: Path) -> None:
        """Remove old files, and the oldest ones if there are many. Make the directory."""
        with contextlib.suppress(OSError):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            closed = [path for path in directory.iterdir() if path.name not in self._open]
            found = sorted((path.stat().st_mtime, path) for path in closed)
            for index, (time_s, path) in enumerate(found):
                if time.time() - time_s > KEPT_S or len(found) - index > MOST_KEPT:
                    path.unlink()


def _read(path: Path) -> tuple[int, ...]:
    """Return the tokens in a file, or none."""
    try:
        if path.stat().st_size > MOST_BYTES:
            return ()
        data = path.read_bytes()
    except OSError:
        return ()
    tokens = array.array("q")
    tokens.frombytes(data[: len(data) // 8 * 8])  # The last one may be half written.
    return tuple(tokens)
