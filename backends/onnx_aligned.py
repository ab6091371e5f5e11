"""Aligns the weights of saved graphs for vector instructions.

ONNX Runtime writes tensors back to back, and maps the file to run it. Kernels read rearranged
weights with instructions that end the process at an address that is no multiple of 64 bytes. One
vector of 160 bytes (hidden size 40) shifts all later weights to such addresses.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import onnx

ALIGNMENT_BYTES = 64
"""The widest vector registers (AVX-512), and a cache line."""

_COPY_BYTES = 1 << 20


def align_weights(graph_file: Path) -> onnx.ModelProto:
    """Read a saved graph, and move its weights to multiples of ALIGNMENT_BYTES in their file.

    Aligned weights are left as they are. Returns the graph, whose weights stay in their file.
    Raises OSError, and ValueError if the file is not as the runtime writes it.
    """
    model = onnx.load(graph_file, load_external_data=False)
    files = {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    spans = [span for tensor in model.graph.initializer for span in _spans(tensor)]
    if all(begin % ALIGNMENT_BYTES == 0 for begin, _ in spans):
        return model
    (name,) = files
    old, new = graph_file.with_name(name), graph_file.with_name(f"{name}.aligned")
    with old.open("rb") as source, new.open("wb") as target:

        def move(begin: int, size: int) -> int:
            return _copy(source, target, begin, size)

        for tensor in model.graph.initializer:
            _move_tensor(tensor, move)
    new.replace(old)
    onnx.save(model, graph_file)
    return model


def _spans(tensor: onnx.TensorProto) -> list[tuple[int, int]]:
    """Return (begin, size) of a tensor's bytes in its file, and of each of its rearranged forms."""
    found: list[tuple[int, int]] = []

    def note(begin: int, size: int) -> int:
        found.append((begin, size))
        return begin

    copy = onnx.TensorProto()
    copy.CopyFrom(tensor)
    _move_tensor(copy, note)
    return found


def _move_tensor(tensor: onnx.TensorProto, move: Callable[[int, int], int]) -> None:
    """Store the new places of a tensor's parts, as ``move(begin, size)`` returns them.

    The entries are ``offset`` and ``length``, and ``prepacked_N``. The latter is
    ``key|begin;size;checksum``, with one such triple a buffer.
    """
    entries = {entry.key: entry for entry in tensor.external_data}
    if "offset" in entries:
        begin = move(int(entries["offset"].value), int(entries["length"].value))
        entries["offset"].value = str(begin)
    for name, entry in entries.items():
        if name.startswith("prepacked"):
            key, *buffers = entry.value.split("|")
            for number, buffer in enumerate(buffers):
                first, size, *rest = buffer.split(";")
                buffers[number] = ";".join([str(move(int(first), int(size))), size, *rest])
            entry.value = "|".join([key, *buffers])


def _copy(source: BinaryIO, target: BinaryIO, begin: int, size: int) -> int:
    """Append bytes of ``source`` at the next aligned place of ``target``, and return that place."""
    target.write(bytes(-target.tell() % ALIGNMENT_BYTES))
    place = target.tell()
    source.seek(begin)
    while size > 0:
        piece = source.read(min(size, _COPY_BYTES))
        if not piece:
            raise ValueError("the weights are shorter than the graph says")
        target.write(piece)
        size -= len(piece)
    return place
