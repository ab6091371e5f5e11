"""Makes a tokenizer of the ``tokenizers`` library from a plain vocabulary: tokens by their ids.

It comes from a sentencepiece model (model.sentencepiece), from vocab.json and merges.txt
(model.tokenizer_files), or from the metadata of a GGUF file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from model.errors import TokenizerError
from model.splittings import GPT2_PATTERN

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""Sentencepiece's mark of a space."""

MAX_TOKEN_CHARS = 1024
"""More than in any known token. Ways to split a token grow with its length."""


class TokenKind(IntEnum):
    """The kind of a token. Sentencepiece and GGUF have the same numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class VocabSettings:
    """How a vocabulary is used. ``bpe`` and ``unigram`` are sentencepiece's models.

    byte_bpe has tokens in GPT-2's byte letters.
    """

    model: Literal["bpe", "unigram", "byte_bpe"]
    space_prefix: bool = True
    """Whether a text begins with a space that is not in it. Not for byte_bpe."""
    prefix_once: bool = False
    """Whether only the first text has that space, and not each one after a special token."""
    prefix_before_space: bool = True
    """Whether a text that begins with a space of its own has that space, too."""
    extra_spaces_removed: bool = False
    escape_spaces: bool = True
    charsmap: bytes | None = None
    """Sentencepiece's precompiled normalization, or None."""
    user_defined_inside: bool = False
    """Whether user-defined tokens are found after normalization, as sentencepiece does."""
    split_patterns: tuple[str, ...] = (GPT2_PATTERN,)
    """For byte_bpe: regular expressions that split a text, one after the other."""
    text_prefix: bool = False
    """For byte_bpe: whether a text begins with a space."""
    ignore_merges: bool = False
    nfc: bool = False
    unknown: int | None = None
    bos: int | None = None
    eos: int | None = None
    add_bos: bool = False
    add_eos: bool = False


def tokenizer_from_vocab(
    tokens: Sequence[str],
    *,
    kinds: Sequence[int] | None = None,
    scores: Sequence[float] | None = None,
    merges: Sequence[tuple[str, str]] | None = None,
    settings: VocabSettings,
) -> tokenizers.Tokenizer:
    """Make a tokenizer in which ``tokens[i]`` has the id i.

    kinds: TokenKind of each token; None: all are normal.
    scores: of each token, for sentencepiece's models. Of bpe they give the merges, unless these are
    given.

    Raises TokenizerError if the lists do not fit each other.
    """
    kinds = [TokenKind.NORMAL] * len(tokens) if kinds is None else kinds
    _check(tokens, kinds, scores, settings)
    _check_merges(tokens, merges or ())
    # The library reports every other defect of a vocabulary as a bare Exception.
    try:
        if settings.model == "byte_bpe":
            backend = _byte_level(tokens, merges or (), settings)
        else:
            backend = _sentencepiece(tokens, kinds, scores, merges, settings)
    except Exception as error:
        raise TokenizerError(f"the vocabulary is not valid: {' '.join(str(error).split())}") from (
            error
        )
    outside = not settings.user_defined_inside
    backend.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind == TokenKind.CONTROL)
            for token, kind in zip(tokens, kinds, strict=True)
            if token and (kind == TokenKind.CONTROL or (outside and kind == TokenKind.USER_DEFINED))
        ]
    )
    add_ends(
        backend,
        bos=_at(tokens, settings.bos) if settings.add_bos else None,
        eos=_at(tokens, settings.eos) if settings.add_eos else None,
    )
    return backend


def add_ends(backend: tokenizers.Tokenizer, *, bos: str | None, eos: str | None) -> None:
    """Let ``encode`` put these tokens, unless None, before and behind a text.

    Both must be in the vocabulary.
    """
    ends = [token for token in (bos, eos) if token is not None]
    if not ends:
        return
    template = [*([] if bos is None else [bos]), "$A", *([] if eos is None else [eos])]
    backend.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(token, backend.token_to_id(token)) for token in ends]
    )


def _at(tokens: Sequence[str], index: int | None) -> str | None:
    return None if index is None else tokens[index]


def _check(
    tokens: Sequence[str],
    kinds: Sequence[int],
    scores: Sequence[float] | None,
    settings: VocabSettings,
) -> None:
    if not tokens:
        raise TokenizerError("the vocabulary is empty")
    if len(kinds) != len(tokens) or (scores is not None and len(scores) != len(tokens)):
        raise TokenizerError("the vocabulary has other numbers of tokens, of scores and of kinds")
    if settings.model == "unigram" and scores is None:
        raise TokenizerError("the vocabulary has no scores, which a unigram model needs")
    if max(map(len, tokens)) > MAX_TOKEN_CHARS:
        raise TokenizerError(
            f"a token of the vocabulary has more than {MAX_TOKEN_CHARS} characters"
        )
    for name in ("unknown", "bos", "eos"):
        index = getattr(settings, name)
        if index is not None and not 0 <= index < len(tokens):
            raise TokenizerError(f"the {name} token {index} is not among {len(tokens)} tokens")


def _check_merges(tokens: Sequence[str], merges: Sequence[tuple[str, str]]) -> None:
    known = set(tokens)
    for left, right in merges:
        if not {left, right, left + right} <= known:
            raise TokenizerError(
                f"it merges {left!r} and {right!r}, which are not all in the vocabulary;"
                " do its files belong together?"
            )


# ---- byte-level BPE ----------------------------------------------------------------------------


def _byte_level(
    tokens: Sequence[str], merges: Sequence[tuple[str, str]], settings: VocabSettings
) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(
        models.BPE(
            _by_token(tokens),
            list(merges),
            unk_token=_at(tokens, settings.unknown),
            ignore_merges=settings.ignore_merges,
        )
    )
    if settings.nfc:
        backend.normalizer = normalizers.NFC()
    patterns = settings.split_patterns
    own = patterns[-1:] == (GPT2_PATTERN,)  # The library has this one, behind the added space.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(
                pre_tokenizers.Split(Regex(pattern), "isolated")
                for pattern in (patterns[:-1] if own else patterns)
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=settings.text_prefix, use_regex=own),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _by_token(tokens: Sequence[str]) -> dict[str, int]:
    """Map tokens to ids. Of equal tokens the first one counts."""
    return {token: index for index, token in reversed(list(enumerate(tokens)))}


# ---- sentencepiece -----------------------------------------------------------------------------


def _sentencepiece(
    tokens: Sequence[str],
    kinds: Sequence[int],
    scores: Sequence[float] | None,
    merges: Sequence[tuple[str, str]] | None,
    settings: VocabSettings,
) -> tokenizers.Tokenizer:
    byte_fallback = TokenKind.BYTE in kinds
    inside = [
        token
        for token, kind in zip(tokens, kinds, strict=True)
        if kind == TokenKind.USER_DEFINED and token and settings.user_defined_inside
    ]
    merged = kinds
    if not settings.user_defined_inside:
        # The library finds these as they are in the text. Runs of spaces are not, and need merges.
        named = TokenKind.USER_DEFINED
        merged = [TokenKind.NORMAL if kind == named else kind for kind in kinds]
    if settings.model == "unigram":
        assert scores is not None  # noqa: S101 - checked before
        vocab = list(zip(tokens, map(float, scores), strict=True))
        backend = tokenizers.Tokenizer(
            models.Unigram(vocab, unk_id=settings.unknown, byte_fallback=byte_fallback)
        )
    else:
        backend = tokenizers.Tokenizer(
            models.BPE(
                _by_token(tokens),
                merges_by_score(tokens, merged, scores) if merges is None else list(merges),
                unk_token=_at(tokens, settings.unknown),
                fuse_unk=True,
                byte_fallback=byte_fallback,
                ignore_merges=bool(inside) or settings.ignore_merges,
            )
        )
    backend.normalizer = _normalizer(settings)
    steps: list[pre_tokenizers.PreTokenizer] = []
    if settings.space_prefix:
        scheme: Literal["first", "always"] = "first" if settings.prefix_once else "always"
        steps.append(pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False))
    if inside:
        longest_first = sorted(inside, key=len, reverse=True)
        pattern = "|".join(map(re.escape, longest_first))
        steps.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
    if steps:
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = _decoder(settings, byte_fallback=byte_fallback)
    return backend


def _normalizer(settings: VocabSettings) -> normalizers.Normalizer:
    """Return sentencepiece's normalization, in its order."""
    steps: list[normalizers.Normalizer] = []
    if settings.charsmap:
        steps.append(normalizers.Precompiled(settings.charsmap))
    if settings.extra_spaces_removed:  # Spaces only: other whitespace stays.
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if settings.escape_spaces:
        steps.append(normalizers.Replace(" ", SPACE))
    if settings.space_prefix and settings.prefix_before_space:
        # Metaspace adds no space to a text that begins with one.
        steps.append(normalizers.Replace(Regex(rf"\A{SPACE}"), SPACE * 2))
    return normalizers.Sequence(steps)


def _decoder(settings: VocabSettings, *, byte_fallback: bool) -> decoders.Decoder:
    steps: list[decoders.Decoder] = [decoders.Replace(SPACE, " ")]
    if byte_fallback:
        steps.append(decoders.ByteFallback())
    if settings.space_prefix:  # Strip is for each token, so they are joined before.
        steps += [decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    elif byte_fallback:
        steps.append(decoders.Fuse())
    return decoders.Sequence(steps)


def merges_by_score(
    tokens: Sequence[str], kinds: Sequence[int], scores: Sequence[float] | None
) -> list[tuple[str, str]]:
    """Return the merges of a sentencepiece BPE model: all pairs that are a token, the best first.

    Without scores, tokens of lower id are better.
    """
    normal = {
        token: (0.0 if scores is None else -scores[index], index)
        for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind == TokenKind.NORMAL
    }
    ranked = [
        (*rank, normal[left], normal[right], left, right)
        for token, rank in normal.items()
        for cut in range(1, len(token))
        if (left := token[:cut]) in normal and (right := token[cut:]) in normal
    ]
    return [(left, right) for *_, left, right in sorted(ranked)]
