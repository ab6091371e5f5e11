"""Several requests at once, from threads that end with the program."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Result = TypeVar("Result")


def in_flight(
    work: Callable[[int], Result], items: Iterable[int], count: int
) -> Iterator[tuple[int, Result]]:
    """Yield (item, its result) in order of their end, with ``count`` items in work at a time.

    Raises what ``work`` raises. Closing the iterator, as Ctrl-C does, starts no further item.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    total = 0
    for item in items:
        waiting.put(item)
        total += 1
    done: queue.SimpleQueue[tuple[int, Result] | BaseException] = queue.SimpleQueue()
    stopped = threading.Event()

    def run() -> None:
        while not stopped.is_set():
            try:
                item = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((item, work(item)))
            except BaseException as error:  # It is raised in the caller's thread.
                done.put(error)
                return

    # A request may wait for long. As a daemon, its thread does not hold up the program's end.
    for _ in range(min(count, total)):
        threading.Thread(target=run, daemon=True).start()
    try:
        for _ in range(total):
            result = done.get()
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        stopped.set()
