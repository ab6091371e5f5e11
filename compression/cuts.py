"""Which parts of a model stay, and the smaller model that they are.

A part is a layer, a KV head with its query heads, or a column of an MLP. All layers of a smaller
model keep equally many heads and columns, because config.json has one number for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from model.spec import LayerSpec, ModelSpec

Array = npt.NDArray[Any]
Blocks = Sequence[Mapping[str, Array]]


@dataclass(frozen=True, slots=True)
class Shape:
    """The size of a smaller model: layers, KV heads of a layer, and columns of its MLP."""

    layers: int
    kv_heads: int
    ffn: int

    def __str__(self) -> str:
        return f"{self.layers} layers, {self.kv_heads} KV heads, {self.ffn} columns"


@dataclass(frozen=True, slots=True)
class Cut:
    """The parts that stay, each by its number in the original.

    heads, columns: one tuple for each layer that stays, of equal lengths.
    """

    layers: tuple[int, ...]
    heads: tuple[tuple[int, ...], ...]
    columns: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        for parts in (self.heads, self.columns):
            if len(parts) != len(self.layers) or len({len(one) for one in parts}) != 1:
                raise ValueError("every layer keeps as many heads and as many columns")
        for kept in (self.layers, *self.heads, *self.columns):
            if not kept or list(kept) != sorted(set(kept)):
                raise ValueError("kept parts are numbers in order, and at least one")

    @property
    def shape(self) -> Shape:
        return Shape(len(self.layers), len(self.heads[0]), len(self.columns[0]))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for a file. ``from_dict`` is the inverse."""
        return {
            "layers": list(self.layers),
            "heads": [list(one) for one in self.heads],
            "columns": [list(one) for one in self.columns],
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Cut:
        """Return the cut that ``to_dict`` wrote. Raises ValueError, KeyError or TypeError."""
        return Cut(
            tuple(values["layers"]),
            tuple(tuple(one) for one in values["heads"]),
            tuple(tuple(one) for one in values["columns"]),
        )


def whole(spec: ModelSpec) -> Cut:
    """Return the cut that keeps everything. All layers must be equally large."""
    first = spec.layers[0]
    count = len(spec.layers)
    return Cut(
        tuple(range(count)),
        (tuple(range(first.kv_heads)),) * count,
        (tuple(range(first.ffn)),) * count,
    )


def cut_spec(spec: ModelSpec, cut: Cut) -> ModelSpec:
    """Return the description of the smaller model."""
    layers = tuple(
        _cut_layer(spec.layers[layer], len(heads), len(columns))
        for layer, heads, columns in zip(cut.layers, cut.heads, cut.columns, strict=True)
    )
    return replace(spec, layers=layers)


def cut_blocks(spec: ModelSpec, blocks: Blocks, cut: Cut) -> list[dict[str, Array]]:
    """Return the canonical tensors of the smaller model's blocks, as copies."""
    kept = [{name: np.array(value) for name, value in blocks[0].items()}]
    for layer, heads, columns in zip(cut.layers, cut.heads, cut.columns, strict=True):
        kept.append(cut_tensors(spec.layers[layer], blocks[layer + 1], heads, columns))
    kept.append({name: np.array(value) for name, value in blocks[-1].items()})
    return kept


def cut_tensors(
    layer: LayerSpec, tensors: Mapping[str, Array], heads: Sequence[int], columns: Sequence[int]
) -> dict[str, Array]:
    """Return a layer's tensors with these KV heads, their query heads, and these columns alone."""
    group = layer.heads // layer.kv_heads
    queries = [head * group + place for head in heads for place in range(group)]
    kv_rows, q_rows = _rows(heads, layer.head_dim), _rows(queries, layer.head_dim)
    places = np.asarray(columns)
    rows = {"q": q_rows, "k": kv_rows, "v": kv_rows, "gate": places, "up": places}
    if layer.qk_norm == "width":
        rows |= {"q_norm": q_rows, "k_norm": kv_rows}
    inputs = {"o": q_rows, "down": places}
    kept = {}
    for name, value in tensors.items():
        module, _, kind = name.rpartition(".")
        if module in rows:
            kept[name] = value[rows[module]]
        elif module in inputs and kind == "weight":
            kept[name] = value[:, inputs[module]]
        else:
            kept[name] = np.array(value)
    return kept


def layer_weights(layer: LayerSpec) -> int:
    """Return the weights of a layer's matrices."""
    shapes = layer.tensors().items()
    return sum(shape[0] * shape[1] for _, shape in shapes if len(shape) == 2)


def weights_of(spec: ModelSpec) -> int:
    """Return the weights of the layers' matrices, which is what cuts make fewer."""
    return sum(map(layer_weights, spec.layers))


def _rows(heads: Sequence[int], width: int) -> npt.NDArray[np.intp]:
    return (np.asarray(heads)[:, None] * width + np.arange(width)).reshape(-1)


def _cut_layer(layer: LayerSpec, kv_heads: int, ffn: int) -> LayerSpec:
    group = layer.heads // layer.kv_heads
    # The scores' factor stays that of the head's width, which stays too.
    return replace(layer, heads=kv_heads * group, kv_heads=kv_heads, ffn=ffn)
