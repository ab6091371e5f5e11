"""The widths and schemes of weight matrices, as constants that need no numpy.

``model.quantize`` describes and makes the codes.
"""

from __future__ import annotations

from typing import Literal

Scheme = Literal["rtn", "truncate", "float"]
"""How codes decode."""
Quantizer = Literal["rtn", "truncate", "clip", "gptq", "auto"]
"""How codes are chosen. All but ``truncate`` store groups as ``rtn`` does."""

BITS = (2, 3, 4, 5, 6, 8, 16, 32)
INTEGER_BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
DEFAULT_SCHEME: Literal["rtn"] = "rtn"
PREPARED: tuple[Quantizer, ...] = ("clip", "gptq", "auto")
"""Quantizers that look at the whole block or a text, so that codes are made beforehand.

``model.quantizers`` makes them.
"""
SCHEMES: tuple[Quantizer, ...] = ("rtn", "truncate", *PREPARED)
"""The schemes that a user can choose."""
DEFAULT_GROUP_SIZE = 64
"""Groups of 64 are as accurate at 4 bits as symmetric groups of 32, and faster.

The figures are in docs/performance.md.
"""
