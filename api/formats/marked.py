"""Shared by formats that write a mark before their calls."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import Any

from api.formats.json_call import JsonCall
from api.formats.parts import Parser, Part, Text, overlap, trailing_space

Step = tuple[list[Part], str, bool]
"""A state turns text into parts, the text that is left, and whether the state changed."""


class MarkedCalls(Parser):
    """Text in which a mark begins a call. White space around calls is the format's, and dropped.

    tools: the JSON schemas of the arguments of each tool, by its name. A call of another name is
    text.
    new_id: makes the id of a call.
    """

    mark = ""

    def __init__(self, tools: Mapping[str, Any], new_id: Callable[[], str]) -> None:
        self._tools = tools
        self._new_id = new_id
        self._held = ""
        self._gap = ""
        """The white space before the last mark, which is shown if no call follows."""
        self._state: Callable[[str], Step] = self._in_text
        self._call: JsonCall | None = None
        self._calls_begun = 0
        self._calls_ended = 0

    @property
    def calls_ended(self) -> int:
        return self._calls_ended

    def feed(self, text: str) -> list[Part]:
        found: list[Part] = []
        rest, moved = self._held + text, True
        while moved:
            parts, rest, moved = self._state(rest)
            found += parts
        self._held = rest
        return found

    def finish(self) -> list[Part]:
        held, self._held = self._held, ""
        call, self._call = self._call, None
        if call is not None and call.begun:
            return call.finish()
        if call is not None:
            return _text(self._gap + self._opening() + call.raw)
        if self._state != self._in_text:
            held = self._cut_off(held)
        if self._calls_begun:
            held = held.rstrip()
        return _text(held)

    @abc.abstractmethod
    def _after_mark(self, text: str) -> Step:
        """Find out what follows the mark."""

    def _opening(self) -> str:
        """Return the text before the current call, which is shown if it is none."""
        return self.mark

    def _cut_off(self, held: str) -> str:
        """Return the text to show if the answer ends in this state, outside of a JSON call."""
        return held

    def _in_text(self, text: str) -> Step:
        at = text.find(self.mark)
        if at >= 0:
            shown = text[:at].rstrip()
            self._gap = text[len(shown) : at]
            self._state = self._after_mark
            return _text(shown), text[at + len(self.mark) :], True
        body = text[: len(text) - overlap(text, [self.mark])]
        shown = body[: len(body) - trailing_space(body)]
        return _text(shown), text[len(shown) :], False

    def _begin_json(self) -> None:
        self._call = JsonCall(self._tools, self._calls_begun, self._new_id())
        self._state = self._in_json

    def _in_json(self, text: str) -> Step:
        call = self._call
        assert call is not None  # noqa: S101 - this state has one
        parts, rest = call.feed(text)
        if call.failed:
            self._call, self._state = None, self._in_text
            shown = self._gap + self._opening()
            self._gap = ""
            return self._failed(shown, call.raw)
        if not call.ended:
            return parts, "", False
        self._call, self._state = None, self._after_call
        self._calls_begun += 1
        self._calls_ended += 1
        return parts, rest, True

    def _failed(self, opening: str, raw: str) -> Step:
        """Show the opening of what is no call, and read the rest again as text."""
        return _text(opening), raw, True

    @abc.abstractmethod
    def _after_call(self, text: str) -> Step:
        """Find out what follows a call."""


def _text(text: str) -> list[Part]:
    return [Text(text)] if text else []


def waits_for(text: str, mark: str) -> bool:
    """Whether ``text`` may still become ``mark``."""
    return len(text) < len(mark) and mark.startswith(text)
