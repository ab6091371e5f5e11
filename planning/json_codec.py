"""Dataclasses as plain values that survive JSON, and back.

Tuples become lists, sets become sorted lists, and paths become text. The keys of mappings become
text (a pair of numbers: "0 1"). JSON has no infinity, which becomes "inf".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from model.errors import ModelError


class Misread(ValueError):
    """A field is missing, unknown or wrong. ``field`` is its name in the dataclass."""

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = field


def to_plain(value: Any) -> Any:
    """``value`` as dicts, lists and scalars only; ``from_plain`` is the inverse.

    A nested type with a ``to_dict`` of its own is written by it.
    """
    if is_dataclass(value):
        return {item.name: _part_to_plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {_key_text(key): _part_to_plain(item) for key, item in value.items()}
    if isinstance(value, AbstractSet):
        return sorted(map(_part_to_plain, value))
    if isinstance(value, (list, tuple)):
        return [_part_to_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return "inf" if value == math.inf else value


def _part_to_plain(value: Any) -> Any:
    own = getattr(value, "to_dict", None) if is_dataclass(value) else None
    return to_plain(value if own is None else own())


def from_plain(kind: Any, value: object, where: str, *, finite: bool = False) -> Any:
    """The dataclass ``kind`` from plain values; fields with a default may be left out.

    A nested type with a ``from_dict`` of its own is read by it. ``finite`` refuses "inf".
    Raises ValueError: one line with the key, below ``where``, that is missing, unknown or wrong.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object")
    read = read_fields(kind, value, f"{where}.", finite=finite)
    try:
        return kind(**read)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def read_fields(
    kind: Any, value: Mapping[str, Any], prefix: str = "", *, finite: bool = False
) -> dict[str, Any]:
    """The arguments of the dataclass ``kind``, as in ``from_plain``. Raises Misread.

    Messages put ``prefix`` before the name of a field.
    """
    hints = _hints(kind)
    for item in fields(kind):
        required = item.default is MISSING and item.default_factory is MISSING
        if item.name not in value and required:
            raise Misread(f"{prefix}{item.name}: missing", item.name)
    read = {}
    for key, item in value.items():
        if key not in hints:
            raise Misread(f"{prefix}{key}: unknown", key)
        try:
            read[key] = _read(hints[key], item, f"{prefix}{key}", finite)
        except ValueError as error:
            raise Misread(str(error), key) from error
    return read


_hints = cache(get_type_hints)


def _read(kind: Any, value: Any, where: str, finite: bool) -> Any:
    """``value`` as a dataclass, tuple[X, ...], frozenset, Mapping, X | None, Literal or scalar.

    A field of the kind Any takes what JSON has.
    """
    if kind is Any:
        return value
    if is_dataclass(kind):
        own = getattr(kind, "from_dict", None)
        if own is None:
            return from_plain(kind, value, where, finite=finite)
        try:
            return own(value)
        except (ValueError, ModelError) as error:
            raise ValueError(f"{where}: {error}") from error
    origin = get_origin(kind)
    if origin in (tuple, frozenset):
        if not isinstance(value, list):
            raise ValueError(f"{where}: expected a list")
        item = get_args(kind)[0]
        return origin(_read(item, part, f"{where}[{i}]", finite) for i, part in enumerate(value))
    if origin is Mapping:
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected an object")
        key_kind, item = get_args(kind)
        return {
            _read_key(key_kind, key, where): _read(item, part, f"{where}.{key}", finite)
            for key, part in value.items()
        }
    if origin is Literal:
        if value not in get_args(kind):
            raise ValueError(f"{where}: expected one of {get_args(kind)}, got {value!r:.40}")
        return value
    if isinstance(kind, UnionType):
        (some,) = (choice for choice in get_args(kind) if choice is not type(None))
        return None if value is None else _read(some, value, where, finite)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and value == "inf" and not finite:
        return math.inf
    if kind is float and type(value) in (int, float):
        number = float(value)
        if math.isfinite(number):
            return number
    elif type(value) is kind:
        return value
    raise ValueError(f"{where}: expected {kind.__name__}, got {value!r:.40}")


def _key_text(key: str | int | tuple[int, ...]) -> str:
    return " ".join(map(str, key)) if isinstance(key, tuple) else str(key)


def _read_key(kind: Any, text: object, where: str) -> str | int | tuple[int, ...]:
    """The key of a mapping: text, a whole number, or a tuple of them, as ``kind`` says."""
    if kind is str and isinstance(text, str):
        return text
    count = len(get_args(kind)) or 1
    words = text.split() if isinstance(text, str) else []
    if len(words) != count or not all(word.isascii() and word.isdigit() for word in words):
        raise ValueError(f"{where}: {text!r:.40} is no key: expected {count} numbers")
    numbers = tuple(map(int, words))
    return numbers if get_args(kind) else numbers[0]
