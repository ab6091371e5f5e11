"""Reads one call that is a JSON object, such as {"name": "f", "arguments": {...}}."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

from api.formats.parts import Arguments, CallBegins, Part

_HEAD = re.compile(
    r'\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*'
    r'"(?:arguments|parameters)"\s*:\s*(?=\S)',
    re.DOTALL,
)
_ARGUMENTS = ("arguments", "parameters")
_HALF = re.compile("[\ud800-\udfff]")
"""Half of a surrogate pair. JSON's escapes can write one, and no encoded text can hold it."""


def written(value: Any) -> str:
    """Return a value as JSON text, in which halves of surrogate pairs stay escapes."""
    return _escaped(json.dumps(value, ensure_ascii=False))


def read_object(text: str) -> dict[str, Any] | None:
    """Return the object that a model has written as JSON, with whole characters and finite numbers.

    A half of a surrogate pair is a replacement character. None: the text is no such object.
    """
    try:
        found = json.loads(text)
        plain = json.dumps(found, ensure_ascii=False, allow_nan=False)
        if _HALF.search(plain):
            found = json.loads(_HALF.sub("\N{REPLACEMENT CHARACTER}", plain))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _escaped(text: str) -> str:
    return _HALF.sub(lambda half: f"\\u{ord(half[0]):04x}", text)


class JsonEnd:
    """Finds the end of one JSON value in a text that comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._kind = ""
        """The value's first character: a bracket, a quote, or another one."""

    @property
    def kind(self) -> str:
        return self._kind

    def feed(self, text: str) -> int | None:
        """Return the index in ``text`` after the value's last character, or None."""
        for at, char in enumerate(text):
            if not self._kind:
                if char.isspace():
                    continue
                self._kind = char
            elif self._kind not in '{["' and (char in ",}]" or char.isspace()):
                return at
            if self._take(char):
                return at + 1
        return None

    def _take(self, char: str) -> bool:
        """Follow one character. Returns whether it ends the value."""
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
                return self._depth == 0
            return False
        if char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            return self._depth <= 0
        return False


class JsonArguments:
    """Streams the value of a call's arguments as the text of a JSON object.

    An object is passed on as the model writes it. A string that holds an object is unpacked, and
    null is an object without members.
    """

    def __init__(self, index: int) -> None:
        self._index = index
        self._end = JsonEnd()
        self._held = ""
        self.ended = False

    def feed(self, text: str) -> tuple[list[Part], str]:
        """Return the parts, and the text after the value once ``ended``."""
        at = self._end.feed(text)
        value, rest = (text, "") if at is None else (text[:at], text[at:])
        self.ended = at is not None
        if self._end.kind in ("{", ""):
            return self._part(value), rest
        self._held += value
        return (self._part(_object_of(self._held)) if self.ended else []), rest

    def finish(self) -> list[Part]:
        """Return the parts of a value that the answer's end has cut off."""
        return self._part(self._held)

    def _part(self, text: str) -> list[Part]:
        return [Arguments(self._index, text)] if text else []


class JsonCall:
    """One call. ``failed``: the text is no call of a known tool, and ``raw`` has all of it."""

    def __init__(self, names: Collection[str], index: int, call_id: str) -> None:
        self._names = names
        self._index = index
        self._id = call_id
        self._whole = JsonEnd()
        self._arguments: JsonArguments | None = None
        self._depth_left = JsonEnd()
        self.raw = ""
        self.begun = False
        self.ended = False
        self.failed = False

    def feed(self, text: str) -> tuple[list[Part], str]:
        """Return the parts, and the text after the object once ``ended``."""
        if self._arguments is not None:
            return self._value(self._arguments, text)
        before = len(self.raw)
        self.raw += text
        if not self.raw.strip():
            return [], ""
        head = _HEAD.match(self.raw)
        if head is not None and (name := _string(head[1])) in self._names:
            self._begin()
            arguments = self._arguments = JsonArguments(self._index)
            parts, rest = self._value(arguments, self.raw[head.end() :])
            return [CallBegins(self._index, self._id, name), *parts], rest
        if head is not None or not self.raw.lstrip().startswith("{"):
            self.failed = True
            return [], ""
        at = self._whole.feed(text)
        return self._object(before + at) if at is not None else ([], "")

    def finish(self) -> list[Part]:
        """Return the parts of a call that the answer's end has cut off."""
        return [] if self._arguments is None or self._arguments.ended else self._arguments.finish()

    def _begin(self) -> None:
        self.begun = True
        # The rest of the object after the arguments is followed as if it began here.
        self._depth_left.feed("{")

    def _value(self, arguments: JsonArguments, text: str) -> tuple[list[Part], str]:
        parts: list[Part] = []
        if not arguments.ended:
            parts, text = arguments.feed(text)
        if arguments.ended:
            at = self._depth_left.feed(text)
            self.ended = at is not None
            return parts, text[at:]
        return parts, ""

    def _object(self, end: int) -> tuple[list[Part], str]:
        """Read a whole object, whose members may have any order."""
        try:
            found = json.loads(self.raw[:end])
        except (ValueError, RecursionError):
            found = None
        name = found.get("name") if isinstance(found, dict) else None
        if not isinstance(name, str) or name not in self._names:
            self.failed = True
            return [], ""
        given = next((found[key] for key in _ARGUMENTS if key in found), None)
        self.begun = self.ended = True
        arguments = _object_of(written(given))
        call = CallBegins(self._index, self._id, name)
        return [call, Arguments(self._index, arguments)], self.raw[end:]


def _string(text: str) -> str:
    try:
        return str(json.loads(text))
    except ValueError:
        return ""


def _object_of(text: str) -> str:
    """Return the object that a JSON text means: itself, the text in a string, or {} for null."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if value is None or value == "":
        return "{}"
    return _escaped(value) if isinstance(value, str) else text
