"""A model in torch that can be trained, with a gate at every part that a cut can remove.

It computes what ``model.reference`` does, for several sequences of equal length at once.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from compression.errors import CompressionError
from model.rotary import rotary_table
from model.spec import LayerSpec, ModelSpec

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Gates:
    """Factors of a model's parts, a row for each layer: 1 keeps a part and 0 removes it.

    heads: [layers, KV heads], of what these heads and their query heads add.
    columns: [layers, columns], of the MLP's inner values.
    """

    heads: torch.Tensor
    columns: torch.Tensor

    @staticmethod
    def ones(spec: ModelSpec, dtype: torch.dtype) -> Gates:
        layers, first = len(spec.layers), spec.layers[0]
        shapes = (layers, first.kv_heads), (layers, first.ffn)
        return Gates(*(torch.ones(shape, dtype=dtype) for shape in shapes))


@dataclass(frozen=True, slots=True)
class Outputs:
    """The results of a network. hidden: after the embedding and after every layer that ran."""

    hidden: list[torch.Tensor]
    logits: torch.Tensor


class Network:
    """A model's weights by block, as leaves that gradients reach.

    A tied head shares the token table with the embedding, as in the file.
    """

    def __init__(
        self,
        spec: ModelSpec,
        blocks: Sequence[Mapping[str, npt.NDArray[Any]]],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Copy the canonical tensors. Raises CompressionError for layers it cannot compute."""
        require_plain(spec)
        self.spec = spec
        self.blocks: list[Tensors] = [
            {name: torch.tensor(np.asarray(value), dtype=dtype) for name, value in block.items()}
            for block in blocks
        ]
        if spec.tied_head:
            self.blocks[-1]["lm_head.weight"] = self.blocks[0]["tokens.weight"]

    def parameters(self) -> list[torch.Tensor]:
        """Return each tensor once."""
        found = {id(tensor): tensor for block in self.blocks for tensor in block.values()}
        return list(found.values())

    def arrays(self) -> list[dict[str, npt.NDArray[np.float32]]]:
        """Return the canonical tensors of every block as fp32."""
        return [
            {name: tensor.detach().float().numpy() for name, tensor in block.items()}
            for block in self.blocks
        ]

    def forward(
        self,
        tokens: torch.Tensor,
        gates: Gates | None = None,
        without: Collection[int] = (),
        at: torch.Tensor | None = None,
    ) -> Outputs:
        """Run sequences [sequences, n] from their first token on.

        without: layers that are left out. Sequences may be padded behind their end.
        at: bool [sequences, n], the rows whose logits are wanted. Then logits are [rows, vocab].
        """
        hidden = self._embed(tokens)
        states = [hidden]
        for number, layer in enumerate(self.spec.layers):
            if number in without:
                continue
            own = None if gates is None else (gates.heads[number], gates.columns[number])
            hidden = _layer(layer, self.blocks[number + 1], hidden, own)
            states.append(hidden)
        return Outputs(states, self.head(hidden if at is None else hidden[at]))

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        weights = self.blocks[0]
        hidden = functional.embedding(tokens, weights["tokens.weight"])
        if self.spec.projected:
            hidden = hidden @ weights["project_in.weight"].T
        if self.spec.learned_positions:
            begin = self.spec.position_offset
            hidden = hidden + weights["positions.weight"][begin : begin + tokens.shape[1]]
        return hidden

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits of rows behind the last layer."""
        weights = self.blocks[-1]
        if self.spec.final_norm:
            hidden = _norm(self.spec.layers[-1], weights, "norm", hidden)
        if self.spec.projected:
            hidden = hidden @ weights["project_out.weight"].T
        return _capped(hidden @ weights["lm_head.weight"].T, self.spec.logit_cap)


def require_plain(spec: ModelSpec) -> None:
    """Raise CompressionError for a model that cannot be cut or trained here."""
    for layer in spec.layers:
        if layer.experts is not None:
            raise CompressionError("models with experts cannot be compressed: give a dense model")
        if layer.sinks:
            raise CompressionError("models with attention sinks cannot be compressed")
    sizes = {(layer.heads, layer.kv_heads, layer.head_dim, layer.ffn) for layer in spec.layers}
    if len(sizes) > 1:
        raise CompressionError("the model's layers differ in size: it cannot be compressed")


def _layer(
    layer: LayerSpec,
    weights: Tensors,
    hidden: torch.Tensor,
    gates: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    rows = _entered(layer, weights, "attn", hidden)
    mixed = _attention(layer, weights, rows, None if gates is None else gates[0])
    hidden = _left(layer, weights, "attn", hidden, _linear(weights, "o", mixed))
    rows = _entered(layer, weights, "mlp", hidden)
    inner = _activate(layer, _linear(weights, "gate" if layer.gated else "up", rows))
    if layer.gated:
        inner = inner * _linear(weights, "up", rows)
    if gates is not None:
        inner = inner * gates[1]
    return _left(layer, weights, "mlp", hidden, _linear(weights, "down", inner))


def _attention(
    layer: LayerSpec, weights: Tensors, rows: torch.Tensor, gates: torch.Tensor | None
) -> torch.Tensor:
    """The mixed values [sequences, n, heads * head_dim], each KV head's by its gate."""
    sequences, count, _ = rows.shape
    q, k, v = (_linear(weights, name, rows) for name in "qkv")
    if layer.qk_norm == "width":
        q, k = (_qk_norm(layer, weights, name, part) for name, part in (("q", q), ("k", k)))
    q, k, v = (
        part.view(sequences, count, heads, layer.head_dim)
        for part, heads in ((q, layer.heads), (k, layer.kv_heads), (v, layer.kv_heads))
    )
    if layer.qk_norm == "head":
        q, k = (_qk_norm(layer, weights, name, part) for name, part in (("q", q), ("k", k)))
    if layer.rope is not None:
        tables = rotary_table(layer.rope, layer.head_dim, count)
        cos, sin = (torch.from_numpy(table)[:, None].to(rows.dtype) for table in tables)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    if gates is not None:
        v = v * gates[:, None]
    group = layer.heads // layer.kv_heads
    keys, values = (part.repeat_interleave(group, 2).transpose(1, 2) for part in (k, v))
    scores = _capped(q.transpose(1, 2) @ keys.transpose(2, 3) * layer.score_factor, layer.score_cap)
    places = torch.arange(count)
    distance = places[:, None] - places
    visible = (distance >= 0) & (distance < (layer.sliding_window or count))
    shares = torch.softmax(scores.masked_fill(~visible, -math.inf), dim=-1)
    return (shares @ values).transpose(1, 2).reshape(sequences, count, -1)


def _qk_norm(layer: LayerSpec, weights: Tensors, name: str, rows: torch.Tensor) -> torch.Tensor:
    return _rms(rows, layer.norm_eps) * weights[f"{name}_norm.weight"]


def _rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _entered(layer: LayerSpec, weights: Tensors, name: str, rows: torch.Tensor) -> torch.Tensor:
    if layer.norm_position in ("pre", "both"):
        return _norm(layer, weights, f"{name}_norm", rows)
    return rows


def _left(
    layer: LayerSpec, weights: Tensors, name: str, rows: torch.Tensor, product: torch.Tensor
) -> torch.Tensor:
    match layer.norm_position:
        case "pre":
            return rows + product
        case "post":
            return _norm(layer, weights, f"{name}_norm", rows + product)
        case "both":
            return rows + _norm(layer, weights, f"{name}_out_norm", product)
        case "output":
            return rows + _norm(layer, weights, f"{name}_norm", product)


def _linear(weights: Tensors, name: str, rows: torch.Tensor) -> torch.Tensor:
    return functional.linear(rows, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def _norm(layer: LayerSpec, weights: Tensors, name: str, rows: torch.Tensor) -> torch.Tensor:
    if layer.norm == "rmsnorm":
        return _rms(rows, layer.norm_eps) * weights[f"{name}.weight"]
    weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    return functional.layer_norm(rows, rows.shape[-1:], weight, bias, layer.norm_eps)


def _rms(rows: torch.Tensor, eps: float) -> torch.Tensor:
    return rows * torch.rsqrt(rows.square().mean(dim=-1, keepdim=True) + eps)


def _capped(values: torch.Tensor, cap: float | None) -> torch.Tensor:
    return values if cap is None else cap * torch.tanh(values / cap)


def _activate(layer: LayerSpec, rows: torch.Tensor) -> torch.Tensor:
    if layer.activation == "relu":
        return torch.relu(rows)
    if layer.activation == "silu":
        return functional.silu(rows)
    return functional.gelu(rows, approximate="tanh" if layer.activation == "gelu_tanh" else "none")
