"""The one rule for threads that use a GPU while another thread captures a CUDA graph.

Several stages of a process run in threads of their own. They load, run and capture graphs at any
time. CUDA ends a capture with an error when another thread meanwhile waits for the whole device,
loads a kernel or frees memory, and that thread's call fails too. So:

    A thread holds ``DEVICE.shared()`` while it calls CUDA: in a pass, in the load of a block, in a
    probe. A thread holds ``DEVICE.exclusive()`` while it captures, and nobody else calls CUDA.
    A thread that waits for another member of its team holds nothing: ``DEVICE.released()``.

Captures never wait for a team (``torch_cuts.without_team``), so each capture ends by itself. A pass
waits for the captures that came before it. A thread may hold nothing else that a pass needs while
it waits for its own turn to capture.

Threads that share the device wait for streams and events, never for the whole device.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

Hold = Literal["nothing", "shared", "exclusive"]


class DeviceLock:
    """Many threads share the device, or one has it alone. Holds of one thread nest."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._sharing = 0
        self._alone = False
        self._waiting = 0
        """The threads that wait to be alone. They go before threads that want to share."""
        self._own = threading.local()

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Share the device with other threads. Keep it alone if this thread has it alone."""
        held = self._held
        with self._holding("shared" if held == "nothing" else held):
            yield

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Have the device alone. A thread that shares it gives it up first, so two can ask."""
        with self._holding("exclusive"):
            yield

    @contextmanager
    def released(self) -> Iterator[None]:
        """Give up what this thread holds, and take it again afterwards."""
        with self._holding("nothing"):
            yield

    @property
    def _held(self) -> Hold:
        held: Hold = getattr(self._own, "held", "nothing")
        return held

    @contextmanager
    def _holding(self, wanted: Hold) -> Iterator[None]:
        before = self._held
        self._change(before, wanted)
        try:
            yield
        finally:
            self._change(wanted, before)

    def _change(self, held: Hold, wanted: Hold) -> None:
        if held == wanted:
            return
        with self._changed:
            if held == "shared":
                self._sharing -= 1
            elif held == "exclusive":
                self._alone = False
            self._changed.notify_all()
            if wanted == "shared":
                self._changed.wait_for(lambda: not self._alone and not self._waiting)
                self._sharing += 1
            elif wanted == "exclusive":
                self._waiting += 1
                try:
                    self._changed.wait_for(lambda: not self._alone and not self._sharing)
                finally:
                    self._waiting -= 1
                self._alone = True
        self._own.held = wanted


DEVICE = DeviceLock()
"""The lock of this process. It has one GPU: the first that CUDA shows."""


@contextmanager
def captured(graph: Any, pool: Any) -> Iterator[None]:
    """Capture what this thread launches on its current stream. Hold ``DEVICE.exclusive()``."""
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        yield
    finally:
        graph.capture_end()
