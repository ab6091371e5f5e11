"""Text of others, for a terminal or a log."""

from __future__ import annotations

MAX_TEXT_CHARACTERS = 1000
"""The largest text for people. Ours have at most about 500 characters."""


def clean_text(text: str, most_characters: int = MAX_TEXT_CHARACTERS) -> str:
    """Return text for a terminal or a log: one line without control characters or reordering."""
    if len(text) > most_characters:
        text = text[: most_characters - 1] + "\N{HORIZONTAL ELLIPSIS}"
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else " " for character in text)
