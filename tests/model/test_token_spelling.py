"""The bytes of tokens: those that a text gains by them, and the file of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers

from model.errors import TokenizerError
from model.token_bytes import TokenBytes, decode_token_bytes
from model.token_spelling import spell
from model.tokenizer import Tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures"
FAMILIES = Path(__file__).parents[1] / "families"
TEXT = 'Hello  wörld, {"a": [1, 2.5]}\n\tEnde 🦈 naïve\u200b x'

FOLDERS = [*sorted(FIXTURES.iterdir()), *sorted(path for path in FAMILIES.iterdir())]


@pytest.mark.parametrize(
    "folder",
    [folder for folder in FOLDERS if (folder / "tokenizer.json").exists()],
    ids=lambda folder: folder.name,
)
def test_the_bytes_of_a_texts_tokens_are_the_text(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    vocab = max(tokenizer.backend.get_vocab().values()) + 3
    spelled = spell(tokenizer.backend, vocab, 0)
    assert len(spelled.tokens) == vocab
    assert spelled.tokens[-2:] == (b"", b"")
    tokens = tokenizer.encode(TEXT, add_special=False)
    joined = b"".join(spelled.tokens[token] for token in tokens).decode()
    # A tokenizer of sentencepiece puts a space before the text, and its decoder drops it.
    assert joined.removeprefix(" ") == tokenizer.decode(tokens, skip_special=False)
    assert decode_token_bytes(spelled.encode()) == spelled


def sentencepiece() -> tokenizers.Tokenizer:
    pieces = [
        ("<unk>", 0.0),
        ("▁", -1.0),
        ("▁the", -2.0),
        *[(f"<0x{b:02X}>", -9.0) for b in range(256)],
    ]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0, byte_fallback=True))
    backend.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<end>"])
    return backend


def test_pieces_and_bytes_of_sentencepiece_are_spelled() -> None:
    backend = sentencepiece()
    end = backend.get_vocab()["<end>"]
    spelled = spell(backend, end + 1, end)
    assert spelled.tokens[1:3] == (b" ", b" the")
    assert spelled.tokens[3 + 0xC3] == b"\xc3"
    assert spelled.tokens[end] == b"<end>"
    assert [token for token, special in enumerate(spelled.special) if special] == [end]


@pytest.mark.parametrize(
    "decoder", [None, tokenizers.decoders.WordPiece(), tokenizers.decoders.BPEDecoder()]
)
def test_tokens_without_bytes_of_their_own_are_refused(decoder: object) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, []))
    if decoder is not None:
        backend.decoder = decoder  # type: ignore[assignment]  # one of the library's
    with pytest.raises(TokenizerError, match="no bytes of their own"):
        spell(backend, 2, 0)


def test_a_file_that_is_none_is_refused() -> None:
    whole = TokenBytes((b"a", b"bc", b""), (False, False, True), 2).encode()
    assert decode_token_bytes(whole).tokens == (b"a", b"bc", b"")
    for size in range(len(whole)):
        with pytest.raises(ValueError, match=r"too short|beginning|lengths"):
            decode_token_bytes(whole[:size])
    for at in (0, 8, 12, 16, 22):
        damaged = bytearray(whole)
        damaged[at] ^= 0x7F
        with pytest.raises(ValueError, match=r"beginning|lengths"):
            decode_token_bytes(bytes(damaged))
