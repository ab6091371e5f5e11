"""One block in one format as a content-addressed safetensors file, which devices fetch and cache.

A matrix ``q.weight`` is stored as ``q.weight.codes``, ``.scales`` and (asymmetric) ``.zeros``, or
as ``q.weight`` if the format is float. Tensors outside QUANTIZED_TENSORS are F32. The header is
canonical. So equal contents are equal bytes, and a file has one possible name.
"""

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

from model.errors import CheckpointError
from model.quantize import Format, QuantizedMatrix, quantize
from model.row_pieces import RowPieces
from model.safetensors import (
    SafetensorsFile,
    encode_header,
    publish,
    read_safetensors,
    write_temporary,
)
from model.spec import QUANTIZED_TENSORS, ModelSpec

Tensor = QuantizedMatrix | npt.NDArray[np.float32]

_VERSION = "1"
_KEYS = {"version", "block", "bits", "scheme", "group_size", "symmetric", "shapes"}


def values_of(tensor: Tensor) -> npt.NDArray[np.float32]:
    """Return the values of a stored tensor."""
    return tensor.dequantize() if isinstance(tensor, QuantizedMatrix) else tensor


@dataclass(frozen=True, slots=True)
class Artifact:
    """A written block. ``size_bytes`` is the file, ``payload_bytes`` its tensors without header."""

    sha256: str
    size_bytes: int
    payload_bytes: int
    block: int
    bits: int
    path: Path


def write_artifact(
    directory: Path, block: int, tensors: Mapping[str, Tensor | RowPieces], fmt: Format
) -> Artifact:
    """Quantize a block's tensors and store them as ``directory / <sha256>``, atomically.

    tensors: canonical names to float values, as ``Checkpoint.block`` gives them. Matrices that are
        in ``fmt`` already are stored as they are (``Checkpoint.block_in``).

    Raises CheckpointError for values that cannot be stored, and if the disk is full. No partial
    file remains.
    """
    stored: dict[str, Tensor] = {}
    for name, tensor in sorted(tensors.items()):
        if isinstance(tensor, QuantizedMatrix) and tensor.format == fmt:
            stored[name] = tensor
        elif name in QUANTIZED_TENSORS:
            values = values_of(tensor) if isinstance(tensor, QuantizedMatrix) else tensor
            stored[name] = quantize(values, fmt, name)
        else:
            stored[name] = np.asarray(tensor, np.float32)
    return store_block(directory, block, stored, fmt)


def store_block(
    directory: Path, block: int, tensors: Mapping[str, Tensor], fmt: Format
) -> Artifact:
    """Store matrices that are in the format already, as ``write_artifact`` does."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    shapes: dict[str, list[int]] = {}
    bfloat16: set[str] = set()
    for name, tensor in sorted(tensors.items()):
        if not isinstance(tensor, QuantizedMatrix):
            arrays[name] = _finite(name, tensor)
            continue
        if fmt.scheme == "float":
            arrays[name] = tensor.data
            if tensor.data.dtype == np.uint16:
                bfloat16.add(name)
            continue
        shapes[name] = list(tensor.shape)
        arrays[f"{name}.codes"] = tensor.data
        arrays[f"{name}.scales"] = _present(tensor.scale_data)
        if tensor.zero_data is not None:
            arrays[f"{name}.zeros"] = tensor.zero_data
    temporary, sha256, size_bytes = write_temporary(
        directory, arrays, _metadata(block, fmt, shapes), frozenset(bfloat16)
    )
    path = directory / sha256
    publish(temporary, path)
    payload_bytes = sum(array.nbytes for array in arrays.values())
    return Artifact(sha256, size_bytes, payload_bytes, block, fmt.bits, path)


def read_block(path: Path, spec: ModelSpec, block: int) -> tuple[Format, dict[str, Tensor]]:
    """Return the format and the tensors of a file that may come from a peer, mapped read-only.

    Every size, dtype and scale is checked. The file must hold exactly the tensors of this block.
    Raises CheckpointError.
    """
    stored_block, fmt, tensors = _read(path)
    expected = spec.block_tensors(block)
    if stored_block != block:
        raise CheckpointError(f"{path}: holds block {stored_block}, expected {block}")
    if set(tensors) != set(expected):
        names = sorted(set(tensors) ^ set(expected))
        raise CheckpointError(
            f"{path}: tensors missing or not of {spec.block_name(block)}: {names}"
        )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"{path}: {name} has shape {tensors[name].shape}, the model's is {shape}"
            )
    return fmt, tensors


def read_format(path: Path) -> Format:
    """Return the format that a block file's header names, without a look at the tensors.

    Raises CheckpointError.
    """
    try:
        _, fmt, _ = _parse_metadata(read_safetensors(path).metadata)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a valid block file: {error}; fetch it again") from error
    return fmt


SHA256 = re.compile(r"[0-9a-f]{64}")
"""A hash as hex, which is the name of an artifact. Use ``fullmatch``."""


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hex. Raises CheckpointError if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def _metadata(block: int, fmt: Format, shapes: Mapping[str, list[int]]) -> dict[str, str]:
    return {
        "version": _VERSION,
        "block": str(block),
        "bits": str(fmt.bits),
        "scheme": fmt.scheme,
        "group_size": str(fmt.group_size),
        "symmetric": str(fmt.symmetric).lower(),
        "shapes": json.dumps(shapes, separators=(",", ":"), sort_keys=True),
    }


def _read(path: Path) -> tuple[int, Format, dict[str, Tensor]]:
    file = read_safetensors(path)
    try:
        block, fmt, shapes = _parse_metadata(file.metadata)
        views = file.map_all()
        tensors = _parse_tensors(file, views, fmt, shapes)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a valid block file: {error}; fetch it again") from error
    _check_canonical(file, views)
    return block, fmt, tensors


def _parse_metadata(metadata: Mapping[str, str]) -> tuple[int, Format, dict[str, tuple[int, int]]]:
    if set(metadata) != _KEYS:
        raise ValueError(f"metadata must have exactly the keys {sorted(_KEYS)}")
    if metadata["version"] != _VERSION:
        raise ValueError(f"version {metadata['version']!r} instead of {_VERSION}")
    scheme: Any = metadata["scheme"]
    symmetric = {"true": True, "false": False}.get(metadata["symmetric"])
    if symmetric is None:
        raise ValueError("symmetric must be true or false")
    fmt = Format(_integer(metadata, "bits"), scheme, _integer(metadata, "group_size"), symmetric)
    block = _integer(metadata, "block")
    values = json.loads(metadata["shapes"])
    if not isinstance(values, dict) or not set(values) <= QUANTIZED_TENSORS:
        raise ValueError("shapes must name matrices")
    shapes: dict[str, tuple[int, int]] = {}
    for name, shape in values.items():
        if not isinstance(shape, list) or len(shape) != 2:
            raise ValueError(f"shape of {name} must be two sizes")
        if not all(type(size) is int and 0 < size < 1 << 31 for size in shape):
            raise ValueError(f"shape of {name} must be two sizes")
        shapes[name] = (shape[0], shape[1])
    if metadata != _metadata(block, fmt, {name: list(shape) for name, shape in shapes.items()}):
        raise ValueError("metadata is not in canonical form")
    return block, fmt, shapes


def _parse_tensors(
    file: SafetensorsFile,
    views: Mapping[str, npt.NDArray[Any]],
    fmt: Format,
    shapes: Mapping[str, tuple[int, int]],
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    remaining = set(file.entries)
    for name, shape in shapes.items():
        parts: list[npt.NDArray[Any] | None] = []
        for suffix, kinds in (("codes", "U8"), ("scales", "F16 F32"), ("zeros", "U8")):
            stored = f"{name}.{suffix}"
            if stored not in remaining:
                parts.append(None)
                continue
            remaining.remove(stored)
            if file.entries[stored].dtype not in kinds.split():
                raise ValueError(f"{stored} has dtype {file.entries[stored].dtype}")
            parts.append(views[stored])
        matrix = QuantizedMatrix(shape, fmt, _present(parts[0], name), parts[1], parts[2])
        _finite(f"{name}.scales", _present(matrix.scale_data))
        tensors[name] = matrix
    for name in sorted(remaining):
        dtype, shape_found = file.entries[name].dtype, file.entries[name].shape
        if name in QUANTIZED_TENSORS:
            if fmt.scheme != "float" or len(shape_found) != 2:
                raise ValueError(f"{name} is not stored in the file's format")
            if dtype not in (("F16", "BF16") if fmt.bits == 16 else ("F32",)):
                raise ValueError(f"{name} has dtype {dtype} in a file of {fmt.bits} bits")
            tensors[name] = QuantizedMatrix((shape_found[0], shape_found[1]), fmt, views[name])
        elif dtype == "F32":
            tensors[name] = _finite(name, views[name])
        else:
            raise ValueError(f"{name} has dtype {dtype} instead of F32")
    return tensors


def _check_canonical(file: SafetensorsFile, views: Mapping[str, npt.NDArray[Any]]) -> None:
    """Check that the header is the one that ``write_artifact`` writes. One content is one file."""
    bfloat16 = frozenset(name for name, entry in file.entries.items() if entry.dtype == "BF16")
    header, _ = encode_header(views, file.metadata, bfloat16)
    if header != file.header:
        raise CheckpointError(f"{file.path}: header is not in canonical form; fetch it again")


def _integer(metadata: Mapping[str, str], key: str) -> int:
    text = metadata[key]
    if not text.isascii() or not text.isdigit() or len(text) > 6:
        raise ValueError(f"{key} must be a number, not {text!r}")
    return int(text)


def _finite(name: str, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if not np.isfinite(values).all():
        raise CheckpointError(f"{name} holds NaN or infinite values; the file is damaged")
    return values


def _present(array: npt.NDArray[Any] | None, name: str = "matrix") -> npt.NDArray[Any]:
    if array is None:
        raise ValueError(f"{name} has no codes or no scales")
    return array
