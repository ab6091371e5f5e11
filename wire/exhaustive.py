"""Chains over message types that mypy checks: a type that nobody handles is an error there."""

from __future__ import annotations

from typing import NoReturn


def assert_never(value: NoReturn) -> NoReturn:
    """The last case of an exhaustive ``match``, never reached (``typing`` has it from 3.11 on)."""
    raise TypeError(f"{type(value).__name__} is not handled")
