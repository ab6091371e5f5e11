"""JSON in a grammar, by its schema."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

WHITESPACE = r"[\x20\x0A\x0D\x09]{1,20}"
"""Without a bound, a small model may go on with spaces until its limit."""


def json_rule(schema: Mapping[str, Any]) -> str:
    """Return the right side of a rule of Lark for JSON that fits a schema."""
    return f"%json {json.dumps({'x-guidance': {'whitespace_pattern': WHITESPACE}, **schema})}"
