"""The cuts of a share's layers on a torch device: the team's sums, and a graph for each piece.

A layer of a share is cut after ``o`` and after ``down``. There its partial rows go to the host, and
``StageOptions.team_sum`` returns the sum of all members. A CUDA graph cannot contain that. So a
token's pass is one graph for each piece between two cuts, and the sums run between the graphs.

Rows are fp32 [n, hidden] everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from backends.base import TeamSum
from backends.torch_capture import DEVICE

Add = Callable[[torch.Tensor], torch.Tensor]


class Cut:
    """Adds a device's partial rows up over the team, and returns the sum on the device."""

    def __init__(self, team_sum: TeamSum, device: torch.device, hidden: int) -> None:
        self._team_sum = team_sum
        self._device = device
        self._hidden = hidden
        # Host memory for partial rows and for their sum. It grows with the rows of a pass.
        self._host = torch.zeros((2, 0, hidden))
        self._instead: Add | None = None
        self.failed = False
        """Whether ``team_sum`` raised when it was last called."""

    def __call__(self, partial: torch.Tensor) -> torch.Tensor:
        return self._sum(partial).to(self._device, non_blocking=True)

    def add_to(self, total: torch.Tensor, partial: torch.Tensor) -> None:
        """Write the sum to ``total``, on the device."""
        total.copy_(self._sum(partial), non_blocking=True)

    @contextmanager
    def replaced(self, add: Add) -> Iterator[None]:
        """Call ``add`` instead of the team."""
        before, self._instead = self._instead, add
        try:
            yield
        finally:
            self._instead = before

    def capture(self, compute: Callable[[], None], rows: int, pool: Any) -> PieceGraphs:
        """Capture a pass of ``rows`` rows on the current stream, with the device alone.

        Raises RuntimeError if CUDA cannot.
        """
        buffers = torch.zeros((2, rows, self._hidden), device=self._device)
        graphs = PieceGraphs(self, buffers, pool)
        graphs.capture(compute)
        return graphs

    def _sum(self, partial: torch.Tensor) -> torch.Tensor:
        return self._over_team(partial) if self._instead is None else self._instead(partial)

    def _over_team(self, partial: torch.Tensor) -> torch.Tensor:
        """Return the team's sum, in host memory that the next call overwrites."""
        count, on_gpu = len(partial), self._device.type == "cuda"
        if self._host.shape[1] < count:
            # Pinned memory needs no intermediate copy.
            self._host = torch.zeros((2, count, self._hidden), pin_memory=on_gpu)
        own, total = self._host[:, :count]
        if on_gpu:
            own.copy_(partial, non_blocking=True)
            torch.cuda.current_stream(self._device).synchronize()
        else:
            own = partial
        self.failed = True
        with DEVICE.released():
            total.numpy()[...] = self._team_sum(own.numpy())
        self.failed = False
        return total


class PieceGraphs:
    """A pass of a share as CUDA graphs, one for each piece between two cuts.

    The graphs share a pool of memory. That is safe because they always replay in the order of their
    capture.
    """

    def __init__(self, cut: Cut, buffers: torch.Tensor, pool: Any) -> None:
        """``buffers`` [2, n, hidden] are for partial rows and for their sum."""
        self._cut = cut
        self._partial, self._total = buffers
        self._pool = pool
        self._graphs: list[Any] = []
        self._capturing: Any = None

    def capture(self, compute: Callable[[], None]) -> None:
        """Capture a pass that calls the cut, on the current stream. Raises RuntimeError."""
        with self._cut.replaced(self._split):
            self._begin()
            try:
                compute()
            finally:
                if self._capturing is not None:
                    self._end()

    def replay(self) -> None:
        """Run the pass. Raises what the team's sum raises."""
        for graph in self._graphs[:-1]:
            graph.replay()
            self._cut.add_to(self._total, self._partial)
        self._graphs[-1].replay()

    def _split(self, partial: torch.Tensor) -> torch.Tensor:
        """End a piece with its partial rows, and begin the next one with their sum."""
        self._partial.copy_(partial)
        self._end()
        self._begin()
        return self._total

    def _begin(self) -> None:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        self._capturing = graph

    def _end(self) -> None:
        graph, self._capturing = self._capturing, None
        graph.capture_end()
        self._graphs.append(graph)


def without_team(cut: Cut | None) -> AbstractContextManager[None]:
    """Run passes as if the other members added nothing. The team must not notice such passes."""
    return nullcontext() if cut is None else cut.replaced(_own_rows)


def _own_rows(partial: torch.Tensor) -> torch.Tensor:
    return partial
