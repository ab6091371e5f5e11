"""The forward pass in plain numpy: slow and short. Every backend is compared with it.

Source of the layer orders: Zhang et al., "OPT" (pre- and post-norm); Touvron et al., "LLaMA"
(pre-norm, gated); the Qwen3 report (norms of q and k per head).

Gemma 2 has norms around each part, and caps of scores and logits (its report). OLMo 2 has norms of
what is added, and of all of q and k ("2 OLMo 2 Furious"). Experts are those of Shazeer et al., "The
Sparsely-Gated Mixture-of-Experts Layer". Sinks and the clipped SwiGLU are those of gpt-oss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model.artifact import Tensor, read_block, values_of
from model.checkpoint import Checkpoint
from model.encoder_ends import norm, result, rms_norm
from model.experts import by_expert, clipped_swiglu, expert_rows, route
from model.position_bias import position_bias
from model.rotary import rotary_table, rotate
from model.spec import LayerSpec, ModelSpec
from model.texts import Texts

Array = npt.NDArray[Any]
Weights = Mapping[str, Array]
Observe = Callable[[str, int | None, Array], None]
"""Gets a matrix's name, its expert or None, and input rows [n, in]. Matrices with the same input
have one name: ``q`` is also that of k and v, ``up`` of gate, ``shared_up`` of shared_gate."""


class ReferenceModel:
    """Contiguous blocks from ``first_block`` on, with a KV cache for one sequence.

    blocks: canonical tensors per block, floats or QuantizedMatrix (dequantized here).
    dtype: float32 or float64, in which it computes.
    team_sum: for a share of layers (model/share.py), whose spec and tensors are given: returns the
        sum of all members' partial rows [n, hidden] at each cut.
    observe: is told the rows that each matrix takes.
    """

    def __init__(
        self,
        spec: ModelSpec,
        blocks: Sequence[Mapping[str, Tensor]],
        *,
        first_block: int = 0,
        dtype: type[np.floating[Any]] = np.float32,
        team_sum: Callable[[Array], Array] = lambda partial: partial,
        observe: Observe | None = None,
    ) -> None:
        self.spec = spec
        self._team_sum = team_sum
        self._observe = observe
        self.blocks = range(first_block, first_block + len(blocks))
        self._dtype = dtype
        self._weights: dict[int, Weights] = {
            block: {
                name: values_of(tensor).astype(dtype, copy=False)
                for name, tensor in tensors.items()
            }
            for block, tensors in zip(self.blocks, blocks, strict=True)
        }
        self._cache: dict[int, tuple[Array, Array]] = {}

    @staticmethod
    def from_checkpoint(
        checkpoint: Checkpoint, dtype: type[np.floating[Any]] = np.float32
    ) -> ReferenceModel:
        """Return the whole model with its original weights."""
        blocks = [checkpoint.block(block) for block in range(checkpoint.spec.block_count)]
        return ReferenceModel(checkpoint.spec, blocks, dtype=dtype)

    @staticmethod
    def from_artifacts(
        spec: ModelSpec,
        artifacts: Iterable[tuple[int, Path]],
        dtype: type[np.floating[Any]] = np.float32,
    ) -> ReferenceModel:
        """Return a contiguous run of blocks from their artifacts. Raises CheckpointError."""
        pairs = list(artifacts)
        blocks = [read_block(path, spec, block)[1] for block, path in pairs]
        return ReferenceModel(spec, blocks, first_block=pairs[0][0], dtype=dtype)

    def forward(self, inputs: npt.NDArray[Any] | Sequence[int], position: int = 0) -> Array:
        """Run rows [position, position + n) of the sequence; cached rows below must be valid.

        inputs: tokens [n] if the embedding is held, else hidden [n, hidden].

        Returns logits [n, vocab] of every row if the head is held, else hidden [n, hidden].
        """
        rows = np.asarray(inputs)
        return self._forward(rows, position, [len(rows)])

    def forward_sequences(self, inputs: npt.NDArray[Any], lengths: Sequence[int]) -> Array:
        """As ``forward`` for whole sequences, one behind the other; the cache is not valid after.

        lengths: rows of each sequence, n in all.
        """
        return self._forward(inputs, 0, lengths)

    def encode(self, inputs: npt.NDArray[Any], texts: Texts) -> Array:
        """Run whole texts through an encoder, one behind the other.

        inputs: tokens [n] if the embedding is held, else hidden [n, hidden].

        Returns hidden [n, hidden]. With the head it returns what ``spec.output`` says: a row for
        each text, or for each token.
        """
        return self._forward(np.asarray(inputs), 0, texts.lengths, texts)

    def _forward(
        self, rows: Array, position: int, lengths: Sequence[int], texts: Texts | None = None
    ) -> Array:
        texts = texts or Texts.plain(*lengths)
        for block in self.blocks:
            kind, weights = self.spec.block_kind(block), self._weights[block]
            if kind == "embedding":
                rows = self._embed(weights, rows, position, texts)
            elif kind == "head" and self.spec.encodes:
                rows = result(self.spec, weights, rows, texts)
            elif kind == "head":
                rows = self._head(weights, rows)
            else:
                rows = self._layer(block, weights, rows.astype(self._dtype), position, lengths)
        return rows

    def _embed(
        self, weights: Weights, tokens: npt.NDArray[Any], position: int, texts: Texts
    ) -> Array:
        hidden: Array = weights["tokens.weight"][tokens]  # [n, embed]
        if self.spec.projected:
            self._seen("project_in", hidden)
            hidden = hidden @ weights["project_in.weight"].T
        if self.spec.learned_positions:
            places = texts.positions() + position + self.spec.position_offset
            hidden = hidden + weights["positions.weight"][places]
        if self.spec.token_types:
            types = np.minimum(texts.types(), self.spec.token_types - 1)
            hidden = hidden + weights["types.weight"][types]
        if self.spec.embed_norm:
            hidden = norm(self.spec.layers[0], weights, "embed_norm", hidden)
        return hidden

    def before_logits(self, hidden: Array) -> Array:
        """Return the rows that the last matrix takes, of hidden rows before the head."""
        weights = self._weights[self.spec.head_block]
        if self.spec.final_norm:
            hidden = norm(self.spec.layers[-1], weights, "norm", hidden)
        if self.spec.projected:
            self._seen("project_out", hidden)
            hidden = hidden @ weights["project_out.weight"].T
        self._seen("lm_head", hidden)
        return hidden

    def _head(self, weights: Weights, hidden: Array) -> Array:
        hidden = self.before_logits(hidden)
        return _capped(hidden @ weights["lm_head.weight"].T, self.spec.logit_cap)

    def _layer(
        self, block: int, weights: Weights, hidden: Array, position: int, lengths: Sequence[int]
    ) -> Array:
        """Run attention and MLP, with norms where ``LayerSpec.norm_position`` has them."""
        layer = self.spec.layer(block)
        mixed = self._mixed(block, _entered(layer, weights, "attn", hidden), position, lengths)
        hidden = _left(layer, weights, "attn", hidden, self._summed(weights, "o", mixed))
        rows = _entered(layer, weights, "mlp", hidden)
        if layer.experts is not None:
            added = self._team_sum(_mixed_experts(layer, weights, rows, self._seen))
        else:
            self._seen("up", rows)
            added = self._summed(weights, "down", _mlp(layer, weights, rows))
        return _left(layer, weights, "mlp", hidden, added)

    def _mixed(self, block: int, rows: Array, position: int, lengths: Sequence[int]) -> Array:
        """The mixed values [n, heads * head_dim] of all sequences."""
        layer, weights = self.spec.layer(block), self._weights[block]
        self._seen("q", rows)
        q, k, v = (_linear(weights, name, rows) for name in "qkv")
        if layer.qk_norm == "width":
            q, k = (
                rms_norm(part, layer.norm_eps) * weights[f"{name}_norm.weight"]
                for name, part in (("q", q), ("k", k))
            )
        ends = np.cumsum(lengths)[:-1]
        pieces = zip(np.split(q, ends), np.split(k, ends), np.split(v, ends), strict=True)
        mixed = [self._attention(block, weights, piece, position) for piece in pieces]
        return np.concatenate(mixed)

    def _summed(self, weights: Weights, name: str, rows: Array) -> Array:
        """Rows times a matrix that the team divides by columns, with its bias."""
        self._seen(name, rows)
        total = self._team_sum(rows @ weights[f"{name}.weight"].T)
        return total + weights[f"{name}.bias"] if f"{name}.bias" in weights else total

    def _seen(self, name: str, rows: Array, expert: int | None = None) -> None:
        if self._observe is not None:
            self._observe(name, expert, rows)

    def _attention(
        self, block: int, weights: Weights, projected: tuple[Array, Array, Array], position: int
    ) -> Array:
        """The mixed values [n, heads * head_dim] of one sequence, from its q, k and v."""
        layer = self.spec.layer(block)
        count, end = len(projected[0]), position + len(projected[0])
        q, k, v = (
            part.reshape(count, heads, layer.head_dim)
            for part, heads in zip(
                projected, (layer.heads, layer.kv_heads, layer.kv_heads), strict=True
            )
        )
        if layer.qk_norm == "head":
            q = rms_norm(q, layer.norm_eps) * weights["q_norm.weight"]
            k = rms_norm(k, layer.norm_eps) * weights["k_norm.weight"]
        if layer.rope is not None:
            cos, sin = (
                table[position:, None].astype(self._dtype)
                for table in rotary_table(layer.rope, layer.head_dim, end)
            )
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if position:
            old_k, old_v = self._cache[block]
            k = np.concatenate([old_k[:position], k])
            v = np.concatenate([old_v[:position], v])
        self._cache[block] = k, v  # [end, kv_heads, head_dim]
        group = layer.heads // layer.kv_heads
        keys, values = (
            np.repeat(part, group, axis=1).transpose(1, 0, 2) for part in (k, v)
        )  # [heads, end, head_dim]
        scores = q.transpose(1, 0, 2) @ keys.transpose(0, 2, 1)
        scores *= self._dtype(layer.score_factor)
        scores = _capped(scores, layer.score_cap)
        if layer.position_buckets:  # Whole texts, from position 0 on.
            scores += position_bias(weights["position_bias.weight"], end)
        distance = np.arange(position, end)[:, None] - np.arange(end)  # [n, end]
        window = layer.sliding_window or end
        if layer.bidirectional:
            distance = np.abs(distance)
        scores = np.where((distance >= 0) & (distance < window), scores, -np.inf)
        largest = scores.max(axis=-1, keepdims=True)
        if layer.sinks:
            sinks = weights["sinks"][:, None, None]
            largest = np.maximum(largest, sinks)
        scores = np.exp(scores - largest)
        total = scores.sum(axis=-1, keepdims=True)
        scores /= total + np.exp(sinks - largest) if layer.sinks else total
        mixed: Array = (scores @ values).transpose(1, 0, 2).reshape(count, -1)
        return mixed


def _entered(layer: LayerSpec, weights: Weights, name: str, rows: Array) -> Array:
    """The rows that attention or MLP takes."""
    if name == "attn" and layer.enters_plain:
        return rows
    if layer.norm_position in ("pre", "both"):
        return norm(layer, weights, f"{name}_norm", rows)
    return rows


def _left(layer: LayerSpec, weights: Weights, name: str, rows: Array, product: Array) -> Array:
    """The hidden state after attention or MLP, of the rows before and its product."""
    match layer.norm_position:
        case "pre":
            return rows + product
        case "post":
            return norm(layer, weights, f"{name}_norm", rows + product)
        case "both":
            return rows + norm(layer, weights, f"{name}_out_norm", product)
        case "output":
            return rows + norm(layer, weights, f"{name}_norm", product)


def _capped(values: Array, cap: float | None) -> Array:
    return values if cap is None else cap * np.tanh(values / cap)


def _mlp(layer: LayerSpec, weights: Weights, hidden: Array) -> Array:
    """The inner rows [n, ffn], which ``down`` takes."""
    if layer.gated:
        gate = _activate(layer, _linear(weights, "gate", hidden))
        return gate * _linear(weights, "up", hidden)
    return _activate(layer, _linear(weights, "up", hidden))


def _mixed_experts(
    layer: LayerSpec, weights: Weights, rows: Array, seen: Callable[[str, Array, int | None], None]
) -> Array:
    """The weighted outputs [n, hidden] of each row's experts, and of the shared one."""
    experts = layer.experts
    assert experts is not None  # noqa: S101 - the caller looked
    mixed = np.zeros_like(rows)
    if experts.shared_ffn:
        gate = _activate(layer, _linear(weights, "shared_gate", rows))
        inner = gate * _linear(weights, "shared_up", rows)
        seen("shared_up", rows, None)
        seen("shared_down", inner, None)
        mixed = _linear(weights, "shared_down", inner)
        if experts.shared_gate:
            mixed *= 0.5 + 0.5 * np.tanh(0.5 * _linear(weights, "shared_mix", rows))
    chosen, shares = route(experts, _linear(weights, "router", rows))
    for expert, places, factors in by_expert(experts, chosen, shares):
        own = {name: expert_rows(layer, expert, name, weights[name]) for name in weights}
        seen("up", rows[places], expert)
        gate, up = _linear(own, "gate", rows[places]), _linear(own, "up", rows[places])
        if experts.limit is None:
            gate = _activate(layer, gate)
        else:
            gate, up = clipped_swiglu(gate, up, experts.limit)
        seen("down", gate * up, expert)
        mixed[places] += factors[:, None] * _linear(own, "down", gate * up)
    return mixed


def _linear(weights: Weights, name: str, rows: Array) -> Array:
    product: Array = rows @ weights[f"{name}.weight"].T
    if f"{name}.bias" in weights:
        product += weights[f"{name}.bias"]
    return product


def _activate(layer: LayerSpec, rows: Array) -> Array:
    if layer.activation == "relu":
        return np.maximum(rows, 0)
    if layer.activation == "silu":
        # tanh does not overflow for large negative inputs.
        weight: Array = 0.5 + 0.5 * np.tanh(0.5 * rows)
    elif layer.activation == "gelu_tanh":
        weight = 0.5 + 0.5 * np.tanh(math.sqrt(2 / math.pi) * (rows + 0.044715 * rows**3))
    else:
        erf = np.vectorize(math.erf, otypes=[rows.dtype])
        weight = 0.5 + 0.5 * erf(rows / math.sqrt(2))
    return rows * weight
