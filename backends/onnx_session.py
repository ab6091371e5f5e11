"""Sessions of ONNX Runtime's CPU provider, from graphs in memory or prepared on disk.

The runtime rearranges weights for its kernels when a session is made, and then holds them twice
for a moment. ``Prepared`` keeps the rearranged weights in a file: a session made from it maps them,
so that the memory is the page cache's, loading is reading, and they are never held twice.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from backends import onnx_graph, onnx_matrix
from backends.base import BackendError
from backends.onnx_graph import MICROSOFT, Graph

_FATAL = 4
"""Log severity: failures come as exceptions, and are reported once by whoever catches them."""

_PROVIDERS = ["CPUExecutionProvider"]
_ERRORS = (
    ort_errors.EPFail,
    ort_errors.EngineError,
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
    RuntimeError,
    MemoryError,
)

_GRAPH_FILE = "graph.onnx"
_WEIGHTS_FILE = "weights.bin"
_FACTS_FILE = "facts.json"

PREPARED_FACTOR = 2.3
"""Bytes of a prepared graph over its weights: the runtime writes them as given and rearranged."""

_DENORMAL = np.array([1e-40], np.float32)
_ONE = np.array([1.0], np.float32)


def new_session(graph: Graph, threads: int) -> Any:
    """An InferenceSession that has taken over the graph's weights."""
    return _from_graph(graph, _options(threads))


def _options(threads: int) -> Any:
    # numpy probes the smallest denormals once, which must be before they read as zero.
    for dtype in (np.float16, np.float32, np.float64):
        np.finfo(dtype)
    # On some boards the runtime complains of processors that it does not know, to no effect.
    ort.set_default_logger_severity(_FATAL)
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Waiting threads sleep: spinning gains a few microseconds per operator on an idle machine, and
    # loses a quarter of the speed where another process wants a core.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Hidden states that decay towards zero would otherwise halve the speed.
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    return options


def _from_graph(graph: Graph, options: Any) -> Any:
    serialized = graph.serialized()
    # The runtime copies what it keeps, so that the arrays may go once the session exists.
    weights, graph.weights = graph.weights, {}
    values = [
        ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)) for array in weights.values()
    ]
    if values:
        options.add_external_initializers(list(weights), values)
    return ort.InferenceSession(serialized, options, _PROVIDERS)


class Prepared:
    """Graphs under ``directory`` with their weights as kernels read them, each by its key."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._used: set[str] = set()

    @staticmethod
    def key(content: Mapping[str, Any]) -> str:
        """The name of what is made from ``content`` (plain values) by this code, this version of
        the runtime and on this kind of processor: all that the bytes depend on."""
        made_by = {"runtime": ort.__version__, "code": _code_sha256(), "processor": _processor()}
        text = json.dumps([content, made_by], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def open(self, key: str, threads: int) -> tuple[Any, dict[str, Any]] | None:
        """(session, the facts it was kept with), or None where there is none or it is damaged."""
        home = self._directory / key
        try:
            facts = json.loads((home / _FACTS_FILE).read_text(encoding="ascii"))
            if (home / _WEIGHTS_FILE).stat().st_size != facts["weights_file_bytes"]:
                return None
            session = ort.InferenceSession(home / _GRAPH_FILE, _options(threads), _PROVIDERS)
        except (OSError, ValueError, KeyError, TypeError, *_ERRORS):
            return None
        self._used.add(key)
        return session, facts

    def keep(self, key: str, graph: Graph, facts: Mapping[str, Any]) -> bool:
        """Write ``graph``, whose weights stay its own; False where there is no room for it."""
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            free_bytes = shutil.disk_usage(self._directory).free
            if free_bytes < 2 * PREPARED_FACTOR * graph.weight_bytes:
                return False
            with tempfile.TemporaryDirectory(dir=self._directory, prefix=".new-") as name:
                home = Path(name) / key
                home.mkdir()
                self._write(home, graph, facts)
                with contextlib.suppress(OSError):
                    shutil.rmtree(self._directory / key)
                home.rename(self._directory / key)
        except (OSError, *_ERRORS):
            return False
        return True

    def _write(self, home: Path, graph: Graph, facts: Mapping[str, Any]) -> None:
        options = _options(1)
        options.optimized_model_filepath = str(home / _GRAPH_FILE)
        for entry, value in (
            ("session.optimized_model_external_initializers_file_name", _WEIGHTS_FILE),
            ("session.optimized_model_external_initializers_min_size_in_bytes", "1024"),
            ("session.save_external_prepacked_constant_initializers", "1"),
        ):
            options.add_session_config_entry(entry, value)
        weights = dict(graph.weights)
        _from_graph(graph, options)
        graph.weights = weights
        file = home / _WEIGHTS_FILE
        file.touch()
        # A power cut must not leave a file of the right size with holes in it.
        with file.open("rb") as written:
            os.fsync(written.fileno())
        content = {**facts, "weights_file_bytes": file.stat().st_size}
        (home / _FACTS_FILE).write_text(json.dumps(content), encoding="ascii")

    def drop_others(self) -> None:
        """Remove what has not been opened through this object."""
        with contextlib.suppress(OSError):
            for path in self._directory.iterdir():
                if path.name not in self._used:
                    shutil.rmtree(path, ignore_errors=True)


@functools.lru_cache(maxsize=1)
def _code_sha256() -> str:
    sources = (onnx_graph.__file__, onnx_matrix.__file__, __file__)
    return hashlib.sha256(b"".join(Path(path).read_bytes() for path in sources)).hexdigest()


@functools.lru_cache(maxsize=1)
def _processor() -> str:
    """The instruction sets, which decide on the kernels and so on the arrangement."""
    lines = {platform.machine()}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.split("\t")[0].strip(" :") in ("flags", "Features", "CPU part"):
                lines.add(line)
    return "\n".join(sorted(lines))


def flush_denormals() -> None:
    """Let the calling thread read denormals as zero, as the runtime's own threads do.

    The runtime sets this in the thread that makes a session, and a stage may run in another, which
    computes its share of every operator: at long contexts a decisive one.
    """
    if (_DENORMAL * _ONE)[0]:
        _tiny_session()


def _tiny_session() -> None:
    graph = Graph()
    value = graph.input("hidden", TensorProto.FLOAT, (1,))
    graph.output(value, "output", TensorProto.FLOAT, (1,))
    new_session(graph, 1)


@functools.lru_cache(maxsize=1)
def window_offset() -> int:
    """Positions that GroupQueryAttention sees beyond ``local_window_size``; depends on the version.

    Measured on a head whose values are the unit vectors and whose scores are all equal.
    """
    width, window, rows = 8, 3, 6
    graph = Graph()
    value = graph.input("hidden", TensorProto.FLOAT, (1, rows, width))
    zeros = graph.input("zeros", TensorProto.FLOAT, (1, rows, width))
    past = graph.input("past", TensorProto.FLOAT, (1, 1, 0, width))
    last = graph.input("last", TensorProto.INT32, (1,))
    total = graph.input("total", TensorProto.INT32, ())
    (seen, *_) = graph.node(
        "GroupQueryAttention",
        [zeros, zeros, value, past, past, last, total],
        3,
        MICROSOFT,
        num_heads=1,
        kv_num_heads=1,
        local_window_size=window,
    )
    graph.output(seen, "output", TensorProto.FLOAT, (1, rows, width))
    inputs = {
        "hidden": np.eye(rows, width, dtype=np.float32)[None],
        "zeros": np.zeros((1, rows, width), np.float32),
        "past": np.zeros((1, 1, 0, width), np.float32),
        "last": np.array([rows - 1], np.int32),
        "total": np.array(rows, np.int32),
    }
    with translated("onnxruntime lacks an operator, install a newer one"):
        (result,) = new_session(graph, 1).run(["output"], inputs)
    return int(np.count_nonzero(result[0, -1])) - window


def return_free_memory() -> None:
    """Give the heap that loading leaves behind back to the system: as much as the weights again."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def translated(context: str) -> Iterator[None]:
    """The runtime's exceptions as BackendError in one line."""
    try:
        yield
    except _ERRORS as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise BackendError(f"{context}: {lines[0][:300]}") from error
