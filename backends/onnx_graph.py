"""ONNX graphs of decoder blocks, built from LayerSpec features alone.

Activations are fp32 [sequences, rows, width]. A protobuf can hold at most 2 GB, so the graph only
names its weights. ``Graph.weights`` holds their arrays until the session takes them over.

Operators of the domain com.microsoft are ONNX Runtime's own: Source:
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from backends.onnx_matrix import INT8_ACTIVATIONS, ByteMatrix, Matrix, PackedMatrix, stack_rows
from backends.onnx_mixture import add_experts
from model.experts import CLIPPED_ALPHA
from model.spec import ExpertSpec, LayerSpec, ModelSpec

MICROSOFT = "com.microsoft"
OPSET = 21
IR_VERSION = 10

ROUTED_OUTPUTS = ("normed", "scores")
"""Outputs of a graph that ends before experts: their input rows, and the router's scores."""

AnyArray: TypeAlias = npt.NDArray[Any]
Array: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class BlockWeights:
    """A block's tensors by canonical name, with matrices as executed."""

    matrices: Mapping[str, Matrix]
    vectors: Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class CacheShape:
    """The KV cache of one layer: two float32 tensors [slots, heads, context, width]."""

    heads: int
    context: int
    width: int

    def of(self, slots: int) -> tuple[int, int, int, int]:
        return (slots, self.heads, self.context, self.width)


def cached_head_width(layer: LayerSpec) -> int:
    """Return the width of a head in the KV cache. Other heads are padded with zeros.

    GroupQueryAttention wants a multiple of 16 with rotary embedding, and of 8 without.
    """
    multiple = 16 if layer.rope is not None else 8
    return -(-layer.head_dim // multiple) * multiple


def table_key(layer: LayerSpec) -> Hashable:
    """Return what the rotary tables of a layer depend on."""
    return layer.rope, layer.head_dim


def padded_tables(layer: LayerSpec, rotary: tuple[Array, Array]) -> tuple[Array, Array]:
    """Return the cos and sin tables as wide as half of a cached head."""
    padding = ((0, 0), (0, (cached_head_width(layer) - layer.head_dim) // 2))
    cos, sin = (np.ascontiguousarray(np.pad(table, padding), np.float32) for table in rotary)
    return cos, sin


class Graph:
    """A graph under construction. It numbers names to make them unique."""

    def __init__(self) -> None:
        self.weights: dict[str, AnyArray] = {}
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._count = 0
        self._added_bytes = 0

    @property
    def weight_bytes(self) -> int:
        return sum(array.nbytes for array in self.weights.values())

    @property
    def executed_bytes(self) -> int:
        """``weight_bytes`` and the bytes that kernels add to packed matrices.

        Kernels add a copy of the scales beside the codes, and a sum per block.
        """
        return self.weight_bytes + self._added_bytes

    def input(self, name: str, dtype: int, shape: Sequence[int | str]) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))
        return name

    def output(self, value: str, name: str, dtype: int, shape: Sequence[int | str]) -> None:
        if value != name:
            self._nodes.append(helper.make_node("Identity", [value], [name]))
        self._outputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))

    def node(
        self,
        operator: str,
        inputs: Sequence[str],
        outputs: int | Sequence[str] = 1,
        domain: str = "",
        **attributes: Any,
    ) -> list[str]:
        """Append a node and return its outputs. An empty name in ``outputs`` drops one."""
        self._count += 1
        if isinstance(outputs, int):
            outputs = [f"{operator}_{self._count}_{index}" for index in range(outputs)]
        self._nodes.append(
            helper.make_node(
                operator, list(inputs), list(outputs), f"{operator}_{self._count}",
                domain=domain, **attributes,
            )
        )  # fmt: skip
        return list(outputs)

    def weight(self, array: AnyArray) -> str:
        """Add a weight, and return its name. The caller shares equal tables."""
        name = f"weight_{len(self.weights)}"
        self.weights[name] = array
        return name

    def integers(self, *values: int) -> str:
        """Return the name of a constant int64 vector."""
        name = "integers_" + "_".join(map(str, values))
        self._constants[name] = helper.make_tensor(name, TensorProto.INT64, [len(values)], values)
        return name

    def serialized(self) -> bytes:
        """Return the model without its weights, which it names as external data."""
        initializers = [*self._constants.values()]
        for name, array in self.weights.items():
            tensor = TensorProto(
                name=name,
                data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
                dims=array.shape,
                data_location=TensorProto.EXTERNAL,
            )
            tensor.external_data.add(key="location", value="memory")
            initializers.append(tensor)
        graph = helper.make_graph(
            self._nodes, "stage", self._inputs, self._outputs, initializer=initializers
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
        serialized: bytes = model.SerializeToString()
        return serialized

    def linear(self, value: str, matrix: Matrix, bias: Array | None = None) -> str:
        """Multiply value [b, n, columns] by ``matrix`` transposed, add ``bias``: [b, n, rows]."""
        if isinstance(matrix, ByteMatrix):
            return self._linear_of_bytes(value, matrix, bias)
        if not isinstance(matrix, PackedMatrix):
            weight = self.weight(_transposed(matrix))
            (result,) = self.node("MatMul", [value, weight])
            if bias is not None:
                (result,) = self.node("Add", [result, self.weight(bias)])
            return result
        self.count_scales(matrix.scales)
        inputs = [value, self.weight(matrix.codes), self.weight(matrix.scales)]
        if matrix.zero_points is not None:
            inputs.append(self.weight(matrix.zero_points))
        if bias is not None:
            inputs += [""] * (5 - len(inputs)) + [self.weight(bias)]
        return self.node(
            "MatMulNBits",
            inputs,
            domain=MICROSOFT,
            K=matrix.columns,
            N=len(matrix.codes),
            bits=matrix.bits,
            block_size=matrix.block_size,
            accuracy_level=INT8_ACTIVATIONS,
        )[0]

    def count_scales(self, *scales: Array) -> None:
        """Count what kernels keep beside packed matrices with these scales."""
        self._added_bytes += sum(2 * some.nbytes for some in scales)

    def _linear_of_bytes(self, value: str, matrix: ByteMatrix, bias: Array | None) -> str:
        # The operator rounds to 256 steps between the extremes of all rows. Rows that were divided
        # by their largest magnitude share these steps without loss.
        (magnitudes,) = self.node("Abs", [value])
        (largest,) = self.node("ReduceMax", [magnitudes, self.integers(-1)], keepdims=1)
        (scale,) = self.node("Max", [largest, self.weight(np.array([1e-30], np.float32))])
        (level,) = self.node("Div", [value, scale])
        weights = [self.weight(matrix.codes), self.weight(matrix.scales)]
        (product,) = self.node("DynamicQuantizeMatMul", [level, *weights], domain=MICROSOFT)
        (result,) = self.node("Mul", [product, scale])
        if bias is not None:
            (result,) = self.node("Add", [result, self.weight(bias)])
        # The kernel keeps a sum per row beside the codes.
        self._added_bytes += matrix.scales.nbytes
        return result

    def norm(self, value: str, weight: Array, bias: Array | None, epsilon: float) -> str:
        """Apply LayerNorm over the last axis, or RMSNorm if there is no bias."""
        if bias is None:
            return self.node(
                "SimplifiedLayerNormalization",
                [value, self.weight(weight)],
                axis=-1,
                epsilon=epsilon,
            )[0]
        return self.node(
            "LayerNormalization",
            [value, self.weight(weight), self.weight(bias)],
            axis=-1,
            epsilon=epsilon,
        )[0]

    def add_norm(
        self, value: str, delta: str, weight: Array, bias: Array | None, epsilon: float
    ) -> tuple[str, str]:
        """Compute (value + delta, its norm) in one node."""
        operator = "SkipSimplifiedLayerNormalization" if bias is None else "SkipLayerNormalization"
        inputs = [value, delta, self.weight(weight)]
        if bias is not None:
            inputs.append(self.weight(bias))
        self._count += 1
        normed, total = f"norm_{self._count}", f"sum_{self._count}"
        self.node(operator, inputs, [normed, "", "", total], MICROSOFT, epsilon=epsilon)
        return total, normed

    def capped(self, value: str, cap: float) -> str:
        """Compute cap * tanh(value / cap)."""
        limit = self.weight(np.array([cap], np.float32))
        (bent,) = self.node("Tanh", self.node("Div", [value, limit]))
        return self.node("Mul", [bent, limit])[0]


class LayerGraph:
    """A run of decoder layers in one graph: ``begin``, ``layer`` for each, ``finish``.

    The inputs are:

    - ``hidden`` float32 [b, n, hidden]: n rows of each of b sequences (n or b is 1)
    - ``seqlens_k`` int32 [b]: the last positions
    - ``total`` int32 []: the most positions that a sequence has after this call
    - ``past_key_i`` and ``past_value_i`` of the i-th layer
    - ``cos_i`` and ``sin_i``: the i-th of the layers' different rotary tables, which graphs share

    The outputs are ``output`` like ``hidden``, and ``key_i`` and ``value_i``. These are bound to
    the same memory as their past, so that only the new rows are written.

    If experts have no matrices here, their layer is the last one of its graph. ``output`` is then
    without its experts, and the graph also has ROUTED_OUTPUTS.
    """

    def __init__(self, hidden: int, context: int, window_offset: int) -> None:
        """GroupQueryAttention sees ``window_offset`` positions beyond ``local_window_size``."""
        self.graph = Graph()
        self.caches: list[CacheShape] = []
        self._hidden = hidden
        self._context = context
        self._window_offset = window_offset
        self._rotary: dict[Any, tuple[str, str]] = {}
        self._value = self.graph.input("hidden", TensorProto.FLOAT, ("b", "n", hidden))
        self._delta: str | None = None
        self._routed_last = False

    def layer(self, layer: LayerSpec, weights: BlockWeights) -> None:
        """Append a layer."""
        inward = layer.norm_position in ("pre", "both")
        if inward:
            value, rows = self._settle(layer, "attn_norm", weights)
        else:
            value = rows = self._sum()
        mixed = self._attention(layer, weights, rows)
        value, attended = self._projected(weights, "o", mixed, value)
        attended = self._outward(layer, "attn", weights, attended)
        if inward:
            value, rows = self._add_norm(layer, "mlp_norm", weights, value, attended)
        elif layer.norm_position == "post":
            value = rows = self._add_norm(layer, "attn_norm", weights, value, attended)[1]
        else:
            value = rows = self.graph.node("Add", [value, attended])[0]
        if layer.experts is not None:
            self._routed(layer, layer.experts, weights, value, rows)
            return
        inner = self._mlp(layer, weights, rows)
        value, delta = self._projected(weights, "down", inner, value)
        if layer.norm_position == "post":
            _, self._value = self._add_norm(layer, "mlp_norm", weights, value, delta)
        else:
            self._value, self._delta = value, self._outward(layer, "mlp", weights, delta)

    def finish(self) -> Graph:
        """Return the graph with its output in place."""
        if self._routed_last:
            return self.graph
        self.graph.output(self._sum(), "output", TensorProto.FLOAT, ("b", "n", self._hidden))
        return self.graph

    def _sum(self) -> str:
        """Add the last layer's MLP to the hidden state. It waited to be joined with a norm."""
        if self._delta is not None:
            (self._value,) = self.graph.node("Add", [self._value, self._delta])
            self._delta = None
        return self._value

    def _settle(self, layer: LayerSpec, name: str, weights: BlockWeights) -> tuple[str, str]:
        if self._delta is not None:
            delta, self._delta = self._delta, None
            return self._add_norm(layer, name, weights, self._value, delta)
        return self._value, self._norm(layer, name, weights, self._value)

    def _outward(self, layer: LayerSpec, part: str, weights: BlockWeights, value: str) -> str:
        """Apply the norm of a part's product, if the layer has one."""
        match layer.norm_position:
            case "both":
                return self._norm(layer, f"{part}_out_norm", weights, value)
            case "output":
                return self._norm(layer, f"{part}_norm", weights, value)
        return value

    def _norm(self, layer: LayerSpec, name: str, weights: BlockWeights, value: str) -> str:
        scale, bias = weights.vectors[f"{name}.weight"], weights.vectors.get(f"{name}.bias")
        return self.graph.norm(value, scale, bias, layer.norm_eps)

    def _add_norm(
        self, layer: LayerSpec, name: str, weights: BlockWeights, value: str, delta: str
    ) -> tuple[str, str]:
        scale, bias = weights.vectors[f"{name}.weight"], weights.vectors.get(f"{name}.bias")
        return self.graph.add_norm(value, delta, scale, bias, layer.norm_eps)

    def _routed(
        self, layer: LayerSpec, experts: ExpertSpec, weights: BlockWeights, value: str, normed: str
    ) -> None:
        """Append the experts of a layer, which take rows ``normed``, or end the graph before."""
        shared = self._shared_expert(layer, experts, weights, normed)
        if shared is not None:
            (value,) = self.graph.node("Add", [value, shared])
        if "down.weight" in weights.matrices:
            scores = self._scores(weights, normed)
            self._value = value
            self._delta = add_experts(self.graph, experts, weights, normed, scores)
            return
        self.graph.output(value, "output", TensorProto.FLOAT, ("b", "n", self._hidden))
        self._routed_outputs(experts, weights, normed)
        self._routed_last = True

    def _routed_outputs(self, experts: ExpertSpec, weights: BlockWeights, normed: str) -> None:
        scores = self._scores(weights, normed)
        widths = self._hidden, experts.count
        for value, name, width in zip((normed, scores), ROUTED_OUTPUTS, widths, strict=True):
            self.graph.output(value, name, TensorProto.FLOAT, ("b", "n", width))

    def _scores(self, weights: BlockWeights, normed: str) -> str:
        bias = weights.vectors.get("router.bias")
        return self.graph.linear(normed, weights.vectors["router.weight"], bias)

    def _shared_expert(
        self, layer: LayerSpec, experts: ExpertSpec, weights: BlockWeights, value: str
    ) -> str | None:
        """Append the MLP that every row takes beside its experts, if there is one."""
        if not experts.shared_ffn:
            return None
        widths = [experts.shared_ffn] * 2
        gate, up = self._projections(weights, value, ("shared_gate", "shared_up"), widths)
        (inner,) = self.graph.node("Mul", [activation(self.graph, layer, gate), up])
        shared = self._linear(weights, inner, "shared_down")
        if experts.shared_gate:
            mix = self.graph.linear(value, weights.vectors["shared_mix.weight"])
            (mix,) = self.graph.node("Sigmoid", [mix])
            (shared,) = self.graph.node("Mul", [shared, mix])
        return shared

    def _projected(
        self, weights: BlockWeights, name: str, inner: str, value: str
    ) -> tuple[str, str]:
        """Return ``value``, and ``inner`` times a matrix, which the caller adds to it."""
        return value, self._linear(weights, inner, name)

    def _linear(self, weights: BlockWeights, value: str, name: str) -> str:
        bias = weights.vectors.get(f"{name}.bias")
        return self.graph.linear(value, weights.matrices[f"{name}.weight"], bias)

    def _joined(self, weights: BlockWeights, value: str, names: Sequence[str]) -> str | None:
        """Return the projections ``names`` as one matrix product, if their layouts allow."""
        stacked = stack_rows([weights.matrices[f"{name}.weight"] for name in names])
        if stacked is None:
            return None
        biases = [weights.vectors.get(f"{name}.bias") for name in names]
        present = [bias for bias in biases if bias is not None]
        bias = np.concatenate(present) if present else None
        return self.graph.linear(value, stacked, bias)

    def _projections(
        self, weights: BlockWeights, value: str, names: Sequence[str], widths: Sequence[int]
    ) -> list[str]:
        joined = self._joined(weights, value, names)
        if joined is None:
            return [self._linear(weights, value, name) for name in names]
        return self.graph.node("Split", [joined, self.graph.integers(*widths)], len(names), axis=2)

    def _attention(self, layer: LayerSpec, weights: BlockWeights, value: str) -> str:
        graph, width = self.graph, cached_head_width(layer)
        queries = self._queries(layer, weights, value)
        index = len(self.caches)
        if not index:
            graph.input("seqlens_k", TensorProto.INT32, ("b",))
            graph.input("total", TensorProto.INT32, ())
        cache = CacheShape(layer.kv_heads, self._context, width)
        self.caches.append(cache)
        past = [
            graph.input(f"past_{kind}_{index}", TensorProto.FLOAT, ("b", *cache.of(1)[1:]))
            for kind in ("key", "value")
        ]
        attributes: dict[str, Any] = {}
        tables: list[str] = []
        if layer.rope is not None:
            tables = list(self._rotary_tables(layer, width))
            attributes["do_rotary"] = 1
        if layer.score_cap is not None:
            attributes["softcap"] = layer.score_cap
        if layer.sliding_window is not None:
            attributes["local_window_size"] = layer.sliding_window - self._window_offset
        sinks: list[str] = []
        if layer.sinks:
            # The inputs between are positions and a bias of the scores.
            absent = [""] * (4 - len(tables))
            sinks = [*absent, graph.weight(weights.vectors["sinks"])]
        attended = f"attended_{index}"
        graph.node(
            "GroupQueryAttention",
            [*queries, *past, "seqlens_k", "total", *tables, *sinks],
            [attended, f"key_{index}", f"value_{index}"],
            MICROSOFT,
            num_heads=layer.heads,
            kv_num_heads=layer.kv_heads,
            scale=layer.score_factor,
            **attributes,
        )
        for kind in ("key", "value"):
            name = f"{kind}_{index}"
            graph.output(name, name, TensorProto.FLOAT, ("b", *cache.of(1)[1:]))
        if width != layer.head_dim:
            attended = self._unpad_heads(layer, attended)
        return attended

    def _queries(self, layer: LayerSpec, weights: BlockWeights, value: str) -> list[str]:
        """Return queries, keys and values, normed and padded. Two are "" if they are one value."""
        graph = self.graph
        padded = cached_head_width(layer) != layer.head_dim
        q_width, kv_width = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
        if layer.qk_norm == "none" and not padded:
            packed = self._joined(weights, value, ("q", "k", "v"))
            if packed is not None:
                return [packed, "", ""]
        q, k, v = self._projections(weights, value, ("q", "k", "v"), (q_width, kv_width, kv_width))
        if layer.qk_norm == "width":
            q, k = (
                graph.norm(each, weights.vectors[f"{name}_norm.weight"], None, layer.norm_eps)
                for name, each in (("q", q), ("k", k))
            )
        elif layer.qk_norm == "head":
            q = self._head_norm(layer, weights.vectors["q_norm.weight"], q, layer.heads)
            k = self._head_norm(layer, weights.vectors["k_norm.weight"], k, layer.kv_heads)
        if padded:
            q = self._pad_heads(layer, q, layer.heads)
            k, v = (self._pad_heads(layer, each, layer.kv_heads) for each in (k, v))
        return [q, k, v]

    def _head_norm(self, layer: LayerSpec, scale: Array, value: str, heads: int) -> str:
        graph, width = self.graph, layer.head_dim
        (split,) = graph.node("Reshape", [value, graph.integers(0, -1, heads, width)])
        normed = graph.norm(split, scale, None, layer.norm_eps)
        return graph.node("Reshape", [normed, graph.integers(0, -1, heads * width)])[0]

    def _pad_heads(self, layer: LayerSpec, value: str, heads: int) -> str:
        """Put zeros behind each half of each head, so that rotary pairs stay pairs."""
        graph, half = self.graph, layer.head_dim // 2
        padding = cached_head_width(layer) // 2 - half
        (split,) = graph.node("Reshape", [value, graph.integers(0, -1, heads * 2, half)])
        (wide,) = graph.node("Pad", [split, graph.integers(*[0] * 7, padding)])
        return graph.node("Reshape", [wide, graph.integers(0, -1, heads * 2 * (half + padding))])[0]

    def _unpad_heads(self, layer: LayerSpec, value: str) -> str:
        graph, half = self.graph, layer.head_dim // 2
        wide = cached_head_width(layer) // 2
        (split,) = graph.node("Reshape", [value, graph.integers(0, -1, layer.heads * 2, wide)])
        bounds = [graph.integers(bound) for bound in (0, half, 3)]
        (narrow,) = graph.node("Slice", [split, *bounds])
        return graph.node("Reshape", [narrow, graph.integers(0, -1, layer.heads * 2 * half)])[0]

    def _rotary_tables(self, layer: LayerSpec, width: int) -> tuple[str, str]:
        key = table_key(layer)
        if key not in self._rotary:
            number, shape = len(self._rotary), (self._context, width // 2)
            cos, sin = (
                self.graph.input(f"{name}_{number}", TensorProto.FLOAT, shape)
                for name in ("cos", "sin")
            )
            self._rotary[key] = cos, sin
        return self._rotary[key]

    def _mlp(self, layer: LayerSpec, weights: BlockWeights, value: str) -> str:
        if not layer.gated:
            raised = self._linear(weights, value, "up")
            return activation(self.graph, layer, raised)
        gate, up = self._projections(weights, value, ("gate", "up"), (layer.ffn, layer.ffn))
        return self.graph.node("Mul", [activation(self.graph, layer, gate), up])[0]


def activation(graph: Graph, layer: LayerSpec, value: str) -> str:
    """Append the activation of a layer's MLP."""
    match layer.activation:
        case "relu":
            return graph.node("Relu", [value])[0]
        case "silu":
            return graph.node("QuickGelu", [value], domain=MICROSOFT, alpha=1.0)[0]
        case "gelu":
            return graph.node("Gelu", [value])[0]
        case "gelu_tanh":
            return graph.node("Gelu", [value], approximate="tanh")[0]


def clipped(graph: Graph, gate: str, up: str, limit: float) -> tuple[str, str]:
    """Append the factors of a clipped SwiGLU (model.experts.clipped_swiglu)."""
    low, high, one = (graph.weight(np.array([bound], np.float32)) for bound in (-limit, limit, 1))
    (gate,) = graph.node("Min", [gate, high])
    (gate,) = graph.node("QuickGelu", [gate], domain=MICROSOFT, alpha=CLIPPED_ALPHA)
    (up,) = graph.node("Min", [up, high])
    (up,) = graph.node("Max", [up, low])
    (up,) = graph.node("Add", [up, one])
    return gate, up


def embedding_graph(embed_dim: int, project_in: Matrix) -> Graph:
    """Project ``rows`` [1, n, embed_dim] to ``output`` [1, n, hidden]."""
    graph = Graph()
    rows = graph.input("hidden", TensorProto.FLOAT, (1, "n", embed_dim))
    result = graph.linear(rows, project_in)
    graph.output(result, "output", TensorProto.FLOAT, (1, "n", "hidden"))
    return graph


def head_graph(spec: ModelSpec, weights: BlockWeights) -> Graph:
    """Run ``hidden`` [1, n, hidden] through final norm, projection and LM head to ``output``."""
    graph = Graph()
    value = graph.input("hidden", TensorProto.FLOAT, (1, "n", spec.hidden))
    logits = add_head(graph, value, spec, weights)
    graph.output(logits, "output", TensorProto.FLOAT, (1, "n", spec.vocab))
    return graph


def add_head(graph: Graph, value: str, spec: ModelSpec, weights: BlockWeights) -> str:
    """Append final norm, projection and LM head, as in ``head_graph``. Return the logits."""
    if spec.final_norm:
        scale, bias = weights.vectors["norm.weight"], weights.vectors.get("norm.bias")
        value = graph.norm(value, scale, bias, spec.layers[-1].norm_eps)
    if "project_out.weight" in weights.matrices:
        value = graph.linear(value, weights.matrices["project_out.weight"])
    logits = graph.linear(value, weights.matrices["lm_head.weight"])
    return logits if spec.logit_cap is None else graph.capped(logits, spec.logit_cap)


def _transposed(matrix: Array) -> Array:
    """Return a copy [columns, rows]. Strips of one cache line make it four times as fast."""
    rows, columns = matrix.shape
    result = np.empty((columns, rows), np.float32)
    for first in range(0, rows, 16):
        result[:, first : first + 16] = matrix[first : first + 16].T
    return result
