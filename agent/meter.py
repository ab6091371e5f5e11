"""Counts what a stage does, and remembers its last passes, for heartbeats and traces.

The thread that runs the stage writes, pass by pass. Any thread may read.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection

from agent.hop import HopCounts
from agent.sequences import Rows, Turn
from wire.messages import StageCounts, TracedPass

REMEMBERED_PASSES = 4096
"""About 1 MB, and at most 200 KB in one message."""

Remembered = tuple[int, int, int, int, float, float, float, float]
"""The fields of TracedPass, with times in seconds."""


class StageMeter:
    """The counters of one stage. They only grow."""

    __slots__ = (
        "_began",
        "_paused_s",
        "_remembered",
        "_run",
        "compute_s",
        "passes",
        "rows",
        "waited_s",
    )

    def __init__(self) -> None:
        self.passes = 0
        self.rows = 0
        self.compute_s = 0.0
        self.waited_s = 0.0
        self._remembered: deque[Remembered] = deque(maxlen=REMEMBERED_PASSES)
        self._run = 0, 0.0, 0.0
        self._began: tuple[float, int] | None = None
        self._paused_s = 0.0

    def begins(self, turns: Collection[Turn], started_s: float) -> None:
        """Note that a pass begins to compute."""
        self._began = started_s, sum(rows.count for _, rows in turns)
        self._paused_s = 0.0

    def paused(self, seconds: float) -> None:
        """Note that the pass has let other stages compute for so long."""
        self._paused_s += seconds

    def ends(self) -> None:
        """Note that the pass does not compute any more, whether it worked or not."""
        self._began = None

    def running(self) -> tuple[float, int]:
        """Return the seconds for which a pass has computed until now, and its rows; or zeros."""
        began = self._began
        if began is None:
            return 0.0, 0
        return time.monotonic() - began[0] - self._paused_s, began[1]

    def counts(
        self, sent: HopCounts | None, held_rows: int = 0, most_rows: int = 0, *, busy: bool = False
    ) -> StageCounts:
        """Return all counts, with those of the hop, if there is one, and of the KV cache."""
        sent = sent or HopCounts()
        running_s, running_rows = self.running()
        return StageCounts(
            self.passes,
            self.rows,
            round(1e6 * self.compute_s),
            round(1e6 * self.waited_s),
            sent.frames,
            sent.sent_bytes,
            round(1e6 * sent.sending_s),
            round(1e6 * sent.round_trip_s),
            held_rows,
            most_rows,
            round(1e6 * running_s),
            running_rows,
            busy,
        )

    def ran(self, turns: Collection[Turn], started_s: float, computed_s: float) -> None:
        """Count one forward pass, by the monotonic clock."""
        self.passes += 1
        self.compute_s += computed_s - started_s - self._paused_s
        for _, rows in turns:
            self.rows += rows.count
            self.waited_s += started_s - rows.arrived_s
        self._run = len(turns), started_s, computed_s

    def sent(self, sequence: int, rows: Rows) -> None:
        """Remember that the result of these rows, which ran in the last pass, has left."""
        together, started_s, computed_s = self._run
        self._remembered.append(
            (
                sequence,
                rows.position,
                rows.count,
                together,
                rows.arrived_s,
                started_s,
                computed_s,
                time.monotonic(),
            )
        )

    def passes_of(self, sequences: Collection[int]) -> tuple[TracedPass, ...]:
        """The remembered passes of these sequences, oldest first."""
        wanted = frozenset(sequences)
        return tuple(
            TracedPass(*item[:4], *(round(1e6 * time_s) for time_s in item[4:]))
            for item in tuple(self._remembered)
            if item[0] in wanted
        )
