"""How long a loaded stage takes for a token, from the passes that it runs anyway."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from backends.base import Array, Stage, Tokens
from model.texts import Texts

PASSES = 128
"""The last passes that count."""

FEWEST_PASSES = 24
"""Fewer may be the first ones after a load, which read weights from the disk."""


def _no_waiting() -> float:
    return 0.0


class PacedStage(Stage):
    """A stage that times its passes of one row. Longer passes are prompts, or several sequences.

    waited_s: the seconds that the stage has waited for other devices so far. They do not count,
        and neither do those for which it has let other stages compute.
    """

    def __init__(
        self, stage: Stage, epoch: int, waited_s: Callable[[], float] = _no_waiting
    ) -> None:
        self.epoch = epoch
        self._stage = stage
        self._waited_s = waited_s
        self._paused_s = 0.0
        self._passes_s: deque[float] = deque(maxlen=PASSES)

    @property
    def token_s(self) -> float:
        """The mean seconds of the last passes, or 0 if there were too few.

        A median would not show a device that stands still now and then, as a busy one does. The
        longest pass is left out, because something rare may have happened in it.
        """
        passes_s = tuple(self._passes_s)
        if len(passes_s) < FEWEST_PASSES:
            return 0.0
        return (sum(passes_s) - max(passes_s)) / (len(passes_s) - 1)

    def forward(
        self, slot: int, position: int, inputs: Array | Tokens, *, logits: int = 1
    ) -> Array:
        self._prepare()
        if len(inputs) != 1:
            return self._stage.forward(slot, position, inputs, logits=logits)
        started_s = self._own_s()
        result = self._stage.forward(slot, position, inputs, logits=logits)
        self._passes_s.append(self._own_s() - started_s)
        return result

    def decode(
        self, slots: Sequence[int], positions: Sequence[int], inputs: Array | Tokens
    ) -> Array:
        self._prepare()
        return self._stage.decode(slots, positions, inputs)

    def encode(self, inputs: Array | Tokens, texts: Texts) -> Array:
        self._prepare()
        return self._stage.encode(inputs, texts)

    @property
    def memory_bytes(self) -> int:
        return self._stage.memory_bytes

    @property
    def kept_files(self) -> Mapping[Path, str]:
        return self._stage.kept_files

    def close(self) -> None:
        self._stage.close()

    def _prepare(self) -> None:
        """Hand down what the caller has set."""
        self._stage.candidates = self.candidates
        self._stage.between = None if self.between is None else self._between

    def _between(self) -> float:
        # A busy device stands still here, too. That time counts, so no clock is read.
        waited_s = 0.0 if self.between is None else self.between()
        self._paused_s += waited_s
        return waited_s

    def _own_s(self) -> float:
        """A clock that stands still while the stage waits."""
        return time.perf_counter() - self._waited_s() - self._paused_s
