"""Harmony, gpt-oss's format: an answer is a row of messages, each in a channel.

    <|channel|>analysis<|message|>The user asks ...<|end|>
    <|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>
    <|start|>assistant<|channel|>final<|message|>It is sunny.<|return|>

The channel analysis has thoughts. What is for a function is a call. All else is for the user.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from api.formats.marked import waits_for
from api.formats.parts import (
    Arguments,
    CallBegins,
    Parser,
    Part,
    Text,
    Thought,
    overlap,
)

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
MARKS = frozenset((START, CHANNEL, MESSAGE, CONSTRAIN, END, CALL, RETURN))
_ENDS = (END, CALL, RETURN, START)
_RECIPIENT = re.compile(r"to=(?:functions\.)?([^\s<]+)")
_ROLE = re.compile(r"\s*<\|start\|>\s*assistant")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_HEADS = (START, CHANNEL, MESSAGE, "to=")


class Harmony(Parser):
    """Reads the messages of an answer.

    split: whether thoughts are parts of their own. Otherwise they stay in the text, with marks.
    """

    def __init__(
        self, tools: Mapping[str, Any], new_id: Callable[[], str], *, split: bool = True
    ) -> None:
        self._tools = tools
        self._new_id = new_id
        self._split = split
        self._held = ""
        self._in_head = True
        self._make: Callable[[str], Part] = Text
        self._tail = ""
        """The text to show after the body of a message whose marks are shown."""
        self._calls_begun = 0
        self._calls_ended = 0
        self._call: int | None = None
        self._is_empty = True

    @property
    def calls_ended(self) -> int:
        return self._calls_ended

    def feed(self, text: str) -> list[Part]:
        self._held += text
        parts: list[Part] = []
        moved = True
        while moved:
            found, moved = self._head() if self._in_head else self._body()
            parts += found
        return parts

    def finish(self) -> list[Part]:
        held, self._held = self._held, ""
        if not self._in_head:
            return self._show(held)
        is_head = any(mark in held for mark in (START, CHANNEL)) or not held.strip()
        return [] if is_head else [Text(held)]

    def _head(self) -> tuple[list[Part], bool]:
        """Read what is before a message's text."""
        begin = self._held.lstrip()
        if not begin:
            return [], False
        if not any(begin.startswith(mark) or waits_for(begin, mark) for mark in _HEADS):
            # The model has left the format.
            self._in_head, self._is_empty, self._tail, self._make = False, True, "", Text
            return [], True
        at = begin.find(MESSAGE)
        if at < 0:
            return [], False
        head, self._held = begin[:at], begin[at + len(MESSAGE) :]
        self._in_head, self._is_empty, self._tail = False, True, ""
        recipient, channel = _RECIPIENT.search(head), _CHANNEL.search(head)
        if recipient is not None and recipient[1] in self._tools:
            index = self._call = self._calls_begun
            self._calls_begun += 1
            self._make = lambda text: Arguments(index, text)
            return [CallBegins(index, self._new_id(), recipient[1])], True
        if recipient is not None:  # An unknown tool: the message is shown as it is.
            self._make, self._tail = Text, CALL
            return [Text(head + MESSAGE)], True
        if channel is not None and channel[1] == "analysis":
            if not self._split:
                self._make, self._tail = Text, END
                return [Text(_ROLE.sub("", head) + MESSAGE)], True
            self._make = Thought
            return [], True
        self._make = Text
        return [], True

    def _body(self) -> tuple[list[Part], bool]:
        found = [(at, mark) for mark in _ENDS if (at := self._held.find(mark)) >= 0]
        if not found:
            keep = overlap(self._held, _ENDS)
            cut = len(self._held) - keep
            shown, self._held = self._held[:cut], self._held[cut:]
            return self._show(shown), False
        at, mark = min(found)
        parts = self._show(self._held[:at])
        self._held = self._held[at + len(mark) * (mark != START) :]
        if self._call is not None:
            if self._is_empty:
                parts.append(self._make("{}"))
            self._call = None
            self._calls_ended += 1
        if self._tail:
            parts.append(Text(self._tail))
        self._in_head = True
        return parts, True

    def _show(self, text: str) -> list[Part]:
        if not text:
            return []
        self._is_empty = False
        return [self._make(text)]
