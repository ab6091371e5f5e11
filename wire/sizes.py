"""Sizes as people write them: ``1.5G``, ``512M``, ``200MiB``."""

from __future__ import annotations

import re
from fractions import Fraction

_UNITS = "KMGT"
_PATTERN = re.compile(
    r"(\d{1,15}(?:\.\d{1,9})?)\s*(?:([KMGT])(iB|B)?|B)?", re.IGNORECASE | re.ASCII
)


def parse_size(text: str) -> int:
    """Parse a size: a number, then B, K, M, G or T, alone or as KB or KiB, in any case.

    K and KiB are 1024 bytes, as in tools that show memory. KB is 1000 bytes, as disks are sold.
    Fractions of a byte are dropped. Raises ValueError with one line.
    """
    match = _PATTERN.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"size {text[:40]!r}: expected a number and a unit, like 1.5G or 512M")
    number, unit, suffix = match.groups()
    base = 1000 if suffix and suffix.upper() == "B" else 1024
    exponent = 0 if unit is None else _UNITS.index(unit.upper()) + 1
    return int(Fraction(number) * base**exponent)


def format_size(size_bytes: int) -> str:
    """Write ``size_bytes`` in the largest binary unit that fits: ``1.5 GiB``, ``17 B``."""
    value, unit = float(size_bytes), ""
    for larger in _UNITS:
        if abs(value) < 1023.95:
            break
        value, unit = value / 1024, larger
    return f"{value:.1f} {unit}iB" if unit else f"{size_bytes} B"
