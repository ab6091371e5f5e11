"""Measures what each part of a model is worth on a text, and chooses cuts by it.

Heads and columns: the squared gradient of the loss by the part's gate, summed over sequences. It
estimates what the loss gains when the part is removed, to the second order, with Fisher's matrix
for the curvature.

Sources: Molchanov et al., "Importance Estimation for Neural Network Pruning"; Kwon et al., "A Fast
Post-Training Pruning Framework for Transformers".

Layers: the measured divergence from the original without the layer, one after another.

Cuts of nearly equal size: the measured divergence of each one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from compression.cuts import Cut, Shape, cut_spec, weights_of
from compression.errors import CompressionError
from compression.network import Gates, Network, Outputs
from compression.text import Batch
from model.spec import ModelSpec

OnStep = Callable[[int, int], None]

HEAD_STEPS = 8
"""Columns of an MLP stay in so many equal steps at the finest, so that few shapes are compared."""
NEAR = 0.06
"""Shapes whose share of weights is up to so much below the wanted one are compared."""


@dataclass(frozen=True, slots=True)
class Importance:
    """The worth of parts. heads: [layers][KV heads]. columns: [layers][columns].

    layers: the layers in the order in which they are best removed, of which one always stays.
    """

    heads: list[list[float]]
    columns: list[list[float]]
    layers: list[int]


Run = Callable[[Batch], Outputs]
"""Runs a batch, and returns logits where ``Batch.predicts`` is true."""


class Probe:
    """A text on which models are compared with the original, which runs once."""

    def __init__(self, original: Network, batches: Sequence[Batch]) -> None:
        """Run the original. Its last rows are kept, which are smaller than logits."""
        self.original, self.batches = original, batches
        self._rows = []
        with torch.no_grad():
            for batch in batches:
                states = original.forward(batch.tokens, at=batch.predicts & False).hidden
                self._rows.append(states[-1][batch.predicts])

    def divergence(self, run: Run) -> float:
        """Return the mean KL(original || model) of predictions that matter, in nats per token."""
        total, count = 0.0, 0
        with torch.no_grad():
            for batch, rows in zip(self.batches, self._rows, strict=True):
                expected = self.original.head(rows)
                total += float(divergence_sum(expected, run(batch).logits))
                count += len(expected)
        return total / count

    def of(self, network: Network) -> float:
        """Return the divergence of a whole network."""
        return self.divergence(lambda batch: network.forward(batch.tokens, at=batch.predicts))


def divergence_sum(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Return the summed KL(expected || found) of logits [n, vocab]."""
    return functional.kl_div(
        found.log_softmax(-1), expected.log_softmax(-1), reduction="sum", log_target=True
    )


def gate_importance(
    network: Network, batches: Sequence[Batch], on_step: OnStep
) -> tuple[list[list[float]], list[list[float]]]:
    """Return the worth of heads and columns: squared gradients of their gates, by sequence."""
    gates = Gates.ones(network.spec, torch.float32)
    heads, columns = torch.zeros_like(gates.heads), torch.zeros_like(gates.columns)
    total = sum(len(batch.tokens) for batch in batches)
    done = 0
    for batch in batches:
        for row in range(len(batch.tokens)):
            length = int(batch.real[row].sum())
            own = Gates.ones(network.spec, torch.float32)
            own.heads.requires_grad_()
            own.columns.requires_grad_()
            tokens = batch.tokens[row : row + 1, :length]
            logits = network.forward(tokens, own).logits[0, :-1]
            matters = batch.predicts[row, : length - 1]
            loss = functional.cross_entropy(logits[matters], tokens[0, 1:][matters])
            torch.autograd.backward(loss)
            for gate, sums in ((own.heads, heads), (own.columns, columns)):
                if gate.grad is not None:
                    sums += gate.grad.square()
            done += 1
            on_step(done, total)
    return heads.tolist(), columns.tolist()


def layer_order(probe: Probe, on_step: OnStep) -> list[int]:
    """Return the order in which layers are best removed, each measured without those before."""
    count = len(probe.original.spec.layers)
    total = count * (count + 1) // 2 - 1
    done = 0
    removed: list[int] = []
    while len(removed) < count - 1:
        found: dict[int, float] = {}
        for layer in set(range(count)) - set(removed):
            found[layer] = probe.divergence(_without(probe.original, {layer, *removed}))
            done += 1
            on_step(done, total)
        removed.append(min(found, key=lambda layer: (found[layer], layer)))
    return removed


def shapes(spec: ModelSpec, *, with_heads: bool) -> Iterator[Shape]:
    """Yield the shapes that may be compared: all numbers of layers and heads, steps of columns."""
    first = spec.layers[0]
    steps = sorted({max(1, round(first.ffn * i / HEAD_STEPS)) for i in range(1, HEAD_STEPS + 1)})
    for layers in range(1, len(spec.layers) + 1):
        for heads in range(1, first.kv_heads + 1) if with_heads else (first.kv_heads,):
            for columns in steps:
                yield Shape(layers, heads, columns)


def cut_of(spec: ModelSpec, importance: Importance, shape: Shape) -> Cut:
    """Return the cut to a shape that keeps what is worth most, layer by layer."""
    count = len(spec.layers)
    layers = sorted(set(range(count)) - set(importance.layers[: count - shape.layers]))
    return Cut(
        tuple(layers),
        tuple(_best(importance.heads[layer], shape.kv_heads) for layer in layers),
        tuple(_best(importance.columns[layer], shape.ffn) for layer in layers),
    )


def best_cut(
    probe: Probe, importance: Importance, share: float, on_step: OnStep, *, with_heads: bool
) -> Cut:
    """Return the cut to ``share`` of the layers' weights that loses least, of those near it.

    Each is measured on the probe, as the original with closed gates. Raises CompressionError if
    no shape is that small.
    """
    spec = probe.original.spec
    whole = weights_of(spec)
    near: dict[Shape, float] = {}
    for shape in shapes(spec, with_heads=with_heads):
        size = weights_of(cut_spec(spec, cut_of(spec, importance, shape))) / whole
        if size <= share + 1e-9:
            near[shape] = size
    if not near:
        raise CompressionError(f"no cut leaves {share:.0%} of the layers' weights: ask for more")
    largest = max(near.values())
    chosen = [shape for shape, size in near.items() if size >= largest - NEAR]
    losses: dict[Shape, float] = {}
    for number, shape in enumerate(chosen, start=1):
        cut = cut_of(spec, importance, shape)
        losses[shape] = probe.divergence(masked(probe.original, cut))
        on_step(number, len(chosen))
    best = min(chosen, key=lambda shape: (losses[shape], -near[shape]))
    return cut_of(spec, importance, best)


def masked(network: Network, cut: Cut) -> Run:
    """Return what runs batches through the original with all parts closed that a cut removes."""
    gates = Gates.ones(network.spec, network.blocks[0]["tokens.weight"].dtype)
    for place, layer in enumerate(cut.layers):
        gates.heads[layer] = _only(gates.heads.shape[1], cut.heads[place])
        gates.columns[layer] = _only(gates.columns.shape[1], cut.columns[place])
    without = set(range(len(network.spec.layers))) - set(cut.layers)
    return lambda batch: network.forward(batch.tokens, gates, without, batch.predicts)


def _without(network: Network, layers: Collection[int]) -> Run:
    return lambda batch: network.forward(batch.tokens, without=layers, at=batch.predicts)


def importance_of(values: Mapping[str, list[list[float]] | list[int]]) -> Importance:
    """Return what ``dataclasses.asdict`` made of it. Raises KeyError and TypeError."""
    return Importance(**values)  # type: ignore[arg-type]  # from our own file


def _only(count: int, kept: Sequence[int]) -> torch.Tensor:
    mask = torch.zeros(count)
    mask[list(kept)] = 1
    return mask


def _best(worth: Sequence[float], count: int) -> tuple[int, ...]:
    order = np.argsort(-np.asarray(worth), kind="stable")[:count]
    return tuple(sorted(int(place) for place in order))
