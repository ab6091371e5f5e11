"""Tells the model's thoughts, such as between <think> and </think>, from its answer."""

from __future__ import annotations

from api.formats.marked import waits_for
from api.formats.parts import Parser, Part, Text, Thought, overlap, trailing_space


class Thoughts(Parser):
    """Thoughts at an answer's begin. The rest goes through the parser ``rest``.

    marks: the texts before and after thoughts.
    opened: whether the prompt ends with the first mark.
    """

    def __init__(self, marks: tuple[str, str], rest: Parser, *, opened: bool) -> None:
        self._open, self._close = marks
        self._rest = rest
        self._held = ""
        self._phase = "thinking" if opened else "begin"
        self._shown = False

    @property
    def calls_ended(self) -> int:
        return self._rest.calls_ended

    def feed(self, text: str) -> list[Part]:
        if self._phase == "answer":
            return self._rest.feed(text)
        self._held += text
        if self._phase == "begin":
            begin = self._held.lstrip()
            if not begin or waits_for(begin, self._open):
                return []
            if not begin.startswith(self._open):
                self._phase = "answer"
                return self._rest.feed(self._take())
            self._held, self._phase = begin.removeprefix(self._open), "thinking"
        parts: list[Part] = []
        if self._phase == "thinking":
            parts = self._think()
        if self._phase == "gap" and (begin := self._held.lstrip()):
            self._phase, self._held = "answer", ""
            parts += self._rest.feed(begin)
        return parts

    def finish(self) -> list[Part]:
        held = self._take()
        if self._phase == "thinking":
            thought = held.rstrip() if self._shown else held.strip()
            return [Thought(thought)] if thought else []
        if self._phase == "begin" and held:
            return [*self._rest.feed(held), *self._rest.finish()]
        return self._rest.finish()

    def _think(self) -> list[Part]:
        """Give out thoughts without the white space around them."""
        held = self._held if self._shown else self._held.lstrip()
        at = held.find(self._close)
        if at >= 0:
            thought = held[:at].rstrip()
            self._held, self._phase = held[at + len(self._close) :], "gap"
        else:
            body = held[: len(held) - overlap(held, [self._close])]
            thought = body[: len(body) - trailing_space(body)]
            self._held = held[len(thought) :]
        self._shown = self._shown or bool(thought)
        return [Thought(thought)] if thought else []

    def _take(self) -> str:
        held, self._held = self._held, ""
        return held


class ShownThoughts(Parser):
    """Thoughts stay in the text as they are. What looks like a call inside of them is none.

    The parameters are those of ``Thoughts``.
    """

    def __init__(self, marks: tuple[str, str], rest: Parser, *, opened: bool) -> None:
        self._open, self._close = marks
        self._rest = rest
        self._held = ""
        self._phase = "thinking" if opened else "begin"

    @property
    def calls_ended(self) -> int:
        return self._rest.calls_ended

    def feed(self, text: str) -> list[Part]:
        held, self._held = self._held + text, ""
        if self._phase == "begin":
            begin = held.lstrip()
            if not begin or waits_for(begin, self._open):
                self._held = held
                return []
            self._phase = "thinking" if begin.startswith(self._open) else "answer"
        if self._phase == "answer":
            return self._rest.feed(held)
        at = held.find(self._close)
        if at < 0:
            cut = len(held) - overlap(held, [self._close])
            self._held = held[cut:]
            return [Text(held[:cut])] if cut else []
        self._phase, end = "answer", at + len(self._close)
        return [Text(held[:end]), *self._rest.feed(held[end:])]

    def finish(self) -> list[Part]:
        held, self._held = self._held, ""
        if self._phase == "thinking":
            return [Text(held)] if held else []
        return [*self._rest.feed(held), *self._rest.finish()]
