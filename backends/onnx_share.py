"""A share of layers (model/share.py): sessions between the cuts, at which a team adds up rows.

Each layer has two sessions. One ends with the partial rows of ``o``, the other with those of
``down``. The next session takes the team's sum, and adds it to the hidden state. The last session
only does that, and is also the head if the stage holds it.

A call of a session costs more than its operators within a longer session. So the memory of a
decoding pass is bound once, and all sessions of a pass hand rows on in the same few buffers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnx import TensorProto

from backends.base import Array, TeamSum, Tokens
from backends.onnx_experts import Experts
from backends.onnx_graph import ROUTED_OUTPUTS, BlockWeights, Graph, LayerGraph, add_head
from backends.onnx_mixture import add_experts
from backends.onnx_session import translated
from model.spec import ExpertSpec, LayerSpec, ModelSpec

PROMPT_ROWS = 16
"""The fewest rows of one sequence for which the prompt copy is faster."""

KEPT_PASSES = 8
"""The number of sets of slots whose bound memory is kept."""

Run = tuple[int, slice]
"""Neighbouring slots, as the first one and the rows that belong to them."""


class ShareGraph(LayerGraph):
    """Layers as graphs between the cuts.

    The first graph has the inputs of a ``LayerGraph``. The others also have ``delta``, the team's
    sum, which is added to ``hidden``. The outputs are ``output``, the partial rows, and ``value``,
    the hidden state to which their sum is added. The first graph has no ``value``: it is its
    ``hidden``. Each graph has one layer's rotary tables at most: ``cos`` and ``sin``.
    """

    def __init__(self, hidden: int, context: int, window_offset: int) -> None:
        super().__init__(hidden, context, window_offset)
        self._cut_graphs: list[Graph] = []

    def take(self) -> list[Graph]:
        """Return the graphs that were finished since the last call."""
        graphs, self._cut_graphs = self._cut_graphs, []
        return graphs

    def finish_with_head(self, spec: ModelSpec, weights: BlockWeights) -> Graph:
        """Return the last graph, whose ``output`` is logits."""
        logits = add_head(self.graph, self._sum(), spec, weights)
        self.graph.output(logits, "output", TensorProto.FLOAT, ("b", "n", spec.vocab))
        return self.graph

    def _projected(
        self, weights: BlockWeights, name: str, inner: str, value: str
    ) -> tuple[str, str]:
        partial = self.graph.linear(inner, weights.matrices[f"{name}.weight"])
        value, delta = self._cut(partial, value)
        bias = weights.vectors.get(f"{name}.bias")
        if bias is not None:
            (delta,) = self.graph.node("Add", [delta, self.graph.weight(bias)])
        return value, delta

    def _cut(self, partial: str, value: str) -> tuple[str, str]:
        """End a graph with partial rows, and begin the next one. Return its hidden and delta."""
        shape = ("b", "n", self._hidden)
        self.graph.output(partial, "output", TensorProto.FLOAT, shape)
        if value != "hidden":
            self.graph.output(value, "value", TensorProto.FLOAT, shape)
        self._cut_graphs.append(self.graph)
        self.graph, self.caches = Graph(), []
        value = self.graph.input("hidden", TensorProto.FLOAT, shape)
        return value, self.graph.input("delta", TensorProto.FLOAT, shape)

    def _routed(
        self, layer: LayerSpec, experts: ExpertSpec, weights: BlockWeights, value: str, normed: str
    ) -> None:
        """End the graph behind the experts, or before: their rows are added to the partial rows."""
        partial = self._shared_expert(layer, experts, weights, normed)
        if "down.weight" in weights.matrices:
            scores = self._scores(weights, normed)
            mixed = add_experts(self.graph, experts, weights, normed, scores)
            if partial is not None:
                (mixed,) = self.graph.node("Add", [partial, mixed])
            self._value, self._delta = self._cut(mixed, value)
            return
        if partial is None:
            (shape,) = self.graph.node("Shape", [normed])
            (partial,) = self.graph.node("ConstantOfShape", [shape])
        self._routed_outputs(experts, weights, normed)
        self._value, self._delta = self._cut(partial, value)

    def _rotary_tables(self, layer: LayerSpec, width: int) -> tuple[str, str]:
        shape = (self._context, width // 2)
        cos, sin = (self.graph.input(name, TensorProto.FLOAT, shape) for name in ("cos", "sin"))
        return cos, sin


@dataclass(frozen=True, slots=True)
class ShareLayer:
    """The memory that is bound to a layer's first session: KV cache and rotary tables.

    Keys and values are float32 [slots, heads, context, width].
    """

    key: Array
    value: Array
    tables: tuple[Array, Array] | None
    experts: Experts | None = None
    """The experts behind the layer's second session."""


class ShareLayers:
    """The layers of a share, and behind them the head or nothing."""

    def __init__(
        self,
        halves: Sequence[Any],
        prompt_halves: Sequence[Any],
        end: Any,
        layers: Sequence[ShareLayer],
        widths: tuple[int, int | None],
        team_sum: TeamSum,
    ) -> None:
        """Take two sessions for each layer, also for prompts, and the last one.

        widths: of hidden rows, and of logits if the last session is the head.
        """
        self._halves, self._prompt_halves, self._end = halves, prompt_halves, end
        self._layers = layers
        self._hidden, self._logits = widths
        self._team_sum = team_sum
        self._passes: dict[tuple[int, ...], _Pass] = {}

    def forward(self, hidden: Array, slot: int, last: Tokens, *, logits: int) -> Array:
        """Run rows [n, hidden] of a sequence, the last of which is at ``last`` [1]."""
        rows = len(hidden)
        if rows == 1:
            bound = self._decoding((slot,))
        else:
            halves = self._prompt_halves if rows >= PROMPT_ROWS else self._halves
            shape = (1, rows, self._hidden)
            bound = _Pass(halves, self._layers, [(slot, slice(0, 1))], shape)
        bound.run(hidden, last, self._team_sum)
        return self._finish(bound, rows if self._logits is None else int(logits))

    def decode(self, hidden: Array, slots: Sequence[int], positions: Tokens) -> Array:
        """Run rows [n, hidden], one for each slot. The team adds them up in this order."""
        bound = self._decoding(tuple(slots))
        bound.run(hidden, positions, self._team_sum)
        return self._finish(bound, len(hidden))

    def _decoding(self, slots: tuple[int, ...]) -> _Pass:
        bound = self._passes.pop(slots, None)
        if bound is None:
            shape = (len(slots), 1, self._hidden)
            bound = _Pass(self._halves, self._layers, neighbours(slots), shape)
        self._passes[slots] = bound
        if len(self._passes) > KEPT_PASSES:
            del self._passes[next(iter(self._passes))]  # The one that was not used for longest.
        return bound

    def _finish(self, bound: _Pass, count: int) -> Array:
        """Return what the last session makes of the last ``count`` rows."""
        width = self._hidden if self._logits is None else self._logits
        result = np.empty((1, count, width), np.float32)
        if count:
            binding = self._end.io_binding()
            for name, rows in zip(("hidden", "delta"), bound.ends, strict=True):
                last = rows.reshape(1, -1, self._hidden)[:, -count:]
                binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(last))
            binding.bind_ortvalue_output("output", ort.OrtValue.ortvalue_from_numpy(result))
            with translated("cannot run the stage"):
                self._end.run_with_iobinding(binding)
        output: Array = result[0]
        return output


class _Pass:
    """The memory of a pass through the layers of a share, bound to their sessions."""

    def __init__(
        self,
        halves: Sequence[Any],
        layers: Sequence[ShareLayer],
        runs: Sequence[Run],
        shape: tuple[int, int, int],
    ) -> None:
        """Bind sessions for [b, n, hidden] in ``shape``, whose b sequences are in ``runs``."""
        self._layers = layers
        counts = {layer.experts.spec.count for layer in layers if layer.experts is not None}
        self._normed = np.empty(shape if counts else 0, np.float32)
        self._scores = {count: np.empty((*shape[:2], count), np.float32) for count in counts}
        # A session reads one hidden state and writes the other.
        self._values = np.empty((2, *shape), np.float32)
        self._delta = np.empty(shape, np.float32)
        self._partial = np.empty(shape, np.float32)
        self._last = np.empty(shape[0], np.int32)
        self._totals = [np.empty((), np.int32) for _ in runs]
        self._runs = runs
        self._steps = [
            self._attention(session, layers[index // 2], index)
            if index % 2 == 0
            else [(session, self._rows(session, index, slice(None)))]
            for index, session in enumerate(halves)
        ]
        self.ends = self._values[(len(halves) - 1) % 2], self._delta
        """The hidden state after ``run``, and the last sum, which is not added to it yet."""

    def run(self, hidden: Array, last: Tokens, team_sum: TeamSum) -> None:
        """Run rows [b * n, hidden]. The last rows of the sequences are at the positions ``last``.

        An exception of ``team_sum`` ends the pass.
        """
        width = hidden.shape[1]
        self._values[0].reshape(-1, width)[...] = hidden
        self._last[:] = last
        for total, (_, part) in zip(self._totals, self._runs, strict=True):
            total[...] = self._last[part].max() + 1
        partial, delta = self._partial.reshape(-1, width), self._delta.reshape(-1, width)
        for index, step in enumerate(self._steps):
            with translated("cannot run the stage"):
                for session, binding in step:
                    session.run_with_iobinding(binding)
                experts = self._layers[index // 2].experts
                if experts is not None and index % 2:
                    scores = self._scores[experts.spec.count].reshape(len(partial), -1)
                    experts.add(partial, self._normed.reshape(-1, width), scores)
            delta[...] = team_sum(partial)

    def _attention(self, session: Any, layer: ShareLayer, index: int) -> list[tuple[Any, Any]]:
        """Bind a session with a cache, for each run of neighbouring slots."""
        steps = []
        for total, (first, part) in zip(self._totals, self._runs, strict=True):
            binding = self._rows(session, index, part)
            inputs: dict[str, npt.NDArray[Any]] = {"seqlens_k": self._last[part], "total": total}
            if layer.tables is not None:
                inputs |= dict(zip(("cos", "sin"), layer.tables, strict=True))
            for name, array in inputs.items():
                binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
            for kind, memory in (("key", layer.key), ("value", layer.value)):
                # Past and present are one buffer, to which only new rows are written.
                slots = memory[first : first + part.stop - part.start]
                shared = ort.OrtValue.ortvalue_from_numpy(slots)
                binding.bind_ortvalue_input(f"past_{kind}_0", shared)
                binding.bind_ortvalue_output(f"{kind}_0", shared)
            steps.append((session, binding))
        return steps

    def _rows(self, session: Any, index: int, part: slice) -> Any:
        """Bind a session's rows of some sequences."""
        binding = session.io_binding()
        source, target = self._values[(index - 1) % 2 if index else 0], self._values[index % 2]
        inputs, outputs = {"hidden": source}, {"output": self._partial}
        if index:
            inputs["delta"], outputs["value"] = self._delta, target
        experts = self._layers[index // 2].experts
        if experts is not None and index % 2:
            arrays = self._normed, self._scores[experts.spec.count]
            outputs |= dict(zip(ROUTED_OUTPUTS, arrays, strict=True))
        for name, array in inputs.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array[part]))
        for name, array in outputs.items():
            binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(array[part]))
        return binding


def neighbours(slots: Sequence[int]) -> list[Run]:
    """Return runs of consecutive numbers in ``slots``, as (first, slice)."""
    runs = []
    for _, group in itertools.groupby(enumerate(slots), key=lambda pair: pair[1] - pair[0]):
        pairs = list(group)
        runs.append((pairs[0][1], slice(pairs[0][0], pairs[-1][0] + 1)))
    return runs
