"""Mixture of experts: which experts a row takes, with which weights, and where they are stored.

A router gives each row a score for each expert. The best ``active`` ones run, and their outputs are
added up with weights that are made of the scores. Every member of a team scores all experts, and
runs those of the chosen ones that it holds.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from model.quantize import QuantizedMatrix
from model.spec import ExpertSpec, LayerSpec

Array = npt.NDArray[Any]
Places = npt.NDArray[np.intp]
AnyTensor = TypeVar("AnyTensor", Array, QuantizedMatrix, QuantizedMatrix | npt.NDArray[np.float32])

CLIPPED_ALPHA = 1.702
"""The factor in the sigmoid of a clipped SwiGLU."""

_DRAWS = 4096

STACKED = frozenset(
    f"{matrix}.{kind}" for matrix in ("gate", "up", "down") for kind in ("weight", "bias")
)
"""The tensors whose rows are those of one expert after the other."""


def route(experts: ExpertSpec, scores: Array) -> tuple[Places, Array]:
    """Return the experts that rows take, and their weights, both [n, active].

    scores: the router's output [n, count].
    """
    active = experts.active
    chosen = np.argpartition(scores, experts.count - active, axis=1)[:, experts.count - active :]
    best = np.take_along_axis(scores, chosen, axis=1)
    largest = best.max(axis=1, keepdims=True)
    weights = np.exp(best - largest)
    # A softmax over all, divided by the sum of the chosen, is a softmax over the chosen.
    over_chosen = experts.scoring == "topk_softmax" or experts.normalized
    others = weights if over_chosen else np.exp(scores - largest)
    return chosen, weights / others.sum(axis=1, keepdims=True)


def route_one(experts: ExpertSpec, scores: Array) -> tuple[list[int], list[float]]:
    """As ``route`` for one row [count], in a few calls: decoding waits for it in every layer."""
    chosen = scores.argpartition(experts.count - experts.active)[-experts.active :]
    best: list[float] = scores[chosen].tolist()
    largest = max(best)
    weights = [math.exp(score - largest) for score in best]
    if experts.scoring == "topk_softmax" or experts.normalized:
        total = sum(weights)
    else:
        total = float(np.exp(scores - largest).sum())
    return chosen.tolist(), [weight / total for weight in weights]


def by_expert(
    experts: ExpertSpec, chosen: Places, weights: Array
) -> Iterator[tuple[int, Places, Array]]:
    """Yield (expert, its rows, their weights) for the experts that are held and chosen.

    The expert is its number among all. ``route`` gives ``chosen`` and ``weights``.
    """
    active = chosen.shape[1]
    flat = chosen.reshape(-1)
    order = np.argsort(flat, kind="stable")
    found, starts = np.unique(flat[order], return_index=True)
    held = range(experts.first, experts.first + experts.stored)
    for expert, places in zip(found.tolist(), np.split(order, starts[1:]), strict=True):
        if expert in held:
            yield expert, places // active, weights.reshape(-1)[places]


def clipped_swiglu(gate: Array, up: Array, limit: float) -> tuple[Array, Array]:
    """Return the two factors of gpt-oss's gated activation."""
    gate = np.minimum(gate, limit)
    # tanh does not overflow for large negative inputs.
    sigmoid = 0.5 + 0.5 * np.tanh(0.5 * CLIPPED_ALPHA * gate)
    return gate * sigmoid, np.clip(up, -limit, limit) + 1


@dataclass(frozen=True, eq=False)
class ExpertCounts:
    """How many rows of a text each expert got, in each layer with experts: [layer][expert]."""

    layers: tuple[tuple[int, ...], ...]


@functools.lru_cache(maxsize=1024)
def busiest(
    held: tuple[int, ...], active: int, rows: int, counts: ExpertCounts | None = None
) -> float:
    """Return how much more the busiest of several devices has to do than its part of the experts.

    held: experts of each device, all of the layer's together. Each of ``rows`` rows takes
    ``active`` of them: uniformly, or as often as rows of a text did. With ``counts`` it is the mean
    of their layers, and 1 without a layer of so many experts. It is the mean of many draws, which
    are always the same.
    """
    random = np.random.default_rng(0)
    draws = max(16, _DRAWS // rows)
    expected = rows * active * np.array(held) / sum(held)
    if counts is None:
        taken = random.multivariate_hypergeometric(held, active, size=(draws, rows)).sum(axis=1)
        return float((taken / expected).max(axis=1).mean())
    layers = [one for one in counts.layers if len(one) == sum(held)]
    factors = [
        (_taken(random, held, active, rows, one, max(1, draws // len(layers))) / expected).max(1)
        for one in layers
    ]
    return float(np.mean(factors)) if factors else 1.0


def _taken(
    random: np.random.Generator,
    held: tuple[int, ...],
    active: int,
    rows: int,
    counts: tuple[int, ...],
    draws: int,
) -> Array:
    """[draw, device]: how many experts of each device rows take, drawn without replacement.

    An expert that no row of the text took may still be taken: each counts one row more.
    """
    # The largest of log-weights with Gumbel noise are such a draw (Efraimidis and Spirakis, 2006).
    noise = random.gumbel(size=(draws, rows, len(counts)))
    scores = np.log(np.array(counts) + 1.0) + noise
    chosen = np.argpartition(scores, len(counts) - active, axis=2)[..., len(counts) - active :]
    owners = np.repeat(np.arange(len(held)), held)[chosen].reshape(draws, -1)
    return np.stack([(owners == device).sum(1) for device in range(len(held))], axis=1)


def rows_of(layer: LayerSpec, expert: int, name: str) -> slice:
    """Return the rows of a stacked tensor that are an expert's."""
    experts = layer.experts
    assert experts is not None  # noqa: S101 - only layers with experts have stacked tensors
    count = layer.hidden if name.startswith("down.") else layer.ffn
    at = expert - experts.first
    return slice(at * count, (at + 1) * count)


def expert_rows(layer: LayerSpec, expert: int, name: str, tensor: AnyTensor) -> AnyTensor:
    """Return an expert's part of a tensor, as a view. Tensors that are not stacked stay whole."""
    if name not in STACKED:
        return tensor
    rows = rows_of(layer, expert, name)
    return tensor.rows(rows) if isinstance(tensor, QuantizedMatrix) else tensor[rows]
