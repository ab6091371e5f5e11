"""Writes .tflite files that hold one int8 matrix product, without TensorFlow.

Each file is one FULLY_CONNECTED operator without bias on one row: int8 [1, K] to int8 [1, N]. The
runtime runs n rows after resizing its input to [n, K]. `edgetpu_compiler` takes one row only.

Source: TensorFlow Lite's schema.fbs, version 3. The numbers below are positions and codes in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import flatbuffers
import numpy as np
import numpy.typing as npt
from flatbuffers.number_types import UOffsetTFlags

SCALE = 1 / 127
"""The step of inputs and outputs, which are numbers in [-1, 1]."""

FILE_IDENTIFIER = b"TFL3"
SCHEMA_VERSION = 3

_FULLY_CONNECTED = 9
_FULLY_CONNECTED_VERSION = 4
"""The version that has int8 with a scale per row.

tflite-runtime 2.14 does not know version 11 and later. The last edgetpu_compiler (2021) is older.
"""

_FULLY_CONNECTED_OPTIONS = 8
_INT8 = 9
_NO_TENSOR = -1
_MIN_RUNTIME_VERSION = b"1.14.0".ljust(16, b"\0")
_ALIGNMENT = 16
_OVERHEAD_BYTES = 4096


@dataclass(frozen=True, slots=True)
class TfliteFile:
    """A file's content, and the offset of its weights: int8 [N, K], row after row."""

    content: bytes
    weights_offset: int


def fully_connected(weights: npt.NDArray[np.int8], scales: npt.NDArray[np.float32]) -> TfliteFile:
    """Return the file that computes y = clip(round(x @ weights.T * scales)) on codes of step SCALE.

    weights: int8 [N, K], never -128.
    scales: float32 [N], the factors that turn sums of code products into output codes.
    """
    rows, columns = weights.shape
    builder = flatbuffers.Builder(weights.nbytes + 8 * rows + _OVERHEAD_BYTES)
    # Children come before their parents. Buffer 0 is empty by convention.
    stored = _bytes(builder, weights.tobytes())
    minimum = _bytes(builder, _MIN_RUNTIME_VERSION)
    buffers = _tables(
        builder, [[], [(0, _offset(builder, stored))], [(0, _offset(builder, minimum))]]
    )
    step = np.array([SCALE], np.float32)
    tensors = _tables(
        builder,
        [
            _tensor(builder, "x", (1, columns), 0, step),
            _tensor(builder, "weights", (rows, columns), 1, scales),
            _tensor(builder, "y", (1, rows), 0, step),
        ],
    )
    # The defaults: no fused activation, plain weights, 2-D output.
    options = _table(builder, [])
    operator = [
        (1, _integers(builder, (0, 1, _NO_TENSOR))),
        (2, _integers(builder, (2,))),
        (3, lambda slot: builder.PrependUint8Slot(slot, _FULLY_CONNECTED_OPTIONS, 0)),
        (4, _offset(builder, options)),
    ]
    subgraph = [
        (0, _offset(builder, tensors)),
        (1, _integers(builder, (0,))),
        (2, _integers(builder, (2,))),
        (3, _offset(builder, _tables(builder, [operator]))),
        (4, _string(builder, "main")),
    ]
    code = [
        (0, lambda slot: builder.PrependInt8Slot(slot, _FULLY_CONNECTED, 0)),
        (2, lambda slot: builder.PrependInt32Slot(slot, _FULLY_CONNECTED_VERSION, 1)),
        (3, lambda slot: builder.PrependInt32Slot(slot, _FULLY_CONNECTED, 0)),
    ]
    metadata = [
        (0, _string(builder, "min_runtime_version")),
        (1, lambda slot: builder.PrependUint32Slot(slot, 2, 0)),
    ]
    model = _table(
        builder,
        [
            (0, lambda slot: builder.PrependUint32Slot(slot, SCHEMA_VERSION, 0)),
            (1, _offset(builder, _tables(builder, [code]))),
            (2, _offset(builder, _tables(builder, [subgraph]))),
            (3, _string(builder, "shoal")),
            (4, _offset(builder, buffers)),
            (6, _offset(builder, _tables(builder, [metadata]))),
        ],
    )
    builder.Finish(model, FILE_IDENTIFIER)
    content = bytes(builder.Output())
    # Offsets count from the end, and a vector begins with its length.
    return TfliteFile(content, len(content) - stored + 4)


Field = tuple[int, Callable[[int], Any]]
"""The position of a field in its table, and the function that writes it there."""


def _tensor(
    builder: Any, name: str, shape: tuple[int, int], buffer: int, scales: npt.NDArray[np.float32]
) -> list[Field]:
    zeros = np.zeros(len(scales), np.int64)
    # Each index of dimension 0 (rows) has one of the scales, by default.
    quantization = _table(
        builder,
        [(2, _numbers(builder, scales)), (3, _numbers(builder, zeros))],
    )
    return [
        (0, _integers(builder, shape)),
        (1, lambda slot: builder.PrependInt8Slot(slot, _INT8, 0)),
        (2, lambda slot: builder.PrependUint32Slot(slot, buffer, 0)),
        (3, _string(builder, name)),
        (4, _offset(builder, quantization)),
    ]


def _table(builder: Any, fields: Sequence[Field]) -> int:
    builder.StartObject(1 + max((slot for slot, _ in fields), default=-1))
    for slot, write in fields:
        write(slot)
    return int(builder.EndObject())


def _tables(builder: Any, tables: Sequence[Sequence[Field]]) -> int:
    """Write a vector of tables."""
    offsets = [_table(builder, fields) for fields in tables]
    builder.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    return int(builder.EndVector())


def _offset(builder: Any, offset: int) -> Callable[[int], Any]:
    return lambda slot: builder.PrependUOffsetTRelativeSlot(slot, offset, 0)


def _string(builder: Any, text: str) -> Callable[[int], Any]:
    return _offset(builder, builder.CreateString(text))


def _numbers(builder: Any, values: npt.NDArray[Any]) -> Callable[[int], Any]:
    return _offset(builder, builder.CreateNumpyVector(values))


def _integers(builder: Any, values: Sequence[int]) -> Callable[[int], Any]:
    return _numbers(builder, np.array(values, np.int32))


def _bytes(builder: Any, content: bytes) -> int:
    """Write a vector of bytes at a multiple of 16, which the schema requires of buffers."""
    builder.StartVector(1, len(content), _ALIGNMENT)
    head = UOffsetTFlags.py_type(builder.Head() - len(content))
    builder.head = head
    builder.Bytes[head : head + len(content)] = content
    return int(builder.EndVector())
