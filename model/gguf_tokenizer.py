"""Makes the tokenizer of a GGUF file from its metadata, as llama.cpp does.

Source: docs/gguf.md of the ggml project ("Tokenizer"), and llama.cpp's defaults for absent values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from model.errors import TokenizerError
from model.gguf import GgufFile, Strings, read_parts, short_number
from model.splittings import SPLITTINGS
from model.vocabulary import VocabSettings, tokenizer_from_vocab

_MODELS = ("llama", "gpt2", "t5")
_SPECIAL = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "pad": "padding",
    "sep": "seperator",
    "mask": "mask",
}
"""The names of special tokens in tokenizer_config.json, and in the metadata (as it spells them)."""

_TEMPLATES = {"chat_template": "chat_template", "tool_template": "chat_template.tool_use"}

_SAMPLING = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
    "mirostat": "mirostat",
    "xtc_probability": "xtc_probability",
}
"""The names of recommendations in generation_config.json, and in the metadata."""


def gguf_tokenizer(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Return the tokenizer of a GGUF model, and what its tokenizer_config.json would say.

    The second has the texts of special tokens (``bos_token``), the ``chat_template``, and as
    ``tool_template`` another one for conversations with tools.

    Raises CheckpointError for a damaged file, TokenizerError for a vocabulary that is absent,
    damaged or of an unknown kind.
    """
    file = read_parts(path)[0]
    try:
        return _tokenizer(_Metadata(file))
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from error


def gguf_sampling(path: Path) -> dict[str, float]:
    """Return what a GGUF model's generation_config.json would recommend for drawing tokens.

    Raises CheckpointError for a damaged file.
    """
    metadata = read_parts(path)[0].metadata
    values: dict[str, float] = {}
    for name, key in _SAMPLING.items():
        value = metadata.get(f"general.sampling.{key}")
        if isinstance(value, float):
            values[name] = short_number(value)
        elif type(value) is int:
            values[name] = value
    return values


class _Metadata:
    """The metadata whose names begin with ``tokenizer.``."""

    def __init__(self, file: GgufFile) -> None:
        self._values = file.metadata

    def get(self, key: str, kind: type[Any], default: Any = None) -> Any:
        """Return a value. Raises TokenizerError if it has another type."""
        value = self._values.get(f"tokenizer.{key}", default)
        if value is not default and type(value) is not kind:
            raise TokenizerError(f"tokenizer.{key} in the metadata is no {kind.__name__}")
        return value

    def token(self, name: str) -> int | None:
        value: int | None = self.get(f"ggml.{name}_token_id", int)
        return None if value == 0xFFFFFFFF else value

    def numbers(self, key: str, count: int) -> list[Any] | None:
        """Return a number for each token, or None."""
        values = self.get(f"ggml.{key}", np.ndarray)
        if values is not None and len(values) != count:
            raise TokenizerError(f"tokenizer.ggml.{key} has {len(values)} items for {count} tokens")
        return None if values is None else list(values.tolist())


def _tokenizer(metadata: _Metadata) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    model = metadata.get("ggml.model", str)
    if model not in _MODELS:
        what = "no tokenizer" if model is None else f"a tokenizer of the kind {model[:40]!r}"
        raise TokenizerError(
            f"the file has {what}; known: {', '.join(_MODELS)}: get the model's safetensors"
        )
    found = metadata.get("ggml.tokens", Strings)
    tokens = list(found or ())
    if not tokens:
        raise TokenizerError("the file has a vocabulary without tokens; get another conversion")
    backend = tokenizer_from_vocab(
        tokens,
        kinds=metadata.numbers("token_type", len(tokens)),
        scores=None if model == "gpt2" else metadata.numbers("scores", len(tokens)),
        merges=_merges(metadata) if model == "gpt2" else None,
        settings=_byte_level(metadata) if model == "gpt2" else _sentencepiece(metadata, model),
    )
    special = {
        f"{name}_token": tokens[index]
        for name, stored in _SPECIAL.items()
        if (index := metadata.token(stored)) is not None and 0 <= index < len(tokens)
    }
    templates = {
        name: template
        for name, key in _TEMPLATES.items()
        if (template := metadata.get(key, str)) is not None
    }
    return backend, special | templates


def _byte_level(metadata: _Metadata) -> VocabSettings:
    name = metadata.get("ggml.pre", str, "default")
    splitting = SPLITTINGS.get(name)
    if splitting is None:
        raise TokenizerError(
            f"the splitting {name[:40]!r} of texts (tokenizer.ggml.pre) is not known: "
            "get the model's safetensors"
        )
    bos = metadata.token("bos")
    return VocabSettings(
        "byte_bpe",
        split_patterns=splitting.patterns,
        ignore_merges=splitting.ignore_merges,
        nfc=splitting.nfc,
        text_prefix=metadata.get("ggml.add_space_prefix", bool, False),
        bos=bos,
        eos=metadata.token("eos"),
        add_bos=bos is not None and metadata.get("ggml.add_bos_token", bool, splitting.add_bos),
        add_eos=metadata.get("ggml.add_eos_token", bool, False),
    )


def _sentencepiece(metadata: _Metadata, model: str) -> VocabSettings:
    charsmap = metadata.get("ggml.precompiled_charsmap", np.ndarray)
    is_bpe = model == "llama"
    tokens = {name: metadata.token(name) for name in ("bos", "eos", "unknown")}
    if is_bpe:
        tokens = {name: value if (value := tokens[name]) is not None else default
                  for name, default in (("bos", 1), ("eos", 2), ("unknown", 0))}  # fmt: skip
    return VocabSettings(
        "bpe" if is_bpe else "unigram",
        space_prefix=metadata.get("ggml.add_space_prefix", bool, True),
        extra_spaces_removed=metadata.get("ggml.remove_extra_whitespaces", bool, False),
        charsmap=None if charsmap is None else charsmap.astype(np.uint8).tobytes(),
        unknown=tokens["unknown"],
        bos=tokens["bos"],
        eos=tokens["eos"],
        add_bos=metadata.get("ggml.add_bos_token", bool, is_bpe) and tokens["bos"] is not None,
        add_eos=metadata.get("ggml.add_eos_token", bool, not is_bpe) and tokens["eos"] is not None,
    )


def _merges(metadata: _Metadata) -> list[tuple[str, str]]:
    """Return the pairs. A token may begin with a space, so the first letter divides none."""
    pairs: list[tuple[str, str]] = []
    for merge in metadata.get("ggml.merges", Strings) or ():
        cut = merge.find(" ", 1)
        if cut < 0:
            raise TokenizerError(f"the merge {merge[:40]!r} has no two parts")
        pairs.append((merge[:cut], merge[cut + 1 :]))
    return pairs
