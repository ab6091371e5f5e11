"""Log-probabilities of tokens as bytes: pairs of an int32 id and a float32, little-endian.

They cross the wire as one plain field, so that a token without them costs nothing more.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from wire.errors import ProtocolError

_PAIR = struct.Struct("<if")

MOST_TOP_LOGPROBS = 20
"""The most alternatives to a token, as in OpenAI's API."""

ROUNDING = 1e-3
"""How far above 0 a log-probability may be rounded."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The log-probability of a token, and (id, log-probability) of the likeliest ones."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def encode_logprobs(ids: Iterable[int], values: Iterable[float]) -> bytes:
    """Return the field of these tokens, in their order."""
    return b"".join(_PAIR.pack(token, value) for token, value in zip(ids, values, strict=True))


def decode_logprobs(data: bytes, *, token: int, top: int, vocab: int) -> TokenLogprobs:
    """Return the log-probabilities of ``token`` and of the ``top`` likeliest ones.

    There are fewer if the vocabulary is smaller. Raises ProtocolError if a peer sent anything else.
    """
    if len(data) != _PAIR.size * (1 + min(top, vocab)):
        raise ProtocolError(f"{len(data)} bytes of log-probabilities of {1 + top} tokens")
    pairs: list[tuple[int, float]] = list(_PAIR.iter_unpack(data))
    for index, value in pairs:
        if not 0 <= index < vocab or not math.isfinite(value) or value > ROUNDING:
            raise ProtocolError(f"log-probability {value} of token {index}")
    (first, value), *others = pairs
    if first != token:
        raise ProtocolError(f"log-probabilities of token {first} in place of {token}")
    return TokenLogprobs(token, min(value, 0.0), tuple((i, min(v, 0.0)) for i, v in others))
