"""A function that lets mypy find message types that a chain of cases forgets."""

from __future__ import annotations

from typing import NoReturn


def assert_never(value: NoReturn) -> NoReturn:
    """End an exhaustive chain; never reached (``typing`` has it from 3.11 on)."""
    raise TypeError(f"{type(value).__name__} is not handled")
