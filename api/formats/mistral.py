"""Mistral's formats, which all begin with [TOOL_CALLS]:

[TOOL_CALLS][{"name": "f", "arguments": {"x": 1}}, ...]
[TOOL_CALLS]f[ARGS]{"x": 1}[TOOL_CALLS]...
[TOOL_CALLS]f[CALL_ID]abcdef123[ARGS]{"x": 1}
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from api.formats.json_call import JsonArguments
from api.formats.marked import MarkedCalls, Step
from api.formats.parts import CallBegins, Text

MARK, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
ID_CHARACTERS = 9
_NAMED = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*([\w-]+)\s*)?(?:\[ARGS\]\s*)?(?=\{)")
_MAY_BE_NAMED = re.compile(
    r"\s*(?:[\w.-]+\s*(?:\[(?:[A-Z_]{0,7}\]?\s*[\w-]*\s*(?:\[[A-Z]{0,4}\]?\s*)?)?)?)?"
)


def fitting_id(call_id: str) -> str:
    """Return an id of nine letters and digits, which the templates demand, for any id."""
    if len(call_id) == ID_CHARACTERS and call_id.isascii() and call_id.isalnum():
        return call_id
    return hashlib.sha256(call_id.encode()).hexdigest()[:ID_CHARACTERS]


class MistralCalls(MarkedCalls):
    """Reads lists of calls, and calls that begin with their names."""

    mark = MARK

    def __init__(self, tools: Mapping[str, Any], new_id: Callable[[], str]) -> None:
        super().__init__(tools, new_id)
        self._arguments: JsonArguments | None = None
        self._in_list = False
        self._ids: set[str] = set()
        """The ids that the model has written."""

    def finish(self) -> list[Any]:
        if self._arguments is not None:
            arguments, self._arguments = self._arguments, None
            return arguments.finish()
        return super().finish()

    def _after_mark(self, text: str) -> Step:
        begin = text.lstrip()
        if begin.startswith("["):
            self._in_list = True
            self._begin_json()
            return [], begin[1:], True
        named = _NAMED.match(text)
        if named is not None and named[1] in self._tools:
            index, self._calls_begun = self._calls_begun, self._calls_begun + 1
            self._arguments = JsonArguments(index)
            self._state = self._in_arguments
            return [CallBegins(index, self._id(named[2]), named[1])], text[named.end() :], True
        if named is None and _MAY_BE_NAMED.fullmatch(text):
            return [], text, False
        self._state = self._in_text
        return [Text(self._gap + MARK)], text, True

    def _id(self, written: str | None) -> str:
        """Return the id of a call: the one that the model has written, unless it did before."""
        if written is None or written in self._ids:
            return self._new_id()
        self._ids.add(written)
        return written

    def _in_arguments(self, text: str) -> Step:
        assert self._arguments is not None  # noqa: S101 - this state has them
        parts, rest = self._arguments.feed(text)
        if not self._arguments.ended:
            return [*parts], "", False
        self._arguments, self._state = None, self._in_text
        self._calls_ended += 1
        return [*parts], rest, True

    def _opening(self) -> str:
        if not self._in_list:
            return MARK
        return MARK + "[" if self._call is None or not self._calls_begun else ", "

    def _cut_off(self, held: str) -> str:
        return "" if self._state == self._after_call else self._gap + MARK + held

    def _after_call(self, text: str) -> Step:
        """A comma goes on in the list, and a bracket ends it."""
        begin = text.lstrip()
        if not begin:
            return [], text, False
        if begin.startswith(","):
            self._gap = ""
            self._begin_json()
            return [], begin[1:], True
        self._in_list = False
        self._state = self._in_text
        return [], begin.removeprefix("]"), True
