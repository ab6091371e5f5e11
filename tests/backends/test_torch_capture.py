"""The lock between threads that use a GPU and a thread that captures a graph on it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from backends.torch_capture import DeviceLock

DEADLINE_S = 20.0
"""No test waits so long unless it fails."""


class Thread:
    """A thread that enters a hold when told, and says when it is inside."""

    def __init__(self, pool: ThreadPoolExecutor, hold: Callable[[], object]) -> None:
        self.inside = threading.Event()
        self.may_leave = threading.Event()
        self._done: Future[None] = pool.submit(self._run, hold)

    def _run(self, hold: Callable[[], object]) -> None:
        with hold():  # type: ignore[attr-defined]  # A context manager of any type.
            self.inside.set()
            assert self.may_leave.wait(DEADLINE_S)

    def leave(self) -> None:
        self.may_leave.set()
        self._done.result(DEADLINE_S)


@pytest.fixture
def lock() -> DeviceLock:
    return DeviceLock()


def test_threads_share_and_one_that_captures_waits_for_all(lock: DeviceLock) -> None:
    with ThreadPoolExecutor() as pool:
        passes = [Thread(pool, lock.shared) for _ in range(2)]
        assert all(each.inside.wait(DEADLINE_S) for each in passes)
        capture = Thread(pool, lock.exclusive)
        passes[0].leave()
        assert not capture.inside.is_set()
        passes[1].leave()
        assert capture.inside.wait(DEADLINE_S)
        late = [Thread(pool, lock.shared), Thread(pool, lock.exclusive)]
        assert not any(each.inside.is_set() for each in late)
        capture.leave()
        for each in late:
            each.may_leave.set()
        assert all(each.inside.wait(DEADLINE_S) for each in late)


def test_two_passes_may_both_capture(lock: DeviceLock) -> None:
    """Each gives up its own part first, so neither waits for the other's pass to end."""
    both_in_a_pass = threading.Barrier(2)
    alone: list[int] = []

    def member(number: int) -> None:
        with lock.shared():
            both_in_a_pass.wait(DEADLINE_S)
            with lock.exclusive(), lock.shared():
                alone.append(number)
                assert lock._alone
                assert not lock._sharing

    with ThreadPoolExecutor() as pool:
        for done in [pool.submit(member, number) for number in range(2)]:
            done.result(DEADLINE_S)
    assert sorted(alone) == [0, 1]
    assert not lock._alone
    assert not lock._sharing


def test_a_member_that_waits_for_its_team_lets_the_team_capture(lock: DeviceLock) -> None:
    captured = threading.Event()

    def waiting() -> None:
        with lock.shared(), lock.shared(), lock.released():
            assert captured.wait(DEADLINE_S)

    def capturing() -> None:
        with lock.shared(), lock.exclusive():
            captured.set()

    with ThreadPoolExecutor() as pool:
        for done in [pool.submit(waiting), pool.submit(capturing)]:
            done.result(DEADLINE_S)


def test_an_error_gives_everything_back(lock: DeviceLock) -> None:
    with pytest.raises(RuntimeError, match="refused"), lock.shared(), lock.exclusive():
        raise RuntimeError("refused")
    with lock.exclusive():
        assert lock._alone
    assert not lock._alone
