"""The vocabulary of a stage that samples, by which it keeps answers to grammars."""

from __future__ import annotations

from collections.abc import Sequence

from agent.blocks import BlockCache
from backends.base import BackendError
from model.grammar_process import GrammarProcess, library_version
from model.token_bytes import MAX_BYTES
from wire.messages import FileRef, LoadStage


def with_vocabulary(blocks: Sequence[FileRef], vocabulary: FileRef | None) -> Sequence[FileRef]:
    """Return the files that a stage is loaded from.

    Raises BackendError for a vocabulary that is too large to be one.
    """
    if vocabulary is None:
        return blocks
    if vocabulary.size_bytes > MAX_BYTES:
        raise BackendError(f"the coordinator sent a vocabulary of {vocabulary.size_bytes} bytes")
    return (*blocks, vocabulary)


def open_grammars(request: LoadStage, cache: BlockCache) -> GrammarProcess | None:
    """Return what follows grammars, or None if this device cannot. Raises BackendError."""
    if request.vocabulary is None or not library_version():
        return None
    try:
        return GrammarProcess(cache.path(request.vocabulary.sha256))
    except OSError as error:
        raise BackendError(f"the vocabulary cannot be read: {error.strerror}") from error
