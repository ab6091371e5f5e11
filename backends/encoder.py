"""The stage of an encoder: whole texts go through once, without a KV cache.

Every backend runs its layers by its own ``EncoderLayers``. The embedding and the head are small,
and run in numpy (model/encoder_ends.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from backends.base import Array, BackendError, Stage, StageOptions, Tokens
from backends.checks import check_inputs
from model import encoder_ends
from model.artifact import Tensor, read_block, values_of
from model.costs import stage_buffer_bytes
from model.position_bias import position_bias
from model.spec import LayerSpec, ModelSpec
from model.texts import Texts, pass_rows


class EncoderLayers(ABC):
    """Some layers of an encoder on a kind of hardware."""

    between: Callable[[], float] | None = None
    """As of Stage."""

    @property
    @abstractmethod
    def memory_bytes(self) -> int:
        """The bytes of the weights as executed."""

    @abstractmethod
    def run(self, hidden: Array, texts: Texts) -> Array:
        """Run rows [n, hidden] of whole texts: hidden float32 [n, hidden]. Raises BackendError."""

    @abstractmethod
    def close(self) -> None:
        """Free everything. Idempotent."""


@dataclass(frozen=True, slots=True)
class LayerFile:
    """The tensors of one layer, read from its artifact."""

    block: int
    bits: int
    layer: LayerSpec
    tensors: dict[str, Tensor]

    @property
    def biases(self) -> Array | None:
        """The table of biases by distance, if the layer has one."""
        found = self.tensors.get("position_bias.weight")
        return None if found is None else values_of(found)


class EncoderStage(Stage):
    """Blocks of an encoder. ``forward`` runs one whole text, whatever its slot and position."""

    def __init__(
        self,
        spec: ModelSpec,
        ends: dict[str, dict[str, Tensor]],
        layers: EncoderLayers | None,
        options: StageOptions,
        buffer_bytes: int,
    ) -> None:
        """``ends`` has the tensors of the embedding and of the head that the stage holds."""
        self._spec = spec
        self._options = options
        self._layers = layers
        self._table = ends.get("embedding", {}).get("tokens.weight")
        self._embedding, self._head = (
            {name: values_of(tensor) for name, tensor in ends[kind].items() if name != _TABLE}
            if kind in ends
            else None
            for kind in ("embedding", "head")
        )
        self._memory_bytes = buffer_bytes + (0 if layers is None else layers.memory_bytes)
        for tensors in ends.values():
            self._memory_bytes += sum(map(_bytes, tensors.values()))
        self._open = True

    @property
    def memory_bytes(self) -> int:
        return self._memory_bytes

    def forward(
        self, slot: int, position: int, inputs: Array | Tokens, *, logits: int = 1
    ) -> Array:
        return self.encode(inputs, Texts.plain(len(inputs)))

    def encode(self, inputs: Array | Tokens, texts: Texts) -> Array:
        if not self._open:
            raise BackendError("the stage is closed")
        check_inputs(inputs, self._spec, tokens=self._table is not None)
        context_tokens = self._options.context_tokens
        if not texts.are_sound or texts.rows != len(inputs):
            raise BackendError(f"texts of {texts.rows} rows in a pass of {len(inputs)}")
        if max(texts.lengths) > context_tokens or texts.rows > pass_rows(context_tokens):
            raise BackendError(
                f"a text of {max(texts.lengths)} tokens in a pass of {texts.rows} does not fit the "
                f"context of {context_tokens} tokens"
            )
        rows = inputs
        if self._embedding is not None and self._table is not None:
            rows = encoder_ends.embedded(
                self._spec, self._table, self._embedding, np.asarray(inputs), texts
            )
        if self._layers is not None:
            self._layers.between = self.between
            rows = self._layers.run(np.ascontiguousarray(rows, np.float32), texts)
        if self._head is not None:
            rows = encoder_ends.result(self._spec, self._head, rows, texts)
        answer: Array = np.asarray(rows, np.float32)
        if not np.isfinite(answer).all():
            raise BackendError(
                "the stage's results are not finite: this model's values leave the range of 16 "
                "bits; load it at 32 bits, or on a device that computes in fp32"
            )
        return answer

    def close(self) -> None:
        self._open = False
        if self._layers is not None:
            self._layers.close()
        self._layers = self._table = self._embedding = self._head = None


_TABLE = "tokens.weight"


def _bytes(tensor: Tensor) -> int:
    return tensor.nbytes if isinstance(tensor, np.ndarray) else tensor.stored_bytes


def read_encoder(
    spec: ModelSpec, artifacts: Sequence[tuple[int, Path]], options: StageOptions
) -> tuple[dict[str, dict[str, Tensor]], list[LayerFile], int]:
    """Read a stage's artifacts: the ends by kind, the layers, and the bytes of its buffers.

    Raises BackendError for what no backend runs, CheckpointError for a damaged artifact.
    """
    if options.team_sum is not None:
        raise BackendError("an encoder's layers are not shared by a team")
    for layer in spec.layers:
        if layer.rope is not None and layer.rope.rotated:
            raise BackendError("an encoder whose heads turn in part is not implemented")
    ends: dict[str, dict[str, Tensor]] = {}
    layers = []
    for block, path in artifacts:
        fmt, tensors = read_block(path, spec, block)
        kind = spec.block_kind(block)
        if kind == "layer":
            layers.append(LayerFile(block, fmt.bits, spec.layer(block), tensors))
        else:
            ends[kind] = tensors
    context_tokens = options.context_tokens
    blocks = [block for block, _ in artifacts]
    buffers = stage_buffer_bytes(spec, blocks, pass_rows(context_tokens), context_tokens)
    return ends, layers, buffers


def see(layer: LayerSpec, texts: Texts, biases: Array | None = None) -> Array:
    """Return what is added to the scores of texts side by side: 0, or -inf where nothing is seen.

    biases: the layer's table of biases by distance, if it has one. They are added.

    float32 [texts, 1, longest, longest], or with biases [texts, heads, longest, longest]. Rows
    behind a text's end see its first token, and nobody looks at them.
    """
    longest = max(texts.lengths)
    at = np.arange(longest)
    distance = at[:, None] - at
    seen = np.ones((longest, longest), bool) if layer.bidirectional else distance >= 0
    if layer.sliding_window is not None:
        seen &= np.abs(distance) < layer.sliding_window
    real = at < np.asarray(texts.lengths)[:, None]
    masks = np.where(seen & real[:, None, :], np.float32(0), np.float32(-np.inf))
    masks[:, :, 0] = np.where(real, masks[:, :, 0], 0)
    side: Array = masks[:, None]
    if biases is not None:
        side = side + position_bias(biases, longest).astype(np.float32)
    return side


def side_by_side(texts: Texts) -> tuple[Tokens, Tokens]:
    """Return how rows lie in a block [texts, longest]: the row at each place, and each row's place.

    int64 [texts, longest] and [n]. Places behind a text's end repeat its first row.
    """
    begins, longest = texts.begins()[:-1], max(texts.lengths)
    at = np.arange(longest)
    lengths = np.asarray(texts.lengths)[:, None]
    rows = begins[:, None] + np.where(at < lengths, at, 0)
    places = np.flatnonzero(at < lengths)
    return rows, places
