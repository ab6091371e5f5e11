"""Layers of an encoder on any CPU, by ONNX Runtime.

Rows of all texts lie one behind the other, [n, width], in every product and norm. Only attention
takes texts side by side, so that no product is spent on padding.

The inputs of a graph are:

- ``hidden`` float32 [n, hidden]
- ``rows`` int64 [texts, longest], ``places`` int64 [n]: backends.encoder.side_by_side
- ``positions`` int64 [texts, longest], with rotary embedding
- ``seen_i`` float32 [texts, 1, longest, longest]: backends.encoder.see, of each kind of layer; with
  biases [texts, heads, longest, longest]

The output is ``output`` float32 [n, hidden].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto

from backends.base import Array, BackendError, StageOptions
from backends.encoder import EncoderLayers, EncoderStage, LayerFile, read_encoder, see, side_by_side
from backends.onnx_graph import MICROSOFT, BlockWeights, Graph, activation
from backends.onnx_matrix import EXACT_BITS, Matrix, bytes_of, executable, stack_rows
from backends.onnx_session import (
    container_bits,
    flush_denormals,
    new_session,
    sums_bytes_exactly,
    translated,
)
from model.quantize import QuantizedMatrix
from model.rotary import rotary_table
from model.spec import LayerSpec, ModelSpec
from model.texts import Texts

SEGMENT_BYTES = 64 << 20
"""Weights of a session, as in backends.onnx_cpu: the runtime holds them twice while it loads."""


def load_encoder(
    spec: ModelSpec, artifacts: Sequence[tuple[int, Path]], options: StageOptions
) -> EncoderStage:
    """Load a stage of an encoder. Raises BackendError, CheckpointError."""
    ends, files, buffer_bytes = read_encoder(spec, artifacts, options)
    layers = None
    if files:
        with translated("cannot load the stage"):
            layers = OnnxEncoderLayers(spec, files, options)
    return EncoderStage(spec, ends, layers, options, buffer_bytes)


class OnnxEncoderLayers(EncoderLayers):
    """Layers in sessions of SEGMENT_BYTES, one after the other."""

    def __init__(self, spec: ModelSpec, files: Sequence[LayerFile], options: StageOptions) -> None:
        self._memory_bytes = 0
        self._kinds = list(dict.fromkeys(_kind(file) for file in files))
        self._files = {_kind(file): (file.layer, file.biases) for file in files}
        self._rotary = any(file.layer.rope is not None for file in files)
        self._sessions = []
        # The bytes multiply faster, with one rounding more. They replace the packed form here.
        as_bytes = (
            options.fast_prompts
            and not options.exact
            and sums_bytes_exactly()
            and all(file.bits <= 8 for file in files)
        )
        containers = EXACT_BITS if options.exact else container_bits()
        for segment in _segments(files):
            run = EncoderGraph(spec, options.context_tokens, self._kinds)
            for file in segment:
                weights = _weights(file, containers, as_bytes=as_bytes)
                run.layer(file.layer, weights, _kind(file))
            graph = run.finish()
            self._memory_bytes += graph.executed_bytes
            self._sessions.append(new_session(graph, options.threads))

    @property
    def memory_bytes(self) -> int:
        return self._memory_bytes

    def run(self, hidden: Array, texts: Texts) -> Array:
        flush_denormals()
        rows, places = side_by_side(texts)
        feeds: dict[str, Any] = {"rows": rows, "places": places}
        if self._rotary:
            feeds["positions"] = np.tile(np.arange(rows.shape[1]), (len(rows), 1))
        for index, kind in enumerate(self._kinds):
            layer, biases = self._files[kind]
            feeds[f"seen_{index}"] = see(layer, texts, biases)
        with translated("cannot run the stage"):
            for number, session in enumerate(self._sessions):
                if number and self.between is not None:
                    self.between()
                wanted = {value.name for value in session.get_inputs()} - {"hidden"}
                own = {name: feeds[name] for name in wanted}
                (hidden,) = session.run(["output"], {"hidden": hidden, **own})
        return hidden

    def close(self) -> None:
        self._sessions = []


@dataclass(frozen=True, slots=True)
class Kind:
    """The rows that a layer's rows see, and its biases. Layers of one kind share an input."""

    bidirectional: bool
    window: int | None
    biases: bytes


def _kind(file: LayerFile) -> Kind:
    biases = b"" if file.biases is None else file.biases.tobytes()
    return Kind(file.layer.bidirectional, file.layer.sliding_window, biases)


class EncoderGraph:
    """A run of layers in one graph: ``layer`` for each, then ``finish``."""

    def __init__(self, spec: ModelSpec, context_tokens: int, kinds: Sequence[Kind]) -> None:
        self.graph = Graph()
        self._spec = spec
        self._context_tokens = context_tokens
        self._kinds = kinds
        self._inputs: set[str] = set()
        self._tables: dict[Any, tuple[str, str]] = {}
        self._value = self.graph.input("hidden", TensorProto.FLOAT, ("n", spec.hidden))
        self._input("rows", TensorProto.INT64, ("b", "t"))
        self._input("places", TensorProto.INT64, ("n",))

    def layer(self, layer: LayerSpec, weights: BlockWeights, kind: Kind) -> None:
        """Append a layer."""
        entered = before = self._value
        inward = layer.norm_position in ("pre", "both")
        if inward and not layer.enters_plain:
            entered = self._norm(layer, weights, "attn_norm", before)
        product = self._linear(weights, self._attention(layer, weights, entered, kind), "o")
        after = self._left(layer, weights, "attn", before, product)
        rows = self._norm(layer, weights, "mlp_norm", after) if inward else after
        product = self._linear(weights, self._mlp(layer, weights, rows), "down")
        self._value = self._left(layer, weights, "mlp", after, product)

    def finish(self) -> Graph:
        """Return the graph with its output in place."""
        width = self._spec.hidden
        self.graph.output(self._value, "output", TensorProto.FLOAT, ("n", width))
        return self.graph

    def _input(self, name: str, dtype: int, shape: Sequence[int | str]) -> str:
        if name not in self._inputs:
            self._inputs.add(name)
            self.graph.input(name, dtype, shape)
        return name

    def _left(
        self, layer: LayerSpec, weights: BlockWeights, part: str, before: str, product: str
    ) -> str:
        """Return the hidden state after attention or MLP."""
        if layer.norm_position == "both":
            product = self._norm(layer, weights, f"{part}_out_norm", product)
        elif layer.norm_position == "output":
            product = self._norm(layer, weights, f"{part}_norm", product)
        elif layer.norm_position == "post":
            scale, bias = _norm_weights(weights, f"{part}_norm")
            if bias is not None:
                return self.graph.add_norm(before, product, scale, bias, layer.norm_eps)[1]
            (total,) = self.graph.node("Add", [before, product])
            return self._norm(layer, weights, f"{part}_norm", total)
        return self.graph.node("Add", [before, product])[0]

    def _norm(self, layer: LayerSpec, weights: BlockWeights, name: str, value: str) -> str:
        return self.graph.norm(value, *_norm_weights(weights, name), layer.norm_eps)

    def _linear(self, weights: BlockWeights, value: str, name: str) -> str:
        bias = weights.vectors.get(f"{name}.bias")
        return self.graph.linear(value, weights.matrices[f"{name}.weight"], bias)

    def _projections(
        self, weights: BlockWeights, value: str, names: Sequence[str], widths: Sequence[int]
    ) -> list[str]:
        stacked = stack_rows([weights.matrices[f"{name}.weight"] for name in names])
        if stacked is None:
            return [self._linear(weights, value, name) for name in names]
        biases = [weights.vectors.get(f"{name}.bias") for name in names]
        present = [bias for bias in biases if bias is not None]
        joined = self.graph.linear(value, stacked, np.concatenate(present) if present else None)
        return self.graph.node("Split", [joined, self.graph.integers(*widths)], len(names), axis=1)

    def _attention(self, layer: LayerSpec, weights: BlockWeights, value: str, kind: Kind) -> str:
        graph, width = self.graph, layer.heads * layer.head_dim
        kv_width = layer.kv_heads * layer.head_dim
        q, k, v = self._projections(weights, value, "qkv", (width, kv_width, kv_width))
        if layer.qk_norm != "none":
            q, k = (
                self._qk_norm(layer, weights.vectors[f"{name}_norm.weight"], part, heads)
                for name, part, heads in (("q", q, layer.heads), ("k", k, layer.kv_heads))
            )
        q, k, v = (graph.node("Gather", [part, "rows"], axis=0)[0] for part in (q, k, v))
        if layer.rope is not None:
            q, k = (
                self._rotated(layer, part, heads)
                for part, heads in ((q, layer.heads), (k, layer.kv_heads))
            )
        if layer.kv_heads != layer.heads:
            k, v = (self._repeated(layer, part) for part in (k, v))
        seen = f"seen_{self._kinds.index(kind)}"
        heads = layer.heads if kind.biases else 1
        self._input(seen, TensorProto.FLOAT, ("b", heads, "t", "t"))
        (mixed,) = graph.node(
            "MultiHeadAttention",
            [q, k, v, "", "", seen],
            domain=MICROSOFT,
            num_heads=layer.heads,
            scale=layer.score_factor,
        )
        (flat,) = graph.node("Reshape", [mixed, graph.integers(-1, width)])
        return graph.node("Gather", [flat, "places"], axis=0)[0]

    def _qk_norm(self, layer: LayerSpec, scale: Array, value: str, heads: int) -> str:
        if layer.qk_norm == "width":
            return self.graph.norm(value, scale, None, layer.norm_eps)
        graph, width = self.graph, layer.head_dim
        (split,) = graph.node("Reshape", [value, graph.integers(-1, heads, width)])
        normed = graph.norm(split, scale, None, layer.norm_eps)
        return graph.node("Reshape", [normed, graph.integers(-1, heads * width)])[0]

    def _rotated(self, layer: LayerSpec, value: str, heads: int) -> str:
        key = layer.rope, layer.head_dim
        if layer.rope is not None and key not in self._tables:
            cos, sin = rotary_table(layer.rope, layer.head_dim, self._context_tokens)
            self._tables[key] = self.graph.weight(cos), self.graph.weight(sin)
        self._input("positions", TensorProto.INT64, ("b", "t"))
        return self.graph.node(
            "RotaryEmbedding",
            [value, "positions", *self._tables[key]],
            domain=MICROSOFT,
            num_heads=heads,
            rotary_embedding_dim=layer.head_dim,
        )[0]

    def _repeated(self, layer: LayerSpec, value: str) -> str:
        """Give each query head its own copy of the key or value head."""
        graph, group = self.graph, layer.heads // layer.kv_heads
        shape = graph.integers(0, 0, layer.kv_heads, 1, layer.head_dim)
        (split,) = graph.node("Reshape", [value, shape])
        (wide,) = graph.node("Tile", [split, graph.integers(1, 1, 1, group, 1)])
        width = layer.heads * layer.head_dim
        return graph.node("Reshape", [wide, graph.integers(0, 0, width)])[0]

    def _mlp(self, layer: LayerSpec, weights: BlockWeights, value: str) -> str:
        if not layer.gated:
            return activation(self.graph, layer, self._linear(weights, value, "up"))
        gate, up = self._projections(weights, value, ("gate", "up"), (layer.ffn, layer.ffn))
        return self.graph.node("Mul", [activation(self.graph, layer, gate), up])[0]


def _norm_weights(weights: BlockWeights, name: str) -> tuple[Array, Array | None]:
    return weights.vectors[f"{name}.weight"], weights.vectors.get(f"{name}.bias")


def _weights(file: LayerFile, containers: Mapping[int, int], *, as_bytes: bool) -> BlockWeights:
    matrices: dict[str, Matrix] = {}
    vectors: dict[str, Array] = {}
    for name, tensor in file.tensors.items():
        if not isinstance(tensor, QuantizedMatrix):
            vectors[name] = tensor
        else:
            matrices[name] = bytes_of(tensor) if as_bytes else executable(tensor, containers)
    if not matrices:
        raise BackendError(f"layer {file.block - 1} has no matrices")
    return BlockWeights(matrices, vectors)


def _segments(files: Sequence[LayerFile]) -> Iterator[list[LayerFile]]:
    run: list[LayerFile] = []
    run_bytes = 0
    for file in files:
        run.append(file)
        run_bytes += sum(
            tensor.stored_bytes if isinstance(tensor, QuantizedMatrix) else tensor.nbytes
            for tensor in file.tensors.values()
        )
        if run_bytes >= SEGMENT_BYTES:
            yield run
            run, run_bytes = [], 0
    if run:
        yield run
