"""Memory that other programs give back, and memory that comes and goes."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from agent.memory import STEADY_S, FreeMemory

GB = 1_000_000_000
PAUSE_S = 5.0


@dataclass
class Machine:
    """A machine with so much free memory, where an agent started with a limit of 4 GB."""

    free_bytes: int = 5 * GB
    now_s: float = 0.0
    most_bytes: int | None = None
    loaded: tuple[int, ...] = ()
    memory: FreeMemory = field(init=False)

    def __post_init__(self) -> None:
        self.memory = FreeMemory(
            4 * GB, self.most_bytes, lambda: self.free_bytes, lambda: self.now_s
        )

    def look(self, seconds: float) -> int:
        """The limit after so much time, with a look now and then."""
        until_s = self.now_s + seconds
        limit_bytes = self.memory.look(self.loaded)
        while self.now_s < until_s:
            self.now_s += PAUSE_S
            limit_bytes = self.memory.look(self.loaded)
        return limit_bytes


def test_memory_that_returns_counts_once_it_has_stayed() -> None:
    machine = Machine()
    assert machine.look(2 * STEADY_S) == 4 * GB
    machine.free_bytes += 2 * GB
    assert machine.look(STEADY_S / 2) == 4 * GB
    assert machine.look(STEADY_S) == pytest.approx(5.8 * GB)
    machine.free_bytes -= 2 * GB
    assert machine.look(0) == 4 * GB
    machine.free_bytes -= 4 * GB
    assert machine.look(STEADY_S) == 4 * GB  # What it has told at its start.


def test_memory_that_comes_and_goes_is_left_alone() -> None:
    machine = Machine()
    for _ in range(10):
        machine.free_bytes += 2 * GB
        assert machine.look(20) == 4 * GB
        machine.free_bytes -= 2 * GB
        assert machine.look(20) == 4 * GB


def test_stages_that_come_and_go_are_no_other_programs() -> None:
    machine = Machine()
    machine.look(STEADY_S)
    for epoch in range(1, 5):
        machine.free_bytes -= 3 * GB
        machine.loaded = (epoch,)
        assert machine.look(2 * STEADY_S) == 4 * GB
        machine.free_bytes += 3 * GB
        machine.loaded = ()
        assert machine.look(2 * STEADY_S) == 4 * GB
    machine.free_bytes -= 3 * GB
    machine.loaded = (9,)
    machine.look(STEADY_S)
    machine.free_bytes += 2 * GB
    assert machine.look(2 * STEADY_S) == pytest.approx(5.8 * GB)


def test_the_limit_of_the_user_holds() -> None:
    machine = Machine(most_bytes=5 * GB)
    machine.free_bytes += 9 * GB
    assert machine.look(2 * STEADY_S) == 5 * GB
