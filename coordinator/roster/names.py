"""Gives each device a name, and keeps the names in the coordinator's state directory.

A device is known by its id, and users see its name. The first device that asks for a name gets it.
The next one that asks for the same name gets ``name-2``. Each keeps its name, in whatever order
they join later.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Collection
from pathlib import Path

from coordinator.disk import Disk, fault, put_aside, write
from model.bounded import read_json

log = logging.getLogger(__name__)

MAX_NAMES = 1024
"""The most devices that are remembered, four times the members that a cluster can have."""

MAX_FILE_BYTES = 1 << 20
MAX_NAME_CHARACTERS = 63
VERSION = 1


class NameBook:
    """The names of devices, on disk. No name is the id or the name of another device."""

    def __init__(self, directory: Path | None = None, disk: Disk | None = None) -> None:
        """Read the names in ``directory``. Without one, names last as long as this object.

        disk: writes the file. Without one, ``assign`` returns when it is written.
        """
        self._write_text = write if disk is None else disk.replace
        self._path = None if directory is None else directory / "names.json"
        self._names: dict[str, tuple[str, str]] = {}
        """Device id -> its name and the name it asked for. The device that joined last is last."""
        if self._path is not None:
            self._names = _read(self._path)

    def assign(self, device: str, wished: str, living: Collection[str]) -> str:
        """The name of ``device``, which asks to be called ``wished``.

        A device keeps its name until it asks for another one. If there are more than MAX_NAMES
        devices, those that joined longest ago and are not in ``living`` are forgotten.
        """
        known = self._names.pop(device, None)
        if known is not None and known[1] == wished:
            self._names[device] = known
            return known[0]
        taken = {name for name, _ in self._names.values()} | self._names.keys()
        name = next(name for name in _candidates(wished) if name not in taken)
        self._names[device] = name, wished
        absent = [other for other in self._names if other != device and other not in living]
        for other in absent[: max(len(self._names) - MAX_NAMES, 0)]:
            del self._names[other]
        self._write()
        return name

    def is_name(self, text: str, *, besides: str) -> bool:
        """Whether a device other than ``besides`` is called ``text``."""
        return any(name == text for device, (name, _) in self._names.items() if device != besides)

    def device(self, text: str) -> str | None:
        """The id of the device with this id or name, or None if no such device ever joined."""
        if text in self._names:
            return text
        return next((device for device, (name, _) in self._names.items() if name == text), None)

    def name(self, device: str) -> str:
        """The name of ``device``, or its id if it never joined."""
        return self._names[device][0] if device in self._names else device

    def _write(self) -> None:
        if self._path is None:
            return
        content = {"version": VERSION, "devices": self._names}
        self._write_text(self._path, json.dumps(content, indent=1), self._not_written)

    def _not_written(self, error: OSError) -> None:
        log.warning("%s: %s: a restart may rename devices", self._path, error.strerror)


def _candidates(wished: str) -> itertools.chain[str]:
    """``wished``, then with -2, -3 and so on behind it. A name that is too long is shortened."""
    numbered = (
        wished[: MAX_NAME_CHARACTERS - len(suffix)] + suffix
        for suffix in map("-{}".format, itertools.count(2))
    )
    return itertools.chain([wished], numbered)


def _read(path: Path) -> dict[str, tuple[str, str]]:
    """The names in a file, or none if there is no file. A damaged file is renamed."""
    try:
        kept = read_json(path, MAX_FILE_BYTES)
        if kept["version"] != VERSION:
            raise ValueError(f"it has version {kept['version']!r:.20}")
        pairs = kept["devices"].items()
        if not all(len(pair) == 2 and _is_text(device, *pair) for device, pair in pairs):
            raise ValueError("it has other things than names")
        names = {device: (name, wished) for device, (name, wished) in pairs}
        if len({name for name, _ in names.values()}) < len(names):
            raise ValueError("two devices have one name")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning(
            "%s cannot be used (%s): %s, and devices are named anew in the order of joining",
            path,
            fault(error),
            put_aside(path),
        )
        return {}
    return names


def _is_text(*values: object) -> bool:
    return all(isinstance(value, str) and 0 < len(value) <= 64 for value in values)
