"""The points of a curve: smaller models at some bits, with what each costs and loses.

They are kept in one file, which is replaced after every step, so that a stopped run goes on.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from compression.errors import CompressionError
from model.bounded import read_json
from model.durable import replace_text

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Point:
    """One smaller model at some bits.

    size: the share of the layers' weights that was asked for. layers, kv_heads, ffn: what stayed.
    weights: those of all matrices. bytes: as stored at these bits.
    loss, kl: nats per expected token of the text kept for measuring, and the divergence from the
        original at its own bits.
    exact_match, f1: percent, or None without questions. latency_ms: of a token, predicted by a
        plan, or None.
    """

    size: float
    distilled: bool
    bits: int
    layers: int
    kv_heads: int
    ffn: int
    weights: int
    bytes: int
    loss: float
    kl: float
    exact_match: float | None = None
    f1: float | None = None
    latency_ms: float | None = None

    @property
    def name(self) -> str:
        """Say which model it is, for a table."""
        return f"{self.size:.0%}" + (", distilled" if self.distilled else "")


class Points:
    """The results of a run so far, in memory and in its file."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Read the file if it is there. Raises CompressionError if it is of other settings."""
        self._path = path
        self._values: dict[str, Any] = {"shoal_compress": FORMAT, "settings": dict(settings)}
        if path.exists():
            try:
                found = read_json(path)
            except (OSError, ValueError) as error:
                raise CompressionError(f"{path}: cannot be read: name another --out") from error
            if not isinstance(found, dict) or found.get("shoal_compress") != FORMAT:
                raise CompressionError(f"{path}: not of `shoal compress`: name another --out")
            before = found.get("settings")
            if not isinstance(before, dict):
                raise _damaged(path)
            for key, value in self._values["settings"].items():
                if before.get(key) != value:
                    raise CompressionError(
                        f"{path}: has results of another {key} ({before.get(key)!r:.60}): name "
                        "another --out, or remove it"
                    )
            self._values = found
            try:
                self.all()
            except (TypeError, KeyError) as error:
                raise _damaged(path) from error

    def get(self, key: str) -> Any:
        """Return what was kept by this name, or None."""
        return self._values.get(key)

    def put(self, key: str, value: Any) -> None:
        """Keep plain values by a name. Raises OSError."""
        self._values[key] = value
        replace_text(self._path, json.dumps(self._values) + "\n", mode=0o644)

    def point(self, size: float, bits: int, *, distilled: bool) -> Point | None:
        """Return a measured point, or None."""
        found = self.get(_key(size, bits, distilled))
        return None if found is None else Point(**found)

    def add(self, point: Point) -> None:
        """Keep a point, or replace it. Raises OSError."""
        self.put(_key(point.size, point.bits, point.distilled), asdict(point))

    def all(self) -> list[Point]:
        """Return all points, the largest first."""
        found = [Point(**one) for key, one in self._values.items() if key.startswith("point ")]
        return sorted(found, key=lambda one: (-one.size, one.distilled, -one.bits))


def _damaged(path: Path) -> CompressionError:
    return CompressionError(f"{path}: damaged: name another --out, or remove the file")


def _key(size: float, bits: int, distilled: bool) -> str:
    return f"point {size:g} {bits} {'distilled' if distilled else 'pruned'}"


def csv_text(points: Sequence[Point]) -> str:
    """Return the points as a table with a line for each."""
    text = io.StringIO()
    names = [field.name for field in fields(Point)]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for point in points:
        writer.writerow(asdict(point))
    return text.getvalue()
