"""Lets SIGTERM and SIGHUP end a command as Ctrl-C does, so that it cleans up."""

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
    """Let SIGTERM and SIGHUP raise Terminated within the block.

    Only the first one counts. Later ones are ignored, also behind the block: they would stop the
    cleaning up, or change the exit code.
    """

    def interrupt(number: int, frame: object) -> None:
        for handled in previous:
            signal.signal(handled, already_ending)
        raise Terminated(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {signal.SIGTERM: signal.signal(signal.SIGTERM, interrupt)}
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it.
        previous[signal.SIGHUP] = signal.signal(signal.SIGHUP, interrupt)
    try:
        yield
    finally:
        for number, handler in previous.items():
            if signal.getsignal(number) is not already_ending:
                signal.signal(number, handler)


def already_ending(number: int, frame: object) -> None:
    """Ignore a signal. SIG_IGN would do so in started processes as well."""


def ignore_until_the_end() -> None:
    """Let the interpreter's own end, which takes handlers away, not be interrupted either."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is already_ending:
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def held_signals() -> Iterator[None]:
    """Hold ending signals until the end of the block, which must be short.

    It protects work that must not stop halfway, such as starting a process and noting it. A signal
    mask would not do, because started processes would inherit it.
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
