"""Passes of one token of each of several sequences, or of a prompt's chunk, as captured graphs.

A pass reads slots and positions from device memory, and looks at a fixed length of the cache. So
one graph serves every position below that length. Lengths double from SHORTEST_LENGTH on. A share's
pass is one graph for each piece between its cuts. On a CPU, or if capturing fails, a token's pass
runs eagerly. A prompt then does not run here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from backends.base import Array, BackendError
from backends.torch_capture import DEVICE, captured
from backends.torch_cuts import Cut, without_team
from backends.torch_layers import ChunkPass, Pass, TokenPass

log = logging.getLogger(__name__)

SHORTEST_LENGTH = 256
"""The positions that the shortest graph looks at."""

GRAPH_TOLERANCE = 1e-2
"""The largest error of a graph. It runs the captured kernels, so more is a fault."""

Compute = Callable[[torch.Tensor, Any], torch.Tensor]
"""Runs rows fp32 [n, width] through a stage, as a Pass says."""

Key = tuple[str, int, int, int | None]
"""A graph's kind, rows, length, and slot if it serves one alone."""


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
        self._filled: Any = torch.cuda.Event() if pinned else None

    def fill(self, slots: Sequence[int], positions: Sequence[int], rows: Array) -> None:
        if self._filled is not None:
            # Chunks of a prompt follow each other without a result in between.
            self._filled.synchronize()
        self._host_rows.numpy()[...] = rows
        self._host_places.numpy()[...] = (slots, positions)
        self.rows.copy_(self._host_rows, non_blocking=True)
        self._places.copy_(self._host_places, non_blocking=True)
        if self._filled is not None:
            self._filled.record()

    def fetch(self) -> Array:
        """Wait for the result, and return it as an array of its own."""
        self._host_result.copy_(self.result, non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        fetched: Array = self._host_result.numpy().copy()
        return fetched


class TokenRunner:
    """Runs passes of one row per sequence. On CUDA they are graphs, captured when first needed.

    Graphs also run chunks of prompts, where the stage is no share.
    """

    def __init__(
        self,
        compute: Compute,
        compute_chunk: Compute,
        device: torch.device,
        widths: tuple[int, int, int],
        context: int,
        cut: Cut | None,
    ) -> None:
        """``widths`` are those of a pass's rows, and of the results of tokens and of chunks.

        ``cut`` is that of a share.
        """
        self._computes: dict[str, Compute] = {"tokens": compute, "prompts": compute_chunk}
        self._device = device
        self._width = widths[0]
        self._result_widths = {"tokens": widths[1], "prompts": widths[2]}
        self._context = context
        self._cut = cut
        self._buffers: dict[tuple[str, int], Buffers] = {}
        self._graphs: dict[Key, Any] = {}
        self._captures = device.type == "cuda"
        self._captures_chunks = cut is None
        self._pool: Any = torch.cuda.graph_pool_handle() if self._captures else None
        self._stream: Any = None

    def run(self, slots: Sequence[int], positions: Sequence[int], rows: Array) -> Buffers:
        """Run one row [width] of each sequence. The result is in the buffers until the next run."""
        length, only_slot = self._length(max(positions) + 1), slots[0] if len(slots) == 1 else None
        buffers = self._filled("tokens", slots, positions, rows)

        def rows_now() -> Pass:
            return TokenPass(buffers.slots, buffers.positions, length, only_slot)

        self._run(("tokens", len(slots), length, only_slot), buffers, rows_now)
        return buffers

    def run_chunk(self, slot: int, position: int, rows: Array, size: int) -> torch.Tensor | None:
        """Run up to ``size`` rows of a sequence as a graph. None: prompts run without graphs.

        Returns hidden rows fp32 [n, hidden], on the device. A graph has ``size`` rows. The last row
        fills the rest, at the same position, where it writes the same keys and values again.
        """
        if not (self._captures and self._captures_chunks):
            return None
        count = len(rows)
        at = [min(row, count - 1) for row in range(size)]
        length = self._length(position + count)
        buffers = self._filled("prompts", [slot] * size, [position + row for row in at], rows[at])

        def rows_now() -> Pass:
            return ChunkPass(buffers.slots, buffers.positions, length)

        self._run(("prompts", size, length, None), buffers, rows_now)
        return buffers.result[:count].clone()

    def close(self) -> None:
        self._graphs.clear()
        self._buffers.clear()
        self._computes.clear()
        self._pool = self._stream = None

    def _filled(
        self, kind: str, slots: Sequence[int], positions: Sequence[int], rows: Array
    ) -> Buffers:
        key = kind, len(slots)
        if key not in self._buffers:
            widths = self._width, self._result_widths[kind]
            self._buffers[key] = Buffers(len(slots), *widths, self._device)
        self._buffers[key].fill(slots, positions, rows)
        return self._buffers[key]

    def _run(self, key: Key, buffers: Buffers, rows_now: Callable[[], Pass]) -> None:
        """Run a pass by its graph, which is captured first, or eagerly."""

        def compute() -> None:
            if not self._computes:
                raise BackendError("the stage is closed")
            buffers.result.copy_(self._computes[key[0]](buffers.rows, rows_now()))

        if self._captures and key not in self._graphs:
            with without_team(self._cut):
                self._capture(key, compute, buffers)
        if key in self._graphs:
            self._graphs[key].replay()
        else:
            compute()

    def _length(self, positions: int) -> int:
        """Return the shortest captured length that holds this many positions."""
        length = SHORTEST_LENGTH
        while length < positions:
            length *= 2
        return min(length, self._context)

    def _capture(self, key: Key, compute: Callable[[], None], buffers: Buffers) -> None:
        """Run and capture the pass. Keep the graph if its results agree, else stop using graphs.

        Graphs of tokens stay if one of a prompt fails. These runs may leave anything in the rows of
        the pass, which therefore runs again.
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
            log.warning("%s run without CUDA graphs, slower: %s", key[0], lines[0][:200])
            self._captures_chunks = False
            if key[0] == "tokens":
                self._captures = False
                self._graphs.clear()
            elif not self._graphs and self._pool is not None:
                # A pool ends with its last graph.
                self._pool = torch.cuda.graph_pool_handle()

    def _record(self, compute: Callable[[], None], rows: int) -> Any:
        """Return the graph of a pass, or the graphs of its pieces. Raises RuntimeError."""
        with DEVICE.exclusive(), torch.cuda.stream(self._stream):
            if self._cut is not None:
                return self._cut.capture(compute, rows, self._pool)
            graph = torch.cuda.CUDAGraph()
            with captured(graph, self._pool):
                compute()
            return graph
