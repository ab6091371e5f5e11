"""A Hugging Face model directory, read block by block: weights stay on disk until asked for."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model.errors import CheckpointError, UnsupportedModelError
from model.families import Config, describe, read_config, tensor_sources
from model.given import INDEX as _INDEX
from model.given import SINGLE as _SINGLE
from model.given import kind_of_file, without_weights
from model.quantize import Format
from model.safetensors import SafetensorsFile, TensorEntry, read_safetensors
from model.spec import ModelSpec

_MAX_INDEX_BYTES = 64 << 20
_FLOATS = ("F32", "F16", "BF16")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d{1,6})\.")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The validated headers of a model's weight files. ``open`` is the way to get one.

    ``fingerprint`` changes when any file is replaced, without reading the weights: SHA-256 over
    config.json and each weight file's name, size, modification time and header.
    """

    directory: Path
    spec: ModelSpec
    fingerprint: str
    config: Config
    files: Mapping[str, SafetensorsFile]
    """Checkpoint tensor name -> the file that holds it."""

    @staticmethod
    def open(directory: Path) -> Checkpoint:
        """Read config.json and all headers; every tensor of every block is checked against them.

        Raises CheckpointError (missing, damaged, unsafe or inconsistent files) or
        UnsupportedModelError (an architecture or option that is not implemented).
        """
        config = read_config(directory)
        spec = describe(config, directory)
        shards = _open_shards(directory)
        files: dict[str, SafetensorsFile] = {}
        for shard in shards.values():
            for name in shard.entries:
                if name in files:
                    raise CheckpointError(
                        f"{shard.path}: tensor {name!r} is also in {files[name].path.name}"
                    )
                files[name] = shard
        checkpoint = Checkpoint(directory, spec, _fingerprint(config, shards), config, files)
        checkpoint._check_tensors()
        return checkpoint

    def block(self, block: int) -> dict[str, npt.NDArray[np.float32]]:
        """Canonical tensors of one block (``ModelSpec.block_tensors``) as float32.

        F32 weights are read-only views of the file, others are converted: the memory needed is
        that of the block. Raises CheckpointError when a file has vanished since.
        """
        return {
            canonical: self.files[source].float32(source)
            for canonical, source in self._sources(block).items()
        }

    def lossless_format(self, block: int) -> Format:
        """The narrowest format that keeps the weights of a block as they are: 16 or 32 bits."""
        wide = "F32" in self.source_dtypes(block).values()
        return Format.of(32 if wide else 16)

    def source_dtypes(self, block: int) -> dict[str, str]:
        """How the checkpoint stores each canonical tensor of a block: F32, F16 or BF16."""
        return {
            canonical: self.files[source].entries[source].dtype
            for canonical, source in self._sources(block).items()
        }

    def _sources(self, block: int) -> dict[str, str]:
        return tensor_sources(self.config, self.spec, block, self.files)

    def _check_tensors(self) -> None:
        used: set[str] = set()
        for block in range(self.spec.block_count):
            shapes = self.spec.block_tensors(block)
            for canonical, source in self._sources(block).items():
                self._check_tensor(source, shapes[canonical])
                used.add(source)
        # A bias or norm that the config does not announce would silently be left out.
        modules = {name.rpartition(".")[0] for name in used} - {"lm_head"}
        for name in self.files:
            layer = _LAYER.search(name)
            inside = layer is not None and int(layer[1]) < len(self.spec.layers)
            derived = name.endswith("rotary_emb.inv_freq")
            if name not in used and not derived and (inside or name.rpartition(".")[0] in modules):
                raise UnsupportedModelError(
                    f"{self.directory}: tensor {name!r} is not part of the architecture that "
                    "config.json describes; its options and the weights disagree"
                )

    def _check_tensor(self, name: str, shape: tuple[int, ...]) -> None:
        file = self.files.get(name)
        if file is None:
            raise CheckpointError(
                f"{self.directory}: tensor {name!r} is in none of its files; "
                "is the download complete, and does config.json belong to it?"
            )
        entry: TensorEntry = file.entries[name]
        if entry.dtype not in _FLOATS:
            raise CheckpointError(
                f"{file.path}: tensor {name!r} is stored as {entry.dtype}; "
                "only F32, F16 and BF16 checkpoints can be read"
            )
        if entry.shape != shape:
            raise CheckpointError(
                f"{file.path}: tensor {name!r} has shape {list(entry.shape)}, "
                f"but config.json makes it {list(shape)}"
            )


def _open_shards(directory: Path) -> dict[str, SafetensorsFile]:
    """Weight files by name. The index wins over a single file, as it names all there is."""
    index = directory / _INDEX
    if index.exists():
        return {name: _open_shard(directory, name) for name in _shard_names(index)}
    if (directory / _SINGLE).exists():
        return {_SINGLE: read_safetensors(directory / _SINGLE)}
    raise without_weights(directory)


def _open_shard(directory: Path, name: str) -> SafetensorsFile:
    if not (directory / name).exists():
        raise CheckpointError(
            f"{directory / name}: missing, but {_INDEX} lists it; complete the download"
        )
    return read_safetensors(directory / name)


def _shard_names(index: Path) -> list[str]:
    """File names an index lists. They must lie beside it: a path would let it read anything."""
    try:
        if index.stat().st_size > _MAX_INDEX_BYTES:
            raise CheckpointError(f"{index}: larger than any index; is it the right file?")
        values: Any = json.loads(index.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{index}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        kind = kind_of_file(index)
        wrong = f"not an index, but {kind}" if kind else f"not valid JSON: {error}; fetch it again"
        raise CheckpointError(f"{index}: {wrong}") from error
    weight_map = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map; fetch it again")
    names: set[str] = set()
    for name in weight_map.values():
        plain = isinstance(name, str) and name.isprintable() and not set(name) & set("/\\:")
        if not plain or not name.endswith(".safetensors") or name.startswith("."):
            raise CheckpointError(
                f"{index}: lists {name!r}; only .safetensors files beside it are read"
            )
        names.add(name)
    return sorted(names)


def _fingerprint(config: Config, shards: Mapping[str, SafetensorsFile]) -> str:
    digest = hashlib.sha256()
    try:
        _feed(digest, config.path.read_bytes())
        for name, shard in sorted(shards.items()):
            status = shard.path.stat()
            _feed(digest, name.encode())
            _feed(digest, f"{status.st_size} {status.st_mtime_ns}".encode())
            _feed(digest, shard.header)
    except OSError as error:
        raise CheckpointError(f"{error.filename}: vanished while reading it") from error
    return digest.hexdigest()


def _feed(digest: Any, part: bytes) -> None:
    """Lengths first, so that no two different lists of parts give the same bytes."""
    digest.update(len(part).to_bytes(8, "little") + part)
