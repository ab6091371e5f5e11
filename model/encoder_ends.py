"""The first and the last block of an encoder, in numpy: every backend runs them by these functions.

They are small beside the layers: rows of tables and a norm, and one row of each text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from model.quantize import QuantizedMatrix
from model.spec import DenseActivation, LayerSpec, ModelSpec
from model.texts import Texts, pooled

Array = npt.NDArray[Any]
Weights = Mapping[str, Array]


def embedded(
    spec: ModelSpec, table: QuantizedMatrix | Array, weights: Weights, tokens: Array, texts: Texts
) -> Array:
    """Return hidden rows [n, hidden] of tokens [n].

    table: ``tokens.weight``, of which only these rows are unpacked.
    weights: the block's other tensors.
    """
    hidden = table.dequantize(tokens) if isinstance(table, QuantizedMatrix) else table[tokens]
    if spec.learned_positions:
        hidden = hidden + weights["positions.weight"][texts.positions() + spec.position_offset]
    if spec.token_types:
        hidden = hidden + weights["types.weight"][np.minimum(texts.types(), spec.token_types - 1)]
    if spec.embed_norm:
        hidden = norm(spec.layers[0], weights, "embed_norm", hidden)
    return hidden


def result(spec: ModelSpec, weights: Weights, hidden: Array, texts: Texts) -> Array:
    """Return what ``spec.output`` says of hidden rows [n, hidden]: a row for each text or token."""
    output = spec.output
    if output is None:
        raise ValueError("the model generates text")
    is_one = output.pooling in ("first", "last")
    if is_one:
        hidden = pooled(hidden, texts, output.pooling)  # A norm is of each row alone.
    rows = norm(spec.layers[-1], weights, "norm", hidden) if spec.final_norm else hidden
    if not (is_one or output.per_token):
        rows = pooled(rows, texts, output.pooling)
    if output.dense:
        rows = _bent(rows @ weights["dense.weight"].T + weights["dense.bias"], output.activation)
    for index, step in enumerate(output.steps):
        rows = rows @ weights[f"step_{index}.weight"].T
        if step.bias:
            rows = rows + weights[f"step_{index}.bias"]
        rows = _bent(rows, step.activation)
    if output.labels:
        rows = rows @ weights["labels.weight"].T + weights["labels.bias"]
    if output.normalized:
        rows = rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)
    return rows[:, : output.columns] if output.columns else rows


def _bent(rows: Array, activation: DenseActivation) -> Array:
    match activation:
        case "tanh":
            bent: Array = np.tanh(rows)
            return bent
        case "relu":
            return np.maximum(rows, 0)
        case "none":
            return rows


def norm(layer: LayerSpec, weights: Weights, name: str, rows: Array) -> Array:
    """Apply the layer's kind of norm, with the weights of this name."""
    if layer.norm == "layernorm":
        rows = rows - rows.mean(axis=-1, keepdims=True)
    normed = rms_norm(rows, layer.norm_eps) * weights[f"{name}.weight"]
    return normed + weights[f"{name}.bias"] if layer.norm == "layernorm" else normed


def rms_norm(rows: Array, eps: float) -> Array:
    """Divide each row by the root of its mean square."""
    mean: Array = np.square(rows).mean(axis=-1, keepdims=True) + rows.dtype.type(eps)
    return rows / np.sqrt(mean)
