"""Results in a file of JSON lines, each written as soon as it is there.

The first line says which command wrote it, and what was evaluated. A later run with the same first
line goes on where the file ends; one with another first line is refused.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from evaluation.errors import EvaluationError

FORMAT = 1
MAX_LINE_BYTES = 4 << 20

_KEYS = ("run", "kind", "item")


class Kept:
    """Results by run, kind and item: in memory, and in a file if one is given."""

    def __init__(
        self, path: Path | None, settings: Mapping[str, Any], command: str = "eval"
    ) -> None:
        """Read what ``path`` has for the same settings.

        settings: plain values of JSON that results depend on.
        command: the command of shoal that the results are of.

        Raises EvaluationError for a file of other settings, a foreign one or one in use, and
        OSError. A last line that was cut off is dropped.
        """
        self._command = command
        self._found: dict[tuple[str, str, int], dict[str, Any]] = {}
        self._file: BinaryIO | None = None
        if path is None:
            return
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read(self._file, path, {self._mark: FORMAT, **settings})
        except BlockingIOError as error:
            self._file.close()
            raise EvaluationError(f"{path}: another `shoal {command}` writes to it") from error
        except BaseException:  # Whatever it is, the lock does not outlive it.
            self._file.close()
            raise

    def __enter__(self) -> Kept:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    def get(self, run: str, kind: str, item: int) -> dict[str, Any] | None:
        """Return the values of a result, or None if it is not there yet."""
        return self._found.get((run, kind, item))

    def put(self, run: str, kind: str, item: int, values: Mapping[str, Any]) -> None:
        """Keep a result, and hand it to the system at once. Raises OSError."""
        self._found[run, kind, item] = dict(values)
        if self._file is not None:
            line = {"run": run, "kind": kind, "item": item, **values}
            self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            self._file.flush()

    def __len__(self) -> int:
        return len(self._found)

    def _read(self, file: BinaryIO, path: Path, head: Mapping[str, Any]) -> None:
        file.seek(0)
        end = 0
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), start=1):
            if not line.endswith(b"\n"):
                begin = f'{{"{self._mark}"'.encode()
                if number == 1 and begin[: len(line)] != line[: len(begin)]:
                    raise EvaluationError(f"{path}: {self._foreign('file')}")
                break  # The program ended while it wrote this line.
            values = _object(line)
            if number == 1:
                self._compare(path, head, values)
            else:
                self._take(f"{path}:{number}", values)
            end = file.tell()
        file.truncate(end)
        if end == 0:
            file.write(json.dumps(head).encode() + b"\n")
            file.flush()

    def _take(self, where: str, values: dict[str, Any] | None) -> None:
        run, kind, item = (None if values is None else values.get(key) for key in _KEYS)
        if values is None or not (isinstance(run, str) and isinstance(kind, str)):
            raise EvaluationError(f"{where}: {self._foreign('result')}")
        if type(item) is not int:
            raise EvaluationError(f"{where}: {self._foreign('result')}")
        rest = {key: value for key, value in values.items() if key not in _KEYS}
        self._found[run, kind, item] = rest

    def _compare(
        self, path: Path, head: Mapping[str, Any], found: Mapping[str, Any] | None
    ) -> None:
        if found is None or self._mark not in found:
            raise EvaluationError(f"{path}: {self._foreign('file')}")
        for key in (*head, *found):
            if head.get(key) != found.get(key):
                raise EvaluationError(
                    f"{path}: has results of another {key} ({found.get(key)!r:.60}):"
                    " name another --out, or remove the file"
                )

    @property
    def _mark(self) -> str:
        """The first key of the file."""
        return f"shoal_{self._command.replace(' ', '_')}"

    def _foreign(self, what: str) -> str:
        return f"not a {what} of `shoal {self._command}`: name another --out"


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None
