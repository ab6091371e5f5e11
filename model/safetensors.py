"""The safetensors container: strict reading by memory map, deterministic atomic writing.

Layout: u64 little-endian header length, a JSON header, then the tensors' bytes back to back.
Header: ``{name: {"dtype", "shape", "data_offsets"}, "__metadata__": {str: str}}``.
Source: the format description of the safetensors project (README, "Format").
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import math
import os
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from model.errors import CheckpointError
from model.given import MAX_HEADER_BYTES, foreign_kind

MAX_RANK = 8
MAX_TENSOR_BYTES = 1 << 42

_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
    "F8_E8M0": np.dtype("u1"),
}
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """The place of one tensor. ``begin`` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """A validated header. Tensors are read only on request."""

    path: Path
    header: bytes
    metadata: Mapping[str, str]
    entries: Mapping[str, TensorEntry]

    def map(self, name: str) -> npt.NDArray[Any]:
        """Return a tensor as a read-only view of the file. bf16 and fp8 appear as bit patterns.

        Raises CheckpointError if the file has no such tensor or has vanished.
        """
        entry = self._entry(name)
        dtype = _DTYPES[entry.dtype]
        if entry.size_bytes == 0:
            return np.zeros(entry.shape, dtype)
        try:
            return np.memmap(
                self.path, dtype=dtype, mode="r", offset=entry.begin, shape=entry.shape
            ).view(np.ndarray)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path}: cannot be read again: {error}") from error

    def map_all(self) -> dict[str, npt.NDArray[Any]]:
        """Return all tensors as read-only views of one mapping, which holds one file descriptor.

        Raises CheckpointError if the file vanished or shrank since its header was read.
        """
        try:
            data = np.memmap(self.path, dtype=np.uint8, mode="r").view(np.ndarray)
            return {
                name: data[entry.begin : entry.begin + entry.size_bytes]
                .view(_DTYPES[entry.dtype])
                .reshape(entry.shape)
                for name, entry in self.entries.items()
            }
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path}: cannot be read again: {error}") from error

    def float32(self, name: str, rows: slice = slice(None)) -> npt.NDArray[np.float32]:
        """Return a tensor's values as float32 (a view of the file if it stores F32).

        rows: of the first axis.

        Raises CheckpointError for a tensor that is not F64, F32, F16 or BF16.
        """
        entry = self._entry(name)
        if entry.dtype not in _FLOATS:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is stored as {entry.dtype}; "
                "only unquantized F32, F16 and BF16 weights can be read"
            )
        stored = self.map(name)
        stored = stored[rows] if stored.ndim else stored
        if entry.dtype == "BF16":
            return bfloat16_to_float32(stored)
        return stored.astype(np.float32, copy=False)

    def _entry(self, name: str) -> TensorEntry:
        entry = self.entries.get(name)
        if entry is None:
            raise CheckpointError(f"{self.path}: no tensor {name!r}; is the download complete?")
        return entry


def read_safetensors(path: Path, size_bytes: int | None = None) -> SafetensorsFile:
    """Read and check a header. Every offset, size and dtype in it is valid afterwards.

    size_bytes: of the whole file, if only its beginning may be here.

    Raises CheckpointError that names the file and the fault.
    """
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size if size_bytes is None else size_bytes
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{path}: too short for a safetensors file; fetch it again")
            (header_bytes,) = struct.unpack("<Q", prefix)
            if header_bytes > min(MAX_HEADER_BYTES, file_bytes - 8):
                raise _no_header(path, prefix + file.read(504), header_bytes, file_bytes)
            header = file.read(header_bytes)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(header) != header_bytes:
        raise CheckpointError(f"{path}: header is truncated; fetch the file again")
    fields = _parse_header(path, header)
    metadata = _parse_metadata(path, fields.pop("__metadata__", {}))
    entries = {
        name: _parse_entry(path, name, value, 8 + header_bytes) for name, value in fields.items()
    }
    _check_layout(path, entries, 8 + header_bytes, file_bytes)
    return SafetensorsFile(path, header, metadata, entries)


def encode_header(
    tensors: Mapping[str, npt.NDArray[Any]],
    metadata: Mapping[str, str],
    bfloat16: frozenset[str] = frozenset(),
) -> tuple[bytes, list[str]]:
    """Return the only header that this project writes for these tensors, and their order.

    The widest items come first, then the order is by name. So every tensor is aligned, and the
    bytes depend only on the contents. ``bfloat16`` names uint16 tensors that hold bf16 bit
    patterns.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    fields: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    begin = 0
    for name in order:
        array = tensors[name]
        dtype = "BF16" if name in bfloat16 else _dtype_name(array.dtype)
        end = begin + array.nbytes
        fields[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=True).encode()
    return text + b" " * (-len(text) % 8), order


def write_safetensors(
    path: Path,
    tensors: Mapping[str, npt.NDArray[Any]],
    metadata: Mapping[str, str] | None = None,
    bfloat16: frozenset[str] = frozenset(),
) -> None:
    """Write a file at once, so that readers see the old one or the whole new one.

    Raises CheckpointError if it cannot be written (a full disk). No partial file remains.
    """
    temporary, _, _ = write_temporary(path.parent, tensors, metadata or {}, bfloat16)
    publish(temporary, path)


def write_temporary(
    directory: Path,
    tensors: Mapping[str, npt.NDArray[Any]],
    metadata: Mapping[str, str],
    bfloat16: frozenset[str] = frozenset(),
) -> tuple[Path, str, int]:
    """Write a temporary file in ``directory``; return (path, sha256 as hex, size in bytes).

    The caller passes the path to ``publish``. Raises CheckpointError, and leaves no file then.
    """
    header, order = encode_header(tensors, metadata, bfloat16)
    digest = hashlib.sha256()
    size_bytes = 0
    temporary: Path | None = None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor, temporary_name = tempfile.mkstemp(prefix=".partial-", dir=directory)
        temporary = Path(temporary_name)
        with os.fdopen(descriptor, "wb") as file:
            prefix: list[bytes | memoryview] = [struct.pack("<Q", len(header)), header]
            for piece in itertools.chain(prefix, (_bytes_of(tensors[name]) for name in order)):
                digest.update(piece)
                size_bytes += len(piece)
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _write_error(directory, error) from error
        raise
    return temporary, digest.hexdigest(), size_bytes


def publish(temporary: Path, path: Path) -> None:
    """Rename a temporary file atomically. Raises CheckpointError and removes it on failure."""
    try:
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _write_error(path, error) from error


def bfloat16_to_float32(patterns: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Return the values of bf16 bit patterns, which are the upper halves of float32 patterns."""
    wide = patterns.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def _write_error(path: Path, error: OSError) -> CheckpointError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CheckpointError(f"{path}: the disk is full; free space there and try again")
    return CheckpointError(f"{path}: cannot be written: {error.strerror or error}")


def _bytes_of(array: npt.NDArray[Any]) -> memoryview:
    return memoryview(cast(Any, np.ascontiguousarray(array).reshape(-1).view(np.uint8)))


def _dtype_name(dtype: np.dtype[Any]) -> str:
    for name, known in _DTYPES.items():
        if known == dtype and name != "BF16":
            return name
    raise ValueError(f"safetensors cannot hold {dtype}")


def _no_header(path: Path, head: bytes, header_bytes: int, file_bytes: int) -> CheckpointError:
    """Return the error for a file whose header length is impossible."""
    kind = foreign_kind(head)
    if kind is not None:
        return CheckpointError(f"{path}: not a safetensors file, but {kind}")
    if header_bytes <= MAX_HEADER_BYTES:
        return CheckpointError(
            f"{path}: has {file_bytes} bytes, and its header alone {header_bytes}; "
            "truncated or not a safetensors file, fetch it again"
        )
    return CheckpointError(f"{path}: not a safetensors file, nor its beginning; fetch it again")


def _parse_header(path: Path, header: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            raise ValueError("a key occurs twice")
        return fields

    try:
        fields = json.loads(header.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: header is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: header is not a JSON object")
    return fields


def _parse_metadata(path: Path, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise CheckpointError(f"{path}: __metadata__ must map strings to strings")
    return value


def _parse_entry(path: Path, name: str, value: Any, data_begin: int) -> TensorEntry:
    where = f"{path}: tensor {name!r}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise CheckpointError(f"{where}: dtype {dtype!r} is not supported; known: {list(_DTYPES)}")
    if not _is_sizes(shape) or len(shape) > MAX_RANK:
        raise CheckpointError(f"{where}: shape {shape!r} is not a list of sizes")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets {offsets!r} are not a range")
    size_bytes = math.prod(shape) * _DTYPES[dtype].itemsize
    if size_bytes > MAX_TENSOR_BYTES or size_bytes != offsets[1] - offsets[0]:
        raise CheckpointError(
            f"{where}: {dtype} of shape {shape} has {size_bytes} bytes, "
            f"but its offsets span {offsets[1] - offsets[0]}"
        )
    return TensorEntry(name, dtype, tuple(shape), data_begin + offsets[0], size_bytes)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item <= MAX_TENSOR_BYTES for item in value
    )


def _check_layout(
    path: Path, entries: Mapping[str, TensorEntry], data_begin: int, file_bytes: int
) -> None:
    """Check that tensors cover the data exactly, so that nothing can hide or overlap."""
    position = data_begin
    for entry in sorted(entries.values(), key=lambda item: (item.begin, item.size_bytes)):
        if entry.begin != position:
            kind = "overlaps another" if entry.begin < position else "leaves a gap before it"
            raise CheckpointError(f"{path}: tensor {entry.name!r} {kind}")
        position += entry.size_bytes
    if position != file_bytes:
        raise CheckpointError(
            f"{path}: header describes {position} bytes, the file has {file_bytes}; "
            "truncated or damaged, fetch it again"
        )
