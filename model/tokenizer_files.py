"""Reads the files that a model's tokenizer comes in.

tokenizer.json is what the ``tokenizers`` library writes. The other files hold only a vocabulary.
Its class, which tokenizer_config.json names, says how transformers uses it.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, normalizers, pre_tokenizers

from model.bounded import read_bytes, read_json
from model.errors import TokenizerError
from model.families.embedders import takes_lower_case
from model.given import kind_of_file
from model.sentencepiece import SentencePiece, read_sentencepiece
from model.splittings import QWEN2_PATTERN
from model.template_values import one_line
from model.vocabulary import (
    TokenKind,
    VocabSettings,
    add_ends,
    merges_by_score,
    tokenizer_from_vocab,
)

_Backend = tokenizers.Tokenizer

_PANIC = "PanicException"
"""The library's error for its own faults. No module has it, and it is no Exception."""

MAX_FILE_BYTES = 256 << 20
MAX_ADDED_TOKENS = 1_000_000
MAX_PATTERN_CHARS = 10_000

HOW_TO_CONVERT = (
    'convert it elsewhere: `python -c "from transformers import AutoTokenizer as T;'
    " T.from_pretrained('.').save_pretrained('.')\"` in the folder"
)

_BYTE_LEVEL = {
    "GPT2Tokenizer": VocabSettings("byte_bpe"),
    "CodeGenTokenizer": VocabSettings("byte_bpe"),
    "Qwen2Tokenizer": VocabSettings("byte_bpe", split_patterns=(QWEN2_PATTERN,), nfc=True),
}
"""How transformers' classes use vocab.json and merges.txt."""
_GPT2_MODELS = ("gpt2", "opt", "gpt_neo", "phi", "starcoder2", "gpt_bigcode", "codegen")
_QWEN2_MODELS = ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe")
_CLASSES = {
    **dict.fromkeys(_GPT2_MODELS, "GPT2Tokenizer"),
    **dict.fromkeys(_QWEN2_MODELS, "Qwen2Tokenizer"),
    "llama": "LlamaTokenizer",
    "gemma": "GemmaTokenizer",
    "gemma2": "GemmaTokenizer",
    "gemma3_text": "GemmaTokenizer",
    "bert": "BertTokenizer",
    "distilbert": "DistilBertTokenizer",
    "mpnet": "MPNetTokenizer",
    "roberta": "RobertaTokenizer",
}
"""The class that transformers takes for a type of model whose tokenizer_config.json names none."""
_WORD_PIECES = frozenset(
    ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "MPNetTokenizer")
)
"""The classes for which the settings say how a text is normalized, whatever tokenizer.json says."""
_SPACE_SET = frozenset(("GPT2Tokenizer", "RobertaTokenizer"))
"""The classes for which the settings say whether a text begins with a space (add_prefix_space)."""
_OLD_TEKKEN_SPECIAL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]"),
    *("[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]"),
    *("<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]"),
    *("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)
"""The first tokens of a tekken.json that does not list them."""
_END_OF_TEXT = "<|endoftext|>"
"""The special token of GPT2Tokenizer and Qwen2Tokenizer, unless the settings name others."""


class _SettingsError(Exception):
    """A fault of a file beside the tokenizer, which the message names."""


def is_fault(error: BaseException) -> bool:
    """Whether an error of the library is about its input, and none that ends the program."""
    return isinstance(error, Exception) or type(error).__name__ == _PANIC


def has_tokenizer(directory: Path) -> bool:
    """Whether a folder has one of the files that ``load_backend`` reads."""
    return any((directory / name).exists() for name in _READERS)


def load_backend(
    directory: Path, settings: Mapping[str, Any], special: Mapping[str, str]
) -> _Backend:
    """Make the tokenizer of a model's folder from the first of these files that is there.

    tokenizer.json, tekken.json, tokenizer.model, vocab.json with merges.txt.

    settings: of tokenizer_config.json. special: texts of special tokens, by names like bos_token.
    Raises TokenizerError, or CheckpointError for files of sentence-transformers, that names the
    file and what to do.
    """
    for name, read in _READERS.items():
        path = directory / name
        if not path.exists() or (name == "vocab.json" and not _merges(directory).exists()):
            continue
        # The library reports every defect of a file as a bare Exception, or as a panic.
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise TokenizerError("larger than any tokenizer; is it the right file?")
            backend = read(path, settings, special)
        except BaseException as error:
            if not is_fault(error):
                raise
            if isinstance(error, _SettingsError):
                raise TokenizerError(f"{error}; fetch it again") from error
            wrong = kind_of_file(path)
            if wrong is None and isinstance(error, TokenizerError):
                raise TokenizerError(f"{path}: {error}") from error
            wrong = wrong or f"{one_line(error)}; fetch it again"
            raise TokenizerError(f"{path}: not a valid tokenizer: {wrong}") from error
        if settings.get("split_special_tokens") is True:
            backend.encode_special_tokens = True
        if takes_lower_case(directory):
            given = [] if backend.normalizer is None else [backend.normalizer]
            backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *given])
        return backend
    raise TokenizerError(_missing(directory))


def _missing(directory: Path) -> str:
    """Say what is known about a folder without any of the files."""
    path = directory / "tokenizer.json"
    if path.is_symlink():
        return f"{path}: a link to a file that is missing; fetch the model again"
    for name in ("vocab.json", "merges.txt"):
        if (directory / name).exists():
            other = "merges.txt" if name == "vocab.json" else "vocab.json"
            return f"{directory / other}: missing, which belongs to {name}; fetch it, too"
    for pattern in (
        "*.tiktoken",
        "tokenizer_*.py",
        "tokenization_*.py",
        "vocab.txt",
        "spiece.model",
    ):
        found = sorted(directory.glob(pattern))
        if found:
            return f"{path}: missing, and {found[0].name} is not read; {HOW_TO_CONVERT}"
    return (
        f"{path}: missing; load the tokenizer with transformers elsewhere and save_pretrained it,"
        " or fetch the model's tokenizer.model, or its vocab.json and merges.txt"
    )


def _merges(directory: Path) -> Path:
    return directory / "merges.txt"


# ---- special and added tokens ------------------------------------------------------------------


def _class(directory: Path, settings: Mapping[str, Any]) -> str:
    """Return the class of the tokenizer without "Fast", or "" if nothing says it."""
    name = settings.get("tokenizer_class")
    if isinstance(name, str):
        return name.removesuffix("Fast")
    try:
        config = read_json(directory / "config.json")
        kind = config.get("model_type") if isinstance(config, dict) else None
    except (OSError, ValueError):
        return ""
    return _CLASSES.get(kind, "") if isinstance(kind, str) else ""


def _add_tokens(
    backend: _Backend,
    directory: Path,
    settings: Mapping[str, Any],
    special: Mapping[str, str],
    *,
    ids_hold: bool = True,
) -> None:
    """Add the tokens that the settings have beside the vocabulary.

    Tokens that are in the vocabulary keep their ids, and are found whole in a text from then on.

    ids_hold: raise TokenizerError if a token does not get the id that the settings give it, because
        that is taken or would leave a gap.
    """
    given = sorted(_given_tokens(directory, settings), key=lambda item: item[0])
    if len(given) > MAX_ADDED_TOKENS:
        raise TokenizerError("it has more added tokens than any; is it the right file?")
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for _, token in given:
        old = known.get(token.content)
        if token.content in special.values() or (old is not None and old.special):
            token.special = True
    # Each call sorts all tokens, of which some models have thousands.
    backend.add_tokens([token for _, token in given if _differs(token, known)])
    for index, token in given:
        found = backend.token_to_id(token.content)
        if ids_hold and found != index:
            raise TokenizerError(
                f"the added token {token.content!r} has the id {index} in the settings, where"
                f" {found} would be next; do the files belong together?"
            )
    known |= {token.content: token for _, token in given}
    texts = list(special.values())
    for key in ("additional_special_tokens", "extra_special_tokens"):
        texts += _texts(settings.get(key))
    names = [text for text in dict.fromkeys(texts) if text and text not in known]
    wrong = next((text for text in names if not _is_text(text)), None)
    if wrong is not None:
        path = directory / "tokenizer_config.json"
        raise _SettingsError(f"{path}: {wrong[:40]!r} is named as a special token, and is no text")
    backend.add_tokens([AddedToken(text, special=True) for text in names])


def _differs(token: AddedToken, known: Mapping[str, AddedToken]) -> bool:
    """Whether a token is not among the known ones, or is found in another way."""
    old = known.get(token.content)
    names = ("lstrip", "rstrip", "single_word", "normalized", "special")
    return old is None or any(getattr(token, name) != getattr(old, name) for name in names)


def _given_tokens(directory: Path, settings: Mapping[str, Any]) -> Iterator[tuple[int, AddedToken]]:
    """Yield the added tokens that have an id of their own. Raises _SettingsError."""
    decoder, path = settings.get("added_tokens_decoder"), directory / "tokenizer_config.json"
    if isinstance(decoder, dict):
        for index, token in decoder.items():
            text = token.get("content") if isinstance(token, dict) else None
            if not _INDEX.fullmatch(index) or not _is_text(text):
                raise _SettingsError(f"{path}: added_tokens_decoder is no object of tokens by id")
            names = ("lstrip", "rstrip", "single_word", "normalized", "special")
            flags = {name: token[name] for name in names if isinstance(token.get(name), bool)}
            yield int(index), AddedToken(text, **flags)
        return
    path = directory / "added_tokens.json"
    if path.exists():
        try:
            values = read_json(path)
        except (OSError, ValueError) as error:
            raise _SettingsError(f"{path}: cannot be read: {error}") from error
        if not isinstance(values, dict):
            values = {"": None}
        for text, index in values.items():
            if type(index) is not int or not _is_text(text):
                raise _SettingsError(f"{path}: not an object of ids by token")
            yield index, AddedToken(text, special=False, normalized=False)


_INDEX = re.compile(r"\d{1,9}", re.ASCII)


def _is_text(value: object) -> bool:
    """Whether a token is a text that UTF-8 can hold, which JSON's half surrogates are not."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def _texts(value: Any) -> list[str]:
    """Return the tokens in a list, or in an object by name. Each is a text or an object."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    texts = (item.get("content") if isinstance(item, dict) else item for item in items)
    return [text for text in texts if isinstance(text, str)]


def _ends(
    backend: _Backend,
    settings: Mapping[str, Any],
    special: Mapping[str, str],
    *,
    add_bos: bool = False,
) -> _Backend:
    """Let ``encode`` add the tokens at both ends that the settings ask for.

    add_bos: what holds if the settings do not say.
    """
    bos, eos = special.get("bos_token"), special.get("eos_token")
    wants_bos = settings.get("add_bos_token")
    wants_bos = wants_bos if isinstance(wants_bos, bool) else add_bos
    known = backend.token_to_id
    add_ends(
        backend,
        bos=bos if wants_bos and bos is not None and known(bos) is not None else None,
        eos=eos
        if settings.get("add_eos_token") is True and eos is not None and known(eos) is not None
        else None,
    )
    return backend


# ---- vocab.json and merges.txt -----------------------------------------------------------------


def _byte_level(path: Path, settings: Mapping[str, Any], special: Mapping[str, str]) -> _Backend:
    """Make byte-level BPE from the two files of GPT-2, OPT and Qwen checkpoints."""
    name = _class(path.parent, settings)
    if name not in _BYTE_LEVEL:
        of = f"of the class {name}" if name else "of no known class"
        raise TokenizerError(
            f"a vocabulary {of}, so it is not known how it splits a text; {HOW_TO_CONVERT}"
        )
    values = read_json(path, MAX_FILE_BYTES)
    if not isinstance(values, dict) or any(type(index) is not int for index in values.values()):
        raise ValueError("not an object of ids by token")
    tokens = [""] * len(values)
    for token, index in values.items():
        if not 0 <= index < len(tokens):
            raise ValueError(f"{len(tokens)} tokens, but the id {index}")
        tokens[index] = token
    used = replace(
        _BYTE_LEVEL[name],
        text_prefix=settings.get("add_prefix_space") is True,
    )
    merges = list(_read_merges(_merges(path.parent)))
    backend = tokenizer_from_vocab(tokens, merges=merges, settings=used)
    if name == "Qwen2Tokenizer":
        defaults = {"eos_token": _END_OF_TEXT, "pad_token": _END_OF_TEXT}
    else:
        defaults = dict.fromkeys(("unk_token", "bos_token", "eos_token"), _END_OF_TEXT)
    for key, text in defaults.items():
        if key not in settings and text in values:  # Null means none.
            special = {key: text} | dict(special)
    _add_tokens(backend, path.parent, settings, special)
    return _ends(backend, settings, special)


def _read_merges(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the pairs of merges.txt. Raises OSError, and ValueError that names the line."""
    text = read_bytes(path, MAX_FILE_BYTES).decode()
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        left, separator, right = line.rstrip("\r").partition(" ")
        if not separator or not left or not right or " " in right:
            raise ValueError(f"line {number} of merges.txt is not two parts of a token")
        yield left, right


# ---- tokenizer.model ---------------------------------------------------------------------------


def _sentencepiece(path: Path, settings: Mapping[str, Any], special: Mapping[str, str]) -> _Backend:
    data = read_bytes(path, MAX_FILE_BYTES)
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", data[:200]):
        raise TokenizerError(
            "a tiktoken vocabulary, which does not say how it splits a text; get the model in the"
            " form for transformers, with tokenizer.json"
        )
    piece = read_sentencepiece(data)
    name = _class(path.parent, settings)
    used = _used(piece)
    is_llama = name in ("LlamaTokenizer", "CodeLlamaTokenizer")
    if is_llama or name == "GemmaTokenizer":
        used = replace(used, user_defined_inside=False)
    if is_llama and settings.get("add_prefix_space") is False:
        used = replace(used, space_prefix=False)
    legacy = settings.get("legacy", not is_llama)
    if is_llama or legacy is False:
        used = replace(used, prefix_once=legacy is not True, prefix_before_space=False)
    backend = tokenizer_from_vocab(
        piece.tokens, kinds=piece.kinds, scores=piece.scores, settings=used
    )
    own = {"unk_token": piece.unknown, "bos_token": piece.bos, "eos_token": piece.eos}
    special = {key: piece.tokens[index] for key, index in own.items() if index is not None} | dict(
        special
    )
    _add_tokens(backend, path.parent, settings, special)
    return _ends(backend, settings, special, add_bos=not piece.is_unigram)


def _used(piece: SentencePiece) -> VocabSettings:
    """How sentencepiece itself uses the vocabulary."""
    return VocabSettings(
        "unigram" if piece.is_unigram else "bpe",
        space_prefix=piece.dummy_prefix,
        extra_spaces_removed=piece.extra_spaces_removed,
        escape_spaces=piece.escape_spaces,
        charsmap=piece.charsmap or None,
        user_defined_inside=True,
        unknown=piece.unknown,
    )


# ---- tekken.json -------------------------------------------------------------------------------


def _tekken(path: Path, settings: Mapping[str, Any], special: Mapping[str, str]) -> _Backend:
    """Make byte-level BPE from Mistral's file. Its tokens are bytes by rank, after special ones."""
    values = read_json(path, MAX_FILE_BYTES)
    try:
        config = values["config"]
        pattern, total = str(config["pattern"]), int(config["default_vocab_size"])
        first = int(config["default_num_special_tokens"])
        given = values.get("special_tokens")
        names = dict(enumerate(_OLD_TEKKEN_SPECIAL))
        if given is not None:
            names = {int(item["rank"]): str(item["token_str"]) for item in given}
        items = values["vocab"][: max(total - first, 0)]
        pieces = [base64.b64decode(str(item["token_bytes"]), validate=True) for item in items]
    except (KeyError, TypeError, AttributeError, binascii.Error) as error:
        raise ValueError("not a tekken vocabulary") from error
    if not 0 < first <= MAX_ADDED_TOKENS or len(pattern) > MAX_PATTERN_CHARS:
        raise ValueError("not a tekken vocabulary")
    controls = [names.get(index, f"<SPECIAL_{index}>") for index in range(first)]
    letters = _byte_letters()
    tokens = controls + ["".join(letters[byte] for byte in piece) for piece in pieces]
    kinds = [TokenKind.CONTROL] * first + [TokenKind.NORMAL] * len(pieces)
    used = VocabSettings("byte_bpe", split_patterns=(pattern,), ignore_merges=True)
    backend = tokenizer_from_vocab(
        tokens, kinds=kinds, merges=merges_by_score(tokens, kinds, None), settings=used
    )
    defaults = {"bos_token": "<s>", "eos_token": "</s>"}
    special = {key: text for key, text in defaults.items() if text in controls} | dict(special)
    _add_tokens(backend, path.parent, settings, special)
    return _ends(backend, settings, special, add_bos=True)


def _byte_letters() -> dict[int, str]:
    """Return GPT-2's letter of each byte: the byte's own, or one that can be seen."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in own)
    return {byte: chr(byte) for byte in own} | {
        byte: chr(256 + index) for index, byte in enumerate(others)
    }


def _whole(path: Path, settings: Mapping[str, Any], special: Mapping[str, str]) -> _Backend:
    backend = tokenizers.Tokenizer.from_file(str(path))
    given = backend.normalizer
    is_word_pieces = _class(path.parent, settings) in _WORD_PIECES
    if is_word_pieces and isinstance(given, normalizers.BertNormalizer):
        lower, chinese = settings.get("do_lower_case"), settings.get("tokenize_chinese_chars")
        accents = settings.get("strip_accents")
        backend.normalizer = normalizers.BertNormalizer(
            clean_text=given.clean_text,
            handle_chinese_chars=chinese is not False,
            strip_accents=accents if isinstance(accents, bool) else None,  # None: as lowercase.
            lowercase=lower is not False,
        )
    own, prefix = backend.pre_tokenizer, settings.get("add_prefix_space")
    if (
        _class(path.parent, settings) in _SPACE_SET
        and isinstance(prefix, bool)
        and isinstance(own, pre_tokenizers.ByteLevel)
    ):
        own.add_prefix_space = prefix
        backend.pre_tokenizer = own
    _add_tokens(backend, path.parent, settings, special, ids_hold=False)
    return backend


_READERS: dict[str, Callable[[Path, Mapping[str, Any], Mapping[str, str]], _Backend]] = {
    "tokenizer.json": _whole,
    "tekken.json": _tekken,
    "tokenizer.model": _sentencepiece,
    "vocab.json": _byte_level,
}
