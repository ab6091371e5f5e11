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
    """SIGHUP as without nohup."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, previous)


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


def test_what_is_ignored_stays_ignored() -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with terminated_like_interrupted(), held_signals():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)
