"""Passes of one token of each of several sequences. On CUDA they are captured graphs.

A token's pass reads slots and positions from device memory, and looks at a fixed length of the
cache. So one graph serves every position below that length. Lengths double from SHORTEST_LENGTH
on. A share's pass is one graph for each piece between its cuts. On a CPU, or if capturing fails,
the same pass runs eagerly.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from backends.base import Array, BackendError
from backends.torch_capture import DEVICE, captured
from backends.torch_cuts import Cut, without_team
from backends.torch_layers import TokenPass

log = logging.getLogger(__name__)

SHORTEST_LENGTH = 256
"""The positions that the shortest graph looks at."""

GRAPH_TOLERANCE = 1e-2
"""The largest error of a graph. It runs the captured kernels, so more is a fault."""

Compute = Callable[[torch.Tensor, TokenPass], torch.Tensor]


class Buffers:
    """Memory with fixed addresses for the passes of ``count`` sequences, on device and host."""

    def __init__(self, count: int, width: int, result_width: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self._device = device
        # Pinned memory needs no intermediate copy.
        self._host_rows = torch.zeros((count, width), pin_memory=pinned)
        self._host_places = torch.zeros((2, count), dtype=torch.int64, pin_memory=pinned)
        self._host_result = torch.zeros((count, result_width), pin_memory=pinned)
        self.rows = torch.zeros((count, width), device=device)
        self._places = torch.zeros((2, count), dtype=torch.int64, device=device)
        self.slots, self.positions = self._places
        self.result = torch.zeros((count, result_width), device=device)

    def fill(self, slots: Sequence[int], positions: Sequence[int], rows: Array) -> None:
        self._host_rows.numpy()[...] = rows
        self._host_places.numpy()[...] = (slots, positions)
        self.rows.copy_(self._host_rows, non_blocking=True)
        self._places.copy_(self._host_places, non_blocking=True)

    def fetch(self) -> Array:
        """Wait for the result, and return it as an array of its own."""
        self._host_result.copy_(self.result, non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        fetched: Array = self._host_result.numpy().copy()
        return fetched


class TokenRunner:
    """Runs passes of one row per sequence. On CUDA they are graphs, captured when first needed."""

    def __init__(
        self,
        compute: Compute,
        device: torch.device,
        widths: tuple[int, int],
        context: int,
        cut: Cut | None,
    ) -> None:
        """``widths`` are those of a pass's rows and of its result. ``cut`` is that of a share."""
        self._compute: Compute | None = compute
        self._device = device
        self._widths = widths
        self._context = context
        self._cut = cut
        self._buffers: dict[int, Buffers] = {}
        self._graphs: dict[tuple[int, int, int | None], Any] = {}
        self._captures = device.type == "cuda"
        self._pool: Any = torch.cuda.graph_pool_handle() if self._captures else None
        self._stream: Any = None

    def run(self, slots: Sequence[int], positions: Sequence[int], rows: Array) -> Buffers:
        """Run one row [width] of each sequence. The result is in the buffers until the next run."""
        count, only_slot = len(slots), slots[0] if len(slots) == 1 else None
        if count not in self._buffers:
            self._buffers[count] = Buffers(count, *self._widths, self._device)
        buffers = self._buffers[count]
        buffers.fill(slots, positions, rows)
        length = self._length(max(positions) + 1)

        def compute() -> None:
            if self._compute is None:
                raise BackendError("the stage is closed")
            rows = TokenPass(buffers.slots, buffers.positions, length, only_slot)
            buffers.result.copy_(self._compute(buffers.rows, rows))

        key = count, length, only_slot
        if self._captures and key not in self._graphs:
            with without_team(self._cut):
                self._capture(key, compute, buffers)
        if key in self._graphs:
            self._graphs[key].replay()
        else:
            compute()
        return buffers

    def close(self) -> None:
        self._graphs.clear()
        self._buffers.clear()
        self._compute = self._pool = self._stream = None

    def _length(self, positions: int) -> int:
        """Return the shortest captured length that holds this many positions."""
        length = SHORTEST_LENGTH
        while length < positions:
            length *= 2
        return min(length, self._context)

    def _capture(
        self, key: tuple[int, int, int | None], compute: Callable[[], None], buffers: Buffers
    ) -> None:
        """Run and capture the pass. Keep the graph if its results agree, else stop using graphs.

        These runs may leave anything in the rows of the pass, which therefore runs again.
        """
        if self._stream is None:
            # Captures share the memory of their pool only on one stream.
            self._stream = torch.cuda.Stream(self._device)
        before = torch.cuda.current_stream(self._device)
        # Libraries allocate and kernels are compiled in the first run, which a graph must not
        # contain.
        self._stream.wait_stream(before)
        with torch.cuda.stream(self._stream):
            compute()
            compute()
        before.wait_stream(self._stream)
        expected = buffers.result.clone()
        try:
            graph = self._record(compute, len(buffers.rows))
            before.wait_stream(self._stream)
            buffers.result.zero_()
            graph.replay()
            difference = (buffers.result - expected).abs().max() / expected.abs().max().clamp_min(1)
            if not float(difference) <= GRAPH_TOLERANCE:
                raise ArithmeticError(f"its results are off by {float(difference):.2g}")
            self._graphs[key] = graph
        except (RuntimeError, ArithmeticError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            log.warning("tokens run without CUDA graphs, slower: %s", lines[0][:200])
            self._captures = False
            self._graphs.clear()

    def _record(self, compute: Callable[[], None], rows: int) -> Any:
        """Return the graph of a pass, or the graphs of its pieces. Raises RuntimeError."""
        with DEVICE.exclusive(), torch.cuda.stream(self._stream):
            if self._cut is not None:
                return self._cut.capture(compute, rows, self._pool)
            graph = torch.cuda.CUDAGraph()
            with captured(graph, self._pool):
                compute()
            return graph
