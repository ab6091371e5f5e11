"""Codes of a checkpoint's blocks that a quantizer chose, made once and kept on disk.

``Prepared`` belongs to one checkpoint, quantizer and text, which its ``identity`` covers. A block
is made when it is asked for. Blocks are best asked for in order: the text's rows then pass each
block once. What was made is never made again, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from model.artifact import SHA256, Tensor, read_block, store_block
from model.bounded import read_json
from model.durable import remove, replace_text
from model.errors import CheckpointError, UnsupportedModelError
from model.memory import memory_bytes
from model.passages import built_in_text, passages_of, split_passages
from model.quantize import PREPARED, Format, Quantizer, require_storable
from model.quantizers.blocks import (
    BlockText,
    Tensors,
    needed_bytes,
    prepared_block,
    rounded_block,
)
from model.reference import ReferenceModel

if TYPE_CHECKING:
    from model.checkpoint import Checkpoint

log = logging.getLogger(__name__)

VERSION = 1
"""The version of the quantizers. Another one makes all codes anew."""

MOST_BITS = 6
"""Wider codes are rounded to nearest: what they lose is far below any budget."""

WITHOUT_TEXT: tuple[Quantizer, ...] = ("clip",)
"""Quantizers that look at weights alone."""

SEQUENCE_TOKENS = 512
TEXT_TOKENS = 8192
"""The most tokens of a text that are looked at, and of one sequence."""

TEXT_FILE = "calibration.txt"
"""A text with this name beside a model's weights comes before the built-in one."""

_GIB = 1 << 30

Rows = Any


@dataclass(frozen=True, slots=True)
class Recipe:
    """How codes are chosen: a quantizer, and the token ids of the text that it looks at."""

    quantizer: Quantizer
    sequences: tuple[tuple[int, ...], ...]

    @property
    def text_key(self) -> str:
        """The hash of the text."""
        plain = json.dumps(self.sequences, separators=(",", ":"))
        return hashlib.sha256(plain.encode()).hexdigest()

    def identity(self, fingerprint: str) -> str:
        """Return a hash that differs for other weights, quantizers, versions and texts."""
        parts = [fingerprint, str(VERSION), self.quantizer]
        if self.quantizer not in WITHOUT_TEXT:
            parts.append(self.text_key)
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()


@dataclass(slots=True, eq=False)
class Prepared:
    """The codes of ``checkpoint`` by ``recipe``; any thread may ask for a block.

    directory: holds the codes of all checkpoints. A file that is lost is made again.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    directory: Path
    made: int = 0
    """How many blocks were made since the start, rather than read."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _at: int = 0
    """The block that ``_rows`` enter."""
    _rows: Rows = None
    _text: BlockText | None = None
    """The last block with its rows, for its other widths."""

    @property
    def identity(self) -> str:
        """The name of this checkpoint with these codes, in place of its fingerprint."""
        return self.recipe.identity(self.checkpoint.fingerprint)

    def makes(self, fmt: Format) -> bool:
        """Whether codes of this format are chosen here, or rounded to nearest like others."""
        return fmt.scheme == "rtn" and fmt.bits <= MOST_BITS

    def tensors(self, block: int, fmt: Format) -> Mapping[str, Tensor]:
        """Return all tensors of a block in a format that ``makes`` names.

        Raises CheckpointError for unreadable weights and a full disk.
        """
        with self._lock:
            known = self._known(block, fmt)
            return self._make(block, fmt) if known is None else known

    @property
    def _home(self) -> Path:
        return self.directory / self.identity

    def _known(self, block: int, fmt: Format) -> Mapping[str, Tensor] | None:
        sha256 = self._index().get(f"{block}/{fmt.key}")
        if sha256 is None:
            return None
        path = self._home / sha256
        try:
            return read_block(path, self.checkpoint.spec, block)[1]
        except CheckpointError:
            log.warning("%s is missing or damaged: it is made again", path)
            remove(path)
            return None

    def _index(self) -> dict[str, str]:
        """Return the files that were made by block and format; nothing if the index is damaged."""
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            return {
                str(key): sha256
                for key, sha256 in read_json(self._home / "index.json").items()
                if SHA256.fullmatch(sha256)
            }
        return {}

    def _make(self, block: int, fmt: Format) -> Mapping[str, Tensor]:
        try:
            self._home.mkdir(parents=True, exist_ok=True)
            if self.recipe.quantizer in WITHOUT_TEXT:
                made = rounded_block(self._weights(block), fmt, self.recipe.quantizer)
            else:
                made = prepared_block(self._text_of(block), fmt, self.recipe.quantizer)
            artifact = store_block(self._home, block, made, fmt)
            index = self._index() | {f"{block}/{fmt.key}": artifact.sha256}
            replace_text(self._home / "index.json", json.dumps(index))
        except OSError as error:
            raise CheckpointError(f"{self._home}: {error.strerror or error}") from error
        self.made += 1
        return read_block(artifact.path, self.checkpoint.spec, block)[1]

    def _text_of(self, block: int) -> BlockText:
        """Return a block with the rows that enter it, which pass all blocks before it."""
        if self._text is not None and self._text.block == block:
            return self._text
        spec, lengths = self.checkpoint.spec, [len(one) for one in self.recipe.sequences]
        needed, (free, _) = needed_bytes(spec, sum(lengths)), memory_bytes()
        if needed > free:
            raise UnsupportedModelError(
                f"--scheme {self.recipe.quantizer} needs {needed / _GIB:.1f} GiB of memory here, "
                f"and {free / _GIB:.1f} GiB are free: use --scheme clip or rtn"
            )
        if self._rows is None or self._at > block:
            self._rows = np.concatenate([np.asarray(one) for one in self.recipe.sequences])
            self._at = 0
        if self._text is not None and self._text.block == self._at < block:
            self._rows, self._at = self._text.outputs, self._at + 1
        self._text = None  # Its memory is needed.
        with np.errstate(over="ignore", invalid="ignore"):  # It is refused in one line.
            while self._at < block:
                model = ReferenceModel(spec, [self._weights(self._at)], first_block=self._at)
                rows = model.forward_sequences(self._rows, lengths)
                self._require_finite(self._at, rows)
                self._rows, self._at = rows, self._at + 1
            text = BlockText(spec, block, self._weights(block), self._rows, lengths)
        self._require_finite(block, text.outputs)
        self._text = text
        return text

    def _weights(self, block: int) -> Tensors:
        """Return a block's tensors. Raises CheckpointError that names one that is not finite."""
        tensors = self.checkpoint.block(block)
        for name, tensor in tensors.items():
            where = f"{self.checkpoint.spec.block_name(block)}: {name}"
            require_storable(tensor.reshape(len(tensor), -1), where)
        return tensors

    def _require_finite(self, block: int, rows: Rows) -> None:
        """Raise UnsupportedModelError for outputs of a block that nothing can be learned from."""
        if not np.isfinite(rows).all():
            raise UnsupportedModelError(
                f"--scheme {self.recipe.quantizer}: on its text the outputs of "
                f"{self.checkpoint.spec.block_name(block)} are not finite: use --scheme clip or rtn"
            )

    def rest(self) -> None:
        """Free the rows in memory. The next block is made a little later."""
        with self._lock:
            self._rows = self._text = None


def quantized(
    checkpoint: Checkpoint, quantizer: Quantizer, state_dir: Path, text: str | None = None
) -> Checkpoint:
    """Return a checkpoint whose codes this quantizer chooses. ``rtn`` and others need no wrapping.

    state_dir: keeps the codes, in ``quantized``.
    text: what the quantizer looks at. None: TEXT_FILE beside the model, or else the built-in text.

    Raises ModelError if the tokenizer makes nothing of the text.
    """
    if quantizer not in PREPARED or not checkpoint.tensors:
        return checkpoint
    sequences = () if quantizer in WITHOUT_TEXT else text_sequences(checkpoint, text)
    return checkpoint.quantized_by(
        Prepared(checkpoint, Recipe(quantizer, sequences), state_dir / "quantized")
    )


def text_sequences(checkpoint: Checkpoint, text: str | None) -> tuple[tuple[int, ...], ...]:
    """Return the token ids of a text, or of the text that a model has. Raises ModelError."""
    from model.tokenizer import Tokenizer  # Other schemes do without its library.

    spec, tokenizer = checkpoint.spec, Tokenizer.load(checkpoint.directory)
    passages = built_in_text() if text is None else passages_of(text)
    beside = checkpoint.directory / TEXT_FILE
    if text is None and beside.is_file():
        try:
            passages = passages_of(beside.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{beside}: cannot be read as UTF-8 text: {error}") from error
    encoded = [tokenizer.encode(passage) for passage in passages]
    known = [[token for token in one if token < spec.vocab] for one in encoded]
    sequences = split_passages(known, min(SEQUENCE_TOKENS, spec.max_context), TEXT_TOKENS)
    if not sequences:
        raise UnsupportedModelError(
            "the tokenizer makes no tokens of the text that the scheme looks at: give another one "
            "with --scheme-text FILE"
        )
    return tuple(map(tuple, sequences))
