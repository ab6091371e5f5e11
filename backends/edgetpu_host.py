"""The host's part of a layer beside a chip that multiplies, in numpy.

It has norms, rotary embedding, attention with its KV cache, activations, biases and residuals, in
float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model.position_bias import position_bias
from model.rotary import rotate
from model.spec import LayerSpec

Array = npt.NDArray[np.float32]
Product = Callable[[Array], Array]
"""A function from float32 [n, in] to float32 [n, out], without bias."""

_HALF = np.float32(0.5)


@dataclass(frozen=True, slots=True)
class Span:
    """Rows [begin, end) of a call: positions from ``position`` on of the sequence in ``slot``."""

    slot: int
    position: int
    begin: int
    end: int


def stacks(layer: LayerSpec) -> dict[str, tuple[str, ...]]:
    """Return a layer's products in order, each with the canonical matrices that it stacks."""
    raised = ("gate", "up") if layer.gated else ("up",)
    return {"qkv": ("q", "k", "v"), "o": ("o",), "raise": raised, "down": ("down",)}


class HostLayer:
    """One layer. Whole texts of an encoder run one after the other in a slot, from position 0 on.

    products: by the names of ``stacks``.
    rotary: float32 [context, head_dim / 2] cosines and sines.
    vectors: the layer's canonical norms and biases.
    """

    def __init__(
        self,
        layer: LayerSpec,
        vectors: Mapping[str, Array],
        products: Mapping[str, Product],
        rotary: tuple[Array, Array] | None,
        slots: int,
        context_tokens: int,
    ) -> None:
        self._layer = layer
        self._vectors = vectors
        self._products = products
        self._rotary = rotary
        shape = (slots, layer.kv_heads, context_tokens, layer.head_dim)
        # Filling the cache shows a lack of memory now, and not in the middle of a text.
        self._keys, self._values = np.full(shape, 0, np.float32), np.full(shape, 0, np.float32)
        self._biases = {
            name: np.concatenate([vectors[f"{part}.bias"] for part in parts])
            for name, parts in stacks(layer).items()
            if all(f"{part}.bias" in vectors for part in parts)
        }

    @property
    def memory_bytes(self) -> int:
        """KV cache, norms and biases. The products have memory of their own."""
        return self._keys.nbytes * 2 + sum(array.nbytes for array in self._vectors.values())

    def __call__(self, hidden: Array, spans: Sequence[Span]) -> Array:
        """Run ``hidden`` float32 [n, hidden], whose rows are those of the spans."""
        hidden = self._left("attn", hidden, self._attention(self._entered("attn", hidden), spans))
        return self._left("mlp", hidden, self._mlp(self._entered("mlp", hidden)))

    def _entered(self, part: str, hidden: Array) -> Array:
        """Return the rows that attention or MLP takes."""
        if part == "attn" and self._layer.enters_plain:
            return hidden
        if self._layer.norm_position in ("pre", "both"):
            return self._norm(f"{part}_norm", hidden)
        return hidden

    def _left(self, part: str, hidden: Array, product: Array) -> Array:
        """Return the hidden state after a part, of the rows before and its product."""
        match self._layer.norm_position:
            case "pre":
                return hidden + product
            case "post":
                return self._norm(f"{part}_norm", hidden + product)
            case "both":
                return hidden + self._norm(f"{part}_out_norm", product)
            case "output":
                return hidden + self._norm(f"{part}_norm", product)

    def _linear(self, name: str, rows: Array) -> Array:
        result = self._products[name](rows)
        if name in self._biases:
            result += self._biases[name]
        return result

    def _mlp(self, rows: Array) -> Array:
        raised = self._linear("raise", rows)
        if not self._layer.gated:
            return self._linear("down", self._activate(raised))
        gate, up = np.split(raised, 2, axis=1)
        return self._linear("down", self._activate(gate) * up)

    def _attention(self, rows: Array, spans: Sequence[Span]) -> Array:
        layer, count = self._layer, len(rows)
        bounds = np.cumsum([layer.heads, layer.kv_heads]) * layer.head_dim
        q, k, v = np.split(self._linear("qkv", rows), bounds, axis=1)
        if layer.qk_norm == "width":
            q = _rms_norm(q, layer.norm_eps) * self._vectors["q_norm.weight"]
            k = _rms_norm(k, layer.norm_eps) * self._vectors["k_norm.weight"]
        q, k, v = (part.reshape(count, -1, layer.head_dim) for part in (q, k, v))
        if layer.qk_norm == "head":
            q = _rms_norm(q, layer.norm_eps) * self._vectors["q_norm.weight"]
            k = _rms_norm(k, layer.norm_eps) * self._vectors["k_norm.weight"]
        mixed = np.empty((count, layer.heads * layer.head_dim), np.float32)
        for span in spans:
            own, positions = (
                slice(span.begin, span.end),
                slice(span.position, span.position + span.end - span.begin),
            )
            queries, keys = q[own], k[own]
            if self._rotary is not None:
                cos, sin = (table[positions, None] for table in self._rotary)
                queries, keys = rotate(queries, cos, sin), rotate(keys, cos, sin)
            self._keys[span.slot, :, positions] = keys.transpose(1, 0, 2)
            self._values[span.slot, :, positions] = v[own].transpose(1, 0, 2)
            mixed[own] = self._attend(queries, span.slot, span.position)
        return self._linear("o", mixed)

    def _attend(self, queries: Array, slot: int, position: int) -> Array:
        """Attend from queries [n, heads, head_dim] at ``position`` on to all rows up to them."""
        layer, count = self._layer, len(queries)
        window, end = layer.sliding_window, position + count
        begin = 0 if window is None else max(0, position + 1 - window)
        group = layer.heads // layer.kv_heads
        split = queries.reshape(count, layer.kv_heads, group, layer.head_dim)
        split = split.transpose(1, 2, 0, 3).reshape(layer.kv_heads, -1, layer.head_dim)
        scores = split @ self._keys[slot, :, begin:end].transpose(0, 2, 1)
        scores *= np.float32(layer.score_factor)
        if layer.score_cap is not None:
            cap = np.float32(layer.score_cap)
            scores = np.tanh(scores / cap) * cap
        if count > 1:
            distance = np.arange(position, end)[:, None] - np.arange(begin, end)
            if layer.bidirectional:
                distance = np.abs(distance)
            hidden = (distance < 0) | (distance >= (window or end))
            scores.reshape(layer.kv_heads, group, count, -1)[..., hidden] = -np.inf
        if layer.position_buckets:  # A text begins at position 0, and ends here.
            bias = position_bias(self._vectors["position_bias.weight"], end)
            scores += bias.reshape(layer.kv_heads, -1, end)
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        mixed = scores @ self._values[slot, :, begin:end]
        mixed = mixed.reshape(layer.kv_heads, group, count, layer.head_dim)
        rows: Array = mixed.transpose(2, 0, 1, 3).reshape(count, -1)
        return rows

    def _norm(self, name: str, rows: Array) -> Array:
        if self._layer.norm == "layernorm":
            rows = rows - rows.mean(axis=-1, keepdims=True)
        normed = _rms_norm(rows, self._layer.norm_eps)
        normed *= self._vectors[f"{name}.weight"]
        if self._layer.norm == "layernorm":
            normed += self._vectors[f"{name}.bias"]
        return normed

    def _activate(self, rows: Array) -> Array:
        bent: Array
        match self._layer.activation:
            case "relu":
                return np.maximum(rows, 0)
            case "silu":
                # tanh does not overflow for large negative inputs.
                bent = np.tanh(_HALF * rows)
            case "gelu_tanh":
                cubic = rows + np.float32(0.044715) * rows**3
                bent = np.tanh(np.float32(math.sqrt(2 / math.pi)) * cubic)
            case "gelu":
                bent = _erf(rows * np.float32(math.sqrt(0.5)))
        active: Array = rows * (_HALF + _HALF * bent)
        return active


def _rms_norm(rows: Array, epsilon: float) -> Array:
    mean = np.square(rows).mean(axis=-1, keepdims=True)
    normed: Array = rows / np.sqrt(mean + np.float32(epsilon))
    return normed


_ERF = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)


def _erf(values: Array) -> Array:
    """Compute erf to 2e-7. Source: Abramowitz and Stegun, formula 7.1.26."""
    size = np.abs(values)
    t = 1 / (1 + np.float32(0.3275911) * size)
    series = np.zeros_like(t)
    for coefficient in reversed(_ERF):
        series = (series + np.float32(coefficient)) * t
    result: Array = np.copysign(1 - series * np.exp(-size * size), values)
    return result
