"""The blocks of a stage on a torch device, from LayerSpec features alone.

The residual stream is fp32 everywhere. Each block multiplies and attends in its own dtype: fp16 on
a GPU, fp32 on a CPU and for blocks stored at 32 bits.

A *pass* says which rows of which sequences run, where their keys and values go, and what each row
sees. The host knows the positions of a prompt's chunk. Only the device knows those of decoded
tokens, so that one captured graph serves every position.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch.nn import functional

from backends.torch_fused import Cache, HeadNorm, Norm, Places, Residual, Rotary, Steps
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
    ) -> None:
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
        if self._spec.norm_position == "pre":
            stream.add(self._attention(self._normed(stream, "attn_norm", "qkv"), rows))
            stream.add(self._mlp(self._normed(stream, "mlp_norm", self._up)))
        else:
            stream.add(self._attention(stream.settled(), rows))
            stream.replace(self._normed(stream, "attn_norm"))
            stream.add(self._mlp(stream.settled()))
            stream.replace(self._normed(stream, "mlp_norm"))

    def empty(self, slot: int, first: int = 0) -> None:
        """Clear the slot's cache from position ``first`` on."""
        self._cache.keys[slot, :, first:].zero_()
        self._cache.values[slot, :, first:].zero_()

    def _normed(self, stream: Residual, name: str, product: str | None = None) -> torch.Tensor:
        """Return the stream's norm, fp32 or in the dtype that a product takes."""
        dtype = torch.float32
        if product is not None:
            dtype = self._linears[product].takes(len(stream))
        return stream.normed(self._steps, norm_of(self._vectors, name, self._spec.norm_eps), dtype)

    def _attention(self, hidden: torch.Tensor, rows: Pass) -> torch.Tensor:
        spec, width, cache = self._spec, self._spec.head_dim, self._cache
        heads = self._linears["qkv"](hidden)
        query = heads.new_empty((len(heads), spec.heads, width), dtype=self._dtype)
        self._steps.place(heads, query, cache, rows.places, self._rotary, self._head_norm)
        # Query heads that share a key head become rows of one head, which saves a copy of the
        # cache.
        group = spec.heads // spec.kv_heads
        folded = rows.fold(query)  # [sequences, heads, rows, width]
        sequences, _, count, _ = folded.shape
        attended = functional.scaled_dot_product_attention(
            folded.reshape(sequences, spec.kv_heads, group * count, width),
            rows.seen(cache.keys),
            rows.seen(cache.values),
            attn_mask=rows.mask(spec.sliding_window, group, self._dtype),
            scale=1 / math.sqrt(width),
        )
        attended = attended.reshape(sequences, spec.heads, count, width)
        return self._summed("o", rows.unfold(attended))

    def _mlp(self, hidden: torch.Tensor) -> torch.Tensor:
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
        return self._linears["lm_head"](rows).float()


def norm_of(vectors: Vectors, name: str, epsilon: float) -> Norm:
    """Return a norm of a block. It is layer norm if the block has a bias for it."""
    return Norm(vectors[f"{name}.weight"], vectors.get(f"{name}.bias"), epsilon)


def head_norm(spec: LayerSpec, vectors: Vectors) -> HeadNorm | None:
    """Return the norms of a layer's query and key heads, if it has them."""
    if not spec.qk_norm:
        return None
    counts = {"q_norm": spec.heads, "k_norm": spec.kv_heads}
    weights = [vectors[f"{name}.weight"].expand(count, -1) for name, count in counts.items()]
    return HeadNorm(torch.cat(weights), spec.norm_eps)


def _sees(rows: torch.Tensor, keys: torch.Tensor, window: int | None) -> torch.Tensor:
    visible = keys <= rows
    return visible if window is None else visible & (keys > rows - window)
