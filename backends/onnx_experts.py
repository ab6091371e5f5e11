"""Experts in ONNX Runtime: a session for each, chosen between the sessions of the layers.

They are for what ``onnx_mixture`` does not take. Such a layer ends with the router's scores. The
experts of each row are chosen in numpy, and each one's rows run through its own session. An expert
is too small to be divided among threads at each of its operators. So its session has one thread,
and several experts run at once.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from queue import SimpleQueue
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto

from backends.base import Array
from backends.onnx_graph import BlockWeights, Graph, activation, clipped
from backends.onnx_matrix import ByteMatrix, Matrix, PackedMatrix, executable, stack_rows
from backends.onnx_session import ERRORS, flush_denormals
from model.artifact import Tensor
from model.experts import STACKED, by_expert, expert_rows, route, route_one
from model.quantize import QuantizedMatrix
from model.share import column_slice, row_slice
from model.spec import ExpertSpec, LayerSpec

LEAST_COLUMNS = 512
"""Narrower pieces of an expert would cost more in calls than they gain."""

MOST_PIECES = 4


def own_tensors(layer: LayerSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a layer's tensors without those of its experts."""
    if layer.experts is None:
        return dict(tensors)
    return {name: tensor for name, tensor in tensors.items() if name not in STACKED}


def expert_part(shapes: Mapping[str, tuple[int, ...]]) -> float:
    """Return the part of a block's numbers that is its experts'."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    return sum(size for name, size in sizes.items() if name in STACKED) / sum(sizes.values())


def pieces(layer: LayerSpec, threads: int) -> int:
    """Return into how many pieces of its width an expert is cut, to occupy all threads.

    Each piece is a session. One is enough if the experts of a row are as many as threads.
    """
    experts = layer.experts
    assert experts is not None  # noqa: S101 - asked of layers with experts alone
    most = max(1, min(MOST_PIECES, layer.ffn // LEAST_COLUMNS))

    def idle(count: int) -> float:
        runs = experts.active * count
        return math.ceil(runs / threads) * threads / runs

    return min(range(1, most + 1), key=lambda count: (round(idle(count), 3), count))


def expert_graphs(
    layer: LayerSpec, tensors: Mapping[str, Tensor], containers: Mapping[int, int], threads: int
) -> Iterator[Graph]:
    """Yield the graphs of a layer's experts, in order, each with its pieces one after the other."""
    experts = layer.experts
    assert experts is not None  # noqa: S101 - asked of layers with experts alone
    for expert in range(experts.first, experts.first + experts.stored):
        own = {
            name: expert_rows(layer, expert, name, tensor)
            for name, tensor in tensors.items()
            if name in STACKED
        }
        spans = _spans(layer, own["down.weight"], pieces(layer, threads))
        for span in spans:
            matrices: dict[str, Matrix] = {}
            vectors = {}
            for name, tensor in _part(own, span, whole=len(spans) == 1).items():
                if isinstance(tensor, QuantizedMatrix):
                    matrices[name] = executable(tensor, containers)
                else:
                    vectors[name] = tensor
            yield expert_graph(layer, BlockWeights(matrices, vectors))


def expert_graph(layer: LayerSpec, weights: BlockWeights) -> Graph:
    """Run ``hidden`` [n, hidden] through one expert, or a piece of it, to ``output``."""
    graph = Graph()
    value = graph.input("hidden", TensorProto.FLOAT, ("n", layer.hidden))
    bias = weights.vectors.get
    gate_up = [weights.matrices["gate.weight"], weights.matrices["up.weight"]]
    biases = [vector for name in ("gate", "up") if (vector := bias(f"{name}.bias")) is not None]
    joined = stack_rows(gate_up)
    if joined is None:
        gate = graph.linear(value, gate_up[0], bias("gate.bias"))
        up = graph.linear(value, gate_up[1], bias("up.bias"))
    else:
        both = graph.linear(value, joined, np.concatenate(biases) if biases else None)
        half = graph.integers(*[_width(gate_up[0])] * 2)
        gate, up = graph.node("Split", [both, half], 2, axis=-1)
    experts = layer.experts
    if experts is not None and experts.limit is not None:
        gate, up = clipped(graph, gate, up, experts.limit)
    else:
        gate = activation(graph, layer, gate)
    (inner,) = graph.node("Mul", [gate, up])
    result = graph.linear(inner, weights.matrices["down.weight"], bias("down.bias"))
    graph.output(result, "output", TensorProto.FLOAT, ("n", layer.hidden))
    return graph


class ExpertThreads:
    """Threads that run experts beside the caller's own."""

    def __init__(self, threads: int) -> None:
        self._calls: list[SimpleQueue[_Work | None]] = [SimpleQueue() for _ in range(threads - 1)]
        for calls in self._calls:
            threading.Thread(target=_serve, args=(calls,), name="expert", daemon=True).start()
        self._finalizer = weakref.finalize(self, _dismiss, self._calls)

    def close(self) -> None:
        """End the threads. They also end when nobody has this object any more."""
        self._finalizer()

    def run(self, tasks: Sequence[Callable[[], None]]) -> None:
        """Run all tasks, the last one first. Raises what a task raised."""
        if not self._calls or len(tasks) < 2:
            for task in reversed(tasks):
                task()
            return
        work = _Work(tasks)
        for calls in self._calls[: len(tasks) - 1]:
            calls.put(work)
        done = work.help()
        # A thread that wakes up too late finds nothing to do, and is not waited for.
        failures = [work.failed.get() for _ in range(len(tasks) - done)]
        for failure in failures + work.own_failures:
            if failure is not None:
                raise failure


class _Work:
    """The tasks of one layer, which several threads take one by one."""

    def __init__(self, tasks: Sequence[Callable[[], None]]) -> None:
        self._tasks = deque(tasks)
        self.failed: SimpleQueue[BaseException | None] = SimpleQueue()
        self.own_failures: list[BaseException] = []

    def help(self) -> int:
        """Run tasks until none is left. Return how many."""
        done = 0
        for task in self._taken():
            done += 1
            try:
                task()
            except ERRORS as error:
                self.own_failures.append(error)
        return done

    def serve(self) -> None:
        """Run tasks until none is left, and tell the owner of each."""
        for task in self._taken():
            failure: BaseException | None = None
            try:
                task()
            except BaseException as error:  # The owner of the work raises it.
                failure = error
            self.failed.put(failure)

    def _taken(self) -> Iterator[Callable[[], None]]:
        while True:
            try:
                yield self._tasks.pop()
            except IndexError:
                return


def _serve(calls: SimpleQueue[_Work | None]) -> None:
    flush_denormals()
    while (work := calls.get()) is not None:
        work.serve()
        del work  # It holds sessions.


def _dismiss(queues: Sequence[SimpleQueue[_Work | None]]) -> None:
    for calls in queues:
        calls.put(None)


class Experts:
    """The experts of a layer that this stage holds."""

    def __init__(
        self,
        spec: ExpertSpec,
        hidden: int,
        sessions: Sequence[Sequence[Any]],
        threads: ExpertThreads,
    ) -> None:
        """``sessions`` has for each expert those of its pieces, whose outputs are added up."""
        self.spec = spec
        self._sessions = sessions
        self._threads = threads
        self.row = np.zeros((1, hidden), np.float32)
        """The memory of a single row, to which calls are bound. ``add`` may be given it."""
        self._pieces = len(sessions[0])
        self._outputs = np.zeros((len(sessions) * self._pieces, hidden), np.float32)
        self._calls: dict[int, Callable[[], None]] = {}

    @property
    def nbytes(self) -> int:
        """The bytes of the memory to which calls are bound."""
        return self.row.nbytes + self._outputs.nbytes

    def add(self, output: Array, normed: Array, scores: Array) -> None:
        """Add the experts of rows ``normed`` [n, hidden] to ``output``, by scores [n, count]."""
        if len(normed) == 1:
            if normed is not self.row:
                self.row[...] = normed
            self._add_row(output, scores[0])
            return
        runs = list(by_expert(self.spec, *route(self.spec, scores)))
        runs.sort(key=lambda run: len(run[1]))  # Those with most rows start first.
        results: dict[int, Array] = {}
        tasks = [
            partial(_run, session, rows, results, number * self._pieces + piece)
            for number, (expert, places, _) in enumerate(runs)
            for rows in [normed if len(places) == len(normed) else normed[places]]
            for piece, session in enumerate(self._sessions[expert - self.spec.first])
        ]
        self._threads.run(tasks)
        for key, rows in sorted(results.items()):
            _, places, weights = runs[key // self._pieces]
            output[places] += weights[:, None] * rows

    def _add_row(self, output: Array, scores: Array) -> None:
        """Add the experts of ``row``."""
        places: list[int] = []
        factors: list[float] = []
        first, held, count = self.spec.first, len(self._sessions), self._pieces
        for expert, weight in zip(*route_one(self.spec, scores), strict=True):
            if first <= expert < first + held:
                begin = (expert - first) * count
                places += range(begin, begin + count)
                factors += [weight] * count
        if places:
            known = self._calls
            self._threads.run([known.get(place) or self._call(place) for place in places])
            output += np.array(factors, np.float32) @ self._outputs[places]

    def _call(self, place: int) -> Callable[[], None]:
        """Bind a piece of an expert to its memory: a bound call costs least."""
        session = self._sessions[place // self._pieces][place % self._pieces]
        binding = session.io_binding()
        result = self._outputs[place : place + 1]
        binding.bind_ortvalue_input("hidden", ort.OrtValue.ortvalue_from_numpy(self.row))
        binding.bind_ortvalue_output("output", ort.OrtValue.ortvalue_from_numpy(result))
        call = partial(session.run_with_iobinding, binding)
        self._calls[place] = call
        return call


def _run(session: Any, rows: Array, results: dict[int, Array], key: int) -> None:
    (results[key],) = session.run(["output"], {"hidden": rows})


def _width(matrix: Matrix) -> int:
    return len(matrix.codes if isinstance(matrix, PackedMatrix | ByteMatrix) else matrix)


def _spans(layer: LayerSpec, down: Tensor, count: int) -> list[slice]:
    """Return the columns of ``down`` in each piece, whole groups of the quantization."""
    step = 1
    if isinstance(down, QuantizedMatrix) and down.format.scheme != "float":
        step = down.format.group_size
    steps = -(-layer.ffn // step)
    cuts = [min(layer.ffn, steps * piece // count * step) for piece in range(count + 1)]
    return [slice(*span) for span in pairwise(cuts)]


def _part(tensors: Mapping[str, Tensor], span: slice, *, whole: bool) -> dict[str, Tensor]:
    """Return some columns of an expert. The first piece alone has the bias of ``down``."""
    if whole:
        return dict(tensors)
    part: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name == "down.weight":
            part[name] = column_slice(tensor, (span.start, span.stop))
        elif name == "down.bias":
            if span.start == 0:
                part[name] = tensor
        else:
            part[name] = row_slice(tensor, (span.start, span.stop))
    return part
