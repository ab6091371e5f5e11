"""A Hugging Face model directory, read block by block. Weights stay on disk until requested."""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from model.adapters import NO_ADAPTER, Adapter
from model.artifact import Tensor
from model.errors import CheckpointError, UnsupportedModelError
from model.families import Config, Piece, Source, describe, read_config, tensor_sources
from model.families.quantization import old_settings, read_quantization
from model.families.sources import shape_of
from model.given import ADAPTER, gguf_of
from model.hub import lacks_weights
from model.quantize import Format, QuantizedMatrix, own_format, stack
from model.row_pieces import RowPieces
from model.safetensors import SafetensorsFile
from model.shards import open_shards, open_steps, some, unread_files, wrong_places
from model.spec import QUANTIZED_TENSORS, ModelSpec
from model.weights import PlainTensor, StoredTensor

if TYPE_CHECKING:
    from model.quantizers.prepared import Prepared

log = logging.getLogger(__name__)

_HEADS = ("lm_head.weight", "language_model.lm_head.weight")
"""The names of a separate head, also as a part of a model that sees."""
_RECOMPUTED = (
    "rotary_emb.inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
    "embeddings.position_ids",
    "embeddings.token_type_ids",
    "pooler.dense.weight",
    "pooler.dense.bias",
)
"""The ends of the names of tensors that config.json makes redundant.

The second and third are GPT-2's causal mask, and the next two BERT's numbers of positions. BERT's
pooler is stored with each model, but only a head that classifies texts takes it.
"""
_PIECE = 1 << 22
"""The number of values that are compared at once."""
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h)\.(\d{1,6})\.")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The validated headers of a model's weight files. Use ``open`` to get one.

    ``fingerprint`` changes if any file is replaced, and needs no weights. It is the SHA-256 over
    config.json and each weight file's name, size, modification time and header.
    """

    directory: Path
    spec: ModelSpec
    fingerprint: str
    config: Config
    tensors: Mapping[str, StoredTensor]
    """The stored tensors by the names that transformers gives them."""
    prepared: Prepared | None = None
    """Codes that a quantizer chose. They are in ``kept``, and ``fingerprint`` covers them."""

    @staticmethod
    def open(directory: Path, adapter: str | None = None) -> Checkpoint:
        """Read config.json and all headers, and check every tensor of every block against them.

        directory: a model's folder, or a GGUF file.
        adapter: the folder of a LoRA adapter to merge, NO_ADAPTER to leave out one that lies beside
            the weights, or None. With None, such an adapter is refused.

        Raises CheckpointError for missing, damaged, unsafe or inconsistent files,
        UnsupportedModelError for an architecture or option that is not implemented.
        """
        gguf = gguf_of(directory)
        if gguf is not None:
            checkpoint = _open_gguf(directory, gguf)
        else:
            checkpoint = _open_folder(directory)
            if adapter is None:
                _refuse_adapter(directory)
        if adapter is None or adapter == NO_ADAPTER:
            return checkpoint
        return checkpoint.with_adapter(Adapter.open(Path(adapter)))

    def with_adapter(self, adapter: Adapter) -> Checkpoint:
        """Return this model with a LoRA adapter merged. The fingerprint covers both.

        Raises CheckpointError if the adapter belongs to another model.
        """
        digest = hashlib.sha256(self.fingerprint.encode())
        adapter.feed(digest)
        tensors, spec = adapter.merged(self.tensors), self.spec
        if spec.tied_head and any(map(adapter.replaces, _HEADS)):
            spec = ModelSpec.from_dict(spec.to_dict() | {"tied_head": False})
        merged = replace(self, spec=spec, fingerprint=digest.hexdigest(), tensors=tensors)
        merged._check_tensors()
        return merged

    def quantized_by(self, prepared: Prepared) -> Checkpoint:
        """Return this model with codes that a quantizer chooses, wherever it has none of its own.

        ``model.quantizers.prepared.quantized`` calls it with the codes of this checkpoint.
        """
        return replace(self, prepared=prepared, fingerprint=prepared.identity)

    @staticmethod
    def open_to_plan(directory: Path, adapter: str | None = None) -> Checkpoint:
        """Open a model, or describe it by its config.json alone if its weights are not here yet.

        Without weights ``tensors`` is empty. Raises as ``open``.
        """
        if not lacks_weights(directory):
            return Checkpoint.open(directory, adapter)
        config = read_config(directory)
        fingerprint = _fingerprint(config, {})
        return Checkpoint(directory, describe(config, directory), fingerprint, config, {})

    def block(self, block: int) -> dict[str, npt.NDArray[np.float32]]:
        """Return the canonical tensors of one block (``ModelSpec.block_tensors``) as float32.

        F32 weights are read-only views of the file. Others are converted, which takes the memory of
        one block. Raises CheckpointError if a file has vanished.
        """
        return {canonical: self._read(source) for canonical, source in self._sources(block).items()}

    def kept(self, block: int, fmt: Format) -> Mapping[str, Tensor]:
        """Return the tensors of a block that need no more rounding to have this format.

        They are matrices whose stored codes have it exactly, or all that a quantizer prepared.
        """
        if self.prepared is not None and self.is_prepared(block, fmt):
            return self.prepared.tensors(block, fmt)
        return self.own_codes(block, fmt)

    @property
    def weights_fingerprint(self) -> str:
        """The fingerprint of the weights alone, whatever a quantizer makes of them."""
        return self.fingerprint if self.prepared is None else self.prepared.checkpoint.fingerprint

    def is_prepared(self, block: int, fmt: Format) -> bool:
        """Whether a quantizer chooses the codes of a block in this format."""
        return (
            self.prepared is not None
            and self.prepared.makes(fmt)
            and self.native_format(block) != fmt
        )

    def own_codes(self, block: int, fmt: Format | None = None) -> dict[str, QuantizedMatrix]:
        """Return the matrices of a block whose stored codes one of our formats holds exactly.

        fmt: the only format to look for.
        """
        sources = self._sources(block)
        return {
            canonical: self._codes(sources[canonical])
            for canonical, found in self.kept_formats(block).items()
            if fmt is None or found == fmt
        }

    def kept_formats(self, block: int) -> dict[str, Format]:
        """Return the formats of the matrices in ``own_codes``, without a look at their codes."""
        if not self.tensors:  # Only config.json is here.
            return {}
        found: dict[str, Format] = {}
        for canonical, source in self._sources(block).items():
            formats = {
                self.tensors[piece.name].format if piece.keeps_codes else None for piece in source
            }
            fmt = formats.pop()
            if canonical in QUANTIZED_TENSORS and fmt is not None and not formats:
                found[canonical] = fmt
        return found

    def native_format(self, block: int) -> Format | None:
        """Return the format of most of the weights in ``own_codes``. None: there are none."""
        shapes = self.spec.block_tensors(block)
        weights: dict[Format, int] = {}
        for canonical, fmt in self.kept_formats(block).items():
            weights[fmt] = weights.get(fmt, 0) + math.prod(shapes[canonical])
        return max(weights, key=lambda fmt: (weights[fmt], fmt.key), default=None)

    def native_formats(self) -> dict[int, Format]:
        """Return the blocks that have a ``native_format``, with it."""
        formats = ((block, self.native_format(block)) for block in range(self.spec.block_count))
        return {block: fmt for block, fmt in formats if fmt is not None}

    def format_of(self, block: int, fmt: Format) -> Format:
        """Return the format that a block has at the bits of ``fmt``: the file's own if it has one.

        All that quantizes a block asks here, so that a plan and its files agree.
        """
        return own_format(self.native_format(block), fmt)

    def block_in(self, block: int, fmt: Format) -> dict[str, Tensor | RowPieces]:
        """As ``block``, but with matrices whose stored codes are in exactly ``fmt`` as they are.

        Matrices of several pieces, as those of experts, are read piece by piece.
        """
        kept = self.kept(block, fmt)
        return {
            canonical: kept[canonical] if canonical in kept else self._readable(canonical, source)
            for canonical, source in self._sources(block).items()
        }

    def _readable(self, canonical: str, source: Source) -> npt.NDArray[np.float32] | RowPieces:
        if len(source) == 1 or canonical not in QUANTIZED_TENSORS:
            return self._read(source)
        shapes = [piece.shape_of(self.tensors[piece.name].shape) for piece in source]
        rows, columns = [shape[0] for shape in shapes], shapes[0][1]
        return RowPieces(rows, columns, lambda number: self._values(source[number]))

    def lossless_format(self, block: int) -> Format:
        """Return the narrowest format that keeps a block's weights unchanged.

        It is the file's own if all matrices have it, else 16 or 32 bits. Weights that are not here
        yet are taken for 16 bits, as most are published.
        """
        if not self.tensors:
            return Format.of(16)
        kept = self.kept_formats(block)
        quantized = QUANTIZED_TENSORS & self.spec.block_tensors(block).keys()
        formats = set(kept.values())
        if kept.keys() == quantized and len(formats) == 1:
            return formats.pop()
        wide = any(
            self.tensors[piece.name].dtype not in ("F16", "BF16")
            or piece.scale != 1
            or (piece.add and canonical in QUANTIZED_TENSORS)
            for canonical, source in self._sources(block).items()
            for piece in source
        )
        return Format.of(32 if wide else 16)

    def source_dtypes(self, block: int) -> dict[str, str]:
        """Return what is stored for each canonical tensor of a block: F32, F16, BF16, Q4_K."""
        if not self.tensors:
            return {}
        return {
            canonical: self.tensors[source[0].name].dtype
            for canonical, source in self._sources(block).items()
        }

    def _read(self, source: Source) -> npt.NDArray[np.float32]:
        if len(source) == 1:
            return self._values(source[0])
        # The pieces may be as large as the block, so each is copied before the next is read.
        shapes = [piece.shape_of(self.tensors[piece.name].shape) for piece in source]
        values = np.empty(shape_of(shapes), np.float32)
        begin = 0
        for piece, shape in zip(source, shapes, strict=True):
            values[begin : begin + shape[0]] = self._values(piece)
            begin += shape[0]
        return values

    def _values(self, piece: Piece) -> npt.NDArray[np.float32]:
        """Return the values of a piece. Of what is stored, only its expert or its rows are read."""
        stored = self.tensors[piece.name]
        if piece.index is None:
            if piece.rows is None or piece.transposed:
                return piece.apply(stored.float32())
            return replace(piece, rows=None).apply(stored.float32(slice(*piece.rows)))
        return replace(piece, index=0).apply(stored.float32(slice(piece.index, piece.index + 1)))

    def _codes(self, source: Source) -> QuantizedMatrix:
        """Return the codes of a matrix that ``kept_formats`` names."""
        parts, whole = [], dict[str, QuantizedMatrix]()
        for piece in source:  # Many pieces may be parts of one stored tensor.
            stored = self.tensors[piece.name]
            codes = whole.get(piece.name) or stored.codes()
            if codes is None or codes.format != stored.format:
                raise AssertionError(f"{stored.dtype} promised codes in {stored.format}")
            whole[piece.name] = codes
            parts.append(piece.apply_codes(codes, stored.shape))
        return stack(parts)

    def _sources(self, block: int) -> dict[str, Source]:
        return tensor_sources(self.config, self.spec, block, self.tensors)

    def _check_tensors(self) -> None:
        used: set[str] = set()
        for block in range(self.spec.block_count):
            shapes = self.spec.block_tensors(block)
            sources = self._sources(block)
            for canonical, shape in shapes.items():
                self._check_source(canonical, sources.get(canonical), shape)
                used.update(piece.name for piece in sources[canonical])
            self._check_parts(sources)
        # A bias or norm that the config does not name would be left out unnoticed.
        modules = {name.rpartition(".")[0] for name in used} - {"lm_head"}
        # Other parts of the model, like one that sees, have layers of their own.
        stems = {name[: layer.start(1)] for name in used if (layer := _LAYER.search(name))}
        for name, tensor in self.tensors.items():
            layer = _LAYER.search(name)
            inside = (
                layer is not None
                and name[: layer.start(1)] in stems
                and int(layer[1]) < len(self.spec.layers)
            )
            derived = name.endswith(_RECOMPUTED) or self._is_idle(name, tensor)
            if name not in used and not derived and (inside or name.rpartition(".")[0] in modules):
                raise UnsupportedModelError(
                    f"{self.directory}: tensor {name!r} is not part of the architecture that "
                    f"{self.config.path.name} describes; its options and the weights disagree"
                )
        self._check_tied_head(used)
        unused = [
            name for name in self.tensors if name not in used and not name.endswith(_RECOMPUTED)
        ]
        if unused and self.config.has("text_config"):
            parts = sorted({name.removeprefix("model.").partition(".")[0] for name in unused})
            which = f"{len(unused)} tensors of {some(parts)}"
            note = f"{self.directory}: {which} not used: the language model runs alone"
            _tell(self.fingerprint, note)
        elif unused:
            _tell(
                self.fingerprint,
                f"{self.directory}: {some(unused)} not used: "
                f"{self.config.path.name} describes no such part",
            )

    def _is_idle(self, name: str, tensor: StoredTensor) -> bool:
        """Whether this is a bias of zeros, which old tools stored beside all packed matrices."""
        module, _, kind = name.rpartition(".")
        packed = not isinstance(self.tensors.get(f"{module}.weight"), PlainTensor | None)
        return kind == "bias" and packed and tensor.readable and not tensor.float32().any()

    def _check_tied_head(self, used: set[str]) -> None:
        """Refuse a separate head if config.json says that there is none.

        Versions of transformers differ in which of the two they take.
        """
        head = next((name for name in _HEADS if name in self.tensors), None)
        if not self.spec.tied_head or head is None:
            return
        (piece,) = self._sources(self.spec.head_block)["lm_head.weight"]
        tokens = piece.name
        if not _same_values(self.tensors[head], self.tensors[tokens]):
            raise CheckpointError(
                f"{self.directory}: tie_word_embeddings in config.json says that {head!r} is "
                f"{tokens!r}, but the weights have both and they differ; set tie_word_embeddings "
                f"to false if the head was trained, or remove {head!r}"
            )
        used.add(head)

    def _check_source(
        self, canonical: str, source: Source | None, expected: tuple[int, ...]
    ) -> None:
        """Check that the pieces of a tensor exist, can be read and have the shape of the spec."""
        if source is None:
            raise CheckpointError(f"{self.directory}: no tensor is known for {canonical}")
        shapes = []
        for piece in source:
            tensor = self._stored(piece.name)
            try:
                shapes.append(piece.shape_of(tensor.shape))
            except ValueError as error:
                raise CheckpointError(
                    f"{tensor.path}: tensor {piece.name!r} with shape {list(tensor.shape)} {error}"
                ) from error
        tensor, name = self._stored(source[0].name), source[0].name
        try:
            found = shape_of(shapes)
        except ValueError as error:
            raise CheckpointError(f"{tensor.path}: tensor {name!r} {error}") from error
        if found != expected:
            raise CheckpointError(
                f"{tensor.path}: tensor {name!r} has shape {list(found)}, "
                f"but {self.config.path.name} makes it {list(expected)}"
            )

    def _check_parts(self, sources: Mapping[str, Source]) -> None:
        """Check that a tensor of which rows are read has no others, as sizes would be wrong."""
        parts: dict[Piece, set[tuple[int, int, int] | None]] = {}
        for piece in itertools.chain.from_iterable(sources.values()):
            whole = Piece(piece.name, index=piece.index, transposed=piece.transposed)
            parts.setdefault(whole, set()).add(piece.rows)
        for whole, spans in parts.items():
            read = sum(len(range(*span)) for span in spans if span is not None)
            stored = self.tensors[whole.name]
            rows = whole.shape_of(stored.shape)[0]
            if None not in spans and read != rows:
                raise CheckpointError(
                    f"{stored.path}: tensor {whole.name!r} has {rows} rows, but "
                    f"{self.config.path.name} makes it {read}"
                )

    def _stored(self, name: str) -> StoredTensor:
        tensor = self.tensors.get(name)
        if tensor is None:
            known = sorted({tensor.path.name for tensor in self.tensors.values()})
            raise CheckpointError(
                f"{self.directory}: tensor {name!r} is in none of its files ({some(known)}); "
                "is the download complete, and does config.json belong to it?"
            )
        if not tensor.readable:
            raise CheckpointError(
                f"{tensor.path}: tensor {name!r} is stored as {tensor.dtype}, and config.json does "
                "not say how it is quantized (quantization_config); fetch config.json again"
            )
        return tensor


def _open_folder(directory: Path) -> Checkpoint:
    """Open a model's folder as Hugging Face stores it."""
    config = read_config(directory)
    spec = describe(config, directory)
    shards = open_shards(directory)
    stored: dict[str, PlainTensor] = {}
    for shard in shards.values():
        for name in shard.entries:
            if name in stored:
                raise CheckpointError(
                    f"{shard.path}: tensor {name!r} is also in {stored[name].path.name}"
                )
            stored[name] = PlainTensor(shard, name)
    more = open_steps(directory) if spec.output is not None and spec.output.steps else {}
    for index, shard in enumerate(more.values()):
        stored |= {f"step_{index}.{name}": PlainTensor(shard, name) for name in shard.entries}
    tensors: dict[str, StoredTensor] = dict(stored)
    if read_quantization(config) is not None:
        from model.packed import (
            unpacked,  # Few models are packed, and every start would pay for it.
        )

        tensors = unpacked(config, stored)
    fingerprint = _fingerprint(config, {**shards, **more})
    checkpoint = Checkpoint(directory, spec, fingerprint, config, tensors)
    notes = unread_files(directory, shards), wrong_places(directory, stored)
    for note in filter(None, notes):
        _tell(checkpoint.fingerprint, note)
    checkpoint._check_tensors()
    return checkpoint


def _open_gguf(given: Path, gguf: Path) -> Checkpoint:
    from model.gguf_map import read_model  # Only who gives such a file pays for its reader.

    model = read_model(gguf)
    config = Config(gguf, model.values)
    spec = describe(config, given)
    checkpoint = Checkpoint(given, spec, model.fingerprint, config, model.tensors)
    checkpoint._check_tensors()
    return checkpoint


def _refuse_adapter(directory: Path) -> None:
    """Refuse weights beside an adapter, because the adapter would be left out of every answer.

    transformers reads another base then, and applies the adapter only if peft is installed.
    """
    if (directory / ADAPTER).exists():
        raise CheckpointError(
            f"{directory / ADAPTER}: adapters (LoRA) beside weights are not taken in silence: give "
            f"`--adapter {directory}` to merge it, or `--adapter {NO_ADAPTER}` to run the weights "
            "without it"
        )


@functools.lru_cache(maxsize=256)
def _tell(fingerprint: str, note: str) -> None:
    """Log a line once for a checkpoint, however often it is opened."""
    log.warning("%s", note)


def _same_values(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors hold equal numbers. Reads them in pieces, up to the first difference."""
    if one.shape != other.shape:
        return False
    rows = max(1, _PIECE // max(1, math.prod(one.shape[1:])))
    return all(
        np.array_equal(
            one.float32(slice(first, first + rows)), other.float32(slice(first, first + rows))
        )
        for first in range(0, one.shape[0], rows)
    )


def _fingerprint(config: Config, shards: Mapping[str, SafetensorsFile]) -> str:
    digest = hashlib.sha256()
    try:
        _feed(digest, config.path.read_bytes())
        for path in old_settings(config):
            _feed(digest, path.read_bytes())
        for name, shard in sorted(shards.items()):
            status = shard.path.stat()
            _feed(digest, name.encode())
            _feed(digest, f"{status.st_size} {status.st_mtime_ns}".encode())
            _feed(digest, shard.header)
    except OSError as error:
        raise CheckpointError(f"{error.filename}: vanished while reading it") from error
    return digest.hexdigest()


def _feed(digest: Any, part: bytes) -> None:
    """Add a part after its length, so that different lists of parts never give the same bytes."""
    digest.update(len(part).to_bytes(8, "little") + part)
