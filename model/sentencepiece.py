"""Reads tokenizer.model, the file of a sentencepiece model.

It is a message of protocol buffers. The few fields that matter are read here, so that no further
library is needed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from model.errors import TokenizerError
from model.vocabulary import TokenKind

MAX_PIECES = 4_000_000
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_SIZES = {_FIXED64: 8, _FIXED32: 4}
_UNIGRAM, _BPE = 1, 2
_OTHER_MODELS = {3: "word", 4: "char"}


@dataclass(frozen=True, slots=True)
class SentencePiece:
    """The contents of a sentencepiece model. ``tokens``, ``scores`` and ``kinds`` are by id.

    A special token that the model does not have has the id None.
    """

    is_unigram: bool
    tokens: tuple[str, ...]
    scores: tuple[float, ...]
    kinds: tuple[TokenKind, ...]
    unknown: int | None
    bos: int | None
    eos: int | None
    charsmap: bytes
    dummy_prefix: bool
    extra_spaces_removed: bool
    escape_spaces: bool


def read_sentencepiece(data: bytes) -> SentencePiece:
    """Read the bytes of a tokenizer.model. Raises TokenizerError that says what is wrong."""
    try:
        return _model(data)
    except (IndexError, struct.error, UnicodeDecodeError, ValueError) as error:
        raise TokenizerError("it is no sentencepiece model, or damaged: fetch it again") from error


class _Fields(NamedTuple):
    """The fields of a message, by number. Of a repeated field ``numbers`` has the last value."""

    numbers: dict[int, int]
    texts: dict[int, bytes]

    def flag(self, number: int, *, default: bool) -> bool:
        return bool(self.numbers.get(number, default))

    def token(self, number: int, default: int, count: int) -> int | None:
        """An id of a token, or None if it is negative, which means that there is none."""
        value = self.numbers.get(number, default)
        if value >= 1 << 63:
            return None
        if value >= count:
            raise ValueError("a special token is outside of the vocabulary")
        return value


def _model(data: bytes) -> SentencePiece:
    pieces: list[tuple[str, float, TokenKind]] = []
    trainer, normalizer = _Fields({}, {}), _Fields({}, {})
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            pieces.append(_piece(value))
            if len(pieces) > MAX_PIECES:
                raise ValueError("too many pieces")
        elif number == 2 and isinstance(value, bytes):
            trainer = _message(value)
        elif number == 3 and isinstance(value, bytes):
            normalizer = _message(value)
    if not pieces:
        raise ValueError("no pieces")
    kind = trainer.numbers.get(3, _UNIGRAM)
    if kind not in (_UNIGRAM, _BPE):
        name = _OTHER_MODELS.get(kind, f"unknown ({kind})")
        raise TokenizerError(f"a sentencepiece model of the type {name}, not unigram or bpe")
    tokens, scores, kinds = zip(*pieces, strict=True)
    return SentencePiece(
        is_unigram=kind == _UNIGRAM,
        tokens=tokens,
        scores=scores,
        kinds=kinds,
        unknown=trainer.token(40, 0, len(tokens)),
        bos=trainer.token(41, 1, len(tokens)),
        eos=trainer.token(42, 2, len(tokens)),
        charsmap=normalizer.texts.get(2, b""),
        dummy_prefix=normalizer.flag(3, default=True),
        extra_spaces_removed=normalizer.flag(4, default=True),
        escape_spaces=normalizer.flag(5, default=True),
    )


def _piece(data: bytes) -> tuple[str, float, TokenKind]:
    text, score, kind = "", 0.0, TokenKind.NORMAL
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            text = value.decode()
        elif number == 2 and isinstance(value, int):
            (score,) = struct.unpack("<f", struct.pack("<I", value))
        elif number == 3 and isinstance(value, int):
            kind = TokenKind(value)
    if score != score or abs(score) == float("inf"):
        raise ValueError("a score is not finite")
    return text, score, kind


def _message(data: bytes) -> _Fields:
    found = _Fields({}, {})
    for number, value in _fields(data):
        if isinstance(value, int):
            found.numbers[number] = value
        else:
            found.texts[number] = value
    return found


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the number and the value of each field. Integers are unsigned, as they are stored.

    Raises ValueError, IndexError and struct.error for anything else than a message.
    """
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, form = key >> 3, key & 7
        if form == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if form == _BYTES:
            size, at = _varint(data, at)
        elif form in _SIZES:
            size = _SIZES[form]
        else:
            raise ValueError(f"a field of the form {form}")
        if at + size > len(data):
            raise ValueError("it ends within a field")
        raw = data[at : at + size]
        at += size
        yield number, raw if form == _BYTES else int.from_bytes(raw, "little")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the number at an offset, and the offset behind it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (1 << 64) - 1, at
    raise ValueError("a number of more than ten bytes")
