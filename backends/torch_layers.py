"""The blocks of a stage on a torch device, from LayerSpec features alone.

The residual stream is fp32 everywhere. Each block multiplies and attends in its own dtype: fp16 on
a GPU, fp32 on a CPU and for blocks stored at 32 bits.

A *pass* says which rows of which sequences run, where their keys and values go, and what each row
sees. The host knows the positions of a prompt's chunk. Only the device knows those of decoded
tokens, so that one captured graph serves every position.
"""

from __future__ import annotations

import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch

from backends.torch_attention import attend
from backends.torch_experts import TorchExperts
from backends.torch_fused import (
    Cache,
    HeadNorm,
    Norm,
    Places,
    Residual,
    Rotary,
    Steps,
    activated,
)
from backends.torch_matmul import Linear
from model.spec import LayerSpec, ModelSpec

Vectors = Mapping[str, torch.Tensor]


class Pass(ABC):
    """Rows that run through a stage together."""

    def __init__(self, slots: torch.Tensor, positions: torch.Tensor) -> None:
        """``slots`` and ``positions`` are int64 [n], on the device."""
        self.places = Places(slots, positions)
        self._masks: dict[tuple[int | None, int, torch.dtype], torch.Tensor] = {}

    @property
    def positions(self) -> torch.Tensor:
        return self.places.positions

    @abstractmethod
    def fold(self, heads: torch.Tensor) -> torch.Tensor:
        """Reshape [n, heads, width] to [sequences, heads, rows of a sequence, width]."""

    @abstractmethod
    def unfold(self, heads: torch.Tensor) -> torch.Tensor:
        """Invert ``fold`` and join the heads: [n, heads * width]."""

    @abstractmethod
    def seen(self, cache: torch.Tensor) -> torch.Tensor:
        """Return what the rows may see of a cache: [sequences, kv_heads, length, width]."""

    @abstractmethod
    def _visible(self, window: int | None) -> torch.Tensor:
        """Return which positions a row sees: bool [sequences, 1, rows of a sequence, length]."""

    def mask(self, window: int | None, group: int, dtype: torch.dtype) -> torch.Tensor:
        """Return 0 where ``_visible`` and else -inf, for ``group`` query heads laid end to end."""
        key = window, group, dtype
        if key not in self._masks:
            visible = self._visible(window).repeat(1, 1, group, 1)
            # Attention would turn a mask of bools into this one in every layer.
            mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
            self._masks[key] = mask.masked_fill_(~visible, -math.inf)
        return self._masks[key]


class _SequencePass(Pass):
    """Rows of one sequence, each of which sees at most its first ``length`` positions."""

    def __init__(self, slots: torch.Tensor, positions: torch.Tensor, length: int) -> None:
        super().__init__(slots, positions)
        self._length = length

    def fold(self, heads: torch.Tensor) -> torch.Tensor:
        return heads.transpose(0, 1)[None]

    def unfold(self, heads: torch.Tensor) -> torch.Tensor:
        return heads[0].transpose(0, 1).flatten(1)

    def _visible(self, window: int | None) -> torch.Tensor:
        keys = torch.arange(self._length, device=self.positions.device)
        return _sees(self.positions[:, None], keys, window)[None, None]


class PromptPass(_SequencePass):
    """Rows [first, first + count) of the sequence in ``slot``, all known to the host."""

    def __init__(self, slot: int, first: int, count: int, device: torch.device) -> None:
        positions = torch.arange(first, first + count, device=device)
        super().__init__(torch.full_like(positions, slot), positions, first + count)
        self._slot = slot

    def seen(self, cache: torch.Tensor) -> torch.Tensor:
        return cache[self._slot : self._slot + 1, :, : self._length]


class ChunkPass(_SequencePass):
    """Rows of one sequence. The host knows only ``length``.

    slots: the same slot for each row. One graph serves all slots, for a copy of what is seen.
    positions: may be equal for equal rows, which pad a chunk.
    """

    def seen(self, cache: torch.Tensor) -> torch.Tensor:
        return cache[:, :, : self._length].index_select(0, self.places.slots[:1])


class TokenPass(Pass):
    """One row of each of several sequences. The host knows only ``length``.

    slots, positions: int64 [n]. Each row sees at most the first ``length`` positions of its slot.
    only_slot: saves the copy of the caches that several sequences need.
    """

    def __init__(
        self, slots: torch.Tensor, positions: torch.Tensor, length: int, only_slot: int | None
    ) -> None:
        super().__init__(slots, positions)
        self._length = length
        self._seen: slice | torch.Tensor = slots
        if only_slot is not None:
            self._seen = slice(only_slot, only_slot + 1)

    def fold(self, heads: torch.Tensor) -> torch.Tensor:
        return heads[:, :, None]

    def unfold(self, heads: torch.Tensor) -> torch.Tensor:
        return heads[:, :, 0].flatten(1)

    def seen(self, cache: torch.Tensor) -> torch.Tensor:
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
    ) -> None:
        self._projection = projection
        self._positions = positions
        self._offset = offset

    def __call__(self, hidden: torch.Tensor, rows: Pass) -> torch.Tensor:
        if self._projection is not None:
            hidden = self._projection(hidden).float()
        if self._positions is not None:
            hidden = hidden + self._positions.index_select(0, rows.positions + self._offset)
        return hidden


class Layer:
    """A decoder layer, which adds its parts to the residual stream of a pass.

    linears: ``qkv`` and ``o``, ``up`` (``gate_up`` if gated) and ``down``.
    vectors: fp32.
    rotary: the layer's table of cosines and sines, each [context, turned columns / 2].
    dtype: that of the caches and of attention.
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
        rotary: Rotary | None,
        dtype: torch.dtype,
        steps: Steps,
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
        self._steps = steps
        self._cut = cut
        self._up = "gate_up" if spec.gated else "up"
        self._head_norm = head_norm(spec, vectors)

    def __call__(self, stream: Residual, rows: Pass) -> None:
        self._leave(stream, "attn", self._attention(self._entered(stream, "attn", "qkv"), rows))
        # A router takes its rows in fp32.
        product = self._up if self._experts is None else None
        self._leave(stream, "mlp", self._mlp(self._entered(stream, "mlp", product)))

    def empty(self, slot: int, first: int = 0) -> None:
        """Clear the slot's cache from position ``first`` on."""
        self._cache.keys[slot, :, first:].zero_()
        self._cache.values[slot, :, first:].zero_()

    def _entered(self, stream: Residual, part: str, product: str | None) -> torch.Tensor:
        """Return the rows that attention or MLP takes, for its first product."""
        if self._spec.norm_position not in ("pre", "both"):
            return stream.settled()
        dtype = torch.float32
        if product is not None:
            dtype = self._linears[product].takes(len(stream))
        return stream.normed(self._steps, self._norm(f"{part}_norm"), dtype)

    def _leave(self, stream: Residual, part: str, product: torch.Tensor) -> None:
        """Bring the product of attention or MLP to the stream."""
        match self._spec.norm_position:
            case "pre":
                stream.add(product)
            case "post":
                stream.add(product)
                norm = self._norm(f"{part}_norm")
                stream.replace(stream.normed(self._steps, norm, torch.float32))
            case "both":
                stream.add(self._normed(f"{part}_out_norm", product))
            case "output":
                stream.add(self._normed(f"{part}_norm", product))

    def _norm(self, name: str) -> Norm:
        return norm_of(self._vectors, name, self._spec.norm_eps)

    def _normed(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Return the norm of rows in fp32."""
        return self._steps.add_norm(rows, None, self._norm(name), torch.float32)[1]

    def _attention(self, hidden: torch.Tensor, rows: Pass) -> torch.Tensor:
        spec, width, cache = self._spec, self._spec.head_dim, self._cache
        heads = self._linears["qkv"](hidden)
        if spec.qk_norm == "width":
            heads = self._width_normed(heads)
        query = heads.new_empty((len(heads), spec.heads, width), dtype=self._dtype)
        self._steps.place(heads, query, cache, rows.places, self._rotary, self._head_norm)
        # Query heads that share a key head become rows of one head, which saves a copy of the
        # cache.
        group = spec.heads // spec.kv_heads
        folded = rows.fold(query)  # [sequences, heads, rows, width]
        sequences, _, count, _ = folded.shape
        attended = attend(
            folded.reshape(sequences, spec.kv_heads, group * count, width),
            rows.seen(cache.keys),
            rows.seen(cache.values),
            rows.mask(spec.sliding_window, group, self._dtype),
            spec.score_factor,
            spec.score_cap,
            self._sinks(count),
        )
        attended = attended.reshape(sequences, spec.heads, count, width)
        return self._summed("o", rows.unfold(attended))

    def _width_normed(self, heads: torch.Tensor) -> torch.Tensor:
        """Apply the norms of q and k over all their heads: [n, columns] in fp32."""
        columns = (count * self._spec.head_dim for count in (self._spec.heads, self._spec.kv_heads))
        query, key, value = heads.tensor_split(tuple(itertools.accumulate(columns)), dim=1)
        normed = self._normed("q_norm", query), self._normed("k_norm", key)
        return torch.cat([*normed, value.float()], dim=1)

    def _sinks(self, count: int) -> torch.Tensor | None:
        """Return the sinks' logits [kv_heads, rows of a head, 1], for ``count`` rows of a query."""
        if not self._spec.sinks:
            return None
        sinks = self._vectors["sinks"].unflatten(0, (self._spec.kv_heads, -1))
        return sinks.repeat_interleave(count, dim=1)[:, :, None]

    def _mlp(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._experts is not None:
            activate = functools.partial(activated, kind=self._spec.activation)
            mixed = self._experts(hidden, self._vectors, activate)
            return mixed if self._cut is None else self._cut(mixed)
        spec, dtype = self._spec, self._linears["down"].takes(len(hidden))
        rows = self._linears[self._up](hidden)
        return self._summed("down", self._steps.activate(rows, spec.activation, spec.gated, dtype))

    def _summed(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Multiply rows by the matrix that ends a part of the layer: [n, hidden] of any dtype."""
        product = self._linears[name](rows)
        if self._cut is None:
            return product
        total = self._cut(product.float())
        bias = self._vectors.get(f"{name}.bias")
        return total if bias is None else total + bias


class Head:
    """Final norm, projection and LM head: the residual stream to logits fp32 [n, vocab]."""

    def __init__(
        self, spec: ModelSpec, linears: Mapping[str, Linear], vectors: Vectors, steps: Steps
    ) -> None:
        self._linears = linears
        self._vectors = vectors
        self._epsilon = spec.layers[-1].norm_eps
        self._cap = spec.logit_cap
        self._steps = steps

    def __call__(self, stream: Residual) -> torch.Tensor:
        first = "project_out" if "project_out" in self._linears else "lm_head"
        if "norm.weight" in self._vectors:
            norm = norm_of(self._vectors, "norm", self._epsilon)
            rows = stream.normed(self._steps, norm, self._linears[first].takes(len(stream)))
        else:
            rows = stream.settled()
        if first == "project_out":
            rows = self._linears["project_out"](rows)
        logits = self._linears["lm_head"](rows).float()
        return logits if self._cap is None else self._cap * torch.tanh(logits / self._cap)


def norm_of(vectors: Vectors, name: str, epsilon: float) -> Norm:
    """Return a norm of a block. It is layer norm if the block has a bias for it."""
    return Norm(vectors[f"{name}.weight"], vectors.get(f"{name}.bias"), epsilon)


def head_norm(spec: LayerSpec, vectors: Vectors) -> HeadNorm | None:
    """Return the norms of each query and key head of a layer, if it has them."""
    if spec.qk_norm != "head":
        return None
    counts = {"q_norm": spec.heads, "k_norm": spec.kv_heads}
    weights = [vectors[f"{name}.weight"].expand(count, -1) for name, count in counts.items()]
    return HeadNorm(torch.cat(weights), spec.norm_eps)


def _sees(rows: torch.Tensor, keys: torch.Tensor, window: int | None) -> torch.Tensor:
    visible = keys <= rows
    return visible if window is None else visible & (keys > rows - window)
