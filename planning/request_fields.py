"""Reads the JSON of a user's request into a dataclass, and checks its fields."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from model.adapters import NO_ADAPTER
from model.given import not_absolute
from model.hub import parse_name
from model.quantize import BITS, SCHEMES, Format, Quantizer
from planning.errors import RequestInvalid
from planning.json_codec import Misread, read_fields

BITS_EXPECTED = f"a list out of {', '.join(map(str, BITS))}"
MODEL_EXPECTED = "the absolute path of a model, or a hub's name for it"


MAX_TEXT = 1 << 18
"""The most characters of a request's ``scheme_text``. Quantizers look at the beginning alone."""

SCHEME_TEXT_EXPECTED = f"a text of at most {MAX_TEXT} characters, or null"

WEIGHT_EXPECTED = "a number from 1e-6 to 1e6"

LONGEST_NAME_BYTES = 255
LONGEST_PATH_CHARS = 4096
"""Linux takes at most these (Source: limits.h)."""


def read_request(
    kind: type, values: Mapping[str, Any], expected: Mapping[str, str]
) -> dict[str, Any]:
    """The arguments of the dataclass ``kind``, from its JSON ``values``.

    ``expected`` has the allowed values of fields, in words. Raises RequestInvalid with the field's
    name.
    """
    unknown = sorted(set(values) - {item.name for item in fields(kind)})
    if unknown:
        raise RequestInvalid(f"unknown fields: {', '.join(unknown)}")
    try:
        return read_fields(kind, values, finite=True)
    except Misread as error:
        words = expected.get(error.field)
        message = str(error) if words is None else f"{error.field}: {words} ({error})"
        raise RequestInvalid(message, error.field) from error


def require(holds: bool, field: str, expected: str) -> None:
    """Raise RequestInvalid with the name of ``field`` unless its value ``holds``."""
    if not holds:
        raise RequestInvalid(f"{field}: {expected}", field)


def require_model(model: Path, field: str = "model") -> None:
    """Raise RequestInvalid unless it is a hub's name, or an absolute path for another machine."""
    if not model.is_absolute() and parse_name(str(model)) is None:
        raise RequestInvalid(
            f"{field}: {not_absolute(str(model))}; {MODEL_EXPECTED} is needed", field
        )
    require_path(str(model), field)


def require_path(path: str, field: str) -> None:
    """Raise RequestInvalid unless a file may have this path."""
    parts = [os.fsencode(part) for part in path.split("/")]
    require("\0" not in path, field, "a path has no NUL character")
    is_short = max(map(len, parts)) <= LONGEST_NAME_BYTES and len(path) < LONGEST_PATH_CHARS
    require(is_short, field, "the path is longer than any of Linux")


def require_adapter(adapter: str | None) -> None:
    """Raise RequestInvalid unless this is null, ``none`` or an absolute path."""
    if adapter not in (None, NO_ADAPTER) and not Path(adapter).is_absolute():
        raise RequestInvalid(
            "adapter: the absolute path of a LoRA adapter's folder, none or null is needed",
            "adapter",
        )
    require_path(adapter or "", "adapter")


def require_form(scheme: Quantizer, group_size: int) -> None:
    """Raise RequestInvalid unless weights can be stored in this form."""
    if scheme not in SCHEMES:
        raise RequestInvalid(f"scheme must be one of {SCHEMES}, not {scheme!r}", "scheme")
    try:
        Format.of(4, scheme, group_size)
    except ValueError as error:
        field = "group_size" if str(error).startswith("group_size") else "scheme"
        raise RequestInvalid(str(error), field) from error


def require_scheme_text(text: str | None) -> None:
    """Raise RequestInvalid unless this is null, or a text that can be kept with a request."""
    require(text is None or 0 < len(text) <= MAX_TEXT, "scheme_text", SCHEME_TEXT_EXPECTED)


def text_sha256(text: str | None) -> str | None:
    """Return the hash that names a request's ``scheme_text``; None for none."""
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


def is_weight(value: float) -> bool:
    """Whether so many requests may go to a model of several, in any unit."""
    return 1e-6 <= value <= 1e6


def require_widths(bits: Iterable[int], field: str) -> None:
    """Raise RequestInvalid unless there is at least one width, and weights can have each."""
    widths = set(bits)
    require(bool(widths) and widths <= set(BITS), field, BITS_EXPECTED)


def require_teams(
    teams: Sequence[Sequence[str]], excluded: Collection[str], *, no_teams: bool
) -> None:
    """Raise RequestInvalid if teams contradict themselves, each other or the other wishes.

    A pin to a member means its team, so pins are no contradiction.
    """
    if teams and no_teams:
        raise RequestInvalid("teams are asked for, and no_teams excludes all: drop one", "teams")
    met: set[str] = set()
    for team in teams:
        names = ", ".join(team)
        if len(team) < 2:
            raise RequestInvalid(
                f"teams: a team of {names or 'no device'}: a team has at least two devices",
                "teams",
            )
        for name in team:
            if not name:
                raise RequestInvalid(f"teams: a device of {names} has no name", "teams")
            if name in met:
                raise RequestInvalid(
                    f"teams: {name} is named twice: a device is in one team at most", "teams"
                )
            met.add(name)
            if name in excluded:
                raise RequestInvalid(
                    f"teams: {name} is to share layers with a team, and is excluded: drop one",
                    "teams",
                )
