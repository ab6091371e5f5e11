"""The GGUF container (llama.cpp's files), versions 2 and 3: strict reading by memory map.

Layout, little-endian: "GGUF", u32 version, u64 number of tensors, u64 number of metadata entries;
the entries (name, u32 type, value); the tensors' names, shapes, types and offsets; after padding,
the tensors' bytes. A string is a u64 length and UTF-8. An array is a u32 type, a u64 length and its
items. Shapes have the innermost size first. A model may be split into files
NAME-00001-of-00003.gguf, of which the first has the metadata.
Source: docs/gguf.md of the ggml project.
"""

from __future__ import annotations

import functools
import hashlib
import math
import mmap
import os
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model.errors import CheckpointError
from model.gguf_types import (
    READ_TYPES,
    TYPES,
    BlockType,
    dequantize,
    kept_codes,
    kept_format,
)
from model.given import foreign_kind, shown
from model.quantize import Format, QuantizedMatrix
from model.safetensors import MAX_TENSOR_BYTES
from model.weights import Rows, StoredTensor

Value = Any
"""A metadata value: bool, int, float, str, an array of numbers, or ``Strings``."""

_MAGIC = b"GGUF"
_MAX_HEADER_BYTES = 128 << 20
"""The header of a model with 262144 tokens has about 15 MB."""
_MAX_ENTRIES = 1 << 16
_MAX_TENSORS = 1 << 18
_MAX_ITEMS = 1 << 22
"""The most items of an array. Half a million merges are the longest known one."""
_MAX_NAME_BYTES = 1 << 16
_MAX_RANK = 4
_MAX_ALIGNMENT = 1 << 20
_MAX_PARTS = 1000

_STRING, _ARRAY = 8, 9
_NUMBERS: Mapping[int, str] = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8",
    11: "<i8", 12: "<f8",
}  # fmt: skip
"""The types of metadata that are numbers."""

_PART = re.compile(r"(?P<name>.*)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Strings:
    """An array of strings, read from the file on request. A vocabulary takes megabytes.

    begin, end: the half-open range of its bytes in the file.
    """

    path: Path
    count: int
    begin: int
    end: int

    def __iter__(self) -> Iterator[str]:
        """Yield the strings. Bytes that are not UTF-8 become replacement characters.

        Raises CheckpointError if the file has changed.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self.begin)
                data = file.read(self.end - self.begin)
        except OSError as error:
            raise _unreadable(self.path, error) from error
        position = 0
        for _ in range(self.count):
            length = int.from_bytes(data[position : position + 8], "little")
            position += 8 + length
            if position > len(data):
                raise CheckpointError(f"{self.path}: changed while it was read")
            yield data[position - length : position].decode("utf-8", "replace")

    def __len__(self) -> int:
        return self.count


@dataclass(frozen=True, slots=True)
class GgufEntry:
    """The place of one tensor. ``begin`` counts from the start of the file.

    shape: outermost size first, as in numpy. A row of a quantized tensor is whole blocks.
    """

    name: str
    kind: BlockType
    shape: tuple[int, ...]
    begin: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A validated header. Tensors are read only on request."""

    path: Path
    metadata: Mapping[str, Value]
    entries: Mapping[str, GgufEntry]
    digest: str
    """SHA-256 of the header."""

    def map_rows(self, name: str) -> npt.NDArray[np.uint8]:
        """Return a tensor's bytes uint8 [rows, bytes of a row], a read-only view of the file.

        All axes but the innermost count as rows. Raises CheckpointError if the file has vanished.
        """
        entry = self.entries[name]
        rows = math.prod(entry.shape[:-1])
        try:
            data = np.memmap(
                self.path, np.uint8, "r", offset=entry.begin, shape=(entry.size_bytes,)
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path}: cannot be read again: {error}") from error
        return data.view(np.ndarray).reshape(rows, -1)


@dataclass(frozen=True, slots=True, eq=False)
class GgufTensor(StoredTensor):
    """A tensor as transformers has it. The steps run in the order of the fields.

    part: half-open range of the stored rows, if it is not all of them. All axes but the innermost
        count as rows.
    pairs: rows are heads this wide, stored with rotary pairs side by side; 0: as they are.
    transposed: the matrix is given [columns, rows].
    shape: that of the result.
    add: a constant that is added.
    """

    file: GgufFile
    name: str
    shape: tuple[int, ...]
    part: tuple[int, int] | None = None
    pairs: int = 0
    transposed: bool = False
    add: float = 0.0

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def dtype(self) -> str:
        return self._entry.kind.name

    @property
    def readable(self) -> bool:
        return self._entry.kind.decode is not None

    def float32(self, rows: Rows = slice(None)) -> npt.NDArray[np.float32]:
        shape = self.shape
        if self.transposed:
            turned: npt.NDArray[np.float32] = self._values(self._rows()).T[rows]
            return turned
        if len(self._entry.shape) == 1 or len(shape) == 1:
            values = self._values(self._rows()).reshape(-1)
            if self.pairs:
                values = _pairs_apart(values, self.pairs)
            return values.reshape(shape)[rows]
        data = self._rows()
        data = data.reshape(shape[0], -1, data.shape[1])[rows]
        return self._values(data.reshape(-1, data.shape[2])).reshape(-1, *shape[1:])

    @property
    def format(self) -> Format | None:
        if len(self.shape) < 2 or self.transposed or self.add:
            return None
        return kept_format(self._entry.kind)

    def codes(self) -> QuantizedMatrix | None:
        if self.format is None:
            return None
        codes = kept_codes(self._entry.kind, self._rows(), self.shape[-1])
        if not np.isfinite(codes.scales()).all():
            raise CheckpointError(
                f"{self.path}: tensor {self.name!r} holds NaN or infinite scales; it is damaged, "
                "fetch it again"
            )
        return codes

    @property
    def _entry(self) -> GgufEntry:
        return self.file.entries[self.name]

    def _rows(self) -> npt.NDArray[np.uint8]:
        """Return the bytes of this tensor's rows in their order, a view if none are moved."""
        data = self.file.map_rows(self.name)
        if self.part is not None:
            data = data[slice(*self.part)]
        return _pairs_apart(data, self.pairs) if self.pairs and len(data) > 1 else data

    def _values(self, data: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        values = dequantize(self._entry.kind, data, self._entry.shape[-1])
        if self.add:
            values = values + np.float32(self.add)
        return values


@dataclass(frozen=True, slots=True, eq=False)
class Alternating(StoredTensor):
    """Two tensors [experts, n, ...] as one [experts, 2 n, ...], whose rows take turns."""

    first: GgufTensor
    second: GgufTensor

    @property
    def path(self) -> Path:
        return self.first.path

    @property
    def shape(self) -> tuple[int, ...]:
        experts, rows, *others = self.first.shape
        return (experts, 2 * rows, *others)

    @property
    def dtype(self) -> str:
        return self.first.dtype

    @property
    def readable(self) -> bool:
        return self.first.readable and self.second.readable

    def float32(self, rows: Rows = slice(None)) -> npt.NDArray[np.float32]:
        both = np.stack((self.first.float32(rows), self.second.float32(rows)), axis=2)
        return both.reshape(-1, *self.shape[1:])

    @property
    def format(self) -> Format | None:
        return self.first.format if self.first.format == self.second.format else None

    def codes(self) -> QuantizedMatrix | None:
        first, second = self.first.codes(), self.second.codes()
        if self.format is None or first is None or second is None:
            return None
        assert first.scale_data is not None  # noqa: S101 - integer formats have scales
        assert second.scale_data is not None  # noqa: S101 - as above
        data = np.stack((first.data, second.data), axis=1)
        scales = np.stack((first.scale_data, second.scale_data), axis=1)
        rows, columns = first.shape
        return QuantizedMatrix(
            (2 * rows, columns),
            first.format,
            data.reshape(2 * rows, *data.shape[2:]),
            scales.reshape(2 * rows, -1),
        )


def _pairs_apart(values: npt.NDArray[Any], width: int) -> npt.NDArray[Any]:
    """Move rows (2 i, 2 i + 1) of each head of ``width`` rows to (i, i + width / 2)."""
    heads = values.reshape(-1, width // 2, 2, *values.shape[1:])
    apart: npt.NDArray[Any] = heads.swapaxes(1, 2).reshape(values.shape)
    return apart


def read_gguf(path: Path) -> GgufFile:
    """Read and check the header of one file. Every offset, size and type in it is valid afterwards.

    Raises CheckpointError that names the file and the fault.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    return _read(path, status.st_size, status.st_mtime_ns)


def read_parts(path: Path) -> tuple[GgufFile, ...]:
    """Read a model's file, and the others if it is split. The first file has the metadata.

    Any part may be given. Raises CheckpointError.
    """
    found = _PART.fullmatch(path.name)
    if found is None:
        file = read_gguf(path)
        parts = _count(file, "split.count")
        if parts > 1:
            raise CheckpointError(
                f"{path}: one of {parts} parts of a model: give the parts their names back, "
                f"like NAME-00001-of-{parts:05}.gguf"
            )
        return (file,)
    count = int(found["parts"])
    if not 0 < count <= _MAX_PARTS:
        raise CheckpointError(f"{path}: the name claims {count} parts, which no model has")
    names = [f"{found['name']}-{part:05}-of-{count:05}.gguf" for part in range(1, count + 1)]
    missing = [name for name in names if not path.with_name(name).exists()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{path.with_name(missing[0])}: missing{more}; all {count} parts must be in one folder"
        )
    files = tuple(read_gguf(path.with_name(name)) for name in names)
    for number, file in enumerate(files):
        if _count(file, "split.count", 1) != count or _count(file, "split.no") != number:
            raise CheckpointError(f"{file.path}: not part {number + 1} of {count}; fetch it again")
    return files


def short_number(value: float) -> float:
    """Return the shortest decimal number that is this float32: 1e-05, not 9.99999974e-06."""
    return float(str(np.float32(value)))


def _count(file: GgufFile, key: str, default: int = 0) -> int:
    value = file.metadata.get(key, default)
    return value if type(value) is int else default


@functools.lru_cache(maxsize=32)
def _read(path: Path, size_bytes: int, _time: int) -> GgufFile:
    """Read a header once for each version of a file. It is asked for many times for each load."""
    try:
        with path.open("rb") as file:
            head = file.read(512)
            if not head.startswith(_MAGIC):
                kind = foreign_kind(head)
                what = f"but {kind}" if kind else "nor its beginning; fetch it again"
                raise CheckpointError(f"{shown(path)}: not a GGUF file, {what}")
            if len(head) < 24:
                raise CheckpointError(f"{path}: too short for a GGUF file; fetch it again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(path, data, os.fstat(file.fileno()).st_size)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


class _Cursor:
    """Reads a header from its start. Raises CheckpointError at its end or for an absurd size."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self._data = data
        self._end = min(len(data), _MAX_HEADER_BYTES)
        self.position = 4

    def take(self, size_bytes: int) -> int:
        """Move on by so many bytes, and return the position before."""
        before = self.position
        if size_bytes > self._end - before:
            where = "beyond its end" if self._end == len(self._data) else "beyond any header's size"
            raise CheckpointError(
                f"{self.path}: the header goes on {where}; truncated or damaged, fetch it again"
            )
        self.position += size_bytes
        return before

    def number(self, form: str) -> int:
        """Return one number of a ``struct`` format."""
        (value,) = struct.unpack_from(form, self._data, self.take(struct.calcsize(form)))
        return int(value)

    def count(self, what: str, most: int) -> int:
        value = self.number("<Q")
        if value > most:
            raise self.wrong(f"claims {value} {what}, which no model has")
        return value

    def text(self) -> str:
        length = self.count("bytes in one name", _MAX_HEADER_BYTES)
        begin = self.take(length)
        return self._data[begin : begin + length].decode("utf-8", "replace")

    def name(self) -> str:
        length = self.count("bytes in one name", _MAX_NAME_BYTES)
        begin = self.take(length)
        try:
            return self._data[begin : begin + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.wrong("has a name that is not UTF-8") from error

    def value(self) -> Value:
        """Return a metadata value with its type before it."""
        kind = self.number("<I")
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self._array()
        return self._numbers(kind, 1)[0].item()

    def _array(self) -> Value:
        kind, length = self.number("<I"), self.count("items in one array", _MAX_ITEMS)
        if kind != _STRING:
            return self._numbers(kind, length)
        begin = self.position
        self._skip_strings(length)
        return Strings(self.path, length, begin, self.position)

    def _skip_strings(self, count: int) -> None:
        """Move behind so many strings, of which a vocabulary has hundreds of thousands."""
        position, last, data, length = self.position, self._end - 8, self._data, struct.Struct("<Q")
        for _ in range(count):
            if position > last:
                break
            position += 8 + length.unpack_from(data, position)[0]
        else:
            if position <= self._end:
                self.position = position
                return
        self.take(self._end)  # It raises, because the strings go on beyond the end.

    def _numbers(self, kind: int, length: int) -> npt.NDArray[Any]:
        if kind not in _NUMBERS:
            what = "arrays in arrays" if kind == _ARRAY else f"metadata of the unknown type {kind}"
            raise self.wrong(f"has {what}")
        dtype = np.dtype(_NUMBERS[kind])
        begin = self.take(length * dtype.itemsize)
        numbers = self._data[begin : self.position]
        if kind == 7 and numbers.strip(b"\x00\x01"):
            raise self.wrong("has a flag that is neither true nor false")
        return np.frombuffer(numbers, dtype)

    def wrong(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: the header {what}; damaged, fetch it again")


def _parse(path: Path, data: mmap.mmap, file_bytes: int) -> GgufFile:
    cursor = _Cursor(path, data)
    _check_version(path, cursor.number("<I"))
    tensors = cursor.count("tensors", _MAX_TENSORS)
    metadata: dict[str, Value] = {}
    for _ in range(cursor.count("metadata entries", _MAX_ENTRIES)):
        key = cursor.name()
        if key in metadata:
            raise cursor.wrong(f"has {key!r} twice")
        metadata[key] = cursor.value()
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 8 <= alignment <= _MAX_ALIGNMENT or alignment % 8:
        raise cursor.wrong(f"has the alignment {alignment!r}, not a multiple of 8")
    places: dict[str, tuple[BlockType, tuple[int, ...], int]] = {}
    for _ in range(tensors):
        name = cursor.name()
        if name in places:
            raise cursor.wrong(f"has the tensor {name!r} twice")
        places[name] = _place(cursor, name, alignment)
    begin = cursor.position + -cursor.position % alignment
    entries = {
        name: GgufEntry(
            name, kind, shape, begin + offset, math.prod(shape) // kind.values * kind.size_bytes
        )
        for name, (kind, shape, offset) in places.items()
    }
    _check_layout(path, entries, file_bytes)
    digest = hashlib.sha256(memoryview(data)[: cursor.position]).hexdigest()
    return GgufFile(path, metadata, entries, digest)


def _check_version(path: Path, version: int) -> None:
    if version in (2, 3):
        return
    if version & 0xFFFF == 0:
        raise CheckpointError(
            f"{path}: a big-endian GGUF file, which is not read; get the usual one"
        )
    raise CheckpointError(
        f"{path}: GGUF version {version}; only versions 2 and 3 are read, get a newer conversion"
    )


def _place(cursor: _Cursor, name: str, alignment: int) -> tuple[BlockType, tuple[int, ...], int]:
    """Read a tensor's shape, type and offset."""
    rank = cursor.number("<I")
    if not 0 < rank <= _MAX_RANK:
        raise cursor.wrong(f"gives tensor {name!r} {rank} axes")
    shape = tuple(cursor.number("<Q") for _ in range(rank))[::-1]
    number, offset = cursor.number("<I"), cursor.number("<Q")
    kind = TYPES.get(number)
    if kind is None:
        raise CheckpointError(
            f"{cursor.path}: tensor {name!r} has the unknown type {number}; "
            f"get another quantization of the model, known: {', '.join(READ_TYPES)}"
        )
    if not all(0 < size < MAX_TENSOR_BYTES for size in shape) or shape[-1] % kind.values:
        raise cursor.wrong(f"gives tensor {name!r} the shape {list(shape)} as {kind.name}")
    if math.prod(shape) // kind.values * kind.size_bytes > MAX_TENSOR_BYTES:
        raise cursor.wrong(f"gives tensor {name!r} the shape {list(shape)} as {kind.name}")
    if offset % alignment or offset > MAX_TENSOR_BYTES * 4:
        raise cursor.wrong(f"puts tensor {name!r} at {offset}, no multiple of {alignment}")
    return kind, shape, offset


def _check_layout(path: Path, entries: Mapping[str, GgufEntry], file_bytes: int) -> None:
    """Check that tensors are inside the file and do not overlap."""
    position = 0
    for entry in sorted(entries.values(), key=lambda item: (item.begin, item.size_bytes)):
        if entry.begin < position:
            raise CheckpointError(
                f"{path}: tensor {entry.name!r} overlaps another; damaged, fetch it again"
            )
        position = entry.begin + entry.size_bytes
    if position > file_bytes:
        raise CheckpointError(
            f"{path}: the header describes {position} bytes, the file has {file_bytes}; "
            "the download is not complete, or it is damaged: fetch it again"
        )


def _unreadable(path: Path, error: OSError | ValueError) -> CheckpointError:
    reason = error.strerror if isinstance(error, OSError) else None
    return CheckpointError(f"{shown(path)}: cannot be read: {reason or error}")
