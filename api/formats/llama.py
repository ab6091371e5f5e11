"""Llama 3's format: an answer that is a JSON object with a name and parameters.

    {"name": "f", "parameters": {"x": 1}}

<|python_tag|> may stand before it. Several calls follow each other, with semicolons between them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from api.formats.marked import MarkedCalls, Step, waits_for
from api.formats.parts import Text

TAG = "<|python_tag|>"


class LlamaCalls(MarkedCalls):
    """Reads calls at the answer's begin, and after the tag."""

    mark = TAG

    def __init__(self, tools: Mapping[str, Any], new_id: Callable[[], str]) -> None:
        super().__init__(tools, new_id)
        self._tagged = False
        self._state = self._at_begin

    def _at_begin(self, text: str) -> Step:
        begin = text.lstrip()
        if not begin or waits_for(begin, TAG):
            return [], text, False
        if begin.startswith("{"):
            self._gap = text[: len(text) - len(begin)]
            self._begin_json()
            return [], begin, True
        self._state = self._in_text
        return [], text, True

    def _after_mark(self, text: str) -> Step:
        begin = text.lstrip()
        if not begin:
            return [], text, False
        if begin.startswith("{"):
            self._tagged = True
            self._begin_json()
            return [], text, True
        self._state = self._in_text
        return [Text(self._gap + TAG)], text, True

    def _opening(self) -> str:
        return TAG if self._tagged else ""

    def _cut_off(self, held: str) -> str:
        if self._state == self._after_call:
            return ""
        return held if self._state == self._at_begin else self._gap + TAG + held

    def _after_call(self, text: str) -> Step:
        begin = text.lstrip("; \t\r\n")
        self._tagged, self._gap = False, text[: len(text) - len(begin)]
        if not begin or waits_for(begin, TAG):
            return [], text, False
        if begin.startswith("{"):
            self._begin_json()
            return [], begin, True
        self._state = self._in_text
        return [], text, True
