"""What SIGINT, SIGTERM and SIGHUP do to a command: each ends it as Ctrl-C does, which cleans up."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Terminated(KeyboardInterrupt):
    """A signal that ends the command as Ctrl-C does, but with its own number."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


@contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM and the end of the terminal raise Terminated within the block."""

    def interrupt(number: int, frame: object) -> None:
        raise Terminated(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {signal.SIGTERM: signal.signal(signal.SIGTERM, interrupt)}
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # Which is what nohup asks for.
        previous[signal.SIGHUP] = signal.signal(signal.SIGHUP, interrupt)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def held_signals() -> Iterator[None]:
    """Ending signals wait for the end of the block, which must be short.

    For what must not stop halfway: a process that has started but that nobody has noted down. They
    are not blocked by a mask, because processes started here would inherit that.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[tuple[int, FrameType | None]] = []
    previous = {
        number: handler for number in _ENDING if callable(handler := signal.getsignal(number))
    }
    for number in previous:
        signal.signal(number, lambda *signalled: arrived.append(signalled))
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for arrived_number, frame in arrived:
            previous[signal.Signals(arrived_number)](arrived_number, frame)
