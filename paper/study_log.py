"""Keeps the results of a long study in a file, so that a stopped study can go on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from model.durable import replace_text

_BEGIN = '{"study"'


class ForeignFile(Exception):
    """A file has something else than results of a study."""


class StudyLog:
    """Results by name in a file of JSON lines, or only in memory.

    The first line describes the study. The file of another study is begun anew. A last line that an
    interruption cut off is dropped. Use it as a context manager.
    """

    def __init__(self, path: Path | None, study: Mapping[str, Any]) -> None:
        """Read what ``path`` has of this study. Raises ForeignFile for a file of no study."""
        self._results: dict[str, Any] = {}
        self._file = None
        if path is None:
            return
        kept = _read(path, study)
        self._results = kept
        heading = {"study": dict(study)}
        lines = [heading, *({"name": name, "result": value} for name, value in kept.items())]
        # Written anew, so that nothing is appended to a cut line.
        text = "".join(json.dumps(line) + "\n" for line in lines)
        replace_text(path, text, mode=0o644)
        self._file = path.open("a", encoding="utf-8")

    def __len__(self) -> int:
        return len(self._results)

    def __enter__(self) -> StudyLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    def result(self, name: str, compute: Callable[[], Any]) -> Any:
        """The result of that name as plain JSON values. It is computed unless it was kept."""
        if name not in self._results:
            value = json.loads(json.dumps(compute()))
            self._results[name] = value
            if self._file is not None:
                self._file.write(json.dumps({"name": name, "result": value}) + "\n")
                self._file.flush()
        return self._results[name]


def _read(path: Path, study: Mapping[str, Any]) -> dict[str, Any]:
    """The results of this study in a file, or {} if it is missing or of another study.

    Raises ForeignFile for a file of no study.
    """
    if not path.exists():
        return {}
    found: dict[str, Any] = {}
    text = path.read_text(encoding="utf-8", errors="replace")
    if not text.startswith(_BEGIN[: len(text)]):
        raise ForeignFile(
            f"{path}: not a file of this study: name another --out, or remove the file"
        )
    for index, line in enumerate(text.splitlines()):
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            values = None
        if index == 0 and (values is None or values["study"] != dict(study)):
            return {}
        if index and isinstance(values, dict) and {"name", "result"} <= set(values):
            found[str(values["name"])] = values["result"]
    return found
