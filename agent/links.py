"""Estimates the links that this device sends over, and says when an estimate is news.

The coordinator has each link measured once, before the first plan. From then on real traffic shows
whether a link has changed, with a ping now and then on the relay's own sockets.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from wire.messages import LinkChanged

RTT_SAMPLES = 9
RATE_SAMPLES = 5
"""The estimate is the median of this many newest samples. With fewer there is none."""

MOVED = 0.2
"""A figure that moved by more than this share is news."""

REPORT_S = 10.0
"""The least time between two reports of a link, which cost about 10 bytes a second."""


@dataclass(frozen=True, slots=True)
class LinkFigures:
    """A link one way: round trips of a small frame (median, 90th percentile), and its rate."""

    rtt_s: float
    rtt_p90_s: float
    bytes_per_s: float


class Link:
    """Collects samples of the link to one peer, and says what the coordinator should know."""

    def __init__(self, device: str, told: LinkFigures | None = None) -> None:
        """``told`` is what the coordinator knows. None if it knows nothing yet."""
        self.device = device
        self._told = told
        self._told_at_s = float("-inf")
        self._rtts_s: deque[float] = deque(maxlen=RTT_SAMPLES)
        self._rates: deque[float] = deque(maxlen=RATE_SAMPLES)
        self._lock = threading.RLock()
        """Guards all fields, because a closed hop may still read an answer beside its successor."""

    @property
    def rtt_s(self) -> float | None:
        """The best estimate of a small frame's round trip. None before the first sample."""
        with self._lock:
            if self._rtts_s:
                return statistics.median(self._rtts_s)
            return None if self._told is None else self._told.rtt_s

    def add_rtt(self, seconds: float) -> None:
        with self._lock:
            self._rtts_s.append(seconds)

    def add_transfer(self, size_bytes: int, seconds: float) -> None:
        """Add the time for which a frame kept the link busy.

        A time below one round trip is dropped, because it would mostly be jitter.
        """
        with self._lock:
            rtt_s = self.rtt_s
            if rtt_s is not None and seconds >= rtt_s:
                self._rates.append(size_bytes / seconds)

    def news(self, now_s: float | None = None) -> LinkChanged | None:
        """Return news for the coordinator and count it as told, or None if nothing moved."""
        now_s = time.monotonic() if now_s is None else now_s
        with self._lock:
            if self._told is None or now_s - self._told_at_s < REPORT_S:
                return None
            told = self._told
            rtt_s, rtt_p90_s, rate = told.rtt_s, told.rtt_p90_s, told.bytes_per_s
            if len(self._rtts_s) == RTT_SAMPLES:
                rtt_s, rtt_p90_s = summary_s(self._rtts_s)
            if len(self._rates) == RATE_SAMPLES:
                rate = statistics.median(self._rates)
            if not (_moved(told.rtt_s, rtt_s) or _moved(told.bytes_per_s, rate)):
                return None
            self._told, self._told_at_s = LinkFigures(rtt_s, rtt_p90_s, rate), now_s
            return LinkChanged(self.device, rtt_s, rate, rtt_p90_s)


class Measuring:
    """Lets one measurement at a time run on this device, because two would disturb each other.

    A requested measurement (``with``) makes an optional one (``try_begin``) give up.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        """Guards the following fields."""
        self._busy = False
        self._waiting = 0
        self._give_up: Callable[[], None] | None = None

    def __enter__(self) -> None:
        with self._changed:
            self._waiting += 1
            give_up = self._give_up
        if give_up is not None:
            give_up()
        with self._changed:
            self._changed.wait_for(lambda: not self._busy)
            self._busy = True
            self._waiting -= 1

    def __exit__(self, *_: object) -> None:
        self.end()

    def try_begin(self, give_up: Callable[[], None]) -> bool:
        """Begin unless a measurement runs. If this returns True, ``end`` must follow.

        Any thread may call ``give_up``. It ends the measurement soon, unless it has ended.
        """
        with self._changed:
            if self._busy or self._waiting:
                return False
            self._busy, self._give_up = True, give_up
            return True

    def end(self) -> None:
        with self._changed:
            self._busy, self._give_up = False, None
            self._changed.notify()


def summary_s(times_s: Sequence[float] | deque[float]) -> tuple[float, float]:
    """Return the median and the 90th percentile of some times."""
    ordered = sorted(times_s)
    return statistics.median(ordered), ordered[min(len(ordered) * 9 // 10, len(ordered) - 1)]


def _moved(before: float, now: float) -> bool:
    return abs(now - before) > MOVED * before
