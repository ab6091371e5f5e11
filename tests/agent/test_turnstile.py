"""Stages of several models compute one at a time, each with its part of the time."""

from __future__ import annotations

import threading
import time
from collections import Counter

from agent.turnstile import Ticket, Turnstile

PASS_S = 2e-3
DEADLINE_S = 30.0


class Runner:
    """A stage that always has rows, until the shared number of passes is reached."""

    def __init__(self, turnstile: Turnstile, weight: float, pass_s: float = PASS_S) -> None:
        self.turnstile = turnstile
        self.ticket = Ticket(weight)
        self.pass_s = pass_s

    def run_pass(self, order: list[Runner]) -> None:
        self.turnstile.enter(self.ticket)
        order.append(self)
        time.sleep(self.pass_s)
        self.turnstile.leave(self.ticket, returns=True)


def order_of(runners: list[Runner], passes: int) -> list[Runner]:
    """Run all until that many passes have begun, and return whose they were."""
    order: list[Runner] = []
    gate = threading.Barrier(len(runners))

    def work(runner: Runner) -> None:
        gate.wait()
        while len(order) < passes:
            runner.run_pass(order)
        runner.turnstile.cede(runner.ticket)

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
    turnstile = Turnstile()
    heavy, light = Runner(turnstile, 3.0), Runner(turnstile, 1.0)
    counts = Counter(order_of([heavy, light], 80))
    assert 1.8 * counts[light] <= counts[heavy] <= 5 * counts[light]


def test_a_stage_with_short_passes_gets_more_of_them() -> None:
    turnstile = Turnstile()
    long, short = Runner(turnstile, 1.0, 8 * PASS_S), Runner(turnstile, 1.0)
    order = order_of([long, short], 60)
    assert Counter(order)[short] > 3 * Counter(order)[long]


def test_a_stage_that_was_idle_has_saved_nothing() -> None:
    turnstile, order = Turnstile(), list[Runner]()
    busy, idle = Runner(turnstile, 1.0), Runner(turnstile, 1.0)
    for _ in range(20):
        busy.run_pass(order)
    turnstile.cede(busy.ticket)
    counts = Counter(order_of([busy, idle], 20))
    assert counts[busy] >= 5


def test_a_pass_that_gives_way_runs_beside_others() -> None:
    turnstile, order = Turnstile(), list[Runner]()
    first, other = Runner(turnstile, 1.0), Runner(turnstile, 1.0)
    turnstile.give_way(first.ticket)  # It has no place.
    turnstile.enter(first.ticket)
    turnstile.give_way(first.ticket)  # Nobody waits.
    assert turnstile.is_taken
    thread = threading.Thread(target=other.run_pass, args=(order,))
    thread.start()
    while not turnstile.is_wanted:
        time.sleep(1e-3)  # A turnstile tells no event of who waits.
    turnstile.give_way(first.ticket)
    thread.join(DEADLINE_S)
    assert order == [other]
    turnstile.leave(first.ticket)
    turnstile.cede(other.ticket)
    assert not turnstile.is_taken


def test_a_kept_place_can_be_ceded() -> None:
    turnstile, order = Turnstile(), list[Runner]()
    first, other = Runner(turnstile, 1000.0), Runner(turnstile, 1.0)
    turnstile.enter(first.ticket)
    thread = threading.Thread(target=other.run_pass, args=(order,))
    other.ticket.due_s = 1.0
    thread.start()
    while not turnstile._waiting:
        time.sleep(1e-3)  # A turnstile tells no event of who waits.
    turnstile.leave(first.ticket, returns=True)
    thread.join(0.05)
    assert thread.is_alive()
    turnstile.cede(other.ticket)  # It is not its own.
    assert turnstile.is_taken
    turnstile.cede(first.ticket)
    thread.join(DEADLINE_S)
    assert order == [other]
