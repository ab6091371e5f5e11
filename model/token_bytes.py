"""The bytes that each token adds to an answer, and a file of them.

A device that samples has no tokenizer. It gets this file, if answers may have to keep to a grammar.
Integers are little-endian:

    offset  size       content
    0       8          magic "SHOLTOK1"
    8       4          number of tokens n
    12      4          the id of the token that ends an answer
    16      2 n        length of each token in bytes
    16+2n   n          1 for a special token, whose bytes are its name, else 0
    16+3n   the rest   the bytes of all tokens
"""

from __future__ import annotations

import struct
import sys
from array import array
from dataclasses import dataclass

MAGIC = b"SHOLTOK1"
MAX_BYTES = 16 << 20
"""The largest file. The largest known vocabulary, of 262,144 tokens, takes 2.5 MB."""
_HEAD = struct.Struct("<8sII")


@dataclass(frozen=True, slots=True)
class TokenBytes:
    """The bytes of each token by its id. An id that no token has is empty.

    special: whether each token is a special one. Its bytes are its name, which text never has.
    """

    tokens: tuple[bytes, ...]
    special: tuple[bool, ...]
    end: int

    def encode(self) -> bytes:
        """Return the file. Equal tokens give equal bytes."""
        lengths = array("H", map(len, self.tokens))
        if sys.byteorder == "big":
            lengths.byteswap()
        head = _HEAD.pack(MAGIC, len(self.tokens), self.end)
        return b"".join((head, lengths.tobytes(), bytes(self.special), *self.tokens))


def decode_token_bytes(data: bytes) -> TokenBytes:
    """Read a file, which may come from anyone. Raises ValueError if it is none."""
    if len(data) < _HEAD.size:
        raise ValueError("it is too short")
    magic, count, end = _HEAD.unpack_from(data)
    if magic != MAGIC or end >= count or len(data) < _HEAD.size + 3 * count:
        raise ValueError("it has no valid beginning")
    lengths = array("H", data[_HEAD.size : _HEAD.size + 2 * count])
    if sys.byteorder == "big":
        lengths.byteswap()
    flags = data[_HEAD.size + 2 * count : _HEAD.size + 3 * count]
    if len(data) != _HEAD.size + 3 * count + sum(lengths) or not set(flags) <= {0, 1}:
        raise ValueError("its lengths do not fit")
    tokens, at = [], _HEAD.size + 3 * count
    for length in lengths:
        tokens.append(data[at : at + length])
        at += length
    return TokenBytes(tuple(tokens), tuple(map(bool, flags)), end)
