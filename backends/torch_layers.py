"""The blocks of a stage on a torch device, from LayerSpec features alone.

The residual stream is fp32 everywhere. Each block multiplies and attends in its own dtype: fp16 on
a GPU, fp32 on a CPU and for blocks stored at 32 bits.

A *pass* says which rows of which sequences run, where their keys and values go, and what each row
sees. The host knows the positions of a prompt's chunk. Only the device knows those of decoded
tokens, so that one captured graph serves every position.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional

from backends.torch_attention import attend
from backends.torch_experts import TorchExperts
from backends.torch_matmul import Linear
from model.spec import LayerSpec, ModelSpec

Vectors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Cache:
    """Keys and values of one layer: [slots, kv_heads, context, head_dim] each."""

    keys: torch.Tensor
    values: torch.Tensor


class Pass(ABC):
    """Rows that run through a stage together."""

    def __init__(self, positions: torch.Tensor) -> None:
        """``positions`` is int64 [n], on the device."""
        self.positions = positions
        self._masks: dict[tuple[int | None, int], torch.Tensor] = {}
        self._rotations: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @abstractmethod
    def fold(self, heads: torch.Tensor) -> torch.Tensor:
        """Reshape [n, heads, width] to [sequences, heads, rows of a sequence, width]."""

    @abstractmethod
    def unfold(self, heads: torch.Tensor) -> torch.Tensor:
        """Invert ``fold`` and join the heads: [n, heads * width]."""

    @abstractmethod
    def store(self, cache: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Write rows [n, kv_heads, width]; return visible [sequences, kv_heads, length, width]."""

    @abstractmethod
    def _visible(self, window: int | None) -> torch.Tensor:
        """Return which positions a row sees: bool [sequences, 1, rows of a sequence, length]."""

    def mask(self, window: int | None, group: int) -> torch.Tensor:
        """Return ``_visible`` for ``group`` query heads laid end to end as rows of one."""
        key = window, group
        if key not in self._masks:
            self._masks[key] = self._visible(window).repeat(1, 1, group, 1)
        return self._masks[key]

    def rotation(
        self, table: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines [n, 1, width / 2] of the rows, from a shared table."""
        key = id(table[0])
        if key not in self._rotations:
            cos, sin = (part.index_select(0, self.positions)[:, None] for part in table)
            self._rotations[key] = cos, sin
        return self._rotations[key]


class PromptPass(Pass):
    """Rows [first, first + count) of the sequence in ``slot``."""

    def __init__(self, slot: int, first: int, count: int, device: torch.device) -> None:
        super().__init__(torch.arange(first, first + count, device=device))
        self._slot = slot
        self._first = first
        self._end = first + count

    def fold(self, heads: torch.Tensor) -> torch.Tensor:
        return heads.transpose(0, 1)[None]

    def unfold(self, heads: torch.Tensor) -> torch.Tensor:
        return heads[0].transpose(0, 1).flatten(1)

    def store(self, cache: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        cache[self._slot, :, self._first : self._end] = rows.transpose(0, 1)
        return cache[self._slot : self._slot + 1, :, : self._end]

    def _visible(self, window: int | None) -> torch.Tensor:
        keys = torch.arange(self._end, device=self.positions.device)
        return _sees(self.positions[:, None], keys, window)[None, None]


class TokenPass(Pass):
    """One row of each of several sequences. The host knows only ``length``.

    slots, positions: int64 [n]. Each row sees at most the first ``length`` positions of its slot.
    only_slot: saves the copy of the caches that several sequences need.
    """

    def __init__(
        self, slots: torch.Tensor, positions: torch.Tensor, length: int, only_slot: int | None
    ) -> None:
        super().__init__(positions)
        self._slots = slots
        self._length = length
        self._seen: slice | torch.Tensor = slots
        if only_slot is not None:
            self._seen = slice(only_slot, only_slot + 1)

    def fold(self, heads: torch.Tensor) -> torch.Tensor:
        return heads[:, :, None]

    def unfold(self, heads: torch.Tensor) -> torch.Tensor:
        return heads[:, :, 0].flatten(1)

    def store(self, cache: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        cache[self._slots, :, self.positions] = rows
        return cache[:, :, : self._length][self._seen]

    def _visible(self, window: int | None) -> torch.Tensor:
        keys = torch.arange(self._length, device=self.positions.device)
        return _sees(self.positions[:, None], keys, window)[:, None, None]


class EmbeddingTail:
    """The device's part of an embedding: projection and positions. The host looks rows up."""

    def __init__(
        self,
        projection: Linear | None,
        positions: torch.Tensor | None,
        offset: int,
        dtype: torch.dtype,
    ) -> None:
        self._projection = projection
        self._positions = positions
        self._offset = offset
        self._dtype = dtype

    def __call__(self, hidden: torch.Tensor, rows: Pass) -> torch.Tensor:
        if self._projection is not None:
            hidden = self._projection(hidden.to(self._dtype)).float()
        if self._positions is not None:
            hidden = hidden + self._positions.index_select(0, rows.positions + self._offset)
        return hidden


class Layer:
    """A decoder layer: rows fp32 [n, hidden] to the same.

    linears: ``qkv`` and ``o``, ``up`` (``gate_up`` if gated) and ``down``.
    vectors: fp32.
    rotary: the layer's table of cosines and sines, each [context, head_dim / 2].
    cut: in a share of a layer, returns the team's sum of partial rows fp32 [n, hidden]. Then ``o``
        and ``down`` have no biases, and ``vectors`` has them.
    experts: instead of ``gate_up`` and ``down``.
    """

    def __init__(
        self,
        spec: LayerSpec,
        linears: Mapping[str, Linear],
        vectors: Vectors,
        cache: Cache,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        dtype: torch.dtype,
        cut: Callable[[torch.Tensor], torch.Tensor] | None = None,
        experts: TorchExperts | None = None,
    ) -> None:
        self._experts = experts
        self._spec = spec
        self._linears = linears
        self._vectors = vectors
        self._cache = cache
        self._rotary = rotary
        self._dtype = dtype
        self._cut = cut

    def __call__(self, hidden: torch.Tensor, rows: Pass) -> torch.Tensor:
        hidden = self._left("attn", hidden, self._attention(self._entered("attn", hidden), rows))
        return self._left("mlp", hidden, self._mlp(self._entered("mlp", hidden)))

    def empty(self, slot: int, first: int = 0) -> None:
        """Clear the slot's cache from position ``first`` on."""
        self._cache.keys[slot, :, first:].zero_()
        self._cache.values[slot, :, first:].zero_()

    def _entered(self, part: str, hidden: torch.Tensor) -> torch.Tensor:
        """Return the rows that attention or MLP takes."""
        if self._spec.norm_position in ("pre", "both"):
            return self._norm(f"{part}_norm", hidden)
        return hidden

    def _left(self, part: str, hidden: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
        """Return the hidden state after a part, of the rows before and its product."""
        match self._spec.norm_position:
            case "pre":
                return hidden + product
            case "post":
                return self._norm(f"{part}_norm", hidden + product)
            case "both":
                return hidden + self._norm(f"{part}_out_norm", product)
            case "output":
                return hidden + self._norm(f"{part}_norm", product)

    def _norm(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        return norm(hidden, self._vectors, name, self._spec.norm_eps)

    def _attention(self, hidden: torch.Tensor, rows: Pass) -> torch.Tensor:
        spec, width = self._spec, self._spec.head_dim
        heads = self._linears["qkv"](hidden.to(self._dtype)).unflatten(1, (-1, width))
        query, key, value = heads.split((spec.heads, spec.kv_heads, spec.kv_heads), dim=1)
        if spec.qk_norm != "none":
            query, key = self._part_norm("q_norm", query), self._part_norm("k_norm", key)
        if self._rotary is not None:
            cos, sin = rows.rotation(self._rotary)
            query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
        keys = rows.store(self._cache.keys, key.to(self._dtype))
        values = rows.store(self._cache.values, value)
        # Query heads that share a key head become rows of one head, which saves a copy of the
        # cache.
        group = spec.heads // spec.kv_heads
        folded = rows.fold(query.to(self._dtype))  # [sequences, heads, rows, width]
        sequences, _, count, _ = folded.shape
        attended = attend(
            folded.reshape(sequences, spec.kv_heads, group * count, width),
            keys,
            values,
            rows.mask(spec.sliding_window, group),
            spec.score_factor,
            spec.score_cap,
            self._sinks(count),
        )
        attended = attended.reshape(sequences, spec.heads, count, width)
        return self._summed("o", rows.unfold(attended))

    def _sinks(self, count: int) -> torch.Tensor | None:
        """Return the sinks' logits [kv_heads, rows of a head, 1], for ``count`` rows of a query."""
        if not self._spec.sinks:
            return None
        sinks = self._vectors["sinks"].unflatten(0, (self._spec.kv_heads, -1))
        return sinks.repeat_interleave(count, dim=1)[:, :, None]

    def _part_norm(self, name: str, heads: torch.Tensor) -> torch.Tensor:
        """Apply the norm of q or k, over each head or over all: [n, heads, width] in fp32."""
        rows = heads.float() if self._spec.qk_norm == "head" else heads.flatten(1).float()
        return norm(rows, self._vectors, name, self._spec.norm_eps).reshape(heads.shape)

    def _mlp(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._experts is not None:
            mixed = self._experts(hidden, self._vectors, self._activate)
            return mixed if self._cut is None else self._cut(mixed)
        narrow = hidden.to(self._dtype)
        if self._spec.gated:
            gate, up = self._linears["gate_up"](narrow).chunk(2, dim=1)
            return self._summed("down", self._activate(gate) * up)
        return self._summed("down", self._activate(self._linears["up"](narrow)))

    def _summed(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Multiply rows by the matrix that ends a part of the layer: fp32 [n, hidden]."""
        product = self._linears[name](rows).float()
        if self._cut is None:
            return product
        total = self._cut(product)
        bias = self._vectors.get(f"{name}.bias")
        return total if bias is None else total + bias

    def _activate(self, rows: torch.Tensor) -> torch.Tensor:
        match self._spec.activation:
            case "relu":
                return functional.relu(rows)
            case "silu":
                return functional.silu(rows)
            case "gelu":
                return functional.gelu(rows)
            case "gelu_tanh":
                return functional.gelu(rows, approximate="tanh")


class Head:
    """Final norm, projection and LM head: rows fp32 [n, hidden] to logits fp32 [n, vocab]."""

    def __init__(
        self, spec: ModelSpec, linears: Mapping[str, Linear], vectors: Vectors, dtype: torch.dtype
    ) -> None:
        self._linears = linears
        self._vectors = vectors
        self._epsilon = spec.layers[-1].norm_eps
        self._cap = spec.logit_cap
        self._dtype = dtype

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        if "norm.weight" in self._vectors:
            hidden = norm(hidden, self._vectors, "norm", self._epsilon)
        narrow = hidden.to(self._dtype)
        if "project_out" in self._linears:
            narrow = self._linears["project_out"](narrow)
        logits = self._linears["lm_head"](narrow).float()
        return logits if self._cap is None else self._cap * torch.tanh(logits / self._cap)


def norm(rows: torch.Tensor, vectors: Vectors, name: str, epsilon: float) -> torch.Tensor:
    """Apply layer norm if the block has a bias for it, else RMS norm, over the last dimension."""
    weight, bias = vectors[f"{name}.weight"], vectors.get(f"{name}.bias")
    if bias is None:
        return functional.rms_norm(rows, weight.shape, weight, epsilon)
    return functional.layer_norm(rows, weight.shape, weight, bias, epsilon)


def _rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate heads [n, heads, width] in fp32, the type of cos and sin."""
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _sees(rows: torch.Tensor, keys: torch.Tensor, window: int | None) -> torch.Tensor:
    visible = keys <= rows
    return visible if window is None else visible & (keys > rows - window)
