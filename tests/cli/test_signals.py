"""Signals that end a command."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from cli.service.signals import Terminated, held_signals, terminated_like_interrupted


def test_a_held_interrupt_comes_at_the_end_of_the_block() -> None:
    reached = []

    def block() -> None:
        with held_signals():
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("the next line")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert reached
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.fixture
def hangup() -> Iterator[None]:
    """SIGHUP as without nohup; afterwards all handlers as before."""
    terminated = signal.getsignal(signal.SIGTERM)
    previous = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, previous)
    signal.signal(signal.SIGTERM, terminated)


@pytest.mark.usefixtures("hangup")
def test_a_held_signal_keeps_its_number() -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        with (
            pytest.raises(Terminated) as ended,
            terminated_like_interrupted(),
            held_signals(),
            held_signals(),
        ):
            os.kill(os.getpid(), number)
        assert ended.value.number == number


@pytest.mark.usefixtures("hangup")
def test_only_the_first_signal_counts() -> None:
    cleaned = []

    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGHUP)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            cleaned.append("all of it")

    with pytest.raises(Terminated) as ended, terminated_like_interrupted():
        work()
    assert ended.value.number == signal.SIGHUP
    assert cleaned
    os.kill(os.getpid(), signal.SIGTERM)


def test_what_is_ignored_stays_ignored() -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with terminated_like_interrupted(), held_signals():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)
