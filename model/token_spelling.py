"""The bytes that each token of a tokenizer adds to a text, by the steps of its decoder.

Only the coordinator imports this module, because it needs ``tokenizers``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import tokenizers

from model.errors import TokenizerError
from model.token_bytes import TokenBytes

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_MARK = re.compile(r"<\S+>|\[\S+\]")
"""Marks such as <think> and <tool_call>, which some tokenizers do not call special."""

_LONGEST_BYTES = 0xFFFF

Spell = Callable[[str], bytes]


def spell(backend: tokenizers.Tokenizer, vocab: int, end: int) -> TokenBytes:
    """Return the bytes of all ``vocab`` tokens of a model. ``end`` is the token that ends answers.

    Ids that the tokenizer does not have are empty. Raises TokenizerError if the bytes of a token
    depend on those before it.
    """
    spelling = _spelling(backend)
    tokens, special = [b""] * vocab, [False] * vocab
    for text, token in backend.get_vocab(with_added_tokens=False).items():
        if token < vocab:
            tokens[token] = spelling(text)
    for token, added in backend.get_added_tokens_decoder().items():
        if token < vocab:
            text = added.content
            tokens[token] = text.encode() if added.special else spelling(text)
            special[token] = added.special or _MARK.fullmatch(text) is not None
    if max(map(len, tokens)) > _LONGEST_BYTES:
        raise TokenizerError("a token is longer than any known one")
    special[end] = True
    return TokenBytes(tuple(tokens), tuple(special), end)


def _spelling(backend: tokenizers.Tokenizer) -> Spell:
    """Return what a decoder makes of one token in the middle of a text. Raises TokenizerError."""
    steps = _steps(backend)
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        letters = _byte_letters()
        return lambda text: _of_letters(text, letters)
    known = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
    if not kinds or not set(kinds) <= known:
        raise TokenizerError(
            f"its tokens have no bytes of their own (decoder: {', '.join(kinds) or 'none'})"
        )
    replaced = [_replacement(step) for step in steps if step["type"] in ("Replace", "Metaspace")]
    falls_back = "ByteFallback" in kinds

    def of_pieces(text: str) -> bytes:
        byte = _BYTE_TOKEN.fullmatch(text) if falls_back else None
        if byte is not None:
            return bytes.fromhex(byte[1])
        for old, new in replaced:
            text = text.replace(old, new)
        return text.encode()

    return of_pieces


def _steps(backend: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    """Return the settings of the decoder's steps, in their order."""
    if backend.decoder is None:
        return []
    settings = json.loads(backend.decoder.__getstate__())
    return list(settings.get("decoders") or [settings])


def _replacement(step: Mapping[str, Any]) -> tuple[str, str]:
    if step["type"] == "Metaspace":
        return step["replacement"], " "
    old = step["pattern"].get("String")
    if not old:
        raise TokenizerError("its decoder replaces by a regular expression")
    return old, step["content"]


def _byte_letters() -> dict[str, int]:
    """Map the letters of byte-level BPE to bytes, as GPT-2 defined them."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {chr(byte): byte for byte in plain}
    others = [byte for byte in range(256) if byte not in plain]
    return letters | {chr(256 + index): byte for index, byte in enumerate(others)}


def _of_letters(text: str, letters: Mapping[str, int]) -> bytes:
    """The library keeps a token as it is if one of its letters stands for no byte."""
    if all(letter in letters for letter in text):
        return bytes(letters[letter] for letter in text)
    return text.encode()
