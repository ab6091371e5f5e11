"""Keeps measurements on disk, under everything that they depend on.

Each has the conditions of its measurement. Any later measurement replaces one of a busy machine.
Only another quiet one replaces one of a quiet machine.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import astuple, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from model.bounded import read_json
from model.durable import hand_over, locked, replace_text
from model.errors import UnsupportedModelError
from model.spec import ModelSpec
from wire.conditions import Conditions

VERSION = 1

MAX_MODELS = 8
"""The number of remembered models. Measuring one again takes some seconds."""

Values = tuple[float, ...]
Due = Callable[[Conditions | None], bool]
"""Whether a figure that was measured under these conditions must be measured again."""

log = logging.getLogger(__name__)


def is_doubtful(conditions: Conditions | None) -> bool:
    """Whether a figure may be a busy machine's: it was, or its conditions are unknown."""
    return conditions is None or conditions.is_noisy


@dataclass(slots=True)
class _Content:
    """The contents of the file. Keys are canonical."""

    entries: dict[str, Values] = field(default_factory=dict)
    conditions: dict[str, Conditions] = field(default_factory=dict)
    models: list[dict[str, Any]] = field(default_factory=list)
    probes: dict[str, dict[str, Any]] = field(default_factory=dict)


class CalibrationStore:
    """A JSON file of measurements, safe for several processes at once.

    A key maps names to plain values, and has all that the measurement depends on. The order does
    not matter. A file that is damaged or of another version counts as empty, with a warning, and
    the next ``put`` replaces it. If the disk is full or read-only, a warning is logged and the
    measurement goes on. Files that the administrator writes go to the owner of the directory, a
    service.
    """

    def __init__(self, path: Path, due: Due = lambda conditions: False) -> None:
        """``get`` does not return figures that are ``due``, so that they are measured again."""
        self.path = path
        self._due = due

    def again(self, due: Due = lambda conditions: True) -> CalibrationStore:
        """Return a store of the same file that measures ``due`` figures again."""
        return CalibrationStore(self.path, due)

    def get(self, key: Mapping[str, Any]) -> Values | None:
        """The values stored under ``key``, or None."""
        return self.found(key)[0]

    def found(self, key: Mapping[str, Any]) -> tuple[Values | None, Conditions | None]:
        """Return the values as ``get`` does, and their conditions. None if these are unknown."""
        content, name = self._read(), _canonical(key)
        conditions = content.conditions.get(name)
        if name not in content.entries or self._due(conditions):
            return None, None
        return content.entries[name], conditions

    def put(
        self, key: Mapping[str, Any], values: Values, conditions: Conditions | None = None
    ) -> None:
        """Store ``values`` under ``key``, in place of earlier ones."""
        with self._changed() as content:
            content.entries[_canonical(key)] = values
            content.conditions.pop(_canonical(key), None)
            if conditions is not None:
                content.conditions[_canonical(key)] = conditions

    def keep(
        self, key: Mapping[str, Any], values: Values, conditions: Conditions
    ) -> tuple[Values, Conditions]:
        """Store ``values`` unless the stored ones were disturbed less; return the better ones."""
        name = _canonical(key)
        with self._changed() as content:
            stored, before = content.entries.get(name), content.conditions.get(name)
            if (
                stored is not None
                and len(stored) == len(values)
                and before is not None
                and conditions.is_noisy
                and (before.is_noisy, before.noise) < (conditions.is_noisy, conditions.noise)
            ):
                return stored, before
            content.entries[name], content.conditions[name] = values, conditions
        return values, conditions

    def note_model(self, spec: Mapping[str, Any], bits: tuple[int, ...]) -> None:
        """Remember a request for this model at ``bits``, as one of the MAX_MODELS latest."""
        known = next((item for item in self.models() if item[0] == spec), None)
        widths = sorted({*bits, *(() if known is None else known[1])})
        if known is not None and list(known[1]) == widths:
            return
        with self._changed() as content:
            others = [item for item in content.models if item["spec"] != spec]
            content.models = [*others, {"spec": dict(spec), "bits": widths}][-MAX_MODELS:]

    def models(self) -> list[tuple[dict[str, Any], tuple[int, ...]]]:
        """Return (spec as a dict, bits) of the remembered models."""
        return [(item["spec"], tuple(item["bits"])) for item in self._read().models]

    def specs(self) -> list[tuple[ModelSpec, tuple[int, ...]]]:
        """Return (spec, bits) of the remembered models that this version of shoal can read.

        Another version that ran in between may have written one that it cannot.
        """
        found = []
        for values, bits in self.models():
            with suppress(UnsupportedModelError):
                found.append((ModelSpec.from_dict(values), bits))
        return found

    def probe(self, name: str, key: str) -> dict[str, Any] | None:
        """Return what probing found while ``key`` was the same, or None."""
        kept = self._read().probes.get(name, {})
        return kept["found"] if kept.get("key") == key else None

    def keep_probe(self, name: str, key: str, found: Mapping[str, Any]) -> None:
        """Store what probing found, in place of what it found earlier."""
        with self._changed() as content:
            content.probes[name] = {"key": key, "found": dict(found)}

    def changed_s(self) -> float:
        """Return the time when the file was last written, or 0 if there is none."""
        try:
            return self.path.stat().st_mtime
        except OSError:
            return 0.0

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Hold the turn to measure, for which other processes with the same file wait."""
        with ExitStack() as held:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(self._locked(".turn"))
            except OSError as error:
                log.info("measuring without a turn in %s: %s", self.path, error)
            yield

    @contextmanager
    def _changed(self) -> Iterator[_Content]:
        """Yield the contents of the file for changes, and write them back at the end."""
        content: _Content | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked(".lock"):
                content = self._read()
                yield content
                self._write(content)
        except OSError as error:
            log.warning("calibration cannot be kept in %s: %s", self.path, error)
            if content is None:
                yield _Content()

    def _read(self) -> _Content:
        try:
            return _parse(read_json(self.path))
        except FileNotFoundError:
            return _Content()
        except OSError as error:
            log.warning(
                "calibration in %s cannot be read and is measured again: %s", self.path, error
            )
            return _Content()
        except ValueError as error:
            log.warning("calibration in %s is damaged and is measured again: %s", self.path, error)
            return _Content()

    def _write(self, content: _Content) -> None:
        text = json.dumps(
            {
                "version": VERSION,
                "entries": content.entries,
                "conditions": {key: astuple(value) for key, value in content.conditions.items()},
                "models": content.models,
                "probes": content.probes,
            },
            indent=1,
            sort_keys=True,
        )
        replace_text(self.path, text, prepare=partial(hand_over, directory=self.path.parent))

    def _locked(self, suffix: str) -> AbstractContextManager[None]:
        # The lock has a file of its own, because the data file is replaced with its lock.
        return locked(self.path.with_name(self.path.name + suffix), 0o644)


def _canonical(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True, separators=(",", ":"))


def _parse(content: Any) -> _Content:
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
    found = _Content({key: tuple(values) for key, values in entries.items()})
    # The parts below came later. An older version leaves them out when it writes.
    conditions = content.get("conditions")
    for key, values in (conditions if isinstance(conditions, dict) else {}).items():
        if _are_conditions(values):
            found.conditions[key] = Conditions(*values)
    models = content.get("models")
    for item in models if isinstance(models, list) else ():
        if isinstance(item, dict) and isinstance(item.get("spec"), dict) and _are_bits(item):
            found.models.append(item)
    probes = content.get("probes")
    for name, kept in (probes if isinstance(probes, dict) else {}).items():
        if isinstance(kept, dict) and isinstance(kept.get("found"), dict):
            found.probes[name] = kept
    return found


def _are_conditions(values: Any) -> bool:
    return (
        isinstance(values, list)
        and len(values) == len(Conditions.__dataclass_fields__)
        and type(values[0]) is int
        and all(type(item) in (int, float) and math.isfinite(item) for item in values)
    )


def _are_bits(item: dict[str, Any]) -> bool:
    bits = item.get("bits")
    return isinstance(bits, list) and all(type(width) is int for width in bits)
