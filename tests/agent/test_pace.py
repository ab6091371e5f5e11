from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from agent.pace import FEWEST_PASSES, PASSES, PacedStage
from backends.base import Array, Stage, Tokens


class Clocked(Stage):
    """A stage whose passes wait, so that a part of their time does not count."""

    def __init__(self) -> None:
        self.waited_s = 0.0
        self.calls: list[tuple[int, int]] = []

    def forward(
        self, slot: int, position: int, inputs: Array | Tokens, *, logits: int = 1
    ) -> Array:
        self.calls.append((len(inputs), self.candidates))
        self.waited_s -= 3.0  # As if the pass had computed for three seconds.
        return np.zeros((1, 4), np.float32)

    @property
    def memory_bytes(self) -> int:
        return 7

    def close(self) -> None:
        self.calls.clear()


def rows(count: int) -> Array:
    return np.zeros((count, 4), np.float32)


def run(stage: Stage, counts: Sequence[int]) -> None:
    for count in counts:
        stage.forward(0, 0, rows(count))


def test_the_pace_is_of_single_rows_without_waiting() -> None:
    inner = Clocked()
    stage = PacedStage(inner, 5, lambda: inner.waited_s)
    stage.candidates = 3
    run(stage, [1] * (FEWEST_PASSES - 1) + [64] * PASSES)
    assert stage.token_s == 0
    run(stage, [1])
    assert 3 <= stage.token_s < 4
    assert set(inner.calls) == {(1, 3), (64, 3)}
    assert (stage.epoch, stage.memory_bytes) == (5, 7)


def test_several_sequences_do_not_count() -> None:
    stage = PacedStage(Clocked(), 1)
    for _ in range(PASSES):
        stage.decode([0, 1], [3, 4], rows(2))
    assert stage.token_s == 0


class Pausing(Clocked):
    """A stage that lets others compute in the middle of each pass."""

    def forward(
        self, slot: int, position: int, inputs: Array | Tokens, *, logits: int = 1
    ) -> Array:
        assert self.between is not None
        self.between()
        return super().forward(slot, position, inputs, logits=logits)


def test_the_pace_is_without_the_time_of_other_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    inner, now_s = Pausing(), 0.0

    def others() -> float:
        nonlocal now_s
        now_s += 60.0
        return 50.0  # For the other 10 s the device itself stood still.

    monkeypatch.setattr("agent.pace.time.perf_counter", lambda: now_s)
    stage = PacedStage(inner, 5, lambda: inner.waited_s)
    stage.between = others
    run(stage, [1] * FEWEST_PASSES)
    assert stage.token_s == 13
