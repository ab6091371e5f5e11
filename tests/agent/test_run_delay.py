"""The time in which a thread could run and got no processor, beside a program that takes it."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import Queue

import numpy as np
import pytest

from agent.run_delay import SCHEDSTAT, Schedstat, run_delay_s
from agent.team_sum import TeamSum
from tests.agent.teams import meshes_of, together

HIDDEN = 64
SUMS = 20
PATIENCE_S = 60.0

counts = SCHEDSTAT.exists()
needs_schedstat = pytest.mark.skipif(not counts, reason="this kernel counts no run delays")


@contextmanager
def busy_core() -> Iterator[int]:
    """A core that another program keeps busy."""
    core = min(os.sched_getaffinity(0))
    code = "print(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as program:
        try:
            os.sched_setaffinity(program.pid, {core})
            assert program.stdout is not None
            program.stdout.readline()
            yield core
        finally:
            program.kill()


def make_way(core: int, thread: int) -> None:
    """From now on a thread runs on one core, when nothing else wants it. It must soon end."""
    os.sched_setaffinity(thread, {core})
    os.setpriority(os.PRIO_PROCESS, thread, 19)


@needs_schedstat
def test_a_thread_that_makes_way_is_delayed() -> None:
    def measured_s(core: int) -> tuple[float, float]:
        make_way(core, threading.get_native_id())
        began_s, before_s = time.monotonic(), run_delay_s()
        while run_delay_s() < before_s + 0.05 and time.monotonic() < began_s + PATIENCE_S:
            pass
        return run_delay_s() - before_s, time.monotonic() - began_s

    with busy_core() as core:
        ((delayed_s, took_s),) = together([lambda: measured_s(core)])
    assert 0.05 <= delayed_s <= took_s


class Announced:
    """A poll object that tells when its thread goes to sleep."""

    def __init__(self, poll: select.poll, asleep: threading.Event) -> None:
        self._poll = poll
        self._asleep = asleep

    def poll(self, timeout_ms: float | None = None) -> list[tuple[int, int]]:
        if timeout_ms != 0:
            self._asleep.set()
        return self._poll.poll(timeout_ms)


@needs_schedstat
def test_a_late_awakening_is_no_wait_for_another_member(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, asleep = np.ones((1, HIDDEN), np.float32), threading.Event()
    waits_s = late_s = 0.0
    with busy_core() as core, meshes_of(2) as (lead, member):
        monkeypatch.setattr(member, "_poll", Announced(member._poll, asleep))
        members_sum, leads_sum = TeamSum(member, HIDDEN, 32), TeamSum(lead, HIDDEN, 32)
        lead.number = member.number = 1
        for _ in range(SUMS):
            asleep.clear()
            threads = Queue[int]()

            def run_member(told: Queue[int] = threads) -> tuple[float, float]:
                told.put(threading.get_native_id())
                began_s = time.perf_counter()
                members_sum(rows)
                return began_s, time.perf_counter()

            with ThreadPoolExecutor(1) as pool:  # A thread that has made way is not used again.
                sums = pool.submit(run_member)
                thread = threads.get(timeout=PATIENCE_S)
                assert asleep.wait(PATIENCE_S)
                make_way(core, thread)
                sent_s = time.perf_counter()
                leads_sum(rows)
                began_s, ended_s = sums.result()
            waits_s += sent_s - began_s
            late_s += ended_s - sent_s
    assert 0 < member.waited_s <= waits_s + 0.5 * late_s


def test_a_kernel_that_counts_no_delays_tells_none(tmp_path: Path) -> None:
    assert Schedstat(tmp_path / "schedstat").delay_s() == 0
    empty = tmp_path / "empty"
    empty.touch()
    assert Schedstat(empty).delay_s() == 0


@needs_schedstat
def test_each_thread_is_told_its_own_delay() -> None:
    with busy_core() as core:

        def delayed_s(makes_way: bool) -> float:
            if makes_way:
                make_way(core, threading.get_native_id())
            before_s, began_s = run_delay_s(), time.thread_time()
            while time.thread_time() < began_s + 0.02:
                pass
            return run_delay_s() - before_s

        slow_s, quick_s = together([lambda: delayed_s(True), lambda: delayed_s(False)])
    assert slow_s > quick_s
