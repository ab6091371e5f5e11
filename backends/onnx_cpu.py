"""Any CPU: ONNX Runtime, weights packed in 2, 4 or 8 bits, activations rounded to 8 bits.

A stage is one graph of its layers and one of its head. Only the rows whose logits are wanted go
through the head.
Layers are cut into segments of SEGMENT_BYTES, each a session with threads of its own. Between two
of them a pass can let stages of other models compute. ONNX Runtime also holds a session's weights
twice while it rearranges them for its kernels.

With ``StageOptions.fast_prompts``, and room in ``memory_bytes``, the stage holds its layers a
second time, as signed bytes with one scale a row. Prompts run through that copy, and each row of
activations is rounded to 8 bits as a whole. That is twice as fast, with errors of a product of 2 to
5 %. Decoding never uses it.

Packed matrices are multiplied with activations rounded to 8 bits in blocks of a group's size. This
gives relative errors of a product of 1 to 2 % at any width (docs/performance.md). With
``StageOptions.exact`` all matrices run as fp32 instead, and the results equal the reference's.
"""

from __future__ import annotations

import importlib.metadata
import itertools
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

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
    TeamSum,
    Tokens,
)
from backends.checks import check_blocks, check_inputs, check_rows
from backends.encoder import EncoderStage
from backends.onnx_encoder import load_encoder
from backends.onnx_experts import (
    Experts,
    ExpertThreads,
    expert_graphs,
    expert_part,
    own_tensors,
    pieces,
)
from backends.onnx_graph import (
    ROUTED_OUTPUTS,
    BlockWeights,
    CacheShape,
    Graph,
    LayerGraph,
    cached_head_width,
    embedding_graph,
    head_graph,
    padded_tables,
    table_key,
)
from backends.onnx_matrix import EXACT_BITS, Matrix, bytes_of, executable
from backends.onnx_mixture import fits
from backends.onnx_prepared import Prepared
from backends.onnx_session import (
    container_bits,
    flush_denormals,
    mixes_experts,
    new_session,
    return_free_memory,
    sums_bytes_exactly,
    translated,
    window_offset,
)
from backends.onnx_share import PROMPT_ROWS, ShareGraph, ShareLayer, ShareLayers, neighbours
from model.artifact import SHA256, Tensor, file_sha256, read_block, read_format
from model.costs import on_chip_layer_bytes, stage_buffer_bytes
from model.errors import CheckpointError
from model.quantize import QuantizedMatrix
from model.rotary import rotary_table
from model.spec import LayerSpec, ModelSpec

SEGMENT_BYTES = 16 << 20
"""The least weights of a session. A pass can pause between two, and each costs some time."""

MAX_EXPANSION = 2
"""The most bytes of a block as executed over those of its file (16 bits run as 32)."""

CHUNK_ROWS = 64
"""The rows of a call for which compute buffers are estimated."""

Part = Literal["layers", "bytes", "experts"]
"""The kinds of a kept layer: all but experts, that as bytes for prompts, or the experts."""

PACKED_BYTES = 4
"""The most bytes that are taken while a layer with experts is packed, for each of its file."""

COPY_MARGIN = 1.02
"""The most bytes of the prompt copy, with scales and sums, per weight."""


class OnnxCpuBackend(Backend):
    """ONNX Runtime's CPU provider on any machine that has it."""

    PREPARED_FACTOR = 4.5  # MAX_EXPANSION * DISK_FACTOR, plus tables and graphs.

    @classmethod
    def probe(cls) -> Capabilities:
        try:
            window_offset()
        except BackendError as error:
            raise BackendUnavailable("onnx_cpu", str(error)) from error
        return Capabilities(
            "onnx_cpu",
            importlib.metadata.version("onnxruntime"),
            container_bits(),
            exact_container_bits=EXACT_BITS,
            shares=True,
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

    def load_encoder(
        self, spec: ModelSpec, artifacts: Sequence[tuple[int, Path]], options: StageOptions
    ) -> EncoderStage:
        check_blocks(spec, [block for block, _ in artifacts], options)
        stage = load_encoder(spec, artifacts, options)
        return_free_memory()
        return stage


class OnnxCpuStage(Stage):
    """A chain of sessions, as the module's description explains."""

    def __init__(
        self,
        embedding: _Embedding | None,
        chain: _Chain | ShareLayers,
        spec: ModelSpec,
        options: StageOptions,
        memory_bytes: int,
        kept_files: Mapping[Path, str],
    ) -> None:
        self._embedding = embedding
        self._chain = chain
        self._spec = spec
        self._options = options
        self._memory_bytes = memory_bytes
        self._kept_files = kept_files
        self._open = True

    @property
    def memory_bytes(self) -> int:
        return self._memory_bytes

    @property
    def kept_files(self) -> Mapping[Path, str]:
        return self._kept_files

    def forward(
        self, slot: int, position: int, inputs: Array | Tokens, *, logits: int = 1
    ) -> Array:
        rows = len(inputs) if inputs.ndim else 0
        self._check([slot], [position], inputs, rows)
        hidden = self._enter(inputs, np.arange(position, position + rows))
        last = np.array([position + rows - 1])
        if isinstance(self._chain, _Chain):
            self._chain.between = self.between
        return self._chain.forward(hidden, slot, last, logits=logits)

    def decode(
        self, slots: Sequence[int], positions: Sequence[int], inputs: Array | Tokens
    ) -> Array:
        if not len(slots) == len(set(slots)) == len(positions) == len(inputs):
            raise BackendError("a pass takes one row for each slot, and its slots must be distinct")
        self._check(slots, positions, inputs, 1)
        at = np.asarray(positions)
        if isinstance(self._chain, _Chain):
            self._chain.between = self.between
        return self._chain.decode(self._enter(inputs, at), slots, at)

    def close(self) -> None:
        self._open = False
        self._embedding, self._chain = None, _Chain([], [], None, self._spec.vocab)
        return_free_memory()

    def _enter(self, inputs: Array | Tokens, positions: Tokens) -> Array:
        """Return hidden rows [n, hidden] of ``inputs`` at ``positions``."""
        flush_denormals()
        if self._embedding is not None:
            with translated("cannot run the stage"):
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


class _Chain:
    """Whole layers in sessions, with a copy for prompts, and the head."""

    between: Callable[[], float] | None = None
    """As of Stage."""

    def __init__(
        self,
        layers: list[_Segment],
        prompt_layers: list[_Segment],
        head: _Segment | None,
        vocab: int,
    ) -> None:
        self._layers = layers
        self._prompt_layers = prompt_layers
        self._head = head
        self._vocab = vocab

    def forward(self, hidden: Array, slot: int, last: Tokens, *, logits: int) -> Array:
        """Run rows [n, hidden] of a sequence, the last of which is at ``last`` [1]."""
        prompt = len(hidden) >= PROMPT_ROWS
        hidden = hidden[None]
        with translated("cannot run the stage"):
            for segment in self._parts(self._prompt_layers if prompt else self._layers):
                hidden = segment.run(hidden, slot, last)
            if self._head is not None:
                if not logits:
                    return np.empty((0, self._vocab), np.float32)
                self._pause()
                hidden = self._head.run(hidden[:, -logits:])
        result: Array = hidden[0]
        return result

    def decode(self, hidden: Array, slots: Sequence[int], positions: Tokens) -> Array:
        """Run rows [n, hidden], one for each slot."""
        order = np.argsort(slots)
        hidden, at = hidden[order][:, None], positions[order]
        # Sequences in neighbouring slots share a call, because they are neighbours in memory.
        runs = neighbours([slots[index] for index in order])
        with translated("cannot run the stage"):
            for segment in self._parts(self._layers):
                parts = [segment.run(hidden[run], first, at[run]) for first, run in runs]
                hidden = parts[0] if len(parts) == 1 else np.concatenate(parts)
            rows = hidden[:, 0]
            if self._head is not None:
                self._pause()
                rows = self._head.run(rows[None])[0]
        if list(slots) == sorted(slots):
            return rows  # Already in order: copying logits of several sequences costs megabytes.
        result = np.empty_like(rows)
        result[order] = rows
        return result

    def _parts(self, segments: Sequence[_Segment]) -> Iterator[_Segment]:
        """Yield segments, with a pause between two of them."""
        for number, segment in enumerate(segments):
            if number:
                self._pause()
            yield segment

    def _pause(self) -> None:
        if self.between is not None:
            self.between()


class _Segment:
    """One session with the KV caches of its layers, which another session may share."""

    def __init__(
        self,
        session: Any,
        caches: Sequence[_Cache],
        width: int,
        experts: Experts | None = None,
        tables: Sequence[tuple[Array, Array] | None] = (),
    ) -> None:
        """``experts`` are those of the last layer, and ``tables`` the different rotary ones."""
        self._session = session
        self._experts = experts
        self._width = width
        self._caches = caches
        self._tables = tables
        self._bindings: dict[tuple[int, int], _Binding] = {}
        self._rows: dict[int, _Row] = {}

    def run(self, hidden: Array, first_slot: int = 0, last: Tokens | None = None) -> Array:
        """Run hidden [b, n, any] to [b, n, width].

        ``last`` is the last row's position of each of b sequences in consecutive slots. A segment
        without layers ignores it.
        """
        count, rows, _ = hidden.shape
        if last is not None and count * rows == 1:
            return self._run_row(hidden, first_slot, last)
        binding = self._bindings.get((first_slot, count))
        if binding is None:
            binding = self._bindings[first_slot, count] = self._bind(first_slot, count)
        if last is not None:
            binding.last[:] = last
            binding.total[...] = last.max() + 1
        result = np.empty((count, rows, self._width), np.float32)
        values = binding.values
        values.bind_ortvalue_input("hidden", ort.OrtValue.ortvalue_from_numpy(hidden))
        values.bind_ortvalue_output("output", ort.OrtValue.ortvalue_from_numpy(result))
        experts = self._experts
        if experts is None:
            self._session.run_with_iobinding(values)
            return result
        total = count * rows
        normed = np.empty((total, self._width), np.float32)
        scores = np.empty((total, experts.spec.count), np.float32)
        for name, array in zip(ROUTED_OUTPUTS, (normed, scores), strict=True):
            bound = ort.OrtValue.ortvalue_from_numpy(array.reshape(count, rows, -1))
            values.bind_ortvalue_output(name, bound)
        self._session.run_with_iobinding(values)
        experts.add(result.reshape(total, -1), normed, scores)
        return result

    def _bind(self, first_slot: int, count: int) -> _Binding:
        # These inputs change every call. The runtime reads this memory in place.
        binding = _Binding(
            self._session.io_binding(), np.zeros(count, np.int32), np.zeros((), np.int32)
        )
        if self._caches:
            for name, array in (("seqlens_k", binding.last), ("total", binding.total)):
                value = ort.OrtValue.ortvalue_from_numpy(array)
                binding.values.bind_ortvalue_input(name, value)
        for index, tables in enumerate(self._tables):
            for name, table in zip(("cos", "sin"), tables or (), strict=True):
                value = ort.OrtValue.ortvalue_from_numpy(table)
                binding.values.bind_ortvalue_input(f"{name}_{index}", value)
        for index, pair in enumerate(self._caches):
            for kind, memory in zip(("key", "value"), pair, strict=True):
                # Past and present are one buffer, to which only new rows are written.
                part = memory[first_slot : first_slot + count]
                shared = ort.OrtValue.ortvalue_from_numpy(part)
                binding.values.bind_ortvalue_input(f"past_{kind}_{index}", shared)
                binding.values.bind_ortvalue_output(f"{kind}_{index}", shared)
        return binding

    def _run_row(self, hidden: Array, slot: int, last: Tokens) -> Array:
        """Run one row. All its memory is bound once, because decoding waits for it."""
        row = self._rows.get(slot)
        if row is None:
            row = self._rows[slot] = self._bind_row(slot)
        row.binding.last[:] = last
        row.binding.total[...] = last[0] + 1
        row.hidden[...] = hidden
        self._session.run_with_iobinding(row.binding.values)
        if self._experts is not None:
            self._experts.add(row.output[0], self._experts.row, row.scores[0])
        output: Array = row.output.copy()
        return output

    def _bind_row(self, slot: int) -> _Row:
        binding, shape, experts = self._bind(slot, 1), (1, 1, self._width), self._experts
        row = _Row(
            binding,
            np.empty(shape, np.float32),
            np.empty(shape, np.float32),
            np.empty((1, 1, 0 if experts is None else experts.spec.count), np.float32),
        )
        outputs = {"output": row.output}
        if experts is not None:
            outputs |= dict(zip(ROUTED_OUTPUTS, (experts.row[None], row.scores), strict=True))
        values = binding.values
        values.bind_ortvalue_input("hidden", ort.OrtValue.ortvalue_from_numpy(row.hidden))
        for name, array in outputs.items():
            values.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(array))
        return row


class _Cache(NamedTuple):
    """Keys and values of a layer, each float32 [slots, heads, context, width]."""

    key: Array
    value: Array


@dataclass(frozen=True, slots=True)
class _Binding:
    """Memory bound for some consecutive slots. It does not keep its arrays alive.

    The arrays that it points to are kept here and in the segment.
    """

    values: Any
    last: Any
    total: Any


@dataclass(frozen=True, slots=True)
class _Row:
    """Memory bound for one row of a slot.

    hidden, output: float32 [1, 1, hidden].
    scores: float32 [1, 1, experts], of which there may be none.
    """

    binding: _Binding
    hidden: Array
    output: Array
    scores: Array


@dataclass(frozen=True, slots=True)
class _Embedding:
    """Unpacks token rows one by one from the stored table, which stays mapped."""

    tokens: QuantizedMatrix
    positions: Array | None
    position_offset: int
    projection: _Segment | None

    def rows(self, tokens: Tokens, positions: Tokens) -> Array:
        """Return hidden [n, hidden] for token ids [n]."""
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
        self._containers = EXACT_BITS if options.exact else container_bits()
        self._prepared = None
        if options.prepared_dir is not None:
            self._prepared = Prepared(options.prepared_dir, options.prepared_bytes)
        self._rotary: dict[Any, tuple[Array, Array]] = {}
        self._memory_bytes = 0
        self._experts_apart: set[int] = set()

    def load(self, artifacts: Sequence[tuple[int, Path]]) -> OnnxCpuStage:
        spec = self._spec
        grouped = itertools.groupby(artifacts, lambda item: spec.block_kind(item[0]))
        parts = {kind: list(group) for kind, group in grouped}
        blocks = [block for block, _ in artifacts]
        self._experts_apart = {
            block for block, path in parts.get("layer", ()) if not self._mixes(block, path)
        }
        self._memory_bytes += stage_buffer_bytes(
            spec, blocks, CHUNK_ROWS, self._options.context_tokens
        )
        embedding = self._embedding(parts["embedding"][0]) if "embedding" in parts else None
        chain = self._chain(parts.get("layer", []), parts.get("head", []))
        if self._prepared is not None:
            self._prepared.drop_others()
        kept_files = {} if self._prepared is None else self._prepared.opened
        return OnnxCpuStage(embedding, chain, spec, self._options, self._memory_bytes, kept_files)

    def _chain(
        self, layers: list[tuple[int, Path]], heads: list[tuple[int, Path]]
    ) -> _Chain | ShareLayers:
        if layers and self._options.team_sum is not None:
            return self._share(layers, heads, self._options.team_sum)
        caches = [self._cache(layer) for layer in self._layers(layers)]
        experts = self._experts(layers)
        segments = self._segments(layers, caches, experts) if layers else []
        head = None
        if heads:
            ((session, _),) = self._sessions(heads)
            head = _Segment(session, (), self._spec.vocab)
        prompt_layers = segments
        if layers and self._room_for_bytes(layers):
            prompt_layers = self._segments(layers, caches, experts, as_bytes=True)
        return _Chain(segments, prompt_layers, head, self._spec.vocab)

    def _share(
        self,
        layers: list[tuple[int, Path]],
        heads: list[tuple[int, Path]],
        team_sum: TeamSum,
    ) -> ShareLayers:
        shared = []
        for layer, experts in zip(self._layers(layers), self._experts(layers), strict=True):
            cache = self._cache(layer)
            shared.append(ShareLayer(cache.key, cache.value, self._tables(layer), experts))
        *halves, end = self._cut_sessions([*layers, *heads])
        prompt_halves = halves
        if self._room_for_bytes(layers):
            *prompt_halves, _ = self._cut_sessions(layers, as_bytes=True)
        spec = self._spec
        width = spec.vocab if heads else None
        return ShareLayers(halves, prompt_halves, end, shared, (spec.hidden, width), team_sum)

    def _room_for_bytes(self, artifacts: Sequence[tuple[int, Path]]) -> bool:
        """Whether to hold layers again as bytes for prompts.

        The caller must have asked for that and given memory, and no layer may be stored wider.
        """
        allowed = self._options.memory_bytes
        if allowed is None or not self._options.fast_prompts or self._options.exact:
            return False
        if not sums_bytes_exactly():
            return False
        if any(layer.experts is not None for layer in self._layers(artifacts)):
            return False  # Few rows of a prompt meet in an expert, so its bytes would gain little.
        if self._memory_bytes + self._copy_bytes(artifacts) > allowed:
            return False
        spec = self._spec
        return all(read_block(path, spec, block)[0].bits <= 8 for block, path in artifacts)

    def _copy_bytes(self, artifacts: Sequence[tuple[int, Path]]) -> int:
        layers = self._layers(artifacts)
        return int(COPY_MARGIN * sum(map(on_chip_layer_bytes, layers)))

    def _embedding(self, artifact: tuple[int, Path]) -> _Embedding:
        spec, projection = self._spec, None
        _, tensors = read_block(artifact[1], spec, artifact[0])
        if spec.projected:
            matrix = executable(tensors["project_in.weight"], self._containers)
            graph = embedding_graph(spec.embed_dim, matrix)
            self._memory_bytes += graph.executed_bytes
            session = new_session(graph, self._options.threads)
            projection = _Segment(session, (), spec.hidden)
        tokens, positions = tensors["tokens.weight"], tensors.get("positions.weight")
        if not isinstance(tokens, QuantizedMatrix) or isinstance(positions, QuantizedMatrix):
            raise BackendError("the embedding's tensors must be stored matrices")
        self._memory_bytes += tokens.stored_bytes + (0 if positions is None else positions.nbytes)
        return _Embedding(tokens, positions, spec.position_offset, projection)

    def _cache(self, layer: LayerSpec) -> _Cache:
        width = cached_head_width(layer)
        shape = CacheShape(layer.kv_heads, self._options.context_tokens, width)
        # Filling the cache shows a lack of memory now, and not in the middle of a text.
        cache = _Cache(*(np.full(shape.of(self._options.slots), 0, np.float32) for _ in range(2)))
        self._memory_bytes += cache.key.nbytes + cache.value.nbytes
        return cache

    def _segments(
        self,
        artifacts: Sequence[tuple[int, Path]],
        caches: Sequence[_Cache],
        experts: Sequence[Experts | None],
        *,
        as_bytes: bool = False,
    ) -> list[_Segment]:
        """Return the layers' segments with their caches and experts, which are one per layer."""
        segments, begin, width = [], 0, self._spec.hidden
        layers = self._layers(artifacts)
        for session, count in self._sessions(artifacts, as_bytes=as_bytes):
            end = begin + count
            own = [layer for layer in layers[begin:end] if layer.rope is not None]
            tables = [
                self._tables(layer) for layer in {table_key(one): one for one in own}.values()
            ]
            segments.append(_Segment(session, caches[begin:end], width, experts[end - 1], tables))
            begin = end
        return segments

    def _experts(self, artifacts: Sequence[tuple[int, Path]]) -> list[Experts | None]:
        """Return the experts of each layer that have sessions of their own, or None."""
        routed = [item for item in artifacts if self._apart([item])]
        if not routed:
            return [None] * len(artifacts)
        threads = ExpertThreads(self._options.threads)
        sessions = iter(self._expert_sessions(routed))
        found: list[Experts | None] = []
        for item, layer in zip(artifacts, self._layers(artifacts), strict=True):
            experts = layer.experts
            if experts is None or not self._apart([item]):
                found.append(None)
                continue
            count = pieces(layer, self._options.threads)
            own = [list(itertools.islice(sessions, count)) for _ in range(experts.stored)]
            mixture = Experts(experts, layer.hidden, own, threads)
            self._memory_bytes += mixture.nbytes
            found.append(mixture)
        return found

    def _expert_sessions(self, artifacts: Sequence[tuple[int, Path]]) -> Iterable[Any]:
        """Return the sessions of all experts of some layers, in order."""
        kept = self._kept(artifacts, partial(self._expert_graphs, artifacts), part="experts")
        return self._new_expert_sessions(artifacts) if kept is None else kept

    def _new_expert_sessions(self, artifacts: Sequence[tuple[int, Path]]) -> Iterator[Any]:
        for graph in self._expert_graphs(artifacts):
            self._memory_bytes += graph.executed_bytes
            yield new_session(graph, 1, small=True)

    def _expert_graphs(self, artifacts: Sequence[tuple[int, Path]]) -> Iterator[Graph]:
        for block, path in artifacts:
            _, tensors = read_block(path, self._spec, block)
            layer = self._spec.layer(block)
            yield from expert_graphs(layer, tensors, self._containers, self._options.threads)

    def _sessions(
        self, artifacts: Sequence[tuple[int, Path]], *, as_bytes: bool = False
    ) -> Iterator[tuple[Any, int]]:
        """Yield a session and its number of blocks, for layers or for the head.

        ``as_bytes`` takes matrices as bytes.
        """
        if not artifacts:  # A stage of the embedding alone has no sessions.
            return
        parts = list(_segments(artifacts, self._experts_apart))
        build = partial(self._graph, as_bytes=as_bytes)
        kept = self._kept(
            artifacts, lambda: map(build, parts), part="bytes" if as_bytes else "layers"
        )
        if kept is not None:
            yield from zip(kept, map(len, parts), strict=True)
            return
        for part in parts:
            graph = build(part)
            self._memory_bytes += graph.executed_bytes
            joined = len(parts) == 1
            yield new_session(graph, self._options.threads, joined=joined), len(part)

    def _cut_sessions(
        self, artifacts: Sequence[tuple[int, Path]], *, as_bytes: bool = False
    ) -> list[Any]:
        """Return two sessions for each layer, and the last, which is also the head if given."""
        build = partial(self._cut_graphs, artifacts, as_bytes=as_bytes)
        sessions = self._kept(artifacts, build, part="bytes" if as_bytes else "layers", cut=True)
        if sessions is None:
            sessions = []
            for graph in build():
                self._memory_bytes += graph.executed_bytes
                sessions.append(new_session(graph, self._options.threads, joined=False))
        return sessions

    def _kept(
        self,
        artifacts: Sequence[tuple[int, Path]],
        build: Callable[[], Iterable[Graph]],
        *,
        part: Part,
        cut: bool = False,
    ) -> list[Any] | None:
        """Return sessions of prepared weights, which are made if there are none. None: not kept."""
        threads, key = self._options.threads, self._key(artifacts, part=part, cut=cut)
        small = part == "experts"
        if small:
            threads = 1
        if self._prepared is None or key is None:
            return None
        found = self._prepared.open(key, threads, small=small)
        if found is None:
            needed_bytes = self._needed_bytes(artifacts, part)
            self._require_whole(artifacts)
            if self._prepared.keep(key, build(), needed_bytes):
                found = self._prepared.open(key, threads, small=small)
        if found is None:
            return None
        sessions, executed_bytes = found
        self._memory_bytes += executed_bytes
        return sessions

    def _needed_bytes(self, artifacts: Sequence[tuple[int, Path]], part: Part) -> int:
        """Return the most bytes of weights as executed."""
        if part == "bytes":
            return self._copy_bytes(artifacts)
        total = 0.0
        for block, path in artifacts:
            routed = (
                expert_part(self._spec.block_tensors(block))
                if self._apart([(block, path)])
                else 0.0
            )
            total += path.stat().st_size * (routed if part == "experts" else 1 - routed)
        return int(MAX_EXPANSION * total)

    def _apart(self, artifacts: Sequence[tuple[int, Path]]) -> bool:
        """Whether experts of a layer have sessions of their own."""
        return any(block in self._experts_apart for block, _ in artifacts)

    def _mixes(self, block: int, path: Path) -> bool:
        """Whether a layer needs no sessions of experts."""
        layer = self._spec.layer(block)
        if layer.experts is None:
            return True
        fmt, allowed = read_format(path), self._options.memory_bytes
        if allowed is not None and PACKED_BYTES * path.stat().st_size > allowed:
            return False
        return fits(layer, fmt, self._containers) and mixes_experts(self._containers[fmt.bits])

    def _require_whole(self, artifacts: Sequence[tuple[int, Path]]) -> None:
        """Raise CheckpointError for an artifact whose contents differ from its name.

        Kept weights that were made of it would stay wrong until they are removed.
        """
        for _, path in artifacts:
            if path not in self._options.hashed and file_sha256(path) != path.name:
                raise CheckpointError(f"{path}: the file is damaged; fetch it again")

    def _key(self, artifacts: Sequence[tuple[int, Path]], *, part: Part, cut: bool) -> str | None:
        """Return the name for prepared weights, or None if files are not named by their content."""
        if not all(SHA256.fullmatch(path.name) and path.exists() for _, path in artifacts):
            return None
        return Prepared.key(
            {
                "spec": self._spec.to_dict(),
                "blocks": [(block, path.name) for block, path in artifacts],
                "context": self._options.context_tokens,
                "exact": self._options.exact,
                "part": part,
                "cut": cut,
                "apart": [block for block, _ in artifacts if block in self._experts_apart],
                # Experts are cut into pieces by the number of threads.
                "threads": self._options.threads if part == "experts" else 0,
            }
        )

    def _layers(self, artifacts: Sequence[tuple[int, Path]]) -> list[LayerSpec]:
        blocks = (block for block, _ in artifacts if self._spec.block_kind(block) == "layer")
        return [self._spec.layer(block) for block in blocks]

    def _cut_graphs(
        self, artifacts: Sequence[tuple[int, Path]], *, as_bytes: bool
    ) -> Iterator[Graph]:
        """Yield the graphs of a share, each when it is complete."""
        spec = self._spec
        run = ShareGraph(spec.hidden, self._options.context_tokens, window_offset())
        for block, path in artifacts:
            _, tensors = read_block(path, spec, block)
            weights = self._weights(block, tensors, as_bytes=as_bytes)
            if spec.block_kind(block) == "head":
                yield run.finish_with_head(spec, weights)
                return
            layer = spec.layer(block)
            run.layer(layer, weights)
            yield from run.take()
        yield run.finish()

    def _graph(self, artifacts: Sequence[tuple[int, Path]], *, as_bytes: bool) -> Graph:
        spec, run = self._spec, None
        for block, path in artifacts:
            _, tensors = read_block(path, spec, block)
            weights = self._weights(block, tensors, as_bytes=as_bytes)
            if spec.block_kind(block) == "head":
                return head_graph(spec, weights)
            if run is None:
                run = LayerGraph(spec.hidden, self._options.context_tokens, window_offset())
            layer = spec.layer(block)
            run.layer(layer, weights)
        if run is None:
            raise BackendError("a graph without blocks")
        return run.finish()

    def _weights(
        self, block: int, tensors: Mapping[str, Tensor], *, as_bytes: bool
    ) -> BlockWeights:
        """Return a block's weights, without those of experts that have sessions."""
        matrices: dict[str, Matrix] = {}
        vectors = {}
        if block in self._experts_apart:
            tensors = own_tensors(self._spec.layer(block), tensors)
        for name, tensor in tensors.items():
            if not isinstance(tensor, QuantizedMatrix):
                vectors[name] = tensor
            elif as_bytes:
                matrices[name] = bytes_of(tensor)
            else:
                matrices[name] = executable(tensor, self._containers)
        return BlockWeights(matrices, vectors)

    def _tables(self, layer: LayerSpec) -> tuple[Array, Array] | None:
        """Return a layer's rotary tables, which all layers like it share."""
        if layer.rope is None:
            return None
        key = table_key(layer)
        if key not in self._rotary:
            table = rotary_table(layer.rope, layer.head_dim, self._options.context_tokens)
            self._rotary[key] = padded_tables(layer, table)
            self._memory_bytes += sum(part.nbytes for part in self._rotary[key])
        return self._rotary[key]


def _segments(
    artifacts: Sequence[tuple[int, Path]], ends: Container[int]
) -> Iterator[list[tuple[int, Path]]]:
    """Yield runs of blocks whose files reach SEGMENT_BYTES, or whose last one is in ``ends``."""
    run: list[tuple[int, Path]] = []
    run_bytes = 0
    for artifact in artifacts:
        run.append(artifact)
        # A missing file fails where it is read.
        run_bytes += artifact[1].stat().st_size if artifact[1].exists() else 0
        if run_bytes >= SEGMENT_BYTES or artifact[0] in ends:
            yield run
            run, run_bytes = [], 0
    if run:
        yield run
