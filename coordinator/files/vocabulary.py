"""The bytes of a model's tokens, for the device that samples and for log-probabilities."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Literal

from coordinator.files.artifacts import ArtifactStore
from model.errors import TokenizerError
from model.grammar_process import GrammarProcess, library_version
from model.spec import ModelSpec
from model.token_bytes import TokenBytes
from model.token_spelling import spell
from model.tokenizer import Tokenizer
from wire.messages import FileRef

log = logging.getLogger(__name__)

CHECKED_GRAMMARS = 64
"""How many grammars are remembered that compiled before."""


class Vocabulary:
    """The tokens of a model as bytes. Threads may share it.

    tokens: the bytes of each token. A special token's are its name.
    special_ids: the ids of special tokens by their names, marks like <think> among them.
    data, ref: the file for the device that samples.
    """

    def __init__(self, tokens: TokenBytes, data: bytes, ref: FileRef, path: Path) -> None:
        """``path`` has ``data``, the file of ``tokens``."""
        self.tokens = tokens.tokens
        self.data = data
        self.ref = ref
        self.special_ids = {
            data.decode(): token
            for token, (data, special) in enumerate(zip(tokens.tokens, tokens.special, strict=True))
            if special
        }
        self._grammars = GrammarProcess(path)
        self.check = functools.lru_cache(CHECKED_GRAMMARS)(self._check)
        """Compiles a grammar, and raises GrammarFailed if a device could not keep to it."""

    def lark(self, form: Literal["regex", "grammar"], text: str) -> str:
        """Return a regular expression, or a grammar in GBNF or Lark, as a grammar in Lark.

        Raises GrammarFailed.
        """
        return self._grammars.lark(form, text)

    def close(self) -> None:
        """End the process that checks grammars."""
        self._grammars.close()

    def _check(self, grammar: str) -> None:
        self._grammars.check(grammar)


def make_vocabulary(
    tokenizer: Tokenizer, spec: ModelSpec, store: ArtifactStore
) -> Vocabulary | None:
    """Return a model's vocabulary, with its file in the store. None if its tokens have no bytes.

    A model without a token that ends answers has none either, because no answer in a format could
    end. Raises OSError, StorageFull.
    """
    if not spec.eos_tokens or not library_version():
        return None
    try:
        tokens = spell(tokenizer.backend, spec.vocab, spec.eos_tokens[0])
    except TokenizerError as error:
        log.info("answers cannot be kept to a format: %s", error)
        return None
    data = tokens.encode()
    ref = store.keep(data)
    return Vocabulary(tokens, data, ref, store.place(ref.sha256))
