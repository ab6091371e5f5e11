"""Hermes' format, which Qwen 2.5 and 3 use: calls between <tool_call> and </tool_call>.

    <tool_call>
    {"name": "f", "arguments": {"x": 1}}
    </tool_call>

Qwen3-Coder writes XML between the same marks:

    <tool_call>
    <function=f>
    <parameter=x>
    1
    </parameter>
    </function>
    </tool_call>
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from api.formats.json_call import written
from api.formats.marked import MarkedCalls, Step, waits_for
from api.formats.parts import Arguments, CallBegins, Text

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_NAME = re.compile(r"\s*<function=([^>\n]+)>")
_MOST_PARTS = 64
"""So many parts of a schema are looked at for the types of one parameter."""
_NAMES = {
    str: "string", bool: "boolean", int: "integer", float: "number", list: "array",
    dict: "object", type(None): "null",
}  # fmt: skip
_PARAMETER = re.compile(
    r"<parameter=([^>\n]+)>\n?(.*?)\n?(?:</parameter>|(?=<parameter=)|\Z)", re.DOTALL
)


class HermesCalls(MarkedCalls):
    """Reads both kinds of calls."""

    mark = OPEN

    def _after_mark(self, text: str) -> Step:
        begin = text.lstrip()
        if not begin or waits_for(begin, _FUNCTION):
            return [], text, False
        if begin.startswith(_FUNCTION):
            self._state = self._in_xml
        else:
            self._begin_json()
        return [], text, True

    def _in_xml(self, text: str) -> Step:
        """Wait for the whole call, because its arguments become JSON."""
        end = text.find(_FUNCTION_END)
        if end < 0:
            return [], text, False
        name = _NAME.match(text)
        if name is None or name[1] not in self._tools:
            self._state = self._in_text
            return [Text(self._gap + self.mark)], text, True
        arguments = _arguments(text[name.end() : end], self._tools[name[1]])
        index, self._calls_begun = self._calls_begun, self._calls_begun + 1
        self._calls_ended += 1
        self._state = self._after_call
        call = CallBegins(index, self._new_id(), name[1])
        return [call, Arguments(index, arguments)], text[end + len(_FUNCTION_END) :], True

    def _cut_off(self, held: str) -> str:
        return "" if self._state == self._after_call else self._gap + self.mark + held

    def _after_call(self, text: str) -> Step:
        begin = text.lstrip()
        if not begin or waits_for(begin, CLOSE):
            return [], text, False
        self._state = self._in_text
        return [], begin.removeprefix(CLOSE), True


def _arguments(xml: str, schema: Any) -> str:
    """Return the JSON object of XML parameters. Their types are those in the tool's schema."""
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    found = {}
    for name, text in _PARAMETER.findall(xml):
        about = properties.get(name) if isinstance(properties, Mapping) else None
        found[name] = _value(text, _types(about, schema))
    return written(found)


def _value(text: str, types: frozenset[str]) -> Any:
    """Return the JSON value of a text, or the text where the types say that it is one."""
    try:
        value = json.loads(text)
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        return text
    is_text = "string" in types and (isinstance(value, str) or not types & _types_of(value))
    return text if is_text else value


def _types(about: Any, schema: Any) -> frozenset[str]:
    """Return the types that a parameter's part of the schema names. Empty: it names none."""
    types: set[str] = set()
    waiting = [about]
    for _ in range(_MOST_PARTS):
        if not waiting:
            break
        part = waiting.pop()
        if not isinstance(part, Mapping):
            continue
        types.update(one for one in _listed(part.get("type")) if isinstance(one, str))
        values = [*_listed(part.get("enum")), *([part["const"]] if "const" in part else [])]
        types.update(*map(_types_of, values))
        for key in ("anyOf", "oneOf", "allOf"):
            waiting += _listed(part.get(key))
        waiting.append(_pointed(schema, part.get("$ref")))
    return frozenset(types)


def _types_of(value: Any) -> frozenset[str]:
    """Return the names that schemas have for a value's type."""
    names = [name for kind, name in _NAMES.items() if type(value) is kind]
    return frozenset([*names, *(["number"] if type(value) is int else [])])


def _pointed(schema: Any, ref: Any) -> Any:
    """Return the part of the schema that a reference such as #/$defs/a points to, or None."""
    if not isinstance(ref, str) or not ref.startswith("#/"):
        return None
    for key in ref[2:].split("/"):
        if not isinstance(schema, Mapping):
            return None
        schema = schema.get(key.replace("~1", "/").replace("~0", "~"))
    return schema


def _listed(value: Any) -> list[Any]:
    """Return a value as a list: of what it holds, or of it alone unless it is None."""
    return value if isinstance(value, list) else [] if value is None else [value]
