"""Stages of several models compute one at a time, each with its part of the time."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

from agent.turnstile import Ticket, Turnstile

PASS_S = 2e-3
DEADLINE_S = 30.0


class Shared:
    """A turnstile whose clock tells the time of passes only, however busy the machine is."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.turnstile = Turnstile(lambda: self.now_s)
        self.active = 1
        """The stages that have rows."""
        self.news = threading.Condition()
        """Is told of each stage that begins to wait, or has no rows any more."""

    def until(self, holds: Callable[[int], bool]) -> None:
        """Wait until something holds of the number of stages that wait."""
        waiting = self.turnstile._waiting
        with self.news:
            assert self.news.wait_for(lambda: holds(len(waiting)), DEADLINE_S)


class Announced(threading.Event):
    """An event whose waiter tells ``news`` before it waits."""

    def __init__(self, news: threading.Condition) -> None:
        super().__init__()
        self._news = news

    def wait(self, timeout: float | None = None) -> bool:
        with self._news:
            self._news.notify_all()
        return super().wait(timeout)


class Runner:
    """A stage that always has rows, until the shared number of passes is reached."""

    def __init__(self, shared: Shared, weight: float, pass_s: float = PASS_S) -> None:
        self.shared = shared
        self.ticket = Ticket(weight)
        self.ticket.ready = Announced(shared.news)
        self.pass_s = pass_s

    def run_pass(self, order: list[Runner]) -> None:
        """Run a pass, which ends once all others wait."""
        turnstile = self.shared.turnstile
        turnstile.enter(self.ticket)
        order.append(self)
        self.shared.until(lambda waiting: waiting >= self.shared.active - 1)
        self.shared.now_s += self.pass_s
        turnstile.leave(self.ticket, returns=True)


def order_of(shared: Shared, runners: list[Runner], passes: int) -> list[Runner]:
    """Run all until that many passes have begun, and return whose they were."""
    order: list[Runner] = []
    shared.active = len(runners)
    gate = threading.Barrier(len(runners))

    def work(runner: Runner) -> None:
        gate.wait()
        while len(order) < passes:
            runner.run_pass(order)
        with shared.news:
            shared.active -= 1
            shared.news.notify_all()
        shared.turnstile.cede(runner.ticket)

    threads = [threading.Thread(target=work, args=(runner,)) for runner in runners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
    return order[:passes]


def test_one_stage_computes_at_a_time() -> None:
    turnstile, inside, most = Turnstile(), 0, 0
    lock = threading.Lock()

    def work() -> None:
        nonlocal inside, most
        ticket = Ticket()
        for _ in range(200):
            turnstile.enter(ticket)
            with lock:
                inside += 1
                most = max(most, inside)
            with lock:
                inside -= 1
            turnstile.leave(ticket)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert most == 1
    assert not turnstile.is_taken


def test_time_is_divided_by_weight() -> None:
    shared = Shared()
    heavy, light = Runner(shared, 3.0), Runner(shared, 1.0)
    counts = Counter(order_of(shared, [heavy, light], 80))
    assert 58 <= counts[heavy] <= 62


def test_a_stage_with_short_passes_gets_more_of_them() -> None:
    shared = Shared()
    long, short = Runner(shared, 1.0, 8 * PASS_S), Runner(shared, 1.0)
    counts = Counter(order_of(shared, [long, short], 60))
    assert 5 <= counts[long] <= 8


def test_a_stage_that_was_idle_has_saved_nothing() -> None:
    shared, order = Shared(), list[Runner]()
    busy, idle = Runner(shared, 1.0), Runner(shared, 1.0)
    for _ in range(20):
        busy.run_pass(order)
    shared.turnstile.cede(busy.ticket)
    counts = Counter(order_of(shared, [busy, idle], 20))
    assert 9 <= counts[busy] <= 11


def test_a_pass_that_gives_way_runs_beside_others() -> None:
    shared, order = Shared(), list[Runner]()
    turnstile = shared.turnstile
    first, other = Runner(shared, 1.0), Runner(shared, 1.0)
    turnstile.give_way(first.ticket)  # It has no place.
    turnstile.enter(first.ticket)
    turnstile.give_way(first.ticket)  # Nobody waits.
    assert turnstile.is_taken
    thread = threading.Thread(target=other.run_pass, args=(order,))
    thread.start()
    shared.until(lambda waiting: waiting == 1)
    turnstile.give_way(first.ticket)
    thread.join(DEADLINE_S)
    assert order == [other]
    turnstile.leave(first.ticket)
    turnstile.cede(other.ticket)
    assert not turnstile.is_taken


def test_a_kept_place_can_be_ceded() -> None:
    shared, order = Shared(), list[Runner]()
    turnstile = shared.turnstile
    first, other = Runner(shared, 1000.0), Runner(shared, 1.0)
    turnstile.enter(first.ticket)
    thread = threading.Thread(target=other.run_pass, args=(order,))
    other.ticket.due_s = 1.0
    thread.start()
    shared.until(lambda waiting: waiting == 1)
    turnstile.leave(first.ticket, returns=True)
    thread.join(0.05)
    assert thread.is_alive()
    turnstile.cede(other.ticket)  # It is not its own.
    assert turnstile.is_taken
    turnstile.cede(first.ticket)
    thread.join(DEADLINE_S)
    assert order == [other]
