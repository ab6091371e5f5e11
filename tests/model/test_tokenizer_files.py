"""Tokenizers made from bare vocabularies find the tokens that transformers finds."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import CheckpointError, TokenizerError
from model.sentencepiece import read_sentencepiece
from model.tokenizer import Tokenizer

VOCABULARIES = Path(__file__).parent / "vocabularies"
TEXTS: list[str] = json.loads((VOCABULARIES / "texts.json").read_text())
GOLDEN = {
    path.name: json.loads((path / "golden.json").read_text())
    for path in sorted(VOCABULARIES.iterdir())
    if path.is_dir()
}
VARIANTS = [
    (name, number) for name, golden in GOLDEN.items() for number in range(len(golden["variants"]))
]


def folder(tmp_path: Path, name: str, config: dict[str, Any] | None = None) -> Path:
    """A copy of the vocabulary, with a tokenizer_config.json."""
    model = Path(shutil.copytree(VOCABULARIES / name, tmp_path / name))
    (model / "golden.json").unlink()
    if config is not None:
        (model / "tokenizer_config.json").write_text(json.dumps(config))
    return model


@pytest.mark.parametrize(("name", "number"), VARIANTS)
def test_tokens_equal_those_of_transformers(tmp_path: Path, name: str, number: int) -> None:
    golden = GOLDEN[name]["variants"][number]
    tokenizer = Tokenizer.load(folder(tmp_path, name, golden["settings"]))
    found = dict(zip(TEXTS, map(tokenizer.encode, TEXTS), strict=True))
    assert found == dict(zip(TEXTS, golden["ids"], strict=True))
    decoded = [tokenizer.decode(ids, skip_special=False) for ids in golden["ids"]]
    assert dict(zip(TEXTS, decoded, strict=True)) == dict(
        zip(TEXTS, golden["decoded"], strict=True)
    )


@pytest.mark.parametrize("name", GOLDEN)
def test_streamed_text_is_the_decoded_text(tmp_path: Path, name: str) -> None:
    golden = GOLDEN[name]["variants"][0]
    tokenizer = Tokenizer.load(folder(tmp_path, name, golden["settings"]))
    for ids in golden["ids"]:
        decoder = tokenizer.stream()
        pieces = [*(decoder.push(token) for token in ids), decoder.finish()]
        assert "".join(pieces) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", GOLDEN)
def test_no_text_has_fewer_tokens_than_is_known_beforehand(tmp_path: Path, name: str) -> None:
    tokenizer = Tokenizer.load(folder(tmp_path, name, GOLDEN[name]["variants"][0]["settings"]))
    for text in TEXTS:
        assert tokenizer.least_tokens(text * 20) <= len(tokenizer.encode(text * 20))


SENTENCEPIECES = [name for name in GOLDEN if "reference" in GOLDEN[name]]
NAMED = ("<s>", "</s>", "<unk>", "<0x41>", "<|im_end|>")
"""Their tokens are special here, and text for sentencepiece."""


@pytest.mark.parametrize("name", SENTENCEPIECES)
def test_a_bare_tokenizer_model_is_used_as_sentencepiece_does(tmp_path: Path, name: str) -> None:
    """U+2581 alone is the exception where spaces are removed: here it is no space.

    Unigram models may find the same pieces in another order, which is as likely.
    """
    tokenizer = Tokenizer.load(folder(tmp_path, name))
    removes_spaces = not tokenizer.encode("  ", add_special=False)
    expected = {
        text: ids
        for text, ids in zip(TEXTS, GOLDEN[name]["reference"], strict=True)
        if not any(special in text for special in NAMED)
        and not (text == "\u2581" and removes_spaces)
    }
    assert len(expected) > 50
    found = {text: tokenizer.encode(text, add_special=False) for text in expected}
    others = [text for text in expected if found[text] != expected[text]]
    assert [text for text in others if sorted(found[text]) != sorted(expected[text])] == []
    assert len(others) <= ("unigram" in name)


def test_a_bare_tokenizer_model_begins_with_its_bos(tmp_path: Path) -> None:
    """Models with sentencepiece's BPE expect it. Their settings say so only sometimes."""
    tokens = Tokenizer.load(folder(tmp_path, "llama")).encode("hi")
    assert tokens[0] == 1
    assert len(tokens) > 1
    without = folder(tmp_path / "b", "llama", {"add_bos_token": False})
    assert Tokenizer.load(without).encode("hi") == tokens[1:]


def test_the_type_of_the_model_tells_how_to_use_a_vocabulary_without_settings(
    tmp_path: Path,
) -> None:
    model = folder(tmp_path, "qwen2")
    with pytest.raises(TokenizerError, match=r"vocab\.json: .*no known class.*save_pretrained"):
        Tokenizer.load(model)
    (model / "config.json").write_text('{"model_type": "qwen3"}')
    decomposed, composed = (Tokenizer.load(model).encode(text) for text in ("e\u0301", "\u00e9"))
    assert decomposed == composed, "Qwen's class composes characters"


TOO_FAR = {"9": {"content": "<far>", "special": True}, "999": {"content": "<gap>"}}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 499723\n"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", {"tokenizer.model": POINTER}, r"tokenizer\.model: .*git lfs pull"),
        ("llama", {"tokenizer.model": ""}, r"tokenizer\.model: it is no sentencepiece model"),
        ("llama", {"tokenizer.model": "IQ== 0\nIg== 1\n"}, "a tiktoken vocabulary, which does not"),
        (
            "llama",
            {"tokenizer_config.json": json.dumps({"added_tokens_decoder": TOO_FAR})},
            "the added token '<far>' has the id 9 in the settings, where 460 would be next",
        ),
        (
            "llama",
            {"added_tokens.json": "[]", "tokenizer_config.json": "{}"},
            r"added_tokens\.json: not an object",
        ),
        ("gpt2", {"vocab.json": '{"a": 7}'}, r"vocab\.json: .*1 tokens, but the id 7"),
        ("gpt2", {"vocab.json": "["}, r"vocab\.json: not a valid tokenizer: .*not valid JSON"),
        (
            "gpt2",
            {"vocab.json": '{"a": 0}'},
            r"vocab\.json: it merges '.+' and '.+', which are not",
        ),
        ("gpt2", {"merges.txt": "a b\na\n"}, r"line 2 of merges\.txt is not two parts"),
        ("gpt2", {"merges.txt": None}, r"merges\.txt: missing, which belongs to vocab\.json"),
        ("gpt2", {"vocab.json": None}, r"vocab\.json: missing, which belongs to merges\.txt"),
        ("tekken", {"tekken.json": "{}"}, "not a valid tokenizer: not a tekken vocabulary; fetch"),
        (
            "tekken",
            {"tekken.json": None, "qwen.tiktoken": ""},
            r"qwen\.tiktoken is not read; convert it elsewhere: .*save_pretrained",
        ),
    ],
)
def test_what_is_wrong_with_a_vocabulary_is_one_line(
    tmp_path: Path, name: str, change: dict[str, str | None], message: str
) -> None:
    model = folder(tmp_path, name, GOLDEN[name]["variants"][0]["settings"])
    for file, text in change.items():
        if text is None:
            (model / file).unlink()
        else:
            (model / file).write_text(text)
    with pytest.raises(TokenizerError, match=message) as caught:
        Tokenizer.load(model)
    assert "\n" not in str(caught.value)


def test_a_model_of_words_is_named() -> None:
    trainer = b"\x18\x03"  # field 3, model_type: word
    piece = b"\x0a\x01a"
    data = b"\x0a" + bytes([len(piece)]) + piece + b"\x12" + bytes([len(trainer)]) + trainer
    with pytest.raises(TokenizerError, match="of the type word, not unigram or bpe"):
        read_sentencepiece(data)


WHOLE = (VOCABULARIES / "llama" / "tokenizer.model").read_bytes()


@given(st.binary(max_size=64), st.integers(0, len(WHOLE)), st.integers(0, len(WHOLE)))
@settings(max_examples=200, deadline=None)
def test_damaged_sentencepiece_models_are_errors(noise: bytes, start: int, end: int) -> None:
    """Whatever the bytes are, they are read or refused."""
    for data in (noise, WHOLE[:end], WHOLE[:start] + noise + WHOLE[end:]):
        with contextlib.suppress(TokenizerError):
            read_sentencepiece(data)


@pytest.mark.parametrize("end", [1, 100, len(WHOLE) - 1])
def test_a_cut_sentencepiece_model_is_refused(end: int) -> None:
    with pytest.raises(TokenizerError, match="no sentencepiece model, or damaged"):
        read_sentencepiece(WHOLE[:end])


@pytest.mark.parametrize("name", ["gpt2", "gemma", "llama", "qwen2", "unigram"])
def test_texts_become_lower_case_if_sentence_transformers_says_so(
    tmp_path: Path, name: str
) -> None:
    model = folder(tmp_path, name, GOLDEN[name]["variants"][0]["settings"])
    texts = ("The LAMP in the Attic", "the lamp in the attic")
    cased = [Tokenizer.load(model).encode_text(text).tokens for text in texts]
    assert cased[0] != cased[1]
    file = model / "sentence_bert_config.json"
    for lowers in (False, True):
        file.write_text(json.dumps({"max_seq_length": 128, "do_lower_case": lowers}))
        found = [Tokenizer.load(model).encode_text(text) for text in texts]
        assert [one.tokens for one in found] == ([cased[1]] * 2 if lowers else cased)
        assert found[0].offsets == found[1].offsets or not lowers
    file.write_text("[]")
    with pytest.raises(CheckpointError, match=r"sentence_bert_config.json: not a JSON object"):
        Tokenizer.load(model)
