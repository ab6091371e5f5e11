"""The errors and messages that a sandbox of templates shares with the process that asks it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

MAX_PROMPT_CHARS = 4_000_000
"""The longest text of a template, and the largest value inside one: more than any context."""


class TemplateFailed(Exception):
    """A template is invalid or cannot be rendered. The text is one line that says why."""


class FieldsIgnored(TemplateFailed):
    """A template did not read fields of messages that it must not ignore.

    fields: their places, such as "messages[2].name".
    """

    def __init__(self, fields: Sequence[str]) -> None:
        super().__init__(f"does not use {', '.join(fields)}")
        self.fields = tuple(fields)


class WatchedMessage(dict[str, Any]):
    """A message that knows which of its fields a template has read.

    may_ignore: the fields that need not be read.
    """

    def __init__(self, fields: Mapping[str, Any], may_ignore: Iterable[str] = ()) -> None:
        super().__init__(fields)
        # Templates see no names that begin with an underscore.
        self._may_ignore = frozenset(may_ignore)
        self._read: set[str] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        return WatchedMessage, (dict(super().items()), self._may_ignore)

    def again(self, without: Collection[str] = (), **fields: Any) -> WatchedMessage:
        """Return a copy that nothing was read of, without some fields, and with others."""
        kept = {name: value for name, value in super().items() if name not in without}
        return WatchedMessage({**kept, **fields}, self._may_ignore)

    def _ignored(self) -> list[str]:
        """Return the fields with a value that were not read, and should have been."""
        known = self._read | self._may_ignore
        given = [name for name, value in super().items() if value not in (None, "")]
        return [name for name in given if name not in known]

    def __getitem__(self, name: str) -> Any:
        self._read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self._read.add(name)
        return super().get(name, default)

    def __iter__(self) -> Iterator[str]:
        # Python copies a dict without this method past __getitem__.
        return super().__iter__()

    def copy(self) -> dict[str, Any]:
        self._read.update(self)
        return super().copy()

    def items(self) -> Any:
        self._read.update(self)
        return super().items()

    def values(self) -> Any:
        self._read.update(self)
        return super().values()

    def __repr__(self) -> str:
        self._read.update(self)
        return super().__repr__()


def ignored_fields(messages: Iterable[Any]) -> list[str]:
    """Return the places of the fields of watched messages that should have been read."""
    return [
        f"messages[{number}].{name}"
        for number, message in enumerate(messages)
        if isinstance(message, WatchedMessage)
        for name in message._ignored()
    ]


def one_line(error: BaseException) -> str:
    """Return an error's text, short enough for a message."""
    return " ".join(str(error).split())[:500] or type(error).__name__
