"""Any CPU: ONNX Runtime, with 4-bit and paired 4-bit kernels on fp32 activations.

A stage is a chain of graphs: runs of layers, and the head by itself, which only the last row goes
through. A run ends once its weights reach SEGMENT_BYTES, because ONNX Runtime holds a graph's
weights twice while it rearranges them for its kernels: this bounds what loading needs beyond what
stays.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from backends.base import (
    Array,
    Backend,
    BackendError,
    BackendUnavailable,
    Capabilities,
    Stage,
    StageOptions,
    Tokens,
)
from backends.onnx_graph import (
    MICROSOFT,
    BlockWeights,
    CacheShape,
    Graph,
    LayerGraph,
    Matrix,
    PackedMatrix,
    embedding_graph,
    head_graph,
)
from model.artifact import Tensor, read_block
from model.costs import stage_buffer_bytes
from model.quantize import QuantizedMatrix
from model.rotary import rotary_table
from model.spec import LayerSpec, ModelSpec

CONTAINER_BITS = {2: 4, 3: 4, 4: 4, 5: 8, 6: 8, 8: 8, 16: 32, 32: 32}
"""The kernels with fp32 activations that are fast: 4-bit, two of them for 8 bits, and fp32. Those
for 2 and 8 bits take 75 and 45 times as long, and on x86 there is none for 16."""

SEGMENT_BYTES = 128 << 20

CHUNK_ROWS = 64
"""Rows of a call that compute buffers are estimated for."""

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
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
    RuntimeError,
    MemoryError,
)


class OnnxCpuBackend(Backend):
    """ONNX Runtime's CPU provider on any machine that has it."""

    @classmethod
    def probe(cls) -> Capabilities:
        try:
            _window_offset()
        except BackendError as error:
            raise BackendUnavailable("onnx_cpu", str(error)) from error
        return Capabilities("onnx_cpu", importlib.metadata.version("onnxruntime"), CONTAINER_BITS)

    def load(
        self, spec: ModelSpec, artifacts: Sequence[tuple[int, Path]], options: StageOptions
    ) -> OnnxCpuStage:
        _check_request(spec, [block for block, _ in artifacts], options)
        with _translated("cannot load the stage"):
            stage = _Loader(spec, options).load(artifacts)
        _return_free_memory()
        return stage


class OnnxCpuStage(Stage):
    """A chain of sessions; see the module's description."""

    def __init__(
        self,
        embedding: _Embedding | None,
        layers: list[_Segment],
        head: _Segment | None,
        vocab: int,
        width: int,
        options: StageOptions,
        memory_bytes: int,
    ) -> None:
        self._embedding = embedding
        self._layers = layers
        self._head = head
        self._vocab = vocab
        self._width = width
        self._options = options
        self._memory_bytes = memory_bytes
        self._open = True

    @property
    def memory_bytes(self) -> int:
        return self._memory_bytes

    def forward(
        self, slot: int, position: int, inputs: Array | Tokens, *, logits: bool = True
    ) -> Array:
        self._check_call(slot, position, inputs)
        with _translated("cannot run the stage"):
            hidden: Array
            if self._embedding is not None:
                hidden = self._embedding.rows(np.asarray(inputs, np.int64), position)
            else:
                hidden = np.ascontiguousarray(inputs, np.float32)[None]
            for segment in self._layers:
                hidden = segment.run(hidden, slot, position)
            if self._head is not None:
                if not logits:
                    return np.empty((0, self._vocab), np.float32)
                hidden = self._head.run(hidden[:, -1:], slot, position)
            return hidden.reshape(hidden.shape[1:])

    def close(self) -> None:
        self._open = False
        self._embedding, self._layers, self._head = None, [], None
        _return_free_memory()

    def _check_call(self, slot: int, position: int, inputs: Array | Tokens) -> None:
        if not self._open:
            raise BackendError("the stage is closed")
        if not 0 <= slot < self._options.slots:
            raise BackendError(f"slot {slot} of a stage with {self._options.slots} slots")
        context = self._options.context_tokens
        rows = inputs.shape[0] if inputs.ndim else 0
        if rows == 0 or position < 0 or position + rows > context:
            raise BackendError(
                f"rows [{position}, {position + rows}) do not fit the context of {context} tokens"
            )
        if self._embedding is None:
            if inputs.shape != (rows, self._width):
                raise BackendError(f"hidden rows are {inputs.shape}, not [n, {self._width}]")
        elif inputs.ndim != 1 or not np.issubdtype(inputs.dtype, np.integer):
            raise BackendError(f"token ids are {inputs.dtype} {inputs.shape}, not integers [n]")
        elif inputs.min() < 0 or inputs.max() >= self._vocab:
            raise BackendError(f"token ids must be within [0, {self._vocab})")


class _Segment:
    """One session with the KV caches of its layers, bound once for every slot."""

    def __init__(
        self, graph: Graph, caches: Sequence[CacheShape], width: int, options: StageOptions
    ) -> None:
        self._session = _session(graph, options.threads)
        self._width = width
        # Inputs that change every call: the runtime reads this memory in place.
        self._last = np.zeros(1, np.int32)
        self._total = np.zeros((), np.int32)
        scalars = {"seqlens_k": self._last, "total": self._total} if caches else {}
        # A binding does not keep the arrays alive that it points into.
        self._caches: list[Array] = []
        self._bindings = []
        for _ in range(options.slots if caches else 1):
            binding = self._session.io_binding()
            for name, array in scalars.items():
                binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
            for index, cache in enumerate(caches):
                for kind in ("key", "value"):
                    # Filled, so that a lack of memory shows now and not in the middle of a text.
                    memory = np.full(cache.shape, 0, np.float32)
                    self._caches.append(memory)
                    # Past and present are one buffer, in which only the new rows are written.
                    shared = ort.OrtValue.ortvalue_from_numpy(memory)
                    binding.bind_ortvalue_input(f"past_{kind}_{index}", shared)
                    binding.bind_ortvalue_output(f"{kind}_{index}", shared)
            self._bindings.append(binding)

    def run(self, hidden: Array, slot: int, position: int) -> Array:
        """hidden [1, n, any] to [1, n, width]; position is that of the first row."""
        rows = hidden.shape[1]
        self._last[0] = position + rows - 1
        self._total[...] = position + rows
        binding = self._bindings[slot if len(self._bindings) > 1 else 0]
        result = np.empty((1, rows, self._width), np.float32)
        binding.bind_ortvalue_input("hidden", ort.OrtValue.ortvalue_from_numpy(hidden))
        binding.bind_ortvalue_output("output", ort.OrtValue.ortvalue_from_numpy(result))
        self._session.run_with_iobinding(binding)
        return result


@dataclass(frozen=True, slots=True)
class _Embedding:
    """Token rows are unpacked one by one from the stored table, which stays mapped."""

    tokens: QuantizedMatrix
    positions: Array | None
    position_offset: int
    projection: _Segment | None

    def rows(self, tokens: Tokens, position: int) -> Array:
        """Token ids [n] to hidden [1, n, hidden]."""
        hidden = self.tokens.dequantize(tokens)[None]
        if self.projection is not None:
            hidden = self.projection.run(hidden, 0, position)
        if self.positions is not None:
            first = position + self.position_offset
            hidden = hidden + self.positions[first : first + len(tokens)]
        return hidden


class _Loader:
    """Builds a stage block by block, and a session as soon as its graph is complete."""

    def __init__(self, spec: ModelSpec, options: StageOptions) -> None:
        self._spec = spec
        self._options = options
        self._rotary: dict[Any, tuple[Array, Array]] = {}
        self._embedding: _Embedding | None = None
        self._layers: list[_Segment] = []
        self._head: _Segment | None = None
        self._open: LayerGraph | None = None
        self._memory_bytes = 0

    def load(self, artifacts: Sequence[tuple[int, Path]]) -> OnnxCpuStage:
        for block, path in artifacts:
            _, tensors = read_block(path, self._spec, block)
            kind = self._spec.block_kind(block)
            if kind == "embedding":
                self._add_embedding(tensors)
            elif kind == "layer":
                self._add_layer(self._spec.layer(block), tensors)
            else:
                self._finish_layers()
                self._add_head(tensors)
        self._finish_layers()
        buffer_bytes = stage_buffer_bytes(
            self._spec,
            [block for block, _ in artifacts],
            CHUNK_ROWS,
            self._options.context_tokens,
        )
        return OnnxCpuStage(
            self._embedding,
            self._layers,
            self._head,
            self._spec.vocab,
            self._spec.hidden,
            self._options,
            self._memory_bytes + buffer_bytes,
        )

    def _add_embedding(self, tensors: dict[str, Tensor]) -> None:
        spec, projection = self._spec, None
        if spec.projected:
            graph = embedding_graph(spec.embed_dim, _matrix(tensors["project_in.weight"]))
            projection = self._segment(graph, (), spec.hidden)
        tokens, positions = tensors["tokens.weight"], tensors.get("positions.weight")
        if not isinstance(tokens, QuantizedMatrix) or isinstance(positions, QuantizedMatrix):
            raise BackendError("the embedding's tensors are not in the form they are stored in")
        self._memory_bytes += tokens.stored_bytes + (0 if positions is None else positions.nbytes)
        self._embedding = _Embedding(tokens, positions, spec.position_offset, projection)

    def _add_layer(self, layer: LayerSpec, tensors: dict[str, Tensor]) -> None:
        context = self._options.context_tokens
        if self._open is None:
            self._open = LayerGraph(self._spec.hidden, context, _window_offset())
        rotary = None
        if layer.rope is not None:
            key = (layer.rope, layer.head_dim)
            if key not in self._rotary:
                self._rotary[key] = rotary_table(layer.rope, layer.head_dim, context)
            rotary = self._rotary[key]
        self._open.layer(layer, _block_weights(tensors), rotary)
        if self._open.graph.weight_bytes >= SEGMENT_BYTES:
            self._finish_layers()

    def _finish_layers(self) -> None:
        if self._open is None:
            return
        graph, caches, self._open = self._open.finish(), self._open.caches, None
        self._layers.append(self._segment(graph, caches, self._spec.hidden))

    def _add_head(self, tensors: dict[str, Tensor]) -> None:
        spec = self._spec
        epsilon = spec.layers[-1].norm_eps if spec.final_norm else None
        graph = head_graph(spec.hidden, spec.vocab, _block_weights(tensors), epsilon)
        self._head = self._segment(graph, (), spec.vocab)

    def _segment(self, graph: Graph, caches: Sequence[CacheShape], width: int) -> _Segment:
        floats = sum(2 * int(np.prod(cache.shape)) for cache in caches)
        self._memory_bytes += graph.weight_bytes + self._options.slots * 4 * floats
        return _Segment(graph, caches, width, self._options)


def _check_request(spec: ModelSpec, blocks: Sequence[int], options: StageOptions) -> None:
    if not blocks or list(blocks) != list(range(blocks[0], blocks[0] + len(blocks))):
        raise BackendError(f"a stage is a contiguous run of blocks, not {list(blocks)}")
    if blocks[0] < 0 or blocks[-1] >= spec.block_count:
        raise BackendError(f"blocks {list(blocks)} of a model with {spec.block_count}")
    if options.slots < 1 or options.threads < 1:
        raise BackendError("a stage needs at least one slot and one thread")
    if not 0 < options.context_tokens <= spec.max_context:
        raise BackendError(
            f"context of {options.context_tokens} tokens: the model has 1 to {spec.max_context}"
        )
    for layer in spec.layers:
        if layer.head_dim % 2:
            raise BackendError(f"head width {layer.head_dim} is odd, which no kernel takes")


def _block_weights(tensors: dict[str, Tensor]) -> BlockWeights:
    matrices, vectors = {}, {}
    for name, tensor in tensors.items():
        if isinstance(tensor, QuantizedMatrix):
            matrices[name] = _matrix(tensor)
        else:
            vectors[name] = tensor
    return BlockWeights(matrices, vectors)


def _matrix(stored: Tensor) -> Matrix:
    """A stored matrix in the form it is executed in; values are exactly the stored ones."""
    if not isinstance(stored, QuantizedMatrix):
        return stored
    container = CONTAINER_BITS[stored.format.bits]
    if container == 32:
        return stored.dequantize()
    codes, zeros = stored.in_container(container)
    pack = PackedMatrix.of_nibbles if container == 4 else PackedMatrix.of_bytes
    return pack(stored.shape[1], codes, stored.scales(), zeros)


def _session(graph: Graph, threads: int) -> Any:
    """An InferenceSession that has taken over the graph's weights."""
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
    serialized = graph.serialized()
    # The runtime copies what it keeps, so that the arrays may go once the session exists.
    weights, graph.weights = graph.weights, {}
    values = [
        ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)) for array in weights.values()
    ]
    if values:
        options.add_external_initializers(list(weights), values)
    return ort.InferenceSession(serialized, options, _PROVIDERS)


@functools.lru_cache(maxsize=1)
def _window_offset() -> int:
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
    with _translated("onnxruntime lacks an operator, install a newer one"):
        (result,) = _session(graph, 1).run(["output"], inputs)
    return int(np.count_nonzero(result[0, -1])) - window


def _return_free_memory() -> None:
    """Give the heap that loading leaves behind back to the system: as much as the weights again."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def _translated(context: str) -> Iterator[None]:
    """The runtime's exceptions as BackendError in one line."""
    try:
        yield
    except _ERRORS as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise BackendError(f"{context}: {lines[0][:300]}") from error
