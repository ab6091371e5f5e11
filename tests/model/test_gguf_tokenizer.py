"""Tokenizers of GGUF files, made from vocabularies whose tokens transformers has found.

The metadata is what llama.cpp's converter writes for these vocabularies.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from model.errors import TokenizerError
from model.gguf_tokenizer import gguf_tokenizer
from model.sentencepiece import read_sentencepiece
from model.tokenizer import Tokenizer
from model.vocabulary import TokenKind
from tests.gguf_files import tiny

VOCABULARIES = Path(__file__).parent / "vocabularies"
_END = "<|endoftext|>"
"""The special token of GPT-2, which its settings need not name."""
TEXTS: list[str] = json.loads((VOCABULARIES / "texts.json").read_text())


def golden(name: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((VOCABULARIES / name / "golden.json").read_text())
    return values


def stored(values: dict[str, Any]) -> dict[str, Any]:
    """Return metadata, the names as ``tiny`` takes them."""
    return {f"tokenizer__{key}": value for key, value in values.items()}


def sentencepiece(name: str) -> dict[str, Any]:
    model = read_sentencepiece((VOCABULARIES / name / "tokenizer.model").read_bytes())
    values = {
        "ggml__model": "t5" if model.is_unigram else "llama",
        "ggml__pre": "default",
        "ggml__tokens": list(model.tokens),
        "ggml__scores": [float(score) for score in model.scores],
        "ggml__token_type": [int(kind) for kind in model.kinds],
        "ggml__unknown_token_id": model.unknown,
        "ggml__add_space_prefix": model.dummy_prefix,
    }
    return {key: value for key, value in values.items() if value is not None}


def byte_level(name: str, splitting: str) -> dict[str, Any]:
    folder = VOCABULARIES / name
    vocab = json.loads((folder / "vocab.json").read_text())
    settings = golden(name)["variants"][0]["settings"]
    tokens: dict[int, str] = {index: token for token, index in vocab.items()}
    added = {int(index): item for index, item in settings.get("added_tokens_decoder", {}).items()}
    tokens |= {index: item["content"] for index, item in added.items()}
    added |= {vocab[_END]: {"special": True}} if _END in vocab else {}
    kinds = [
        int(TokenKind.CONTROL if added[index]["special"] else TokenKind.USER_DEFINED)
        if index in added
        else int(TokenKind.NORMAL)
        for index in range(len(tokens))
    ]
    lines = (folder / "merges.txt").read_text().splitlines()
    return {
        "ggml__model": "gpt2",
        "ggml__pre": splitting,
        "ggml__tokens": [tokens[index] for index in range(len(tokens))],
        "ggml__token_type": kinds,
        "ggml__merges": [line for line in lines if line and not line.startswith("#version")],
    }


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_sentencepieces_tokens_are_found(tmp_path: Path, name: str) -> None:
    """Against sentencepiece itself, except texts with special tokens: they are text for it."""
    metadata = sentencepiece(name) | {"ggml__add_bos_token": False}
    file = tiny(**stored(metadata)).write(tmp_path / "x.gguf")
    backend, _ = gguf_tokenizer(file)
    special = [
        token
        for token, kind in zip(metadata["ggml__tokens"], metadata["ggml__token_type"], strict=True)
        if kind in (TokenKind.CONTROL, TokenKind.USER_DEFINED, TokenKind.UNKNOWN, TokenKind.BYTE)
    ]
    expected = {
        text: ids
        for text, ids in zip(TEXTS, golden(name)["reference"], strict=True)
        if not any(token in text for token in special)
    }
    assert len(expected) > 40
    assert {text: backend.encode(text).ids for text in expected} == expected


@pytest.mark.parametrize(("name", "splitting"), [("gpt2", "gpt-2"), ("qwen2", "qwen2")])
def test_byte_level_tokens_are_those_of_transformers(
    tmp_path: Path, name: str, splitting: str
) -> None:
    file = tiny(**stored(byte_level(name, splitting))).write(tmp_path / "x.gguf")
    backend, _ = gguf_tokenizer(file)
    variant = golden(name)["variants"][0]
    found = {text: backend.encode(text).ids for text in TEXTS}
    assert found == dict(zip(TEXTS, variant["ids"], strict=True))


def test_special_tokens_and_template(tmp_path: Path) -> None:
    metadata = sentencepiece("llama") | {
        "ggml__bos_token_id": 1,
        "ggml__eos_token_id": 2,
        "ggml__padding_token_id": 0xFFFFFFFF,
        "ggml__add_eos_token": True,
        "chat_template": "{{ bos_token }}{{ messages[0].content }}",
        "chat_template.tool_use": "tools {{ tools | length }}",
    }
    file = tiny(**stored(metadata)).write(tmp_path / "x.gguf")
    _, settings = gguf_tokenizer(file)
    assert settings == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "chat_template": metadata["chat_template"],
        "tool_template": metadata["chat_template.tool_use"],
    }
    tokenizer = Tokenizer.load(file)
    ids = tokenizer.encode("hi")
    assert (ids[0], ids[-1]) == (1, 2)
    assert ids[1:-1] == tokenizer.encode("hi", add_special=False)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}]) == "<s>hi"
    assert tokenizer.apply_chat_template([], tools=[{}]) == "tools 1"


def test_recommendations_of_sampling(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    changes: dict[str, Any] = {
        "general__sampling__temp": 0.6,
        "general__sampling__top_k": 20,
        "general__sampling__top_p": 0.95,
        "general__sampling__min_p": 0.1,
        "general__sampling__penalty_repeat": 99.0,
        "general__sampling__mirostat": 2,
    }
    path = tiny(**stored(byte_level("gpt2", "gpt-2")), **changes).write(tmp_path / "x.gguf")
    expected = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1}
    assert Tokenizer.load(path).defaults.stated() == expected, "a penalty of 99 is absurd"
    assert "x.gguf: not implemented, so it changes nothing: mirostat" in caplog.text
    assert Tokenizer.load(tmp_path).defaults.stated() == expected
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.3}')
    assert Tokenizer.load(tmp_path).defaults.stated() == {"temperature": 0.3}


def test_a_splitting_may_ask_for_bos(tmp_path: Path) -> None:
    metadata = byte_level("gpt2", "llama-bpe") | {"ggml__bos_token_id": 0}
    backend, _ = gguf_tokenizer(tiny(**stored(metadata)).write(tmp_path / "x.gguf"))
    assert backend.encode("hi").ids[0] == 0
    without = tiny(**stored(metadata | {"ggml__add_bos_token": False})).write(tmp_path / "y.gguf")
    assert gguf_tokenizer(without)[0].encode("hi").ids == backend.encode("hi").ids[1:]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ggml__model": None}, "the file has no tokenizer"),
        ({"ggml__model": "bert"}, "a tokenizer of the kind 'bert'; known: llama, gpt2, t5"),
        ({"ggml__tokens": None}, "a vocabulary without tokens"),
        ({"ggml__tokens": "abc"}, "tokenizer.ggml.tokens in the metadata is no Strings"),
        ({"ggml__token_type": [1]}, "tokenizer.ggml.token_type has 1 items for"),
        ({"ggml__pre": "new-bpe"}, "the splitting 'new-bpe' of texts (tokenizer.ggml.pre)"),
        ({"ggml__merges": ["ab"]}, "the merge 'ab' has no two parts"),
        ({"ggml__merges": ["zz yy"]}, "it merges 'zz' and 'yy', which are not all in"),
        ({"ggml__bos_token_id": 10**6, "ggml__add_bos_token": True}, "the bos token 1000000"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    metadata = byte_level("gpt2", "gpt-2") | changes
    path = tiny(**stored(metadata)).write(tmp_path / "x.gguf")
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.load(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert said in message
    assert "\n" not in message
