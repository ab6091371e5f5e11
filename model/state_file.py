"""A JSON file of a state directory that commands change while a service reads it.

Commands change it under the lock of another file, one after the other. The service sees a change by
the file's stamp.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from model.durable import hand_over, locked, replace_text

LATEST_S = 2.5e11
"""The latest time in such a file: the year 9892. Tables cannot show years of five digits."""

Stamp = tuple[int, int, int]
"""Tells versions of a file apart: time of change, size, inode."""

Content = TypeVar("Content")


class Newer(Exception):
    """The file has what this version does not know. It may be a limit."""


@dataclass(frozen=True, slots=True)
class Kind(Generic[Content]):
    """A kind of file.

    name: what it is, for messages.
    nothing: the content where there is no file.
    parse: makes the content of the JSON value. Raises Newer, and for other things ValueError,
        TypeError, LookupError, AttributeError.
    dump: makes the JSON object of the content.
    fault: the exception that readers raise, with its message.
    if_newer, if_damaged: what to do about a file of a newer version, and about a damaged one.
    """

    name: str
    largest_bytes: int
    nothing: Content
    parse: Callable[[Any], Content]
    dump: Callable[[Content], Mapping[str, Any]]
    fault: Callable[[str], Exception]
    if_newer: str
    if_damaged: str


@dataclass(slots=True)
class Change(Generic[Content]):
    """The content of a file, which the holder of its lock may replace."""

    content: Content


class StateFile(Generic[Content]):
    """The file, for one thread."""

    def __init__(self, path: Path, lock: Path, kind: Kind[Content]) -> None:
        self.path = path
        self._lock = lock
        self._kind = kind
        self._stamp: Stamp | None = None

    def news(self) -> Content | None:
        """Return the content if the file has changed since it was read here last, else None.

        Raises the kind's fault. Then it has changed at the next call, too.
        """
        stamp, known = self._stamp_now(), self._stamp
        if stamp is not None and stamp == known:
            return None
        self._stamp = None
        content = self.read()
        self._stamp = stamp
        return content

    def read(self) -> Content:
        """Return the content. Raises the kind's fault."""
        kind, path = self._kind, self.path
        try:
            if path.stat().st_size > kind.largest_bytes:
                raise kind.fault(f"{path} is too large: it is not {kind.name}")
            return kind.parse(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return kind.nothing
        except OSError as error:
            raise kind.fault(f"cannot read {path}: {(error.strerror or '').lower()}") from error
        except Newer as error:
            raise kind.fault(
                f"{path} was written by a newer version of shoal: install that one, or "
                f"{kind.if_newer}"
            ) from error
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise kind.fault(f"{path} is damaged: {kind.if_damaged}") from error

    @contextlib.contextmanager
    def changing(self) -> Iterator[Change[Content]]:
        """Read the content, and write what the block has made of it. Others wait meanwhile.

        The file is for the owner of its directory, who runs the service. Raises the kind's fault,
        OSError.
        """
        with locked(self._lock):
            change = Change(before := self.read())
            yield change
            if change.content != before:
                text = json.dumps(self._kind.dump(change.content), indent=1)
                prepare = partial(hand_over, directory=self.path.parent)
                replace_text(self.path, text + "\n", prepare=prepare, lasts=True)

    def _stamp_now(self) -> Stamp | None:
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino
