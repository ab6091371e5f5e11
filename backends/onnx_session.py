"""Sessions of ONNX Runtime's CPU provider, and the settings of its threads."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import platform
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from backends.base import BackendError
from backends.onnx_graph import MICROSOFT, BlockWeights, Graph
from backends.onnx_matrix import KERNEL_BITS, ByteMatrix, containers, executable
from backends.onnx_mixture import add_experts
from model.quantize import Format, quantize
from model.spec import ExpertSpec

_ARENA_LOCK = threading.Lock()

_FATAL = 4
"""The log severity. Failures come as exceptions, which the catching code reports once."""

PROVIDERS = ["CPUExecutionProvider"]
ERRORS = (
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

# glibc's fenv_t: its size, the offset of the vector unit's control word, and the bits that flush
# denormals (DAZ and FTZ of MXCSR, FZ of FPCR).
_MODES = {"x86_64": (32, 28, 0x8040), "aarch64": (8, 0, 1 << 24)}
_MODE = _MODES.get(platform.machine()) if platform.libc_ver()[0] == "glibc" else None
_MATH = ctypes.CDLL("libm.so.6") if _MODE is not None else ctypes.CDLL(None)

# A region in /proc/self/smaps: its bounds and its file.
_REGION = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \S+ *(.*)")

_DENORMAL = np.array([1e-40], np.float32)
_ONE = np.array([1.0], np.float32)


def new_session(graph: Graph, threads: int, *, joined: bool = True, small: bool = False) -> Any:
    """Make an InferenceSession that takes over the graph's weights."""
    return session_of(graph, session_options(threads, joined=joined, small=small))


def session_options(threads: int, *, joined: bool = True, small: bool = False) -> Any:
    """The settings that every session shares.

    joined: few sessions run a whole stage. Otherwise many do in turn, and share one arena, because
        an arena of its own would keep the buffers of each session's largest call.
    small: the session is one of hundreds, each with few small buffers, so it has no arena.
    """
    # numpy probes the smallest denormals once, which must happen before they read as zero.
    for dtype in (np.float16, np.float32, np.float64):
        np.finfo(dtype)
    # On some boards the runtime warns of unknown processors, to no effect.
    ort.set_default_logger_severity(_FATAL)
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Waiting threads sleep. Spinning gains a few microseconds per operator on an idle machine, but
    # loses a quarter of the speed if another process wants a core.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Hidden states that decay towards zero would otherwise halve the speed.
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    if small:
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
    elif not joined:
        with _ARENA_LOCK:
            _make_arena()
        options.add_session_config_entry("session.use_env_allocators", "1")
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    return options


@functools.lru_cache(maxsize=1)
def _make_arena() -> None:
    """Make the process's arena, for sessions whose settings ask for it."""
    memory = ort.OrtMemoryInfo(
        "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
    )
    ort.create_and_register_allocator(memory, None)


def session_of(graph: Graph, options: Any) -> Any:
    """Make a session as ``new_session`` does, with extended ``session_options``."""
    serialized = graph.serialized()
    # The runtime copies what it keeps, so the arrays may go once the session exists.
    weights, graph.weights = graph.weights, {}
    values = [
        ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)) for array in weights.values()
    ]
    if values:
        options.add_external_initializers(list(weights), values)
    return ort.InferenceSession(serialized, options, PROVIDERS)


def flush_denormals() -> None:
    """Let the calling thread read denormals as zero, as the runtime's own threads do.

    The runtime sets this once, in the thread that makes the first session of the process. A stage
    may run in another thread, which computes its share of every operator. At long contexts this
    share decides the speed. Unknown processors and C libraries are left as they are.
    """
    if (_DENORMAL * _ONE)[0] and _MODE is not None:
        size, offset, bits = _MODE
        environment = (ctypes.c_uint8 * size)()
        _MATH.fegetenv(environment)
        word = ctypes.c_uint32.from_buffer(environment, offset)
        word.value |= bits
        _MATH.fesetenv(environment)


@functools.lru_cache(maxsize=1)
def window_offset() -> int:
    """Return the positions that GroupQueryAttention sees beyond ``local_window_size``.

    They depend on the version. They are measured on a head whose values are the unit vectors and
    whose scores are all equal.
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


@functools.lru_cache(maxsize=1)
def container_bits() -> Mapping[int, int]:
    """Map stored to executed widths, with the kernels of the installed runtime.

    The operator's documentation does not say which version brought which width. So each kernel is
    tried once on a small matrix.
    """
    return containers([bits for bits in KERNEL_BITS if _multiplies(bits)])


def _multiplies(bits: int) -> bool:
    """Whether the runtime multiplies codes of this width correctly."""
    stored = quantize(np.eye(64, dtype=np.float32), Format.of(bits))
    graph = Graph()
    value = graph.input("hidden", TensorProto.FLOAT, (1, 1, 64))
    product = graph.linear(value, executable(stored, {bits: bits}))
    graph.output(product, "output", TensorProto.FLOAT, (1, 1, 64))
    row = np.linspace(-1, 1, 64, dtype=np.float32)
    try:
        (result,) = new_session(graph, 1).run(["output"], {"hidden": row[None, None]})
    except ERRORS:
        return False
    return bool(np.allclose(result[0, 0], stored.dequantize() @ row, atol=0.05))


@functools.lru_cache(maxsize=2)
def mixes_experts(bits: int) -> bool:
    """Whether the runtime's operator for experts rounds activations to 8 bits, as others do.

    Otherwise it widens weights at each call, which takes longer than sessions of experts.
    """
    width, experts = 128, ExpertSpec(count=2, active=1)
    random = np.random.default_rng(0)
    stored = [
        quantize(random.standard_normal((2 * width, width), np.float32), Format.of(bits))
        for _ in range(3)
    ]
    matrices = {
        f"{name}.weight": executable(matrix, {bits: bits})
        for name, matrix in zip(("gate", "up", "down"), stored, strict=True)
    }
    graph = Graph()
    value = graph.input("hidden", TensorProto.FLOAT, (1, 1, width))
    scores = graph.input("scores", TensorProto.FLOAT, (1, 1, 2))
    mixed = add_experts(graph, experts, BlockWeights(matrices, {}), value, scores)
    graph.output(mixed, "output", TensorProto.FLOAT, (1, 1, width))
    row = np.linspace(-1, 1, width, dtype=np.float32)
    inputs = {"hidden": row[None, None], "scores": np.array([[[0, 1]]], np.float32)}
    try:
        (result,) = new_session(graph, 1).run(["output"], inputs)
    except ERRORS:
        return False
    gate, up, down = (matrix.dequantize(slice(width, 2 * width)) for matrix in stored)
    raised = gate @ row
    expected = down @ (raised / (1 + np.exp(-raised)) * (up @ row))
    error = np.linalg.norm(result[0, 0] - expected) / np.linalg.norm(expected)
    return bool(1e-4 < error < 0.05)


@functools.lru_cache(maxsize=1)
def sums_bytes_exactly() -> bool:
    """Whether sums of byte products are exact.

    x86 processors without VNNI add pairs of them in 16 bits, which is too narrow.
    """
    columns = 64
    graph = Graph()
    value = graph.input("hidden", TensorProto.FLOAT, (1, 1, columns))
    largest = ByteMatrix(np.full((columns, 1), 127, np.int8), np.ones(1, np.float32))
    graph.output(graph.linear(value, largest), "output", TensorProto.FLOAT, (1, 1, 1))
    inputs = {"hidden": np.ones((1, 1, columns), np.float32)}
    try:
        (result,) = new_session(graph, 1).run(["output"], inputs)
    except ERRORS:
        return False
    return bool(np.isclose(result[0, 0, 0], 127 * columns))


def return_free_memory() -> None:
    """Return the freed heap to the system. After a load it is as large as the weights."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def release_mapped(directory: Path) -> None:
    """Unmap the pages of the files in ``directory``. They are mapped again when they are read.

    A session is made from tensors that no kernel reads later. Linux only; elsewhere, and for pages
    that were changed in memory, nothing happens.
    """
    begin, size, mapped = 0, 0, False
    with contextlib.suppress(OSError), Path("/proc/self/smaps").open(encoding="utf-8") as regions:
        for line in regions:
            header = _REGION.match(line)
            if header is not None:
                begin, end = int(header[1], 16), int(header[2], 16)
                size, mapped = end - begin, header[3].startswith(f"{directory}/")
            elif mapped and line.split() == ["Anonymous:", "0", "kB"]:
                advise = ctypes.CDLL(None).madvise
                advise(ctypes.c_void_p(begin), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


@contextmanager
def translated(context: str) -> Iterator[None]:
    """Turn the runtime's exceptions into BackendError with one line."""
    try:
        yield
    except ERRORS as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise BackendError(f"{context}: {lines[0][:300]}") from error
