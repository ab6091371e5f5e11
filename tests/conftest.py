"""Hygiene for every test: nothing may outlive it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator

import pytest

LIBRARY_THREADS = ("asyncio_", "AnyIO", "ThreadPoolExecutor")
"""Pools that their libraries keep for the life of the process."""


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_is_heard() -> None:
    """Shells start background jobs with SIGINT ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def no_thread_outlives_the_test() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + 5
    for thread in set(threading.enumerate()) - before:
        if not thread.name.startswith(LIBRARY_THREADS):
            thread.join(max(deadline - time.monotonic(), 0))
            assert not thread.is_alive(), f"thread {thread.name} outlived the test"
