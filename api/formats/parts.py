"""The parts of an answer, and what all of its parsers share.

A parser takes an answer's text in pieces of any size. The parts that it returns do not depend on
where the pieces were cut, except for where texts are cut.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Text:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Thought:
    """Text of the model's reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegins:
    """The model calls the tool ``name``. ``index`` counts the calls of an answer from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More text of a call's arguments, which are a JSON object."""

    index: int
    text: str


Part = Text | Thought | CallBegins | Arguments


class Parser(abc.ABC):
    """Turns the text of one answer into parts."""

    @property
    def calls_ended(self) -> int:
        """The number of calls that are complete."""
        return 0

    @abc.abstractmethod
    def feed(self, text: str) -> list[Part]:
        """Return the parts that this text makes certain. Other text is held back."""

    @abc.abstractmethod
    def finish(self) -> list[Part]:
        """Return the parts that were held back, once no more text comes."""


class PlainText(Parser):
    """An answer that is text only."""

    def feed(self, text: str) -> list[Part]:
        return [Text(text)] if text else []

    def finish(self) -> list[Part]:
        return []


def overlap(text: str, marks: Iterable[str]) -> int:
    """Return the length of the longest end of ``text`` that begins one of the marks."""
    return max((_one_overlap(text, mark) for mark in marks), default=0)


def _one_overlap(text: str, mark: str) -> int:
    longest = min(len(mark) - 1, len(text))
    return next((size for size in range(longest, 0, -1) if mark.startswith(text[-size:])), 0)


def trailing_space(text: str) -> int:
    """Return the number of white characters at the end of a text."""
    return len(text) - len(text.rstrip())
