"""Any CPU: ONNX Runtime, weights packed in 2, 4 or 8 bits, activations rounded to 8 bits.

A stage is a graph of its layers and one of the head, which only the last row goes through. ONNX
Runtime holds a graph's weights twice while it rearranges them for its kernels, so layers are built
in segments of SEGMENT_BYTES. Where prepared weights can be kept they become one session; else each
segment is one, with threads of its own.

Packed matrices are multiplied with activations rounded to 8 bits in blocks of a group's size:
relative errors of a product of 1 to 2 % at any width (docs/performance.md). With
``StageOptions.exact`` all matrices run as fp32 instead, and results are the reference's.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

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
from backends.checks import check_blocks, check_inputs, check_rows
from backends.onnx_graph import (
    BlockWeights,
    CacheShape,
    Graph,
    LayerGraph,
    cached_head_width,
    embedding_graph,
    head_graph,
)
from backends.onnx_matrix import CONTAINER_BITS, executable
from backends.onnx_prepared import Prepared
from backends.onnx_session import (
    flush_denormals,
    new_session,
    return_free_memory,
    translated,
    window_offset,
)
from model.artifact import Tensor, read_block
from model.costs import stage_buffer_bytes
from model.quantize import QuantizedMatrix
from model.rotary import rotary_table
from model.spec import LayerSpec, ModelSpec

SEGMENT_BYTES = 64 << 20
MAX_EXPANSION = 2
"""Bytes of a block as executed over those of its file, at most (16 bits run as 32)."""

CHUNK_ROWS = 64
"""Rows of a call that compute buffers are estimated for."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


class OnnxCpuBackend(Backend):
    """ONNX Runtime's CPU provider on any machine that has it."""

    PREPARED_FACTOR = 4.5  # MAX_EXPANSION * DISK_FACTOR, and what tables and graphs take.

    @classmethod
    def probe(cls) -> Capabilities:
        try:
            window_offset()
        except BackendError as error:
            raise BackendUnavailable("onnx_cpu", str(error)) from error
        return Capabilities(
            "onnx_cpu",
            importlib.metadata.version("onnxruntime"),
            CONTAINER_BITS,
            exact_container_bits=dict.fromkeys(CONTAINER_BITS, 32),
        )

    def load(
        self, spec: ModelSpec, artifacts: Sequence[tuple[int, Path]], options: StageOptions
    ) -> OnnxCpuStage:
        check_blocks(spec, [block for block, _ in artifacts], options)
        for layer in spec.layers:
            if layer.head_dim % 2:
                raise BackendError(f"head width {layer.head_dim} is odd, which no kernel takes")
        with translated("cannot load the stage"):
            stage = _Loader(spec, options).load(artifacts)
        return_free_memory()
        return stage


class OnnxCpuStage(Stage):
    """A chain of sessions; see the module's description."""

    def __init__(
        self,
        embedding: _Embedding | None,
        layers: list[_Segment],
        head: _Segment | None,
        spec: ModelSpec,
        options: StageOptions,
        memory_bytes: int,
    ) -> None:
        self._embedding = embedding
        self._layers = layers
        self._head = head
        self._spec = spec
        self._options = options
        self._memory_bytes = memory_bytes
        self._open = True

    @property
    def memory_bytes(self) -> int:
        return self._memory_bytes

    def forward(
        self, slot: int, position: int, inputs: Array | Tokens, *, logits: bool = True
    ) -> Array:
        rows = len(inputs) if inputs.ndim else 0
        self._check([slot], [position], inputs, rows)
        positions = np.arange(position, position + rows)
        with translated("cannot run the stage"):
            hidden = self._enter(inputs, positions)[None]
            for segment in self._layers:
                hidden = segment.run(hidden, slot, positions[-1:])
            if self._head is not None:
                if not logits:
                    return np.empty((0, self._spec.vocab), np.float32)
                hidden = self._head.run(hidden[:, -1:])
            result: Array = hidden[0]
            return result

    def decode(
        self, slots: Sequence[int], positions: Sequence[int], inputs: Array | Tokens
    ) -> Array:
        if not len(slots) == len(set(slots)) == len(positions) == len(inputs):
            raise BackendError("decoding takes one row of each of some distinct slots")
        self._check(slots, positions, inputs, 1)
        order = np.argsort(slots)
        at = np.asarray(positions)[order]
        with translated("cannot run the stage"):
            hidden = self._enter(inputs[order], at)[:, None]
            # Sequences share a call where their slots are neighbours, as in memory.
            runs = _neighbours([slots[index] for index in order])
            for segment in self._layers:
                parts = [segment.run(hidden[run], first, at[run]) for first, run in runs]
                hidden = parts[0] if len(parts) == 1 else np.concatenate(parts)
            rows = hidden[:, 0]
            if self._head is not None:
                rows = self._head.run(rows[None])[0]
        result = np.empty_like(rows)
        result[order] = rows
        return result

    def close(self) -> None:
        self._open = False
        self._embedding, self._layers, self._head = None, [], None
        return_free_memory()

    def _enter(self, inputs: Array | Tokens, positions: Tokens) -> Array:
        """Hidden rows [n, hidden] of ``inputs`` at ``positions``."""
        flush_denormals()
        if self._embedding is not None:
            return self._embedding.rows(np.asarray(inputs, np.int64), positions)
        return np.ascontiguousarray(inputs, np.float32)

    def _check(
        self, slots: Sequence[int], positions: Sequence[int], inputs: Array | Tokens, rows: int
    ) -> None:
        if not self._open:
            raise BackendError("the stage is closed")
        check_inputs(inputs, self._spec, tokens=self._embedding is not None)
        for slot, position in zip(slots, positions, strict=True):
            check_rows(slot, position, rows, self._options.slots, self._options.context_tokens)


class _Segment:
    """One session with the KV caches of its layers."""

    def __init__(self, session: Any, caches: Sequence[CacheShape], width: int, slots: int) -> None:
        self._session = session
        self._width = width
        # Filled, so that a lack of memory shows now and not in the middle of a text.
        self._caches = [
            [np.full(cache.of(slots), 0, np.float32) for _ in ("key", "value")] for cache in caches
        ]
        self._bindings: dict[tuple[int, int], _Binding] = {}

    def run(self, hidden: Array, first_slot: int = 0, last: Tokens | None = None) -> Array:
        """hidden [b, n, any] to [b, n, width]; ``last``: the last row's position of each of b
        sequences in consecutive slots (unused by a segment without layers)."""
        count, rows, _ = hidden.shape
        binding = self._bindings.get((first_slot, count))
        if binding is None:
            binding = self._bind(first_slot, count)
        if last is not None:
            binding.last[:] = last
            binding.total[...] = last.max() + 1
        result = np.empty((count, rows, self._width), np.float32)
        values = binding.values
        values.bind_ortvalue_input("hidden", ort.OrtValue.ortvalue_from_numpy(hidden))
        values.bind_ortvalue_output("output", ort.OrtValue.ortvalue_from_numpy(result))
        self._session.run_with_iobinding(values)
        return result

    def _bind(self, first_slot: int, count: int) -> _Binding:
        # Inputs that change every call: the runtime reads this memory in place.
        binding = _Binding(
            self._session.io_binding(), np.zeros(count, np.int32), np.zeros((), np.int32)
        )
        if self._caches:
            for name, array in (("seqlens_k", binding.last), ("total", binding.total)):
                value = ort.OrtValue.ortvalue_from_numpy(array)
                binding.values.bind_ortvalue_input(name, value)
        for index, pair in enumerate(self._caches):
            for kind, memory in zip(("key", "value"), pair, strict=True):
                # Past and present are one buffer, in which only the new rows are written.
                part = memory[first_slot : first_slot + count]
                shared = ort.OrtValue.ortvalue_from_numpy(part)
                binding.values.bind_ortvalue_input(f"past_{kind}_{index}", shared)
                binding.values.bind_ortvalue_output(f"{kind}_{index}", shared)
        self._bindings[first_slot, count] = binding
        return binding


@dataclass(frozen=True, slots=True)
class _Binding:
    """Memory bound for some consecutive slots. It does not keep arrays alive: those it points to
    are here and in the segment."""

    values: Any
    last: Any
    total: Any


@dataclass(frozen=True, slots=True)
class _Embedding:
    """Token rows are unpacked one by one from the stored table, which stays mapped."""

    tokens: QuantizedMatrix
    positions: Array | None
    position_offset: int
    projection: _Segment | None

    def rows(self, tokens: Tokens, positions: Tokens) -> Array:
        """Token ids [n] to hidden [n, hidden]."""
        hidden: Array = self.tokens.dequantize(tokens)
        if self.projection is not None:
            hidden = self.projection.run(hidden[None])[0]
        if self.positions is not None:
            hidden = hidden + self.positions[positions + self.position_offset]
        return hidden


class _Loader:
    """Builds a stage segment by segment."""

    def __init__(self, spec: ModelSpec, options: StageOptions) -> None:
        self._spec = spec
        self._options = options
        self._prepared = None if options.prepared_dir is None else Prepared(options.prepared_dir)
        self._rotary: dict[Any, tuple[Array, Array]] = {}
        self._memory_bytes = 0

    def load(self, artifacts: Sequence[tuple[int, Path]]) -> OnnxCpuStage:
        spec = self._spec
        embedding, layers, head = None, [], None
        for kind, group in itertools.groupby(artifacts, lambda item: spec.block_kind(item[0])):
            part = list(group)
            if kind == "embedding":
                embedding = self._embedding(part[0])
            elif kind == "layer":
                layers = [self._segment(*found, spec.hidden) for found in self._sessions(part)]
            else:
                (head,) = (self._segment(*found, spec.vocab) for found in self._sessions(part))
        if self._prepared is not None:
            self._prepared.drop_others()
        blocks = [block for block, _ in artifacts]
        buffer_bytes = stage_buffer_bytes(spec, blocks, CHUNK_ROWS, self._options.context_tokens)
        return OnnxCpuStage(
            embedding,
            layers,
            head,
            spec,
            self._options,
            self._memory_bytes + buffer_bytes,
        )

    def _embedding(self, artifact: tuple[int, Path]) -> _Embedding:
        spec, projection = self._spec, None
        _, tensors = read_block(artifact[1], spec, artifact[0])
        if spec.projected:
            matrix = executable(tensors["project_in.weight"], exact=self._options.exact)
            graph = embedding_graph(spec.embed_dim, matrix)
            self._memory_bytes += graph.executed_bytes
            session = new_session(graph, self._options.threads)
            projection = _Segment(session, (), spec.hidden, 1)
        tokens, positions = tensors["tokens.weight"], tensors.get("positions.weight")
        if not isinstance(tokens, QuantizedMatrix) or isinstance(positions, QuantizedMatrix):
            raise BackendError("the embedding's tensors are not in the form they are stored in")
        self._memory_bytes += tokens.stored_bytes + (0 if positions is None else positions.nbytes)
        return _Embedding(tokens, positions, spec.position_offset, projection)

    def _segment(self, session: Any, layers: Sequence[LayerSpec], width: int) -> _Segment:
        caches = [
            CacheShape(layer.kv_heads, self._options.context_tokens, cached_head_width(layer))
            for layer in layers
        ]
        kv_floats = sum(2 * int(np.prod(cache.of(self._options.slots))) for cache in caches)
        self._memory_bytes += 4 * kv_floats
        return _Segment(session, caches, width, self._options.slots)

    def _sessions(
        self, artifacts: Sequence[tuple[int, Path]]
    ) -> Iterator[tuple[Any, list[LayerSpec]]]:
        """Sessions for layers, or for the head: one where prepared weights can be kept."""
        threads, parts = self._options.threads, list(_segments(artifacts))
        key, found = self._key(artifacts), None
        if self._prepared is not None and key is not None:
            found = self._prepared.open(key, threads)
            if found is None:
                needed_bytes = MAX_EXPANSION * sum(path.stat().st_size for _, path in artifacts)
                if self._prepared.keep(key, map(self._graph, parts), needed_bytes):
                    found = self._prepared.open(key, threads)
        if found is not None:
            session, executed_bytes = found
            self._memory_bytes += executed_bytes
            yield session, self._layers(artifacts)
            return
        for part in parts:
            graph = self._graph(part)
            self._memory_bytes += graph.executed_bytes
            yield new_session(graph, threads), self._layers(part)

    def _key(self, artifacts: Sequence[tuple[int, Path]]) -> str | None:
        """Names what would be prepared; None for files that are not named by their content."""
        if not all(_SHA256.fullmatch(path.name) and path.exists() for _, path in artifacts):
            return None
        return Prepared.key(
            {
                "spec": self._spec.to_dict(),
                "blocks": [(block, path.name) for block, path in artifacts],
                "context": self._options.context_tokens,
                "exact": self._options.exact,
            }
        )

    def _layers(self, artifacts: Sequence[tuple[int, Path]]) -> list[LayerSpec]:
        blocks = (block for block, _ in artifacts if self._spec.block_kind(block) == "layer")
        return [self._spec.layer(block) for block in blocks]

    def _graph(self, artifacts: Sequence[tuple[int, Path]]) -> Graph:
        spec, run = self._spec, None
        for block, path in artifacts:
            _, tensors = read_block(path, spec, block)
            weights = _block_weights(tensors, exact=self._options.exact)
            if spec.block_kind(block) == "head":
                epsilon = spec.layers[-1].norm_eps if spec.final_norm else None
                return head_graph(spec.hidden, spec.vocab, weights, epsilon)
            if run is None:
                run = LayerGraph(spec.hidden, self._options.context_tokens, window_offset())
            layer = spec.layer(block)
            run.layer(layer, weights, self._rotary_table(layer))
        if run is None:
            raise BackendError("a graph without blocks")
        return run.finish()

    def _rotary_table(self, layer: LayerSpec) -> tuple[Array, Array] | None:
        if layer.rope is None:
            return None
        key = (layer.rope, layer.head_dim)
        if key not in self._rotary:
            self._rotary[key] = rotary_table(
                layer.rope, layer.head_dim, self._options.context_tokens
            )
        return self._rotary[key]


def _segments(artifacts: Sequence[tuple[int, Path]]) -> Iterator[list[tuple[int, Path]]]:
    """Runs of blocks whose files reach SEGMENT_BYTES."""
    run: list[tuple[int, Path]] = []
    run_bytes = 0
    for artifact in artifacts:
        run.append(artifact)
        # What is missing fails where it is read.
        run_bytes += artifact[1].stat().st_size if artifact[1].exists() else 0
        if run_bytes >= SEGMENT_BYTES:
            yield run
            run, run_bytes = [], 0
    if run:
        yield run


def _neighbours(slots: Sequence[int]) -> list[tuple[int, slice]]:
    """Runs of consecutive numbers in rising ``slots``, as (first, where they are)."""
    runs = []
    for _, group in itertools.groupby(enumerate(slots), key=lambda pair: pair[1] - pair[0]):
        pairs = list(group)
        runs.append((pairs[0][1], slice(pairs[0][0], pairs[-1][0] + 1)))
    return runs


def _block_weights(tensors: dict[str, Tensor], *, exact: bool) -> BlockWeights:
    matrices, vectors = {}, {}
    for name, tensor in tensors.items():
        if isinstance(tensor, QuantizedMatrix):
            matrices[name] = executable(tensor, exact=exact)
        else:
            vectors[name] = tensor
    return BlockWeights(matrices, vectors)
