"""What tokenizer_config.json adds to a tokenizer.json, with the tokens of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Library

from model.errors import TokenizerError
from model.tokenizer import Tokenizer

TOKENS = ("th", "the", "\u0120the", "<|im_end|>", "<|eot|>")
"""The tokens behind the 256 bytes. None of them is an added one."""
THE, SPACE_THE, END, TURN, START, NEXT = 257, 258, 259, 260, 261, 262
"""Their ids, that of the added <s>, and the next one."""


def folder(path: Path, settings: dict[str, Any], **files: Any) -> Path:
    """A folder with a small tokenizer.json, in which <s> is added and special."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate((*letters, *TOKENS))}
    library = Library(models.BPE(vocab, [("t", "h"), ("th", "e"), ("\u0120", "the")]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_tokens([AddedToken("<s>", special=True)])
    library.save(str(path / "tokenizer.json"))
    files["tokenizer_config"] = settings
    for name, values in files.items():
        (path / f"{name}.json").write_text(json.dumps(values))
    return path


def token(content: str, **flags: bool) -> dict[str, Any]:
    names = ("lstrip", "rstrip", "normalized", "single_word", "special")
    return {"content": content} | dict.fromkeys(names, False) | flags


@pytest.mark.parametrize(
    ("settings", "files", "text", "ids"),
    [
        # A special token that is in the vocabulary alone is one token, however it is named.
        ({"eos_token": "<|im_end|>"}, {}, "the<|im_end|>the", [THE, END, THE]),
        ({"eos_token": token("<|eot|>")}, {}, "the<|eot|>", [THE, TURN]),
        ({}, {"special_tokens_map": {"eos_token": "<|eot|>"}}, "the<|eot|>", [THE, TURN]),
        ({"additional_special_tokens": ["<|eot|>"]}, {}, "the<|eot|>", [THE, TURN]),
        ({"turn_token": "<|eot|>"}, {}, "the<|eot|>", [THE, TURN]),
        ({"extra_special_tokens": {"turn_token": "<|eot|>"}}, {}, "the<|eot|>", [THE, TURN]),
        ({"added_tokens_decoder": {END: token("<|im_end|>")}}, {}, "<|im_end|>the", [END, THE]),
        ({}, {"added_tokens": {"<|im_end|>": END}}, "<|im_end|>the", [END, THE]),
        # One that is nowhere else gets the next id.
        ({"added_tokens_decoder": {NEXT: token("<tool>")}}, {}, "the<tool>", [THE, NEXT]),
        ({"extra_special_tokens": ["<tool>"]}, {}, "the<tool>", [THE, NEXT]),
        ({}, {"added_tokens": {"<tool>": NEXT}}, "the<tool>", [THE, NEXT]),
        # The settings say how a token is found, whatever tokenizer.json says.
        (
            {"added_tokens_decoder": {START: token("<s>", rstrip=True, special=True)}},
            {},
            "<s> the",
            [START, THE],
        ),
        ({"split_special_tokens": False}, {}, "<s>the", [START, THE]),
        ({"split_special_tokens": True}, {}, "<s>the", [27, 82, 29, THE]),
        # A space at the beginning is for the settings in some classes, and else for the file.
        ({"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}, {}, "the", [SPACE_THE]),
        ({"tokenizer_class": "RobertaTokenizerFast", "add_prefix_space": True}, {}, "the", [258]),
        (
            {"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": True},
            {},
            "the",
            [257],
        ),
    ],
)
def test_settings_beside_a_tokenizer_change_its_tokens(
    tmp_path: Path, settings: dict[str, Any], files: dict[str, Any], text: str, ids: list[int]
) -> None:
    model = folder(tmp_path, {"tokenizer_class": "PreTrainedTokenizerFast"} | settings, **files)
    assert Tokenizer.load(model).encode(text) == ids


def test_tokens_that_the_settings_call_special_are_left_out_of_text(tmp_path: Path) -> None:
    settings = {
        "eos_token": "<|im_end|>",
        "added_tokens_decoder": {
            str(TURN): token("<|eot|>", special=True),
            str(NEXT): token("<think>"),
            str(START): token("<s>"),
        },
    }
    tokenizer = Tokenizer.load(folder(tmp_path, settings))
    ids = tokenizer.encode("<s>the<think>the<|eot|><|im_end|>")
    assert ids == [START, THE, NEXT, THE, TURN, END]
    assert tokenizer.decode(ids) == "the<think>the"
    assert set(tokenizer.special_ids) == {"<s>", "<|eot|>", "<|im_end|>"}


def bare(path: Path, settings: dict[str, Any]) -> Tokenizer:
    """A tokenizer made from vocab.json and merges.txt of GPT-2's class."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = (*letters, *TOKENS, "<|endoftext|>")
    (path / "vocab.json").write_text(json.dumps({token: at for at, token in enumerate(tokens)}))
    (path / "merges.txt").write_text("#version: 0.2\nt h\nth e\n\u0120 the\n")
    values = {"tokenizer_class": "GPT2Tokenizer"} | settings
    (path / "tokenizer_config.json").write_text(json.dumps(values))
    return Tokenizer.load(path)


def test_a_special_token_that_a_class_has_stays_beside_named_ones(tmp_path: Path) -> None:
    text, default = "the<|im_end|>the<|endoftext|>", 261
    ids = [THE, END, THE, default]
    end: dict[str, Any] = {"eos_token": "<|im_end|>"}
    assert bare(tmp_path, {}).encode("the<|endoftext|>") == [THE, default]
    assert bare(tmp_path, end).encode(text) == ids
    none = {"bos_token": None, "unk_token": None}
    assert bare(tmp_path, none | end).encode("<|endoftext|>") != [default]
    assert len(bare(tmp_path, {"split_special_tokens": True} | end).encode(text)) > len(ids)


@pytest.mark.parametrize(
    ("settings", "files", "said"),
    [
        ({"added_tokens_decoder": {"x": token("<a>")}}, {}, "tokenizer_config.json: added_tokens"),
        ({"added_tokens_decoder": {"9" * 5000: token("<a>")}}, {}, "no object of tokens by id"),
        ({"added_tokens_decoder": {"1": "<a>"}}, {}, "tokenizer_config.json: added_tokens"),
        ({"added_tokens_decoder": {"1": token("\ud800")}}, {}, "no object of tokens by id"),
        ({"eos_token": "\ud800"}, {}, "tokenizer_config.json: .* is no text; fetch it again"),
        ({}, {"added_tokens": {"<a>": "x"}}, "added_tokens.json: not an object of ids by token"),
        ({}, {"added_tokens": [1]}, "added_tokens.json: not an object of ids by token"),
    ],
)
def test_wrong_settings_are_named_and_not_the_tokenizer(
    tmp_path: Path, settings: dict[str, Any], files: dict[str, Any], said: str
) -> None:
    with pytest.raises(TokenizerError, match=said) as error:
        Tokenizer.load(folder(tmp_path, settings, **files))
    assert "tokenizer.json" not in str(error.value)
