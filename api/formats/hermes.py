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

from api.formats.marked import MarkedCalls, Step, waits_for
from api.formats.parts import Arguments, CallBegins, Text

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_NAME = re.compile(r"\s*<function=([^>\n]+)>")
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
        is_text = isinstance(about, Mapping) and about.get("type") == "string"
        found[name] = text if is_text else _value(text)
    return json.dumps(found, ensure_ascii=False)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
