"""Graphs on disk with their weights as kernels read them, to be mapped instead of built.

ONNX Runtime rearranges weights when it makes a session, and holds them twice meanwhile. Here that
is done piece by piece, each saved with what the runtime made of its weights; then the pieces are
joined into one graph, whose session maps all their files. So memory beyond the weights is bounded
by a piece, the weights are the page cache's, and loading again is reading.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

from backends import onnx_graph, onnx_matrix, onnx_session
from backends.onnx_graph import Graph
from backends.onnx_session import (
    ERRORS,
    PROVIDERS,
    release_mapped,
    session_of,
    session_options,
)

DISK_FACTOR = 2.1
"""Bytes on disk over those of the weights: the runtime keeps them as given and rearranged."""

_GRAPH_FILE = "graph.onnx"
_FACTS_FILE = "facts.json"

_INLINE_BYTES = "128"
"""Smaller tensors stay in the graph: sizes that it needs to be read at all."""

_CACHES = re.compile(r"(past_key|past_value|key|value)_(\d+)")
_SHARED = ("", "seqlens_k", "total")


class Prepared:
    """Graphs under ``directory``, each by its key, which take ``limit_bytes`` at most."""

    def __init__(self, directory: Path, limit_bytes: int | None = None) -> None:
        self._directory = directory
        self._limit_bytes = limit_bytes
        self._used: dict[str, int] = {}

    @staticmethod
    def key(content: Mapping[str, Any]) -> str:
        """The name of what is made from ``content`` (plain values) by this code, this version of
        the runtime and on this kind of processor: all that the bytes depend on."""
        made_by = {"runtime": ort.__version__, "code": _code_sha256(), "processor": _processor()}
        text = json.dumps([content, made_by], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def open(self, key: str, threads: int) -> tuple[Any, int] | None:
        """(session, bytes of its weights as executed); None where there is none, or a damaged
        one."""
        home = self._directory / key
        try:
            facts = json.loads((home / _FACTS_FILE).read_text(encoding="ascii"))
            for name, size in facts["files"].items():
                if (home / name).stat().st_size != size:
                    return None
            options = session_options(threads)
            session = ort.InferenceSession(home / _GRAPH_FILE, options, PROVIDERS)
            executed_bytes = int(facts["executed_bytes"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, *ERRORS):
            return None
        release_mapped(home.resolve())
        self._used[key] = sum(facts["files"].values())
        return session, executed_bytes

    def keep(self, key: str, pieces: Iterable[Graph], needed_bytes: int) -> bool:
        """Save graphs that follow one another as one; False where the disk or the limit has no
        room for ``needed_bytes`` of weights, or the disk fails."""
        needed_bytes = int(DISK_FACTOR * needed_bytes)
        kept_bytes = sum(self._used.values())
        if self._limit_bytes is not None and kept_bytes + needed_bytes > self._limit_bytes:
            return False
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self.drop_others()  # They are not both kept, not even meanwhile.
            # Leave as much free again: other files have to fit as well.
            if shutil.disk_usage(self._directory).free < 2 * needed_bytes:
                return False
            with tempfile.TemporaryDirectory(dir=self._directory, prefix=".new-") as name:
                home = Path(name) / key
                home.mkdir()
                _write(home, pieces)
                shutil.rmtree(self._directory / key, ignore_errors=True)
                home.rename(self._directory / key)
        except (OSError, _Differs, *ERRORS):
            return False
        return True

    def drop_others(self) -> None:
        """Remove what has not been opened through this object."""
        with contextlib.suppress(OSError):
            for path in self._directory.iterdir():
                if path.name not in self._used:
                    shutil.rmtree(path, ignore_errors=True)


def _write(home: Path, pieces: Iterable[Graph]) -> None:
    models, executed_bytes = [], 0
    for number, graph in enumerate(pieces):
        executed_bytes += graph.executed_bytes
        part = home / f"part-{number}.onnx"
        options = session_options(1)
        options.optimized_model_filepath = str(part)
        for entry, value in (
            ("session.optimized_model_external_initializers_file_name", f"weights-{number}.bin"),
            ("session.optimized_model_external_initializers_min_size_in_bytes", _INLINE_BYTES),
            ("session.save_external_prepacked_constant_initializers", "1"),
        ):
            options.add_session_config_entry(entry, value)
        made = _output(session_of(graph, options))
        read = _output(ort.InferenceSession(part, session_options(1), PROVIDERS))
        if not np.allclose(read, made, rtol=0, atol=1e-3 * float(np.abs(made).max())):
            raise _Differs
        models.append(onnx.load(part, load_external_data=False))
        part.unlink()
    (home / _GRAPH_FILE).write_bytes(joined(models).SerializeToString())
    files = {}
    for path in home.iterdir():
        # A power cut must not leave a file of the right size with holes in it.
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.name] = path.stat().st_size
    facts = {"executed_bytes": executed_bytes, "files": files}
    (home / _FACTS_FILE).write_text(json.dumps(facts), encoding="ascii")


def _output(session: Any) -> npt.NDArray[np.float32]:
    """What a session makes of one row without a past.

    The runtime (1.31) is not to be trusted with what it saves: of matrices with inline scales, and
    of some small ones of 2 bits, what it reads back are other weights.
    """
    values: dict[str, npt.NDArray[Any]] = {}
    for value in session.get_inputs():
        shape = [size if isinstance(size, int) else 1 for size in value.shape]
        dtype = np.int32 if value.type == "tensor(int32)" else np.float32
        values[value.name] = np.full(shape, value.name == "total", dtype)
    hidden = values["hidden"]
    hidden[...] = np.random.default_rng(0).standard_normal(hidden.shape, np.float32)
    (output,) = session.run(["output"], values)
    result: npt.NDArray[np.float32] = output
    return result


class _Differs(Exception):
    """What was saved does not compute what it was made from."""


def joined(models: Sequence[onnx.ModelProto]) -> onnx.ModelProto:
    """One model of those whose ``hidden`` is the ``output`` of the one before.

    Caches are numbered on; ``seqlens_k`` and ``total`` are one input; all else gets names of its
    own.
    """
    result = onnx.ModelProto()
    result.CopyFrom(models[0])
    result.graph.Clear()
    result.graph.name = "stage"
    layers = 0
    inputs: dict[str, onnx.ValueInfoProto] = {}
    outputs: dict[str, onnx.ValueInfoProto] = {}
    for number, model in enumerate(models):
        names = _Names(number, layers, last=number == len(models) - 1)
        for node in model.graph.node:
            copy = result.graph.node.add()
            copy.CopyFrom(node)
            copy.name = f"{number}/{node.name}"
            copy.input[:] = map(names.new, node.input)
            copy.output[:] = map(names.new, node.output)
        for tensor in model.graph.initializer:
            weight = result.graph.initializer.add()
            weight.CopyFrom(tensor)
            weight.name = names.new(tensor.name)
        for values, found in ((model.graph.input, inputs), (model.graph.output, outputs)):
            for value in values:
                found[names.new(value.name)] = value
        layers += sum(value.name.startswith("past_key") for value in model.graph.input)
    for found, target in ((inputs, result.graph.input), (outputs, result.graph.output)):
        for name, value in found.items():
            if not name.startswith("hidden_"):
                copied = target.add()
                copied.CopyFrom(value)
                copied.name = name
    return result


class _Names:
    """What the names of one of several joined models become."""

    def __init__(self, number: int, layers: int, *, last: bool) -> None:
        self._number, self._layers, self._last = number, layers, last

    def new(self, name: str) -> str:
        if name in _SHARED:
            return name
        if name == "hidden":
            return name if self._number == 0 else f"hidden_{self._number}"
        if name == "output":
            return name if self._last else f"hidden_{self._number + 1}"
        cache = _CACHES.fullmatch(name)
        if cache is not None:
            return f"{cache[1]}_{int(cache[2]) + self._layers}"
        return f"{self._number}/{name}"


@functools.lru_cache(maxsize=1)
def _code_sha256() -> str:
    sources = (onnx_graph.__file__, onnx_matrix.__file__, onnx_session.__file__, __file__)
    return hashlib.sha256(b"".join(Path(path).read_bytes() for path in sources)).hexdigest()


@functools.lru_cache(maxsize=1)
def _processor() -> str:
    """The instruction sets, which decide on the kernels and so on the arrangement."""
    lines = {platform.machine()}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.split(":")[0].strip() in ("flags", "Features", "CPU part"):
                lines.add(line)
    return "\n".join(sorted(lines))
