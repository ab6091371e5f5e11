"""Reads settings files of the services: TOML whose keys are the long options of a command.

The command's own options are the only table of settings. A file gives them other defaults.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cli.argument_types import Several
from cli.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NOT_SETTINGS = {
    "config",
    "create_token",
    "help",
    "json",
    "list_backends",
    "measurements_dir",
    "until_stdin_closes",
    "verbose",
}


def settings_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """The options of ``parser`` that a file may set, by name. Dashes become underscores."""
    return dict(_settings(parser))


def read_settings(path: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Read new defaults for ``parser`` from a file, checked as on the command line.

    Raises UsageError, which names the file, the setting and the values that are allowed.
    """
    try:
        values = parse_toml(path.read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise UsageError(f"{path}: {(reason or str(error)).lower()}") from error
    known = settings_of(parser)
    settings = {}
    for name, value in values.items():
        if name not in known:
            raise UsageError(f"{path}: unknown setting {name!r}; known are {', '.join(known)}")
        settings[name] = _converted(path, name, value, known[name])
    return settings


def parse_toml(text: str, path: Path) -> dict[str, Any]:
    """The values in ``text``, the content of the file at ``path``. Raises UsageError."""
    try:
        values: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not TOML: {error}") from error
    return values


def _settings(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.Action]]:
    # argparse has no public way to list a parser's options.
    for action in parser._actions:
        if action.option_strings and action.dest not in NOT_SETTINGS:
            yield action.dest, action


def _converted(path: Path, name: str, value: object, action: argparse.Action) -> Any:
    if not isinstance(action, Several):
        return _one(path, name, value, action)
    items = value if isinstance(value, list) else [value]
    parts = [_one(path, name, item, action) for item in items]
    if parts and isinstance(parts[0], list):
        return [one for part in parts for one in part]
    return tuple(parts)


def _one(path: Path, name: str, value: object, action: argparse.Action) -> Any:
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UsageError(f"{path}: {name}: expected true or false")
        return value
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise UsageError(f"{path}: {name}: expected a text or a number")
    convert = action.type if callable(action.type) else str
    try:
        converted = convert(str(value))
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise UsageError(f"{path}: {name}: {error}") from error
    if action.choices is not None and converted not in action.choices:
        raise UsageError(f"{path}: {name}: {value!r}: expected one of {', '.join(action.choices)}")
    return converted
